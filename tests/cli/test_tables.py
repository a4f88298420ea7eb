"""A table of cells is whole at every width: a column is never broken, and goes below where there is no room."""

import io

import pytest
from rich.console import Console

from lora_init.cli.tables import Cells, rank_table

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


def test_a_table_of_ranks_in_bands_has_each_row_where_it_has_layers():
    ranks = {f"h.{i}.up": 8 for i in range(40)} | {"h.0.first": 4, "h.39.last": 2}
    out = io.StringIO()
    Console(file=out, width=60).print(rank_table(ranks, 60))
    lines = out.getvalue().rstrip("\n").split("\n")
    bands = " ".join(line.split()[0] if line.strip() else "|" for line in lines).split(" | ")
    assert len(bands) > 1 and lines[0].strip()
    assert [band.split()[1:] for band in (bands[0], bands[-1])] == [["up", "first"], ["up", "last"]]
