"""What a comparison leaves beside its runs: the report, and the trained adapter of the best start in `best/`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from lora_init.adapters.directory import card_header
from lora_init.comparison.findings import Summary, summarise
from lora_init.comparison.plots import pictures
from lora_init.comparison.runs import BEST, BEST_RUN, Record, Run, RunDirectory, read_runs, read_settings
from lora_init.comparison.tables import PARTS, run_tables
from lora_init.comparison.wording import fill, number, page_of, rate_text
from lora_init.comparison.workers import Worker, come_back
from lora_init.errors import LoraInitError
from lora_init.files import new_directory, read_json, write_whole


def write_report(directory: str | Path) -> list[Path]:
    """Write report.html, report.md and the pictures into the directory of a comparison, from what ended so far."""
    directory = Path(directory).expanduser()
    settings = read_settings(directory)
    summary = summarise(read_runs(directory), settings)
    drawn = pictures(summary)
    rows = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in settings.items()]
    listed = pd.DataFrame(rows, columns=["setting", "value"])
    file = directory / BEST / BEST_RUN
    kept = file.exists() and read_json(file).get("start") == summary.start
    tables = run_tables(summary)
    parts = {name: part for name, part in PARTS.items() if name in drawn or name in tables}
    content = {"summary": summary, "parts": parts, "pictures": drawn, "tables": tables}
    content |= {"settings": listed, "kept": kept}
    files = {f"{name}.png": kinds["png"] for name, kinds in drawn.items()}  # for Markdown; the page has its own, sharp
    text = fill(content)
    page = page_of(summary.title, text, {f"{name}.png": kinds["svg"] for name, kinds in drawn.items()})
    files |= {"report.md": text.encode(), "report.html": page.encode()}
    for name, data in files.items():
        write_whole(directory / name, data)
    return [directory / name for name in files]


_NOT_SAID = ("title", "start", "verdicts", "alphas", "table")  # of a summary, in plain values


def describe_directory(path: str | Path) -> dict[str, Any]:
    """Return as plain values from which model and data a comparison is, how far it is, and what it found."""
    path = Path(path).expanduser()
    settings = read_settings(path)
    summary = summarise(read_runs(path), settings)
    return {
        "what": "comparison",
        "path": str(path),
        "settings": settings,
        "runs": {status: int(n) for status, n in summary.table["status"].value_counts().items()},
        **{name: value for name, value in vars(summary).items() if name not in _NOT_SAID},
        "verdicts": [asdict(verdict) for verdict in summary.verdicts],
    }


def keep_best(log: RunDirectory, worker: Worker, say: Callable[[str], None]) -> None:
    """Train the best start once more, as its run with the lowest loss on the examples to select by, and keep it.

    Adapters of all runs would take more room than this takes time. What is in `best/` already is never replaced.
    """
    summary = summarise(log.records.values(), log.settings)
    if summary.start is None:
        return
    runs = summary.table[summary.table["best"] & summary.table["start"].eq(summary.start)]
    row = runs.loc[runs["selection_loss"].idxmin()]
    run, path = Run.of(row), log.path / BEST
    start, quantized = run.start.start, log.settings.get("quantisation")
    if start and start.changes_base and not start.corrects(bool(quantized)):
        say(f"{run.start} changes the weights of the model, so its trained adapter is not kept.")
        return
    if path.exists() and any(path.iterdir()):
        there = Run.of(read_json(path / BEST_RUN)) if (path / BEST_RUN).exists() else None
        if there != run:
            held = there.title if there else "something else"
            say(f"{path} holds {held} and stays; the best is now {run.title}. Remove {path} to have that one made.")
        return
    record = come_back(worker.submit(run, f"{BEST}: {run.title}", keep=True))
    if isinstance(record, str):
        raise LoraInitError(f"the worker that trained {path} died. The same command makes it. {record}")
    files = record.pop("adapter") if record["status"] == "finished" else {}
    if not files:
        say(f"{path} is not made: {record['error']}")
        return
    files |= {BEST_RUN: f"{json.dumps(record)}\n".encode(), "README.md": _card(summary, log, record).encode()}
    with new_directory(path, overwrite=False, marker=BEST_RUN, replaceable=()) as fresh:
        for name, content in files.items():
            (fresh / name).write_bytes(content)


def _card(summary: Summary, log: RunDirectory, record: Record) -> str:
    known, losses = log.settings, record["report_loss"]
    quantized = known.get("quantisation")
    loaded = f"\nThe base was quantized, and must be for this adapter: quantization_config={quantized}.\n"
    return f"""{card_header(known["model"] if "/" in known["model"] else None, known["task_type"])}
# The best start of a comparison, trained

`{record["start"]}` on {known["task"]}: rank {known["rank"]}, learning rate {rate_text(record["learning_rate"])}, \
{known["steps"]} steps of {known["batch_size"]} examples, seed {record["seed"]}. Loss on the examples to report: \
{number(losses[-1])}, {number(record["plain_loss"])} of the plain model.

{" ".join([summary.answer, *summary.caveats, summary.headroom])}

{summary.facts}

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{BEST}")
```

{loaded if quantized else ""}
Compared by lora_init; the runs are beside this directory, the one of this adapter in `{BEST_RUN}`.
"""
