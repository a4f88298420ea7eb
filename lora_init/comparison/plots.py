"""The pictures of a comparison, each as inline SVG that follows the page's colours and as a PNG file."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from textwrap import wrap
from typing import Any

from lora_init.comparison.findings import Verdict, rate_text
from lora_init.comparison.runs import RANDOM, Group, Variant, final_loss, random_group
from lora_init.comparison.tables import Summary, all_rates, average, retained
from lora_init.planning.pictures import draw_heat_map, inline_svg

# Told apart by every kind of colour vision: chosen so that the least distance of two, as seen with protanopia,
# deuteranopia or tritanopia too, is 30 in CIELAB, with a contrast of 3 on white. The second is for a dark page.
INK = ("#1a1a1a", "#e8e8e8")
RANDOM_COLOR = ("#444444", "#d8d8d8")
COLORS = (
    ("#3803f1", "#5c61f5"),
    ("#d87917", "#e9bc0c"),
    ("#7e3106", "#d9120e"),
    ("#c075aa", "#be3961"),
    ("#4b88f7", "#4ac9fc"),
    ("#65067c", "#a4489d"),
)
DARK = dict([INK, RANDOM_COLOR, *COLORS])
_MARKERS = "o^Dvp<>P"
# A start has the same look in every report; those that are not listed take the places that follow.
_ORDER = (
    "eva", "eva-rho1", "eva-ranks", "orthogonal", "gaussian", "eva-uncentred", "eva-frozen-a", "pissa", "olora",
    "corda", "loftq",
)  # fmt: skip
_LINES = {(False, False): "-", (True, False): "--", (False, True): ":", (True, True): "-."}


def looks(groups: Iterable[Group]) -> dict[str, tuple[str, str]]:
    """Give each start a colour and a marker."""
    names = list(dict.fromkeys([*_ORDER, *(g.variant.start for g in groups if g.variant.start != RANDOM.start)]))
    # 24 starts before a pair of colour and marker comes again.
    styles = {name: (COLORS[i % len(COLORS)][0], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(names)}
    return styles | {RANDOM.start: (RANDOM_COLOR[0], "s")}


def line_style(variant: Variant) -> str:
    """Draw a start as it is with a whole line, with matched scale dashed, with equal parameters dotted."""
    return _LINES[variant.matched_scale, variant.equal_parameters]


def panels(groups: Sequence[Group]) -> list[list[Group]]:
    """Put the variants of a start together, a panel for each start; random alone if there is nothing else."""
    random = random_group(groups)
    drawn = [group for group in groups if any(cell.finished for cell in group.cells.values())]
    starts = list(dict.fromkeys(g.variant.start for g in drawn if g.variant != RANDOM))
    made = [[g for g in drawn if g.variant.start == start and g.variant != RANDOM] for start in starts]
    return made or ([[random]] if random else [])


def curve_limits(groups: Iterable[Group]) -> tuple[float, float]:
    """Find the losses to show: all after the first evaluation, and those before training only if they are near."""
    losses = [run["validation_loss"] for g in groups for run in g.best_runs.values()]
    trained = [loss for curve in losses for loss in curve[1:]] or [loss for curve in losses for loss in curve] or [0, 1]
    low, high = min(trained), max(trained)
    first = max((curve[0] for curve in losses if curve), default=high)
    if first - low <= 3 * (high - low):
        high = max(high, first)
    return padded(low, high)


def padded(low: float, high: float) -> tuple[float, float]:
    """Leave some room around what is shown."""
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def rate_limits(groups: Sequence[Group]) -> tuple[float, float]:
    """Find the losses to show by rate: not those so high that the others would look alike."""
    means = sorted(m for g in groups for cell in g.cells.values() if (m := cell.mean()) is not None) or [0.0, 1.0]
    middle = means[len(means) // 2]
    return padded(means[0], min(means[-1], means[0] + 4 * (middle - means[0]) or means[-1]))


def draw_curves(axes: Any, panel: Sequence[Group], groups: Sequence[Group], limits: tuple[float, float]) -> None:
    """Draw validation loss over steps at the best rate: mean, and a band from the lowest to the highest seed."""
    styles = looks(groups)
    for group in _with_random(panel, groups):
        color, _ = styles[group.variant.start]
        runs = list(group.best_runs.values())
        if runs:
            steps = runs[0]["evaluation_points"]
            at = list(zip(*(run["validation_loss"] for run in runs if run["evaluation_points"] == steps), strict=False))
            means = [average(losses) for losses in at]
            axes.plot(steps[: len(at)], means, line_style(group.variant), color=color, linewidth=1.5)
            low, high = [min(losses) for losses in at], [max(losses) for losses in at]
            axes.fill_between(steps[: len(at)], low, high, color=color, alpha=0.2, linewidth=0)
    axes.set_ylim(*limits)
    finish(axes, panel_title(panel), "steps")


def draw_rates(axes: Any, panel: Sequence[Group], groups: Sequence[Group], limits: tuple[float, float]) -> None:
    """Draw final validation loss over learning rates: means, a dot for each run, a cross on top of an unstable rate."""
    styles, rates = looks(groups), all_rates(groups)
    for group in _with_random(panel, groups):
        color, marker = styles[group.variant.start]
        counted = {rate: cell for rate, cell in group.cells.items() if cell.counts}
        means = [cell.mean() for cell in counted.values()]
        axes.plot(list(counted), means, line_style(group.variant), color=color, linewidth=1.5)
        for rate, cell in counted.items():
            losses = [final_loss(run) for run in cell.finished.values()]
            axes.plot([rate] * len(losses), losses, ".", color=color, markersize=3)
        if group.best is not None:
            best = group.cells[group.best].mean()
            axes.plot([group.best], [best], marker, color=color, markersize=6, markeredgecolor=color)
        top = limits[1] - 0.04 * (limits[1] - limits[0])
        unstable = [rate for rate, cell in group.cells.items() if cell.unstable]
        axes.plot(unstable, [top] * len(unstable), "x", color=color, markersize=6, markeredgewidth=1.6)
        above = [rate for rate, mean in zip(counted, means, strict=True) if mean is not None and mean > limits[1]]
        axes.plot(above, [top] * len(above), "^", color=color, markersize=4)
    axes.set_xscale("log")
    axes.set_xlim(rates[0] / 1.6, rates[-1] * 1.6)
    axes.set_xticks(rates, list(map(rate_text, rates)), rotation=45 if len(rates) > 5 else 0)
    axes.set_xticks([], minor=True)
    axes.set_ylim(*limits)
    finish(axes, panel_title(panel), "learning rate")


def _with_random(panel: Sequence[Group], groups: Sequence[Group]) -> list[Group]:
    random = random_group(groups)
    return [*([random] if random and random not in panel else []), *panel]


def panel_title(panel: Sequence[Group]) -> str:
    """Name a panel by its start."""
    return panel[0].variant.start


def draw_differences(axes: Any, verdicts: Sequence[Verdict], groups: Sequence[Group]) -> None:
    """Draw each start's mean difference to random with its interval, and every pair as a dot; left is better."""
    styles = looks(groups)
    starts = {group.label: group.variant for group in groups}
    shown = [verdict for verdict in verdicts if verdict.pairs.mean is not None]
    reach = 1.6 * max((abs(d) for v in shown for d in v.pairs.differences.values()), default=0.0) or 1.0
    reach = min(
        reach * 2, max([reach, *(abs(end) for v in shown for end in (v.pairs.low, v.pairs.high) if end)]) * 1.05
    )
    axes.axvline(0, color=INK[0], linewidth=0.8)
    for y, verdict in enumerate(shown):
        color, marker = styles[starts[verdict.label].start]
        pairs = verdict.pairs
        axes.plot(list(pairs.differences.values()), [y + 0.22] * pairs.n, ".", color=color, markersize=4, alpha=0.7)
        if pairs.low is not None and pairs.high is not None:
            axes.plot([max(pairs.low, -reach), min(pairs.high, reach)], [y, y], color=color, linewidth=1.8)
            for end, arrow in ((pairs.low, "<"), (pairs.high, ">")):
                if abs(end) > reach:
                    axes.plot([math.copysign(reach, end)], [y], arrow, color=color, markersize=5)
        face = color if pairs.n > 1 else "none"
        axes.plot([pairs.mean], [y], marker, color=color, markerfacecolor=face, markersize=6.5)
    axes.set_xlim(-1.03 * reach, 1.03 * reach)
    axes.set_ylim(len(shown) - 0.5, -0.6)
    axes.set_yticks(range(len(shown)), [_two_lines(verdict.label) for verdict in shown], parse_math=False)
    axes.locator_params(axis="x", nbins=5)
    finish(axes, "", "final validation loss, start − random\n← start better · random better →")


def _two_lines(label: str) -> str:
    return label.replace(", ", "\n", 1)


def draw_forgetting(axes: Any, groups: Sequence[Group]) -> None:
    """Draw what each run forgot over what it learned, at the best rate; down and left is good."""
    styles = looks(groups)
    for group in groups:
        color, marker = styles[group.variant.start]
        points = [(final_loss(run), kept) for run in group.best_runs.values() if (kept := retained(run))]
        if points:
            axes.plot(
                [learned for learned, _ in points], [after - before for _, (before, after) in points], marker,
                color=color, markerfacecolor="none" if group.variant.matched_scale else color, markersize=5.5,
                label=group.label, alpha=0.85, fillstyle="left" if group.variant.equal_parameters else "full",
            )  # fmt: skip
    axes.locator_params(axis="x", nbins=5)
    finish(axes, "", "final validation loss (less: learned more)")
    axes.set_ylabel("loss on retained text, change\n(less: forgot less)", fontsize=8, color=INK[0])
    for text in axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False).get_texts():
        text.set(color=INK[0], parse_math=False)


def finish(axes: Any, title: str, x_label: str) -> None:
    """Give axes the look that all plots share; every colour in it has a twin for dark pages."""
    axes.set_title(title, fontsize=9, color=INK[0], parse_math=False)
    axes.set_xlabel(x_label, fontsize=8, color=INK[0])
    axes.tick_params(labelsize=8, colors=INK[0])
    axes.grid(alpha=0.15, color=INK[0])
    axes.set_facecolor("none")
    axes.figure.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=INK[0], linewidth=0.8)


_WRITING: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "lora_init", "font.family": "sans-serif", "text.color": INK[0],
}  # fmt: skip
_PER_ROW = 4


@dataclass(frozen=True)
class Picture:
    """One picture, of one or more drawings of the same size.

    Attributes:
        name: Name of the PNG file without its ending.
        title: What it shows.
        caption: How to read it.
        drawings: Each draws on axes.
        size: Width and height of a drawing in inches.
    """

    name: str
    title: str
    caption: str
    drawings: list[Callable[[Any], None]]
    size: tuple[float, float]

    def html(self) -> str:
        """Draw it as <figure> elements whose colours are variables of the page."""
        with _writing():
            svgs = [inline_svg(draw, *self.size, f"{self.name}{i}") for i, draw in enumerate(self.drawings)]
        figures = [f"<figure>{re.sub('|'.join(DARK), lambda m: f'var(--c{m[0][1:]})', svg)}</figure>" for svg in svgs]
        return f'<div class="{"panels" if self.size[0] < 3 else "single"}">{"".join(figures)}</div>'

    def png(self) -> bytes:
        """Draw it as PNG."""
        from matplotlib.figure import Figure

        columns = min(len(self.drawings), _PER_ROW)
        rows = math.ceil(len(self.drawings) / columns)
        width, height = self.size
        with _writing():
            figure = Figure(figsize=(columns * width, rows * height + 0.9), dpi=150, layout="constrained")
            axes = list(figure.subplots(rows, columns, squeeze=False).flat)
            for place, draw in zip(axes, self.drawings, strict=False):
                draw(place)
            for place in axes[len(self.drawings) :]:
                place.set_visible(False)
            figure.suptitle(self.title, fontsize=11)
            if not figure.legends:  # both would stand in the same place
                words = wrap(self.caption, round(15 * columns * width))
                figure.supxlabel("\n".join(words), fontsize=7.5, parse_math=False)
            out = io.BytesIO()
            figure.savefig(out, format="png", facecolor="white", metadata={"Software": None})
        return out.getvalue()


def _writing() -> AbstractContextManager[None]:
    import matplotlib

    return matplotlib.rc_context(_WRITING)


def pictures(summary: Summary) -> list[Picture]:
    """Make the pictures that there is something to draw for."""
    groups = summary.groups
    each = panels(groups)
    compared = [verdict for verdict in summary.verdicts if verdict.pairs.mean is not None]
    made = []
    if each:
        low_high = curve_limits(groups)
        made.append(
            Picture(
                "learning_curves",
                "Learning curves",
                "Validation loss over steps, each start at its own best rate: the mean, and a band from the lowest "
                "to the highest seed. Grey is random, the same in every panel."
                + _before(groups, low_high[1])
                + _line_words(groups),
                [partial(draw_curves, panel=panel, groups=groups, limits=low_high) for panel in each],
                (2.1, 1.8),
            )
        )
        made.append(
            Picture(
                "learning_rates",
                "Final validation loss by learning rate",
                "Means over the seeds that each rate has, with a dot for each run. The large marker is the rate at "
                "which a start is compared; a cross at the top is a rate with an unstable run, a small triangle "
                "there one "
                "that ends above the picture. Grey is random." + _line_words(groups),
                [partial(draw_rates, panel=panel, groups=groups, limits=rate_limits(groups)) for panel in each],
                (2.1, 1.8),
            )
        )
    if compared:
        made.append(
            Picture(
                "differences",
                "Difference to random",
                "Large markers: mean over seeds, with its 95 % interval, hollow if there is one seed and so no "
                "interval; an arrow where an interval goes on outside the picture. Dots below: one pair each.",
                [partial(draw_differences, verdicts=compared, groups=groups)],
                (4.3, 1.1 + 0.36 * len(compared)),
            )
        )
    if any(retained(run) for group in groups for run in group.best_runs.values()):
        drawn = len(groups)
        made.append(
            Picture(
                "forgetting",
                "Forgetting against learning",
                "One marker for each run at its start's best rate.",
                [partial(draw_forgetting, groups=groups)],
                (4.3, 3.0 + 0.2 * math.ceil(drawn / 2)),
            )
        )
    return made


def _before(groups: Sequence[Group], top: float) -> str:
    losses = [run["validation_loss"][0] for group in groups for run in group.best_runs.values()]
    if not losses or max(losses) <= top:
        return ""
    return f" Before training the loss is {max(losses):.3g}, above the picture."


def _line_words(groups: Sequence[Group]) -> str:
    variants = [group.variant for group in groups]
    words = [
        *(["dashed: matched scale"] if any(v.matched_scale and not v.equal_parameters for v in variants) else []),
        *(["dotted: equal parameters"] if any(v.equal_parameters and not v.matched_scale for v in variants) else []),
        *(["dots and dashes: both"] if any(v.equal_parameters and v.matched_scale for v in variants) else []),
    ]
    return f" Whole lines: the start as it is; {', '.join(words)}." if words else ""


def rank_maps(groups: Sequence[Group]) -> dict[str, Mapping[str, int]]:
    """Find the ranks of the variants that moved them, with the first seed at the best rate; equal ones only once."""
    maps: dict[str, Mapping[str, int]] = {}
    for group in groups:
        runs = group.best_runs.values() or [run for cell in group.cells.values() for run in cell.runs.values()]
        ranks = next((run["ranks"] for run in runs if run.get("ranks")), None)
        if ranks and (same := next((label for label, known in maps.items() if known == ranks), None)):
            maps = {f"{label}; {group.label}" if label == same else label: known for label, known in maps.items()}
        elif ranks:
            maps[group.label] = ranks
    return maps


def rank_picture(groups: Sequence[Group]) -> Picture | None:
    """Make the heat maps of `rank_maps` as one picture; None if all ranks are equal."""
    maps = rank_maps(groups)
    if not maps:
        return None
    from lora_init.layers.grid import layer_grid

    grids = [layer_grid(ranks) for ranks in maps.values()]
    size = (
        max(0.36 * len(grid.kinds) + 1.2 for grid in grids),
        max(0.17 * len(grid.blocks) + 1.4 for grid in grids),
    )

    def draw(axes: Any, label: str) -> None:
        draw_heat_map(axes, maps[label])
        axes.set_title("\n".join(wrap(label, 28)), fontsize=9, parse_math=False)

    return Picture("ranks", "Rank of each layer", "", [partial(draw, label=label) for label in maps], size)
