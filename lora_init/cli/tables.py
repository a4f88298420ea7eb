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
_FIRST_DARK = 4  # from this step on, white digits are read more easily than black ones


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
    # All cells are as wide as the longest number, with a space before it.
    cell_width = max(len(str(number)) for number in (*ranks.values(), *grid.blocks, 0)) + 1
    # Colours begin at the smallest rank that is used: rank 0 has none.
    used = [rank for rank in ranks.values() if rank] or [0]
    least, most = min(used), max(used)
    per_band = max(1, (width - label_width) // cell_width)
    bands: list[Table | str] = []
    for start in range(0, len(grid.blocks), per_band):
        blocks = grid.blocks[start : start + per_band]
        band = Table(box=None, padding=0, pad_edge=False, show_edge=False)
        band.add_column("", no_wrap=True, min_width=label_width)
        for block in blocks:
            header = "" if block < 0 else f" {block}"  # -1 stands for layers outside any block
            band.add_column(header, justify="right", no_wrap=True)
        for kind in grid.kinds:
            names = [grid.cells.get((kind, block)) for block in blocks]
            if any(names):  # a band of blocks may have no layer of this kind
                band.add_row(kind, *(_cell(ranks[name], least, most) if name else "" for name in names))
        if bands:
            bands.append("")
        bands.append(band)
    return Group(*bands)


def heat_style(rank: int, least: int, most: int) -> str:
    """Name the rich style of a cell; rank 0 has no colour, so that layers without an adapter stand out."""
    if rank == 0:
        return "dim"
    step = round((len(_SCALE) - 1) * (rank - least) / max(most - least, 1))  # with equal ranks all cells are light
    digits = "white" if step >= _FIRST_DARK else "black"
    return f"{digits} on {_SCALE[step]}"


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
        size = {}
        for name in (first, *others):
            cells = [row[name] for row in self.rows]
            size[name] = 2 + max(map(len, (name, *cells)))  # with the space between columns
        while others:
            # The last column of a band has no space after it, hence the 2.
            band, left = [first], options.max_width + 2 - size[first]
            # At least one column goes into each band, however narrow the terminal is, or this would never end.
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
    if made.get("keeps") is not None:
        text += f"; on other data the start would keep {made['keeps']:.0%}"
    return text


def finite(value: float | None) -> float | None:
    """Round a number for JSON; return None for NaN and infinity, which JSON lacks."""
    if value is None or not math.isfinite(value):
        return None
    return round(value, 6)


def correction_facts(correction: Mapping[str, Any]) -> dict[str, str]:
    """Return what quantization cost and what an adapter gives back, from `correction_of`."""
    left = []
    for name, (before, after) in correction["errors"].items():
        ratio = after / before if before else 1.0  # a layer that was quantized exactly has no error to correct
        left.append((ratio, name))
    left.sort()
    (least, least_name), (most, most_name) = left[0], left[-1]
    layers = (
        f"{median(ratio for ratio, _ in left):.0%} of the error of the quantized weights is left "
        f"(median), {least:.0%} at least ({least_name}), {most:.0%} at most ({most_name})"
    )
    return {"loss": _correction_losses(correction["losses"], correction["share_closed"]), "error of layers": layers}


def _correction_losses(losses: Mapping[str, float | None], closed: float | None) -> str:
    """Write the losses of the float model, the quantized and the corrected one, and how much the last one won back."""
    if losses["quantised"] is None:
        return "not measured: without DATA no examples are set aside"
    share = "quantization does not raise it" if closed is None else f"{closed:.0%} of the difference is closed"
    words = []
    for kind, loss in losses.items():
        words.append(f"{loss:.4g} in float" if kind == "float" else f"{loss:.4g} {kind}")
    return f"{', '.join(words)}: {share}"


def quantization_name(settings: Mapping[str, Any]) -> str:
    """Return the name of a quantization: its library, and its kind or bits."""
    library = settings.get("quant_method", "")
    # Each library has its own key. The type of four bits says more than their number, and eight have its default, too.
    if settings.get("load_in_8bit"):
        return f"{library} 8 bits".strip()
    for key in ("bnb_4bit_quant_type", "bits", "nbits"):
        if settings.get(key):
            return f"{library} {settings[key]}".strip()
    if settings.get("load_in_4bit"):
        return f"{library} 4 bits".strip()
    return str(library).strip()
