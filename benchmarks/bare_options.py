"""Options without their letters: `python -m benchmarks.bare_options SIQA/test.jsonl siqa/all.jsonl`.

The files have options as `A. ...`, one a line, and the answer with its letter. Where the prompt doesn't show the
options, nobody can know the letter, and a loss that counts it measures little else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(source: str | Path, target: str | Path) -> None:
    """Write every row with its options as a list and its answer as text."""
    rows = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    for row in rows:
        row["options"] = [_bare(option) for option in row["options"].splitlines()]
        row["answer"] = _bare(row["answer"])
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows: {target}")


def _bare(option: str) -> str:
    return option.split(". ", 1)[-1].strip()


if __name__ == "__main__":
    main(*sys.argv[1:])
