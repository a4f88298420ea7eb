"""The heat map of ranks, block x kind of layer: of a plan and of an adapter, alone or within a larger picture."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_init.errors import require
from lora_init.layers.grid import layer_grid
from lora_init.planning.plan import rank_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = "YlGnBu"


def draw_heat_map(axes: Any, ranks: Mapping[str, int]) -> None:
    """Draw a cell for each layer with its rank in it, blocks from top to bottom."""
    grid = rank_grid(ranks)  # blocks x kinds of layers, NaN where there is no adapter
    least = most = 1.0
    if grid.notna().any(axis=None):
        least, most = grid.min(axis=None), grid.max(axis=None)
    span = (most - least) or 1.0  # of equal ranks it is zero, and colors need some
    # The lightest tenth is left out, so that white stays for layers without an adapter.
    ends = {"vmin": least - 0.1 * span, "vmax": least + span}
    cells = axes.pcolormesh(grid, cmap=_COLORS, edgecolors="#dddddd", linewidth=0.4, **ends)
    for (y, x), rank in np.ndenumerate(grid):
        color = "white" if cells.norm(rank) > 0.675 else "black"  # the contrast is 4.5 at least
        text = "·" if math.isnan(rank) else f"{rank:.0f}"
        axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7, color=color)
    axes.invert_yaxis()  # the first block on top
    places = np.arange(len(grid.columns)) + 0.5  # the middle of each cell
    axes.set_xticks(places, grid.columns, rotation=40, ha="left", rotation_mode="anchor", fontsize=8, parse_math=False)
    axes.set_yticks(np.arange(len(grid)) + 0.5, grid.index, fontsize=7)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.set_ylabel("block")
    axes.spines[:].set_visible(False)


def map_size(ranks: Mapping[str, int]) -> tuple[float, float]:
    """Return the inches at which every cell can be read."""
    grid = layer_grid(ranks)
    return 0.36 * len(grid.kinds) + 1.2, 0.17 * len(grid.blocks) + 2.4


def heat_map_figure(ranks: Mapping[str, int]) -> Figure:
    """Draw the heat map alone; a notebook shows it, which would print `<Figure size ...>` of one without pyplot."""
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=map_size(ranks), dpi=110, layout="constrained")
    draw_heat_map(figure.add_subplot(), ranks)
    figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
