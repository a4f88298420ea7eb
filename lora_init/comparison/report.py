"""The report of a comparison: report.html, report.md and pictures, from the settings and the runs in its directory."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from lora_init.comparison.findings import summarise
from lora_init.comparison.plots import pictures
from lora_init.comparison.runs import BEST, BEST_RUN, best_rates, by_seed, read_runs, read_settings
from lora_init.comparison.tables import run_tables
from lora_init.files import read_json, write_whole


def write_report(directory: str | Path) -> list[Path]:
    """Write report.html, report.md and the pictures into the directory of a comparison, from what ended so far.

    Returns:
        The files.

    Raises:
        LoraInitError: settings.json is missing or damaged.
        OSError: A file can't be written.
    """
    directory = Path(directory).expanduser()
    settings = read_settings(directory)
    summary = summarise(read_runs(directory), settings)
    drawn = pictures(summary)
    rows = _settings_table(settings)
    file = directory / BEST / BEST_RUN
    kept = file.exists() and read_json(file).get("start") == summary.start
    content = {"summary": summary, "pictures": drawn, "tables": run_tables(summary), "settings": rows, "kept": kept}
    files = {f"{name}.png": png for name, png in drawn.items()}
    files |= {name: _fill(name, content).encode() for name in ("report.md", "report.html")}
    for name, data in files.items():
        write_whole(directory / name, data)
    return [directory / name for name in files]


def describe_directory(path: str | Path) -> dict[str, Any]:
    """Describe the directory of a comparison: from which model and data it is, how far it is, what it found.

    Returns:
        Plain values that `json.dumps` takes.

    Raises:
        LoraInitError: It is no directory of a comparison, one of an older version, or damaged.
    """
    path = Path(path).expanduser()
    settings = read_settings(path)
    summary = summarise(read_runs(path), settings)
    table = summary.table
    best, losses = best_rates(table), by_seed(table).mean(axis=1)
    return {
        "what": "comparison",
        "path": str(path),
        "settings": settings,
        "runs": {status: int(n) for status, n in table["status"].value_counts().items()},
        "answer": summary.answer,
        "command": summary.command,
        "headline": summary.headline,
        "headroom": summary.headroom,
        "starts": {
            start: {"learning_rate": best.get(start), "loss": float(losses[start]) if start in losses else None}
            for start in table["start"].unique()
        },
        "verdicts": [asdict(verdict) for verdict in summary.verdicts],
        "equal_time": summary.equal_time,
        "forgetting": summary.forgetting,
        "notes": summary.notes,
    }


def _fill(template: str, content: dict[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lora_init.comparison"),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": _plain, "base64": lambda png: base64.b64encode(png).decode()}
    return re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(content)).strip() + "\n"


def _plain(text: str) -> str:
    """Keep Markdown from reading signs in text as its own."""
    return re.sub(r"([\\`*_\[\]<>|#$~])", r"\\\1", " ".join(text.split()))


def _settings_table(settings: dict[str, Any]) -> pd.DataFrame:
    rows = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in settings.items()]
    return pd.DataFrame(rows, columns=["setting", "value"])
