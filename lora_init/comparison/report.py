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
    rows = []
    for name, value in settings.items():
        rows.append((name, value if isinstance(value, str) else json.dumps(value)))
    file = directory / BEST / BEST_RUN
    # The adapter of an earlier call may be of another start: only the one that is advised is mentioned.
    kept = file.exists() and read_json(file).get("start") == summary.start
    tables = run_tables(summary)
    content = {
        "summary": summary,
        "parts": {name: part for name, part in PARTS.items() if name in drawn or name in tables},
        "pictures": drawn,
        "tables": tables,
        "settings": pd.DataFrame(rows, columns=["setting", "value"]),
        "kept": kept,
    }
    text = fill(content)
    files, svg_of = {}, {}
    for name, kinds in drawn.items():
        files[f"{name}.png"] = kinds["png"]  # for Markdown
        svg_of[f"{name}.png"] = kinds["svg"]  # the page has its own, which are sharp at any size
    files["report.md"] = text.encode()
    files["report.html"] = page_of(summary.title, text, svg_of).encode()
    for name, data in files.items():
        write_whole(directory / name, data)
    return [directory / name for name in files]


# Fields of a summary that a description leaves out: verdicts come as plain values, runs as their number.
_NOT_DESCRIBED = ("title", "start", "verdicts", "alphas", "table")


def describe_directory(path: str | Path) -> dict[str, Any]:
    """Return as plain values which model and data a comparison is of, how far it has come, and what it found."""
    path = Path(path).expanduser()
    settings = read_settings(path)
    summary = summarise(read_runs(path), settings)
    content = vars(summary).copy()
    for name in _NOT_DESCRIBED:
        del content[name]
    return {
        "what": "comparison",
        "path": str(path),
        "settings": settings,
        "runs": {status: int(n) for status, n in summary.table["status"].value_counts().items()},
        **content,
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
    # Not by the loss to report: a run that was chosen by it would look better than it is.
    row = runs.loc[runs["selection_loss"].idxmin()]
    run, path = Run.of(row), log.path / BEST
    start, quantized = run.start.start, log.settings.get("quantisation")
    if start and start.changes_base and not start.corrects(bool(quantized)):
        say(f"{run.start} changes the weights of the model, so its trained adapter is not kept.")
        return
    if path.exists() and any(path.iterdir()):
        held, file = None, path / BEST_RUN
        if file.exists():
            held = Run.of(read_json(file))
        if held != run:
            held_title = held.title if held else "something else"
            say(
                f"{path} holds {held_title} and stays; the best is now {run.title}. "
                f"Remove {path} to have that one made."
            )
        return
    record = come_back(worker.submit(run, f"{BEST}: {run.title}", keep=True))
    if isinstance(record, str):  # why no record came back
        raise LoraInitError(f"the worker that trained {path} died. The same command makes it. {record}")
    files = {}
    if record["status"] == "finished":
        files = record.pop("adapter")  # the rest of the record is kept beside it
    if not files:
        say(f"{path} is not made: {record['error'] or f'{run.start} changes the weights of the model'}")
        return
    files |= {BEST_RUN: f"{json.dumps(record)}\n".encode(), "README.md": _card(summary, log, record).encode()}
    # Whole or not at all: what is in `best/` is never replaced.
    with new_directory(path, overwrite=False, marker=BEST_RUN, replaceable=()) as fresh:
        for name, content in files.items():
            (fresh / name).write_bytes(content)


def _card(summary: Summary, log: RunDirectory, record: Record) -> str:
    settings, losses = log.settings, record["report_loss"]
    base = loaded = None
    if "/" in settings["model"]:  # a hub id: of a directory the settings have the name alone, which the hub lacks
        base = settings["model"]
    if quantized := settings.get("quantisation"):
        loaded = f"\nThe base was quantized, and must be for this adapter: quantization_config={quantized}.\n"
    return f"""{card_header(base, settings["task_type"])}
# The best start of a comparison, trained

`{record["start"]}` on {settings["task"]}: rank {settings["rank"]}, learning rate \
{rate_text(record["learning_rate"])}, \
{settings["steps"]} steps of {settings["batch_size"]} examples, seed {record["seed"]}. Loss on the examples to report: \
{number(losses[-1])}, {number(record["plain_loss"])} of the plain model.

{" ".join([summary.answer, *summary.caveats, summary.headroom])}

{summary.facts}

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{BEST}")
```

{loaded or ""}
Compared by lora_init; the runs are beside this directory, the one of this adapter in `{BEST_RUN}`.
"""
