"""Sphinx extension: make the report of a committed comparison, and put it beside the pages as sample-report.html."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lora_init.comparison.report import write_report
from lora_init.comparison.runs import PACKED, SETTINGS_FILE

STUDY = Path(__file__).parent.parent / "benchmarks" / "results" / "confirm-piqa"


def setup(app: Any) -> dict[str, bool]:
    app.connect("build-finished", _write_report)
    return {"parallel_read_safe": True}


def _write_report(app: Any, exception: Exception | None) -> None:
    # The source distribution has no runs.
    if exception is not None or app.builder.format != "html" or not (STUDY / PACKED).exists():
        return
    with TemporaryDirectory() as folder:
        for name in (PACKED, SETTINGS_FILE):
            shutil.copy(STUDY / name, folder)
        write_report(folder)
        shutil.copy(Path(folder) / "report.html", Path(app.outdir) / "sample-report.html")
