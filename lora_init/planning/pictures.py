"""Pictures of a plan as a file's name asks for: .png, .svg, or one .html page without outside resources."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, cast

import numpy as np

from lora_init.errors import LoraInitError
from lora_init.layers.grid import layer_grid
from lora_init.planning.allocate import allocate_ranks
from lora_init.planning.plan import RankAllocation
from lora_init.planning.policies import POLICIES, stack_spectra
from lora_init.statistics.statistics import Statistics


@dataclass(frozen=True)
class KindTotals:
    """What the layers of one kind have together.

    Attributes:
        kind: Label, as in the heat map.
        n_layers: How many there are.
        least: Smallest rank.
        most: Largest rank.
        total_rank: Sum of the ranks.
        parameters: Trainable parameters.
        explained: Mean share of the variance explained.
    """

    kind: str
    n_layers: int
    least: int
    most: int
    total_rank: int
    parameters: int
    explained: float


def kind_totals(plan: RankAllocation) -> list[KindTotals]:
    """Sum a plan up by kind of layer, in model order."""
    grid = layer_grid(plan)
    totals = []
    for kind in grid.kinds:
        names = list(grid.of_kind(kind).values())
        ranks = [plan[name] for name in names]
        totals.append(
            KindTotals(
                kind,
                len(names),
                min(ranks),
                max(ranks),
                sum(ranks),
                sum(plan.targets[name].parameters(plan[name]) for name in names),
                sum(plan.explained[name] for name in names) / len(names),
            )
        )
    return totals


def uniform_twin(plan: RankAllocation, stats: Statistics) -> RankAllocation:
    """Give the same total rank to the same layers as evenly as can be: what the plan is to be compared with."""
    return allocate_ranks(stats, total_rank=plan.total_rank, policy="uniform", exclude=plan.excluded)


@dataclass(frozen=True)
class KindSpectra:
    """How much of their variance the layers of one kind explain by rank.

    Attributes:
        kind: Label, as in the heat map.
        blocks: Block number of each layer.
        reached: For each layer, the share that its first r components explain, r = 0 to as many as it has.
        ranks: Rank of each layer.
    """

    kind: str
    blocks: list[int]
    reached: list[list[float]]
    ranks: list[int]


def kind_spectra(plan: RankAllocation, stats: Statistics) -> list[KindSpectra]:
    """Collect the cumulative explained variance of every layer, by kind, in model order."""
    grid = layer_grid(plan)
    spectra = stack_spectra(stats, list(plan))
    rows = {
        name: row[: count + 1].tolist()
        for name, row, count in zip(spectra.names, spectra.reached, spectra.collected.tolist(), strict=True)
    }
    found = []
    for kind in grid.kinds:
        layers = grid.of_kind(kind)
        found.append(
            KindSpectra(kind, list(layers), [rows[n] for n in layers.values()], [plan[n] for n in layers.values()])
        )
    return found


@dataclass(frozen=True)
class BudgetCurve:
    """What one policy explains for how many parameters: a plan at each point, under the same limits."""

    policy: str
    parameters: list[int]
    explained: list[float]


def budget_curves(
    plan: RankAllocation, stats: Statistics, policies: Sequence[str] = tuple(POLICIES), n_points: int = 20
) -> list[BudgetCurve]:
    """Plan for budgets from an eighth of the plan's parameters to eight times as many, as far as components reach.

    Rank limits, ties and exclusions are the plan's; so is rho, relative to the average rank of each budget.
    """
    settings = {"rho": 2.0, **plan.settings}
    part = [name for name in plan if name not in set(plan.excluded)]
    spectra = stack_spectra(stats, part)
    exists = int((spectra.widths * spectra.collected).sum())
    budgets = np.geomspace(max(plan.parameters / 8, 1), min(plan.parameters * 8, exists), n_points)
    curves = []
    for policy in policies:
        plans = {}
        for budget in budgets:
            try:
                at = allocate_ranks(stats, parameters=int(budget), policy=policy, **settings)
            except LoraInitError:  # below what min_rank or the cheapest step costs: no point there
                continue
            plans[at.parameters] = at.explained_variance
        curves.append(BudgetCurve(policy, list(plans), list(plans.values())))
    return curves


def source_text(plan: RankAllocation) -> str:
    """Say what a plan was computed from."""
    made = plan.provenance
    if made is None:
        return "a plan made by hand"
    model = made.model_id or made.model_class or "a model without a name"
    rows = f"{made.n_samples:,} rows in {made.n_batches} batches" if made.n_samples else "rows that were not counted"
    return f"the inputs of each layer of {model} on {made.data or 'data not described'}: {rows}, {_method(made.center)}"


def _method(center: bool) -> str:
    return "centred (PCA)" if center else "not centred (second moment)"


def plan_text(plan: RankAllocation) -> str:
    """Say what was asked for, in the words of the command line."""
    settings = ", ".join(
        f"{key}={value:g}" if key == "rho" else f"{key}={value}" for key, value in plan.settings.items()
    )
    return f"policy {plan.policy or 'by hand'}, budget {plan.budget or 'by hand'}{', ' + settings if settings else ''}"


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


def html_page(title: str, style: str, body: str) -> str:
    """Put a body into a page that may load nothing.

    Args:
        title: Text.
        style: CSS.
        body: HTML.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def html_table(head: Sequence[str], rows: Sequence[Sequence[object]], name: str = "totals") -> str:
    """Write a table, of class `name`, that scrolls sideways where the page is too narrow."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{name}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def html_heat_map(ranks: Mapping[str, int], about: Callable[[str], str]) -> str:
    """Write ranks as a table, blocks from top to bottom, coloured by rank.

    Args:
        ranks: Layer name to rank.
        about: What to say of a layer when a pointer rests on it.
    """
    grid = layer_grid(ranks)
    rows = []
    for block in grid.blocks:
        cells = [_cell(ranks, grid.cells.get((kind, block)), about) for kind in grid.kinds]
        rows.append(f"<tr><th>{block if block >= 0 else ''}</th>{''.join(cells)}</tr>\n")
    top = "".join(f"<th>{escape(kind)}</th>" for kind in grid.kinds)
    head = f"<thead><tr><th></th>{top}</tr></thead>"
    return f'<div class="scroll"><table class="map">{head}<tbody>\n{"".join(rows)}</tbody></table></div>'


def _cell(ranks: Mapping[str, int], name: str | None, about: Callable[[str], str]) -> str:
    if name is None:
        return "<td></td>"
    said = f'title="{escape(about(name), quote=True)}"'
    if not ranks[name]:
        return f"<td {said}>·</td>"
    color = rank_color(ranks[name], ranks)
    return f'<td style="background:{color};color:{text_color(color)}" {said}>{ranks[name]}</td>'


def inline_svg(draw: Callable[[Any], None], width: float, height: float, prefix: str) -> str:
    """Draw on axes of width x height inches and return the <svg> element, with ids that no other on the page has."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure.add_subplot())
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration, which has no place within HTML
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return svg.strip()


FORMATS = {".png": "PNG picture", ".svg": "SVG picture", ".html": "HTML page"}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; padding: 1rem;
  max-width: 84rem; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
p { margin: .3rem 0 .8rem; max-width: 48rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
.totals td, .totals th { padding: .15rem .7rem .15rem 0; text-align: right; white-space: nowrap; }
.totals td:first-child, .totals th:first-child { text-align: left; }
.totals th { font-weight: 600; border-bottom: 1px solid #bbb; white-space: normal; vertical-align: bottom;
  min-width: 4rem; }
.map td { min-width: 2.1rem; height: 1.3rem; text-align: center; font-size: .8rem; border: 1px solid #e4e4e4; }
.map thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; font-weight: 500;
  font-size: .8rem; padding: .3rem 0; height: auto; }
.map tbody th { font-weight: 400; font-size: .75rem; color: #555; text-align: right; padding-right: .4rem; }
.columns { display: flex; flex-wrap: wrap; gap: 0 2.5rem; }
.left { flex: none; max-width: 100%; } .right { flex: 1 1 24rem; min-width: 0; }
.spectra { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .3rem; }
figure { margin: 0; } .curve { max-width: 38rem; }
svg { width: 100%; height: auto; display: block; }
li { overflow-wrap: anywhere; }
@media (max-width: 32rem) { .totals { font-size: .73rem; } .totals td, .totals th { padding-right: .4rem; }
  .totals th { min-width: 0; } .totals td:first-child { white-space: normal; } }
"""


def picture_kind(path: Path) -> str:
    """Say what kind of file a picture's name asks for.

    Raises:
        LoraInitError: None that can be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise LoraInitError(f"{path}: pictures are written as {', '.join(FORMATS)}. Name the file so.")
    return FORMATS[path.suffix.lower()]


def save_picture(plan: RankAllocation, stats: Statistics, path: str | Path) -> Path:
    """Draw a plan: heat map of ranks, spectra with the ranks marked, and what other budgets and policies explain.

    Args:
        plan: What to draw.
        stats: What it was made from.
        path: Ends in .png, .svg or .html.

    Raises:
        LoraInitError: Another ending, a plan for another model, or a file that cannot be written.
    """
    path = Path(path).expanduser()
    kind = picture_kind(path)
    if not plan.total_rank:
        raise LoraInitError("the plan gives no layer any rank, so there is nothing to draw.")
    plan.check(stats)
    if kind == "HTML page":
        write_picture(path, lambda: path.write_text(_page(plan, stats), encoding="utf-8"))
    else:
        save_figure(plan, stats, path)
    return path


def _page(plan: RankAllocation, stats: Statistics) -> str:
    even = uniform_twin(plan, stats)
    model = plan.provenance.model_id or plan.provenance.model_class if plan.provenance else ""
    used = [rank for rank in plan.values() if rank]
    title = f"Rank plan{f' for {model}' if model else ''}"
    facts = [
        ("layers with an adapter", f"{len(used)} of {len(plan)}", f"{sum(rank > 0 for rank in even.values())}"),
        ("rank", f"{min(used)} to {max(used)}", f"{min(r for r in even.values() if r)} to {max(even.values())}"),
        ("total rank", f"{plan.total_rank:,}", f"{even.total_rank:,}"),
        ("parameters", f"{plan.parameters:,}", f"{even.parameters:,}"),
        ("saved in float32, MB", f"{plan.megabytes():.2f}", f"{even.megabytes():.2f}"),
        ("variance explained, mean", f"{plan.explained_variance:.1%}", f"{even.explained_variance:.1%}"),
    ]
    kinds = [
        (k.kind, k.n_layers, f"{k.least} to {k.most}", f"{k.total_rank:,}", f"{k.parameters:,}", f"{k.explained:.1%}")
        for k in kind_totals(plan)
    ]
    n_blocks = len(layer_grid(plan).blocks)
    spectra = "".join(
        f"<figure>{inline_svg(partial(draw_spectra, spectra=kind, n_blocks=n_blocks), 3.0, 2.2, f's{i}')}</figure>"
        for i, kind in enumerate(kind_spectra(plan, stats))
    )
    curves = budget_curves(plan, stats)
    curve = inline_svg(partial(draw_budget_curve, plan=plan, curves=curves), 4.4, 3.4, "curve")
    notes = "".join(f"<li>{escape(note)}</li>" for note in plan.notes)
    body = f"""<h1>{escape(title)}</h1>
<p>{escape(_sentence(plan_text(plan)))} Computed from {escape(source_text(plan))}.</p>
{html_table(("", "this plan", "uniform, same total rank"), facts)}
<div class="columns">
<section class="left">
<h2>Rank of each layer</h2>
<p>Blocks from top to bottom. A dot: no adapter.</p>
{html_heat_map(plan, partial(_about, plan))}
</section>
<section class="right">
<h2>What the ranks explain</h2>
<p>Share of a layer's variance (upwards) that its first components (to the right) explain: a line per block, the first
dark, the last light. The dot is the rank the layer has.</p>
<div class="spectra">{spectra}</div>
<h2>Other budgets, other policies</h2>
<p>Mean share of the variance explained, for the parameters spent, under the same limits.</p>
<figure class="curve">{curve}</figure>
<h2>By kind of layer</h2>
{html_table(("kind", "layers", "rank", "total rank", "parameters", "explained"), kinds)}
{f"<h2>Notes</h2><ul>{notes}</ul>" if notes else ""}
</section>
</div>"""
    return html_page(title, _STYLE, body)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _about(plan: RankAllocation, name: str) -> str:
    about = f"{name}: rank {plan[name]}, explains {plan.explained[name]:.1%} of its variance"
    if name in plan.unsettled:
        about += "; within the sampling error it could be {} to {}".format(*plan.unsettled[name])
    return about
