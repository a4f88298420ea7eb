"""Tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from lora_init.layers.grid import layer_grid

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group
    from rich.table import Table
    from rich.text import Text


# Seven steps of ColorBrewer's YlGnBu, from light to dark: told apart by every kind of colour vision.
_SCALE = ("#f4fbc0", "#cdebb4", "#7acbbc", "#35aac3", "#2075b3", "#243d98", "#081d58")
_FIRST_DARK = 4


def _cell(rank: int, least: int, most: int) -> Text:
    """Write a rank in the colour that it has in the heat map."""
    from rich.text import Text

    return Text(f" {rank or '·'}", heat_style(rank, least, most))


def rank_table(ranks: Mapping[str, int], width: int) -> Group:
    """Lay ranks out as module type x block, a heat map where there are colours. A dot is rank 0, a gap no such layer.

    30 blocks fit in 100 columns; more go below, in as many bands as the width needs.

    Example:
        >>> from rich.console import Console
        >>> Console().print(rank_table({"h.0.up": 4, "h.0.down": 12, "h.1.up": 0}, width=40))
              0  1
        up    4  ·
        down 12
    """
    from rich.console import Group
    from rich.table import Table

    grid = layer_grid(ranks)
    label_width = max((len(kind) for kind in grid.kinds), default=0)
    cell_width = max(len(str(number)) for number in (*ranks.values(), *grid.blocks, 0)) + 1
    given = [rank for rank in ranks.values() if rank] or [0]
    least, most = min(given), max(given)
    per_band = max(1, (width - label_width) // cell_width)
    bands: list[Table | str] = []
    for start in range(0, len(grid.blocks), per_band):
        blocks = grid.blocks[start : start + per_band]
        band = Table(box=None, padding=0, pad_edge=False, show_edge=False)
        band.add_column("", no_wrap=True, min_width=label_width)
        for block in blocks:
            band.add_column("" if block < 0 else f" {block}", justify="right", no_wrap=True)
        for kind in grid.kinds:
            names = [grid.cells.get((kind, block)) for block in blocks]
            cells = [_cell(ranks[name], least, most) if name else "" for name in names]
            if any(names):
                band.add_row(kind, *cells)
        bands += ["", band] if bands else [band]
    return Group(*bands)


def heat_style(rank: int, least: int, most: int) -> str:
    """Name the rich style of a cell; rank 0 has no colour, so that layers without an adapter stand out."""
    if rank == 0:
        return "dim"
    step = round((len(_SCALE) - 1) * (rank - least) / max(most - least, 1))
    return f"{'white' if step >= _FIRST_DARK else 'black'} on {_SCALE[step]}"


def facts(pairs: Mapping[str, str]) -> Table:
    """Lay out names and values in two columns."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # paths are long and to be copied
    for name, value in pairs.items():
        table.add_row(name, Text(value))  # a path may have square brackets, which are no markup
    return table


@dataclass(frozen=True)
class Cells:
    """A table of rows under the keys of the first: that column on the left, the others on the right.

    Columns that the width has no room for go below, beside the first one again.
    """

    rows: Sequence[Mapping[str, str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """Yield the bands of the table."""
        from rich.table import Table
        from rich.text import Text

        first, *others = self.rows[0] if self.rows else [""]
        size = {name: 2 + max(map(len, (name, *(row[name] for row in self.rows)))) for name in (first, *others)}
        while others:
            band, left = [first], options.max_width + 2 - size[first]
            while others and (len(band) == 1 or size[others[0]] <= left):
                left -= size[others[0]]
                band.append(others.pop(0))
            table = Table(box=None, padding=(0, 1), pad_edge=False)
            for name in band:
                table.add_column(Text(name), justify="left" if name == first else "right", no_wrap=True)
            for row in self.rows:
                table.add_row(*(Text(row[name]) for name in band))
            yield table


def rows_read(made: Mapping[str, Any]) -> str:
    """Return what a pass has read, why it ended, and how much of the start other data would give again."""
    text = f"{made.get('n_samples', 0):,} in {made.get('n_batches')} batches, stopped: {made.get('stop_reason')}"
    return f"{text}; on other data the start would keep {made['keeps']:.0%}" if made.get("keeps") is not None else text


def finite(value: float | None) -> float | None:
    """Round a number for JSON; return None for NaN and infinity, which JSON lacks."""
    return None if value is None or not math.isfinite(value) else round(value, 6)


def correction_facts(correction: Mapping[str, Any]) -> dict[str, str]:
    """Return what quantization cost and what an adapter gives back, from `correction_of`."""
    left = sorted((after / before if before else 1.0, name) for name, (before, after) in correction["errors"].items())
    least, most = left[0], left[-1]
    rows = {
        "error of layers": f"{median(ratio for ratio, _ in left):.0%} of the error of the quantized weights is left "
        f"(median), {least[0]:.0%} at least ({least[1]}), {most[0]:.0%} at most ({most[1]})"
    }
    losses, closed = correction["losses"], correction["share_closed"]
    if losses["quantised"] is None:
        return {"loss": "not measured: without DATA no examples are set aside", **rows}
    share = "quantization does not raise it" if closed is None else f"{closed:.0%} of the difference is closed"
    words = ", ".join(f"{loss:.4g} {'in float' if kind == 'float' else kind}" for kind, loss in losses.items())
    return {"loss": f"{words}: {share}", **rows}


def quantization_name(settings: Mapping[str, Any]) -> str:
    """Return the name of a quantization:  its library, and its kind or bits."""
    kind = next((settings[key] for key in ("bnb_4bit_quant_type", "bits", "nbits") if settings.get(key)), None)
    bits = next((f"{n} bits" for n in (4, 8) if settings.get(f"load_in_{n}bit")), "")
    return f"{settings.get('quant_method', '')} {kind or bits}".strip()
