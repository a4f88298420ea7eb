"""The pictures of a comparison, as PNG: learning curves, losses by rate, differences, forgetting, ranks."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from textwrap import wrap
from typing import Any

import pandas as pd

from lora_init.comparison.findings import Summary, rate_text
from lora_init.comparison.runs import RANDOM, Results, Variant
from lora_init.layers.grid import layer_grid
from lora_init.planning.pictures import draw_heat_map

# Told apart by every kind of colour vision: chosen so that the least distance of two, as seen with protanopia,
# deuteranopia or tritanopia too, is 30 in CIELAB, with a contrast of 3 on white.
INK, RANDOM_COLOR = "#1a1a1a", "#444444"
COLORS = ("#3803f1", "#d87917", "#7e3106", "#c075aa", "#4b88f7", "#65067c")
_MARKERS = "o^Dvp<>P"
# A start has the same look in every report; those that are not listed take the places that follow.
_ORDER = (
    "eva", "eva-rho1", "eva-ranks", "orthogonal", "gaussian", "eva-uncentred", "eva-frozen-a", "pissa", "olora",
    "corda", "loftq",
)  # fmt: skip
_LINES = {(False, False): "-", (True, False): "--", (False, True): ":", (True, True): "-."}
_PER_ROW = 4


def looks(starts: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Give each start a colour and a marker."""
    names = list(dict.fromkeys([*_ORDER, *(start for start in starts if start != RANDOM.start)]))
    # 24 starts before a pair of colour and marker comes again.
    styles = {name: (COLORS[i % len(COLORS)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(names)}
    return styles | {RANDOM.start: (RANDOM_COLOR, "s")}


def line_style(variant: Variant) -> str:
    """Draw a start as it is with a whole line, with matched scale dashed, with equal parameters dotted."""
    return _LINES[variant.matched_scale, variant.equal_parameters]


def pictures(summary: Summary) -> dict[str, bytes]:
    """Draw the pictures that there is something to draw for: PNG by name."""
    results, made = summary.results, {}
    styles = looks(variant.start for variant in results.variants.values())
    drawn = {results.variants[label].start for label in results.best}
    panels = [start for start in styles if start in drawn - {RANDOM.start}] or list(drawn)
    if panels:
        top = _rate_limits(results)
        made["learning_curves"] = _draw(panels, (2.1, 1.8), lambda axes, s: _draw_curves(axes, s, results, styles))
        made["learning_rates"] = _draw(panels, (2.1, 1.8), lambda axes, s: _draw_rates(axes, s, results, styles, top))
    compared = sum(verdict.mean is not None for verdict in summary.verdicts)
    if compared:
        made["differences"] = _draw(
            [""], (5.0, 1.1 + 0.36 * compared), lambda a, _: _draw_differences(a, summary, styles)
        )
    if results.at_best["retained_after"].notna().any():
        size = (5.0, 3.0 + 0.2 * math.ceil(len(drawn) / 2))
        made["forgetting"] = _draw([""], size, lambda a, _: _draw_forgetting(a, results, styles))
    maps = rank_maps(results)
    if maps:
        grids = [layer_grid(ranks) for ranks in maps.values()]
        width = max(0.36 * len(grid.kinds) + 1.2 for grid in grids)
        height = max(0.17 * len(grid.blocks) + 1.4 for grid in grids)
        made["ranks"] = _draw(list(maps), (width, height), lambda axes, label: draw_heat_map(axes, maps[label]))
    return made


def _draw(names: Sequence[str], size: tuple[float, float], draw: Callable[[Any, str], None]) -> bytes:
    """Draw a panel of `size` inches for each name, four in a row."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(len(names), _PER_ROW)
    rows = math.ceil(len(names) / columns)
    with matplotlib.rc_context({"font.family": "sans-serif", "text.color": INK, "text.parse_math": False}):
        figure = Figure(figsize=(columns * size[0], rows * size[1] + 0.4), dpi=150, layout="constrained")
        places = list(figure.subplots(rows, columns, squeeze=False, sharey=len(names) > 1).flat)
        for name, axes in zip(names, places, strict=False):
            draw(axes, name)
            axes.set_title("\n".join(wrap(name, 28)), fontsize=9)
        for axes in places[len(names) :]:
            axes.set_visible(False)
        out = io.BytesIO()
        figure.savefig(out, format="png", facecolor="white", metadata={"Software": None})
    return out.getvalue()


def _rate_limits(results: Results) -> tuple[float, float]:
    """Find the losses to show by rate: not those so high that the others would look alike."""
    means = results.counted.groupby(["label", "learning_rate"])["loss"].mean()
    low, high = means.min(), means.max()
    high = min(high, low + 4 * (means.median() - low) or high)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


Styles = Mapping[str, tuple[str, str]]


def _shown(results: Results, start: str) -> list[str]:
    """List what is drawn in the panel of a start: random, then its variants."""
    variants = results.variants
    return [label for label in results.best if label == RANDOM.label or start == variants[label].start != RANDOM.start]


def _draw_curves(axes: Any, start: str, results: Results, styles: Styles) -> None:
    """Draw validation loss over steps at the best rate: mean, and a band from the lowest to the highest seed.

    What is before training would leave no room for what differs.
    """
    for label in _shown(results, start):
        variant = results.variants[label]
        runs = results.at_best[results.at_best["label"] == label]
        curves = pd.DataFrame(runs["validation_loss"].tolist(), columns=runs["evaluation_points"].iloc[0]).iloc[:, 1:]
        color = styles[variant.start][0]
        axes.plot(curves.columns, curves.mean(), line_style(variant), color=color, linewidth=1.5)
        axes.fill_between(curves.columns, curves.min(), curves.max(), color=color, alpha=0.2, linewidth=0)
    _finish(axes, "steps")


def _draw_rates(axes: Any, start: str, results: Results, styles: Styles, limits: tuple[float, float]) -> None:
    """Draw final validation loss over learning rates: means, a dot for each run, a cross on top of an unstable rate."""
    top = limits[1] - 0.04 * (limits[1] - limits[0])
    for label in _shown(results, start):
        variant = results.variants[label]
        color, marker = styles[variant.start]
        runs = results.counted[results.counted["label"] == label]
        means = runs.groupby("learning_rate")["loss"].mean()
        axes.plot(means.index, means, line_style(variant), color=color, linewidth=1.5)
        axes.plot(runs["learning_rate"], runs["loss"], ".", color=color, markersize=3)
        axes.plot([results.best[label]], [means[results.best[label]]], marker, color=color, markersize=6)
        frame = results.frame[results.frame["label"] == label]
        unstable = frame[frame["status"] == "unstable"]["learning_rate"].unique()
        axes.plot(unstable, [top] * len(unstable), "x", color=color, markersize=6, markeredgewidth=1.6)
        above = means[means > limits[1]].index
        axes.plot(above, [top] * len(above), "^", color=color, markersize=4)
    rates = results.rates
    axes.set_xscale("log")
    axes.set_xlim(rates[0] / 1.6, rates[-1] * 1.6)
    axes.set_xticks(rates, list(map(rate_text, rates)), rotation=45 if len(rates) > 5 else 0)
    axes.set_xticks([], minor=True)
    axes.set_ylim(*limits)
    _finish(axes, "learning rate")


def _draw_differences(axes: Any, summary: Summary, styles: Styles) -> None:
    """Draw each start's mean difference to random with its interval, and every pair as a dot; left is better."""
    verdicts = [verdict for verdict in summary.verdicts if verdict.mean is not None]
    dots = max(abs(difference) for verdict in verdicts for difference in verdict.differences.values())
    ends = [abs(end) for verdict in verdicts for end in (verdict.low, verdict.high) if end is not None]
    reach = min(3.2 * dots, 1.05 * max([1.6 * dots, *ends])) or 1.0
    axes.axvline(0, color=INK, linewidth=0.8)
    for y, verdict in enumerate(verdicts):
        color, marker = styles[summary.results.variants[verdict.label].start]
        pairs = list(verdict.differences.values())
        axes.plot(pairs, [y + 0.22] * len(pairs), ".", color=color, markersize=4, alpha=0.7)
        if verdict.low is not None and verdict.high is not None:
            axes.plot([max(verdict.low, -reach), min(verdict.high, reach)], [y, y], color=color, linewidth=1.8)
            for end, arrow in ((verdict.low, "<"), (verdict.high, ">")):
                if abs(end) > reach:
                    axes.plot([math.copysign(reach, end)], [y], arrow, color=color, markersize=5)
        face = "none" if verdict.low is None else color
        axes.plot([verdict.mean], [y], marker, color=color, markerfacecolor=face, markersize=6.5)
    axes.set_xlim(-1.03 * reach, 1.03 * reach)
    axes.set_ylim(len(verdicts) - 0.5, -0.6)
    axes.set_yticks(range(len(verdicts)), [verdict.label.replace(", ", "\n", 1) for verdict in verdicts])
    axes.locator_params(axis="x", nbins=5)
    _finish(axes, "final validation loss, start − random\n← start better · random better →")


def _draw_forgetting(axes: Any, results: Results, styles: Styles) -> None:
    """Draw what each run forgot over what it learned, at the best rate; down and left is good."""
    for label, own in results.at_best.groupby("label", sort=False):
        variant = results.variants[label]
        color, marker = styles[variant.start]
        axes.plot(
            own["loss"], own["retained_after"] - own["retained_before"], marker, color=color, markersize=5.5,
            markerfacecolor="none" if variant.matched_scale else color, label=label, alpha=0.85,
            fillstyle="left" if variant.equal_parameters else "full",
        )  # fmt: skip
    axes.locator_params(axis="x", nbins=5)
    _finish(axes, "final validation loss (less: learned more)")
    axes.set_ylabel("loss on retained text, change\n(less: forgot less)", fontsize=8)
    axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def _finish(axes: Any, x_label: str) -> None:
    """Give axes the look that all plots share."""
    axes.set_xlabel(x_label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.15, color=INK)
    axes.spines[["top", "right"]].set_visible(False)


def rank_maps(results: Results) -> dict[str, Mapping[str, int]]:
    """Find the ranks of the starts that moved them, with the first seed at the best rate; equal ones only once."""
    moved = results.at_best[results.at_best["ranks"].notna()].drop_duplicates("label")
    labels: dict[str, list[str]] = {}
    for label, ranks in zip(moved["label"], moved["ranks"], strict=True):
        labels.setdefault(str(ranks), []).append(label)
    by_label = dict(zip(moved["label"], moved["ranks"], strict=True))
    return {"; ".join(same): by_label[same[0]] for same in labels.values()}
