"""The heat map: a cell for each rank, in its place, that can be read."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lora_init.plots.heat_map import heat_map_figure, map_size


@pytest.mark.parametrize(("ranks", "cells", "ends"), [
    (
        {"l.0.q_proj": 1, "l.0.k_proj": 9, "l.1.q_proj": 7, "l.1.k_proj": 0},
        [["1 black", "9 white"], ["7 white", "· black"]], (0.2, 9.0),
    ),
    ({"l.0.q_proj": 1, "l.0.k_proj": 9, "l.1.q_proj": 6}, [["1 black", "9 white"], ["6 black", "· black"]], (0.2, 9.0)),
    ({"l.0.q_proj": 3, "l.0.k_proj": 3}, [["3 black", "3 black"]], (2.9, 4.0)),
    ({"l.0.q_proj": 0}, [["· black"]], (0.9, 2.0)),
])  # fmt: skip
def test_each_rank_stands_in_its_cell_in_a_color_that_can_be_read(ranks, cells, ends):
    figure = heat_map_figure(ranks)
    (axes,) = figure.axes
    found = {text.get_position(): f"{text.get_text()} {text.get_color()}" for text in axes.texts}
    assert found == {(x + 0.5, y + 0.5): cell for y, row in enumerate(cells) for x, cell in enumerate(row)}
    assert {(text.get_ha(), text.get_va()) for text in axes.texts} == {("center", "center")}
    assert axes.collections[0].get_clim() == pytest.approx(ends)
    assert axes.get_ylim() == (len(cells), 0) and axes.get_xlim() == (0, len(cells[0]))  # the first block on top
    for ticks, names in ((axes.get_xticklabels(), ["q_proj", "k_proj"]), (axes.get_yticklabels(), ["0", "1"])):
        assert [one.get_text() for one in ticks] == names[: len(ticks)]
    assert [*axes.get_xticks()] == [x + 0.5 for x in range(len(cells[0]))]
    assert [*axes.get_yticks()] == [y + 0.5 for y in range(len(cells))] and axes.get_ylabel() == "block"
    assert [*figure.get_size_inches()] == pytest.approx(map_size(ranks))
    assert not any(spine.get_visible() for spine in axes.spines.values())
    sides = axes.xaxis.get_tick_params()
    assert (sides["labeltop"], sides["labelbottom"], sides["top"], sides["bottom"]) == (True, False, False, False)


def test_the_map_grows_with_kinds_and_blocks_and_a_notebook_shows_it():
    ranks = {f"l.{block}.{kind}": 2 for block in range(30) for kind in ("q", "k", "v")}
    assert map_size(ranks) == pytest.approx((3 * 0.36 + 1.2, 30 * 0.17 + 2.4))
    assert heat_map_figure({"l.0.q": 2})._repr_png_().startswith(b"\x89PNG")


def test_names_stand_as_they_are_and_words_fit_their_cells():
    figure = heat_map_figure({"l.0.$q^$": 2, "l.1.$q^$": 0})
    (axes,) = figure.axes
    names, blocks = axes.get_xticklabels(), axes.get_yticklabels()
    assert [name.get_text() for name in names] == ["$q^$"] and not any(name.get_parse_math() for name in names)
    looks = {(name.get_rotation(), name.get_ha(), name.get_rotation_mode(), name.get_fontsize()) for name in names}
    assert looks == {(40, "left", "anchor", 8)}
    assert {one.get_fontsize() for one in (*axes.texts, *blocks)} == {7}
    assert axes.xaxis.get_tick_params()["length"] == axes.yaxis.get_tick_params()["length"] == 0
    (cells,) = axes.collections
    assert to_hex(cells.get_edgecolor()[0]) == "#dddddd" and cells.get_linewidth()[0] == 0.4
    assert isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine) and figure.dpi == 110
