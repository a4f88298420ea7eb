"""Attention, MLP or all layers, at equal parameters: `python -m benchmarks.targets [TASK...]`, resumable.

`lora-init compare` does the work. `random` adapts all linear layers at rank 8, and two starts of our own put the same
number of parameters, within 1.2 %, into attention alone (rank 21) and into the MLP alone (rank 13). Every one has the
scaling 2, PEFT's random start, its own best of the same learning rates, and the same data in the same order.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import lora_init
from benchmarks import bare_options
from benchmarks.settings import compare_each, random_adapter, table
from lora_init.comparison.tables import run_tables

RANKS = {"attention": 21, "mlp": 13}
TASKS = {
    "siqa": ("SIQA", "{passage} {question}\nAnswer:"),
    "openbookqa": ("OpenBookQA", "{question}\nAnswer:"),
}
RESULTS = Path(__file__).parent / "results"


def main(tasks: list[str]) -> None:
    """Run what is left of each comparison, and print its verdicts."""
    for found in compare_each(tasks or TASKS, _compare):
        for cells in run_tables(found.summary).values():
            print(table(list(cells.columns), cells.to_numpy().tolist()))


def _compare(name: str, made: Path) -> lora_init.Comparison:
    import demo_assets

    folder, template = TASKS[name]
    data = made / name / "all.jsonl"
    bare_options.main(demo_assets.dataset(folder, "test.jsonl"), data)
    return lora_init.compare(
        str(demo_assets.smollm2()), data, RESULTS / f"targets-{name}",
        starts=["random", *((on, partial(random_adapter, on, rank, "CAUSAL_LM")) for on, rank in RANKS.items())],
        learning_rates=[1e-3, 3e-3], seeds=3, sweep="halving", extend=0, rank=8, steps=20, batch_size=4,
        template=template, completion=" {answer}", max_length=96, selection_samples=24, report_samples=48,
        evaluation_points=[20], dtype="bfloat16", name=name, command=f"python -m benchmarks.targets {name}",
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
