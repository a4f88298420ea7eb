"""Plots of a comparison: learning curves, learning rates, differences to random, forgetting against learning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lora_init.comparison.run_measures import all_rates, average, retained
from lora_init.comparison.runs import RANDOM, Group, Variant, final_loss, random_group
from lora_init.comparison.verdicts import Verdict
from lora_init.comparison.wording import rate_text

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
