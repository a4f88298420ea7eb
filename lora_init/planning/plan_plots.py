"""Pictures of a plan with matplotlib: heat map, spectra, budget curve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from lora_init.errors import LoraInitError
from lora_init.layers.grid import layer_grid
from lora_init.planning.plan import RankAllocation
from lora_init.planning.plan_numbers import (
    BudgetCurve,
    KindSpectra,
    budget_curves,
    kind_spectra,
    plan_text,
    source_text,
)
from lora_init.statistics.statistics import Statistics

# From the palette of Okabe and Ito, told apart by every kind of colour vision, as are dashes and markers.
POLICY_STYLES = {
    "uniform": {"color": "#555555", "linestyle": "--", "marker": "s"},
    "eva": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "cost-aware": {"color": "#D55E00", "linestyle": "-.", "marker": "^"},
    "proportional": {"color": "#009E73", "linestyle": ":", "marker": "D"},
}
CHOSEN = "#CC0066"
_MOST_KINDS = 12


def rank_color(rank: int, ranks: Mapping[str, int]) -> str:
    """Pick a cell's colour, #rrggbb: light for a plan's smallest rank, dark for its largest, white for none."""
    from matplotlib import colormaps, colors

    if rank == 0:
        return "#ffffff"
    given = [rank for rank in ranks.values() if rank]
    height = (rank - min(given)) / max(max(given) - min(given), 1)
    # The lightest tenth is left out, so that white stays for layers without an adapter.
    return str(colors.to_hex(colormaps["YlGnBu"](0.08 + 0.92 * height)))


def text_color(background: str) -> str:
    """Pick black or white, whichever can be read on a colour."""
    from matplotlib import colors

    red, green, blue = colors.to_rgb(background)
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "#ffffff"  # luma


def draw_heat_map(axes: Any, plan: Mapping[str, int]) -> None:
    """Draw a cell for each layer with its rank in it, blocks from top to bottom."""
    from matplotlib.patches import Rectangle

    grid = layer_grid(plan)
    for (kind, block), name in grid.cells.items():
        x, y = grid.kinds.index(kind), grid.blocks.index(block)
        color = rank_color(plan[name], plan)
        axes.add_patch(
            Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="#dddddd", linewidth=0.4, gid=name)
        )
        axes.text(x, y, plan[name] or "·", ha="center", va="center", fontsize=7, color=text_color(color))
    axes.set_xlim(-0.5, len(grid.kinds) - 0.5)
    axes.set_ylim(len(grid.blocks) - 0.5, -0.5)
    axes.set_xticks(
        range(len(grid.kinds)), grid.kinds, rotation=40, ha="left", rotation_mode="anchor", fontsize=8, parse_math=False
    )
    axes.set_yticks(range(len(grid.blocks)), [str(b) if b >= 0 else "" for b in grid.blocks], fontsize=7)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.set_ylabel("block")
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_spectra(axes: Any, spectra: KindSpectra, n_blocks: int) -> None:
    """Draw the cumulative explained variance of each layer of a kind, and a dot where its rank ends."""
    from matplotlib import colormaps

    for block, reached, rank in zip(spectra.blocks, spectra.reached, spectra.ranks, strict=True):
        color = colormaps["cividis"](0.85 * max(block, 0) / max(n_blocks - 1, 1))  # the last tints vanish on white
        axes.plot(range(len(reached)), reached, color=color, linewidth=0.7, alpha=0.55)
        axes.plot([rank], [reached[rank]], "o", color=color, markersize=4, markeredgecolor="black", markeredgewidth=0.5)
    average = sum(spectra.ranks) / len(spectra.ranks)
    axes.set_title(f"{spectra.kind}: average rank {average:.1f}", fontsize=9, parse_math=False)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0, max(len(reached) for reached in spectra.reached) - 1 or 1)
    axes.yaxis.set_major_formatter(_percent)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def draw_budget_curve(axes: Any, plan: RankAllocation, curves: list[BudgetCurve]) -> None:
    """Draw what each policy explains for how many parameters, and the plan."""
    for curve in curves:
        style = POLICY_STYLES.get(curve.policy, {})
        axes.plot(curve.parameters, curve.explained, label=curve.policy, markersize=3.5, linewidth=1.4, **style)
    axes.plot(
        [plan.parameters], [plan.explained_variance], "*", color=CHOSEN, markersize=15, markeredgecolor="white",
        label=f"this plan: {_millions(plan.parameters)}, {plan.explained_variance:.1%}", zorder=5,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: _millions(value))
    axes.xaxis.set_minor_formatter(lambda value, _: _millions(value) if f"{value:e}"[0] in "25" else "")
    axes.yaxis.set_major_formatter(_percent)
    axes.set_xlabel("adapter parameters", fontsize=9)
    axes.set_ylabel("variance explained,\nmean over layers", fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, loc="best", framealpha=0.9)


def _percent(value: float, _: object = None) -> str:
    return f"{value:.0%}"


def _millions(value: float) -> str:
    value = float(f"{value:.3g}")
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:.0f}"


def make_figure(plan: RankAllocation, stats: Statistics) -> Any:
    """Lay all three pictures out in one figure, sized so that every cell can be read."""
    from matplotlib.figure import Figure

    grid = layer_grid(plan)
    kinds = kind_spectra(plan, stats)
    shown = kinds[:_MOST_KINDS]
    rows_high = 0.17 * len(grid.blocks) + 2.4
    columns = 4 if rows_high < 9 else 2  # inches: beside a tall map, spectra go in a tall stack
    rows = -(-len(shown) // columns)
    map_width = 0.36 * len(grid.kinds) + 1.2
    spectra_width = 2.4 * columns + 0.6
    height = max(rows_high, 1.9 * rows + 4.2)
    figure = Figure(figsize=(map_width + spectra_width, height), dpi=110, layout="constrained")
    left, right = cast(Any, figure.subfigures(1, 2, width_ratios=[map_width, spectra_width]))
    draw_heat_map(left.add_subplot(), plan)
    left.suptitle("Rank of each layer (· none)", fontsize=11)
    upper, lower = right.subfigures(2, 1, height_ratios=[1.9 * rows, 3.4])
    axes = upper.subplots(rows, columns, sharey=True, squeeze=False)
    for place, spectra in zip(axes.flat, shown, strict=False):
        draw_spectra(place, spectra, len(grid.blocks))
    for place in axes.flat[len(shown) :]:
        place.set_visible(False)
    left_out = f"; {len(kinds) - len(shown)} more kinds not shown" if len(kinds) > len(shown) else ""
    title = "Variance explained by the first components: a line per block, from dark to light; a dot at its rank"
    upper.suptitle(_wrap(title + left_out, spectra_width), fontsize=10)
    upper.supxlabel("components", fontsize=9)
    draw_budget_curve(lower.add_subplot(), plan, budget_curves(plan, stats))
    title = "Variance explained for the parameters spent, by policy, under the same limits"
    lower.suptitle(_wrap(title, spectra_width), fontsize=10)
    caption = f"Plan: {plan_text(plan)}. Computed from {source_text(plan)}."
    figure.supxlabel(_wrap(caption, 1.2 * (map_width + spectra_width)), fontsize=8, parse_math=False)
    return figure


def _wrap(text: str, inches: float) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, int(inches * 12)))


def save_figure(plan: RankAllocation, stats: Statistics, path: Path) -> None:
    """Write the pictures as .png or .svg.

    Raises:
        LoraInitError: The file cannot be written.
    """
    write_picture(path, lambda: make_figure(plan, stats).savefig(path))


def write_picture(path: Path, write: Callable[[], object]) -> None:
    """Write with text as text and without a date, so that the same plan gives the same file."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lora_init", "font.family": "sans-serif"}):
        try:
            write()
        except OSError as error:
            raise LoraInitError(f"{path}: the picture could not be written: {error.strerror or error}.") from error
