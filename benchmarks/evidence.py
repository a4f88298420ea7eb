"""Everything that is made from committed runs, made again: `python -m benchmarks.evidence`.

For each study in `results/`: its runs in one file, `runs.jsonl`, its report and the report's pictures. And the
pictures of several studies, `starts.svg`, `trade_off.svg` and `dial.svg`, and the figures in our pages
(`benchmarks.figures`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import dial, figures, starts, trade_off
from lora_init.comparison.report import write_report
from lora_init.comparison.runs import FORMAT, PACKED, RUNS, SETTINGS_FILE, Run, read_runs
from lora_init.files import read_json, write_whole

RESULTS = Path(__file__).parent / "results"


def pack(directory: Path) -> int:
    """Put the runs of a comparison that nobody is writing to into one file, a line each, and say how many they are.

    `read_runs` reads either form, so the comparison can be inspected, reported and gone on with as before.
    """
    files = list((directory / RUNS).glob("*.json"))
    records = sorted(read_runs(directory), key=lambda record: Run.of(record).file)
    if files:
        lines = [f"{json.dumps(_shorter(record))}\n" for record in records]
        write_whole(directory / PACKED, "".join(lines).encode())
        for file in files:
            file.unlink()
        (directory / RUNS).rmdir()
    return len(records)


def _shorter(value: Any) -> Any:
    """Write numbers that are exactly a float32, as the losses of steps, with no more digits than tell them apart."""
    if isinstance(value, dict):
        return {name: _shorter(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_shorter(item) for item in value]
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def main() -> None:
    for directory in sorted(file.parent for file in RESULTS.glob(f"*/{SETTINGS_FILE}")):
        print(f"{directory.name}: {pack(directory)} runs")
        if read_json(directory / SETTINGS_FILE)["format"] == FORMAT:
            write_report(directory)
    starts.main()
    trade_off.draw(RESULTS / "trade_off.svg")
    dial.draw(RESULTS / "dial.svg")
    for page in figures.PAGES:
        text = (figures.ROOT / page).read_text(encoding="utf-8")
        write_whole(figures.ROOT / page, figures.corrected(text).encode())


if __name__ == "__main__":
    main()
