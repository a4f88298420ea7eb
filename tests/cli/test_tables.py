"""A table of cells is whole at every width: a column is never broken, and goes below where there is no room."""

import io
import math

import pytest
from rich.console import Console

from lora_init.cli.tables import Cells, correction_facts, facts, finite, heat_style, rank_table, rows_read

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


def test_the_least_rank_is_the_lightest_and_layers_without_one_have_no_color():
    """A layer of rank 0 has no adapter, so it is no end of the scale."""
    ranks = {"h.0.up": 0, "h.1.up": 4, "h.2.up": 8, "h.3.up": 16}
    console = Console(file=io.StringIO(), width=60)
    styles = {segment.text.strip(): str(segment.style) for segment in console.render(rank_table(ranks, 60))}
    assert styles["·"] == "dim" and [styles[one] for one in ("4", "16")] == [heat_style(1, 1, 2), heat_style(2, 1, 2)]
    assert styles["4"] != styles["8"] != styles["16"] and all("on #" in styles[one] for one in ("4", "8", "16"))


@pytest.mark.parametrize("n", [0, 1])
def test_a_table_of_one_row_or_none_is_one(n):
    out = io.StringIO()
    Console(file=out, width=100).print(Cells(ROWS[:n]))
    assert len(out.getvalue().splitlines()) == 2 * n


def laid_out(thing, width):
    out = io.StringIO()
    Console(file=out, width=width).print(thing)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_columns_stand_below_each_other_to_the_character():
    """Names on the left and never broken, long values folded beside them; numbers on the right."""
    assert laid_out(facts({"a": "x", "longer": "one [b]path[/b]/that/is/long"}), 24) == [
        "a       x", "longer  one", "        [b]path[/b]/that", "        /is/long",
    ]  # fmt: skip
    rows = [{"start": "a", "loss": "0.5"}, {"start": "longer", "loss": "10.25"}]
    assert laid_out(Cells(rows), 40) == ["start    loss", "a         0.5", "longer  10.25"]
    more = Cells([row | {"n": "1"} for row in rows])
    assert laid_out(more, 16) == laid_out(more, 40) == ["start    loss  n", "a         0.5  1", "longer  10.25  1"]
    assert len(laid_out(more, 15)) == 6  # the last column goes below
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    assert laid_out(facts({"base model of it": long}), 24)[0] == "base model of it  one"
    ranks = {"h.0.up": 4, "h.1.up": 16, "h.10.up": 8, "h.0.down": 2}
    assert laid_out(rank_table(ranks, 40), 40) == ["     0  1 10", "up   4 16  8", "down 2"]


def luminance(color):
    """Relative luminance of sRGB, by WCAG 2."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_larger_rank_is_darker_and_its_number_is_in_what_stands_out_from_it():
    lights, texts = [], []
    for style in (heat_style(rank, 1, 7) for rank in range(1, 8)):
        text, color = style.split(" on ")
        assert len(color) == 7
        lights.append(luminance(color))
        texts.append(text)
    assert lights == sorted(lights, reverse=True) and len(set(lights)) == 7
    assert texts == ["white" if 1.05 / (one + 0.05) > (one + 0.05) / 0.05 else "black" for one in lights]
    assert heat_style(0, 1, 7) == "dim" and heat_style(3, 3, 3) == heat_style(1, 1, 7)


@pytest.mark.parametrize(("value", "rounded"), [
    (None, None), (math.nan, None), (math.inf, None), (0.12345678, 0.123457), (0.0, 0.0), (3, 3),
])  # fmt: skip
def test_a_number_for_json_is_finite_and_has_six_digits(value, rounded):
    assert finite(value) == rounded


def test_what_a_pass_has_read_is_said_with_how_much_of_the_start_would_stay():
    made = {"n_samples": 1234, "n_batches": 5, "stop_reason": "converged"}
    assert rows_read(made | {"keeps": None}) == rows_read(made) == "1,234 in 5 batches, stopped: converged"
    assert rows_read(made | {"keeps": 0.0}).endswith("; on other data the start would keep 0%")


def test_what_a_correction_leaves_is_named_by_the_layers_at_both_ends():
    errors = {"a": (2.0, 1.0), "b": (4.0, 1.0), "c": (1.0, 0.75)}
    losses = {"float": 2.0, "quantised": 2.5, "corrected": 2.12345}
    assert correction_facts({"errors": errors, "losses": losses, "share_closed": 0.75}) == {
        "loss": "2 in float, 2.5 quantised, 2.123 corrected: 75% of the difference is closed",
        "error of layers": "50% of the error of the quantized weights is left (median), 25% at least (b), 75% at most "
        "(c)",
    }


@pytest.mark.parametrize(("closed", "said"), [
    (None, "quantization does not raise it"), (0.0, "0% of the difference is closed"),
    (-0.25, "-25% of the difference is closed"), (1.0, "100% of the difference is closed"),
])  # fmt: skip
def test_a_correction_that_wins_nothing_back_is_told_from_a_quantization_that_costs_nothing(closed, said):
    losses = {"float": 2.0, "quantised": 2.5, "corrected": 2.5}
    found = correction_facts({"errors": {"a": (1.0, 1.0)}, "losses": losses, "share_closed": closed})
    assert found["loss"] == f"2 in float, 2.5 quantised, 2.5 corrected: {said}"


@pytest.mark.parametrize(("blocks", "width", "bands"), [(10, 33, 1), (10, 32, 2), (11, 36, 1), (11, 35, 2), (3, 1, 3)])
def test_a_table_of_ranks_has_a_band_for_as_many_blocks_as_fit(blocks, width, bands):
    """A cell is a space and the longest number, of ranks or of blocks: two digits from the eleventh block on."""
    lines = laid_out(rank_table({f"h.{i}.q": 10 for i in range(blocks)} | {"h.0.kqv": 8}, width), max(width, 20))
    assert sum(line.strip().startswith("kqv") for line in lines) == 1
    assert sum(line.split()[:1] == ["q"] for line in lines) == bands


def test_layers_outside_any_block_have_a_column_without_a_number():
    ranks = {"head": 4, "h.0.q": 12, "h.1.q": 0}
    assert laid_out(rank_table(ranks, 40), 40) == ["        0 1", "head 4", "q      12 ·"]


def test_no_layer_is_no_table():
    assert laid_out(rank_table({}, 40), 40) == []
