"""Tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_init.layers.grid import layer_grid

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

# Seven steps of ColorBrewer's YlGnBu, from light to dark: told apart by every kind of colour vision.
_SCALE = ("#f4fbc0", "#cdebb4", "#7acbbc", "#35aac3", "#2075b3", "#243d98", "#081d58")
_FIRST_DARK = 4


def rank_table(ranks: Mapping[str, int]) -> RenderableType:
    """Lay ranks out as module type x block, a heat map where there are colours. A dot is rank 0, a gap no such layer.

    30 blocks fit in 100 columns; more go below, in as many bands as the terminal needs.

    Args:
        ranks: Full layer name to rank, in model order.

    Example:
        >>> from rich.console import Console
        >>> Console(width=40).print(rank_table({"h.0.up": 4, "h.0.down": 12, "h.1.up": 0}))
              0  1
        up    4  ·
        down 12
    """
    return _RankMap(ranks)


@dataclass(frozen=True)
class _RankMap:
    ranks: Mapping[str, int]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        grid = layer_grid(self.ranks)
        label_width = max((len(kind) for kind in grid.kinds), default=0)
        cell_width = max(len(str(number)) for number in (*self.ranks.values(), *grid.blocks, 0)) + 1
        per_band = max(1, (options.max_width - label_width) // cell_width)
        for start in range(0, len(grid.blocks), per_band):
            if start:
                yield ""
            yield self._band(grid.blocks[start : start + per_band], label_width)

    def _band(self, blocks: list[int], label_width: int) -> Table:
        from rich.table import Table
        from rich.text import Text

        grid = layer_grid(self.ranks)
        table = Table(box=None, padding=0, pad_edge=False, show_edge=False)
        table.add_column("", no_wrap=True, min_width=label_width)
        for block in blocks:
            table.add_column("" if block < 0 else f" {block}", justify="right", no_wrap=True)
        width = max(len(str(rank)) for rank in self.ranks.values()) + 1
        given = [rank for rank in self.ranks.values() if rank] or [0]
        least, most = min(given), max(given)
        for kind in grid.kinds:
            layers = grid.of_kind(kind)
            cells = [
                Text(f"{self.ranks[layers[b]] or '·':>{width}}", heat_style(self.ranks[layers[b]], least, most))
                if b in layers
                else Text("")
                for b in blocks
            ]
            if any(b in layers for b in blocks):
                table.add_row(kind, *cells)
        return table


def heat_style(rank: int, least: int, most: int) -> str:
    """Name the rich style of a cell; rank 0 has no colour, so that layers without an adapter stand out."""
    if rank == 0:
        return "dim"
    step = round((len(_SCALE) - 1) * (rank - least) / max(most - least, 1))
    return f"{'white' if step >= _FIRST_DARK else 'black'} on {_SCALE[step]}"


def facts(pairs: Mapping[str, str]) -> Table:
    """Lay out names and values in two columns."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # paths are long and to be copied
    for name, value in pairs.items():
        table.add_row(name, value)
    return table


def group_by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Group layers that differ only in their block, under the shortest label that tells the groups apart.

    Example:
        >>> group_by_kind(["h.0.up", "h.0.down", "h.1.up"])
        {'up': ['h.0.up', 'h.1.up'], 'down': ['h.0.down']}
    """
    grid = layer_grid(names)
    return {kind: list(grid.of_kind(kind).values()) for kind in grid.kinds}


def finite(value: float | None) -> float | None:
    """Round a number for JSON; return None for NaN and infinity, which JSON lacks."""
    return None if value is None or not math.isfinite(value) else round(value, 6)
