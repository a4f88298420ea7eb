"""Pictures of a plan: heat map of ranks, spectra, what other budgets explain; as .png or .svg."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lora_init.errors import LoraInitError, require
from lora_init.files import write_whole
from lora_init.layers.grid import layer_grid
from lora_init.planning.allocate import allocate_ranks
from lora_init.planning.plan import RankAllocation, plan_text, source_text
from lora_init.planning.policies import POLICIES
from lora_init.planning.spectra import Spectra, stack_spectra
from lora_init.plots.heat_map import draw_heat_map, map_size
from lora_init.statistics.statistics import SPARE, Statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = {".png": "PNG picture", ".svg": "SVG picture"}


def picture_kind(path: Path) -> str:
    """Return what kind of file a picture's name asks for."""
    if path.suffix.lower() not in FORMATS:
        raise LoraInitError(f"{path}: pictures are written as {', '.join(FORMATS)}. Name the file so.")
    return FORMATS[path.suffix.lower()]


def save_picture(plan: RankAllocation, stats: Statistics, path: str | Path) -> Path:
    """Draw a plan: heat map of ranks, spectra with the ranks marked, and what other budgets and policies explain."""
    require("matplotlib")
    import matplotlib

    path = Path(path).expanduser()
    picture_kind(path)
    if not plan.total_rank:
        raise LoraInitError("the plan gives no layer any rank, so there is nothing to draw.")
    plan.check(stats)
    kind = path.suffix.lower()[1:]
    metadata: dict[str, None] = {}
    if kind == "svg":  # None leaves a field out
        metadata = dict.fromkeys(("Date", "Creator", "Type", "Format"))
    buffer = io.BytesIO()
    # Text as text and no date, so that the same plan gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lora_init", "font.family": "sans-serif"}):
        make_figure(plan, stats).savefig(buffer, format=kind, metadata=metadata)
    write_whole(path, buffer.getvalue())  # whole or not at all
    return path


def budget_curves(plan: RankAllocation, stats: Statistics) -> dict[str, dict[int, float]]:
    """Plan for budgets from an eighth of the plan's parameters to eight times as many, as far as components reach.

    Return what each policy explains, by parameters. Rank limits, ties and exclusions are the plan's; so is rho,
    relative to the average rank of each budget, if it is 2 at least: at 1 there is nothing to decide.
    """
    settings = {**plan.settings, "rho": max(SPARE, plan.settings.get("rho", SPARE))}
    excluded = set(plan.excluded)
    spectra = stack_spectra(stats, [name for name in plan if name not in excluded])
    # Parameters of all components that were collected: no plan can have more.
    available = int((spectra.widths * spectra.collected).sum())
    budgets = np.geomspace(max(plan.parameters / 8, 1), min(plan.parameters * 8, available), 20)
    curves: dict[str, dict[int, float]] = {name: {} for name, policy in POLICIES.items() if not policy.needs_gradient}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of budgets that nobody asked for
        for policy, curve in curves.items():
            for budget in budgets:
                try:
                    budgeted = allocate_ranks(stats, parameters=int(budget), policy=policy, **settings)
                except LoraInitError:  # below what min_rank or the cheapest step costs: no point there
                    continue
                curve[budgeted.parameters] = budgeted.explained_variance  # at what was spent, not at what was given
    return curves


# From the palette of Okabe and Ito, distinct to every kind of color vision, as are dashes and markers.
_STYLES: Mapping[str, Any] = {
    "color": ("#555555", "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#E69F00"),
    "linestyle": ("--", "-", "-.", ":", "--", "-"),
    "marker": ("s", "o", "^", "D", "v", "P"),
}
_CHOSEN = "#CC0066"
_MOST_KINDS = 12


def _draw_spectra(axes: Any, kind: str, layers: Mapping[int, str], plan: RankAllocation, spectra: Spectra) -> None:
    """Draw the cumulative explained variance of each layer of a kind, and a dot where its rank ends."""
    from matplotlib import colormaps
    from matplotlib.ticker import PercentFormatter

    for block, name in layers.items():
        color = colormaps["cividis"](0.85 * max(block, 0) / max(*layers, 1))  # the last tints vanish on white
        i, rank = spectra.names.index(name), plan[name]
        shares = spectra.reached[i, : spectra.collected[i] + 1]  # after 0, 1, 2 and more components
        axes.plot(range(len(shares)), shares, color=color, linewidth=0.7, alpha=0.55)
        axes.plot([rank], [shares[rank]], "o", color=color, markersize=4, markeredgecolor="black", markeredgewidth=0.5)
    average = sum(plan[name] for name in layers.values()) / len(layers)
    axes.set_title(f"{kind}: average rank {average:.1f}", fontsize=9, parse_math=False)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def draw_budget_curve(axes: Any, plan: RankAllocation, curves: Mapping[str, Mapping[int, float]]) -> None:
    """Draw what each policy explains for how many parameters, and the plan."""
    from matplotlib.ticker import EngFormatter, PercentFormatter

    count = EngFormatter(sep="")
    axes.set_prop_cycle(**_STYLES)
    for policy, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), label=policy, markersize=3.5, linewidth=1.4)
    axes.plot(
        [plan.parameters], [plan.explained_variance], "*", color=_CHOSEN, markersize=15, markeredgecolor="white",
        label=f"this plan: {EngFormatter(places=1, sep='')(plan.parameters)}, {plan.explained_variance:.1%}", zorder=5,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(count)
    # Between powers of ten, 2 and 5 alone have a label.
    axes.xaxis.set_minor_formatter(lambda value, _: count(value) if f"{value:e}"[0] in "25" else "")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("adapter parameters", fontsize=9)
    axes.set_ylabel("variance explained,\nmean over layers", fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, loc="lower right", framealpha=0.9)  # below curves that rise


def make_figure(plan: RankAllocation, stats: Statistics) -> Figure:
    """Lay all three pictures out in one figure, sized so that every cell can be read."""
    from matplotlib.figure import Figure

    kinds = layer_grid(plan).by_kind
    shown = list(kinds.items())[:_MOST_KINDS]
    map_width, map_height = map_size(plan)
    columns = 4 if map_height < 9 else 2  # inches: beside a tall map, spectra go in a tall stack
    rows = -(-len(shown) // columns)  # rounded up
    width, height = 2.4 * columns + 0.6, 1.9 * rows + 4.2
    figure = Figure(figsize=(map_width + width, max(map_height, height)), dpi=110, layout="constrained")
    left, right = cast(Any, figure.subfigures(1, 2, width_ratios=[map_width, width]))
    draw_heat_map(left.add_subplot(), plan)
    left.suptitle("Rank of each layer (· none)", fontsize=11)
    upper, lower = right.subfigures(2, 1, height_ratios=[1.9 * rows, 3.4])
    axes = upper.subplots(rows, columns, sharey=True, squeeze=False)
    spectra = stack_spectra(stats, list(plan))
    for place, (kind, layers) in zip(axes.flat, shown, strict=False):  # the last row may have places that stay empty
        _draw_spectra(place, kind, layers, plan, spectra)
    for place in axes.flat[len(shown) :]:
        place.set_visible(False)
    title = "Variance explained by the first components: a line per block, from blue to yellow; a dot at its rank"
    if len(kinds) > len(shown):
        title += f"; {len(kinds) - len(shown)} more kinds not shown"
    upper.suptitle(textwrap.fill(title, int(12 * width)), fontsize=10)
    upper.supxlabel("components", fontsize=9)
    draw_budget_curve(lower.add_subplot(), plan, budget_curves(plan, stats))
    title = "Variance explained for the parameters spent, by policy, under the same limits"
    lower.suptitle(textwrap.fill(title, int(12 * width)), fontsize=10)
    caption = f"Plan: {plan_text(plan)}. Computed from {source_text(plan)}."
    caption = textwrap.fill(caption, int(14 * (map_width + width)))
    figure.supxlabel(caption, fontsize=8, parse_math=False)
    return figure
