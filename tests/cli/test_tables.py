"""A table of cells is whole at every width: a column is never broken, and goes below where there is no room."""

import io

import pytest
from rich.console import Console

from lora_init.cli.tables import Cells

ROWS = [
    {"start": start, "difference": "−0.0043", "interval": "−0.48 % to +0.27 %", "verdict": "no difference shown"}
    for start in ("random", "natural-gradient+equal-parameters")
]


@pytest.mark.parametrize(("width", "bands"), [(100, 1), (80, 2), (60, 3)])
def test_no_word_of_a_table_is_broken(width, bands):
    out = io.StringIO()
    Console(file=out, width=width, soft_wrap=True).print(Cells(ROWS))
    lines = out.getvalue().splitlines()
    assert len(lines) == bands * (1 + len(ROWS)) and all(len(line) <= width for line in lines)
    assert all(text in out.getvalue() for row in ROWS for text in (*row, *row.values()))
    assert sum("start" in line for line in lines) == bands
