"""The trained adapter of the best start, in `best/`, with a card that says what it is."""

from __future__ import annotations

import json
from collections.abc import Callable

from lora_init.adapters.peft_model import card_header
from lora_init.comparison.findings import Summary, number, rate_text, summarise
from lora_init.comparison.runs import BEST, BEST_RUN, Record, Run, RunDirectory
from lora_init.comparison.starts import can_be_kept
from lora_init.comparison.workers import Worker
from lora_init.errors import LoraInitError
from lora_init.files import new_directory, read_json

_CARD = "README.md"


def keep_best(log: RunDirectory, worker: Worker, say: Callable[[str], None]) -> None:
    """Train the best start once more, as its run with the lowest loss on the examples to select by, and keep it.

    Adapters of all runs would take more room than this takes time. What is in `best/` already is never replaced.

    Args:
        log: The runs, and the directory that `best/` is put in.
        worker: Does the run.
        say: Receives a line where there is nothing to keep, or something else is there.
    """
    summary = summarise(log.records.values(), log.settings)
    if summary.start is None:
        return
    runs = summary.table[summary.table["best"] & summary.table["start"].eq(summary.start)]
    row = runs.loc[runs["selection_loss"].idxmin()]
    run, path = Run(row["start"], int(row["seed"]), float(row["learning_rate"])), log.path / BEST
    if not can_be_kept(run.start):
        say(f"{run.start} changes the weights of the model, so its trained adapter is not kept.")
        return
    if path.exists() and any(path.iterdir()):
        there = Run.of(read_json(path / BEST_RUN)) if (path / BEST_RUN).exists() else None
        if there != run:
            held = there.title if there else "something else"
            say(f"{path} holds {held} and stays; the best is now {run.title}. Remove {path} to have that one made.")
        return
    record = worker.take(worker.submit(run, f"{BEST}: {run.title}", keep=True))
    if record is None:
        raise LoraInitError(f"the worker that trained {path} died. The same command makes it.")
    files = record.pop("adapter") if record["status"] == "finished" else {}
    if not files:
        say(f"{path} is not made: {record['error']}")
        return
    files |= {BEST_RUN: f"{json.dumps(record)}\n".encode(), _CARD: _card(summary, log, record).encode()}
    with new_directory(path, overwrite=False, marker=BEST_RUN, replaceable=()) as fresh:
        for name, content in files.items():
            (fresh / name).write_bytes(content)


def _card(summary: Summary, log: RunDirectory, record: Record) -> str:
    known, losses = log.settings, record["report_loss"]
    return f"""{card_header(known["model"] if "/" in known["model"] else None, known["task_type"])}
# The best start of a comparison, trained

`{record["start"]}` on {known["task"]}: rank {known["rank"]}, learning rate {rate_text(record["learning_rate"])}, \
{known["steps"]} steps of {known["batch_size"]} examples, seed {record["seed"]}. Loss on the examples to report: \
{number(losses[-1])}, {number(record["plain_loss"])} of the plain model.

{summary.answer} {summary.headroom}

{summary.facts}

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{BEST}")
```

Compared by lora_init; the runs are beside this directory, the one of this adapter in `{BEST_RUN}`.
"""
