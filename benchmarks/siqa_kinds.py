"""A classification task from SIQA: `python -m benchmarks.siqa_kinds SIQA/test.jsonl siqa_kinds/all.jsonl`.

Which kind of question does an answer belong to? SIQA asks six kinds about a situation: what someone wants to do next,
needs to do before, feels afterwards, why they did it, how one would describe them, what happens to others. The kind is
read off the wording of the question; the classifier sees the situation and the right answer only.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

# The first that occurs in a question decides.
_KINDS = {
    "before": r"need to do before|before this",
    "next": r"do next|do after",
    "describe": r"describe",
    "feel": r"feel",
    "why": r"^why",
    "effect": r"happen",
}


def kind_of(question: str) -> str | None:
    """Name the kind of a question, or None for the few that are of no kind."""
    return next((kind for kind, words in _KINDS.items() if re.search(words, question, re.IGNORECASE)), None)


def main(source: str | Path, target: str | Path) -> None:
    """Write situation, answer and kind of every row that has a kind."""
    rows = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    kept = [
        {"passage": row["passage"], "answer": row["answer"].split(". ", 1)[-1], "kind": kind}
        for row in rows
        if (kind := kind_of(row["question"]))
    ]
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    print(f"{len(kept)} of {len(rows)} rows: {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
