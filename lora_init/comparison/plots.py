"""The pictures of a comparison, as SVG and PNG: learning curves, losses by rate, differences, forgetting."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from lora_init.comparison.findings import Summary, equal_loss
from lora_init.comparison.runs import best_rates
from lora_init.comparison.variants import Variant
from lora_init.comparison.wording import rate_text
from lora_init.starts.starts import FULL, RANDOM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinct to every kind of color vision: chosen so that the least distance of two, as seen with protanopia,
# deuteranopia or tritanopia too, is 30 in CIELAB, with a contrast of 3 on white.
INK, RANDOM_COLOR = "#1a1a1a", "#444444"
COLORS = ("#3803f1", "#d87917", "#7e3106", "#c075aa", "#4b88f7", "#65067c")
_MARKERS = "o^Dvp<>"
# Line and filling of the marker (matplotlib's fillstyle) for each way in which a start is run.
_WAYS = (("-", "full"), ("--", "none"), (":", "left"), ("-.", "right"))
# Two panels of this width, in inches, fill a narrow screen of 390 px: letters of _SMALL points have 11 px there.
_PER_ROW, _WIDTH, _SMALL = 2, 2.15, 9
_LOOK: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": _SMALL, "axes.titlesize": _SMALL, "axes.labelsize": _SMALL,
    "xtick.labelsize": _SMALL, "ytick.labelsize": _SMALL, "legend.fontsize": _SMALL, "text.color": INK,
    "text.parse_math": False, "svg.hashsalt": "lora_init",
}  # fmt: skip


class Look(NamedTuple):
    """How a start is drawn: color and marker are the start's, line and filling of the marker tell how it was run."""

    color: str
    marker: str
    line: str
    fill: str


def looks(starts: Iterable[str]) -> dict[str, Look]:
    """Return a color and a marker for each start: six starts before a color comes again, 42 before a pair does.

    The same start run in other ways, as with another lora_alpha or from other numbers of batches, differs in its line.
    """
    own = {RANDOM: (RANDOM_COLOR, "s"), FULL: (INK, "*")}  # color and marker, by base
    n_others = 0
    n_ways: Counter[str] = Counter()  # in which each base has been run so far
    by_name: dict[str, Look] = {}
    for name in dict.fromkeys(starts):
        base = Variant.parse(name).base
        if base not in own:
            # Numbers of colors and markers have no common factor, so a pair comes again after their product.
            own[base] = COLORS[n_others % len(COLORS)], _MARKERS[n_others % len(_MARKERS)]
            n_others += 1
        by_name[name] = Look(*own[base], *_WAYS[n_ways[base] % len(_WAYS)])
        n_ways[base] += 1
    return by_name


def pictures(summary: Summary) -> dict[str, dict[str, bytes]]:
    """Draw the pictures that there is something to draw for: by name, as `svg` and `png`."""
    runs, figures = summary.table, {}
    best = runs[runs["best"]]
    styles = looks(runs["start"])
    drawn = list(best["base"].unique())
    panels = [start for start in drawn if start != RANDOM] or drawn
    if panels:
        top = _rate_limits(runs)
        if best["evaluation_points"].map(len).max() > 2:  # from one point after the first no line can be drawn
            figures["learning_curves"] = _draw(panels, 1.9, lambda axes, s: _draw_curves(axes, s, best, styles))
        figures["learning_rates"] = _draw(panels, 1.9, lambda axes, s: _draw_rates(axes, s, runs, styles, top))
    n_judged = sum(verdict.mean is not None for verdict in summary.verdicts)
    if n_judged:
        height = 1.2 + 0.4 * n_judged
        figures["differences"] = _draw([""], height, lambda axes, _: _draw_differences(axes, summary, styles))
    if any(isinstance(dial, list) for dial in best["dial"]):
        lines = frontiers(runs)
        figures["frontiers"] = _draw(panels, 2.1, lambda axes, s: _draw_frontiers(axes, _shown(runs, s), lines, styles))
    elif best["rise"].notna().any():
        counted = runs[runs["counts"]]
        figures["forgetting"] = _draw(panels, 2.1, lambda axes, s: _draw_forgetting(axes, s, counted, styles))
    return {name: {"svg": _saved(figure, "svg"), "png": _saved(figure, "png")} for name, figure in figures.items()}


def _saved(figure: Figure, kind: str) -> bytes:
    from matplotlib import style

    out = io.BytesIO()
    with style.context(["default", _LOOK]):  # labels of ticks are made as they are drawn
        unsaid = {"Software": None} if kind == "png" else {"Date": None}
        figure.savefig(out, format=kind, dpi=200, metadata=unsaid)
    return out.getvalue()


def _draw(names: Sequence[str], height: float, draw: Callable[[Any, str], None]) -> Figure:
    """Draw a panel of so many inches for each name, two in a row."""
    from matplotlib import style
    from matplotlib.figure import Figure

    columns = min(len(names), _PER_ROW)
    rows = math.ceil(len(names) / columns)
    with style.context(["default", _LOOK]):  # and not in a style of the user's, which may be dark
        figure = Figure(figsize=(_PER_ROW * _WIDTH, rows * height + 0.4), layout="constrained")
        # One vertical scale, so that panels can be compared.
        places = list(figure.subplots(rows, columns, squeeze=False, sharey=len(names) > 1).flat)
        for name, axes in zip(names, places, strict=False):  # a row may be left with a place that is empty
            draw(axes, name)
            axes.set_title("\n".join(wrap(name.replace("+", " +"), 22)))
        for axes in places[len(names) :]:
            axes.set_visible(False)
        line_of: dict[str, Any] = {}  # a start that is in several panels, as random, has one entry
        for axes in places:
            lines, labels = axes.get_legend_handles_labels()
            line_of |= zip(labels, lines, strict=True)
        if len(line_of) > 1:
            figure.set_figheight(figure.get_figheight() + 0.18 * len(line_of))  # panels keep their height
            figure.legend(line_of.values(), line_of, loc="outside lower center", frameon=False)
    return figure


def _rate_limits(runs: pd.DataFrame) -> tuple[float, float]:
    """Find the losses to show by rate: not those so high that the others would look alike."""
    means = runs[runs["counts"]].groupby(["start", "learning_rate"])["loss"].mean()
    # At most four times as far above the lowest mean as the median is.
    top = min(means.max(), means.min() + 4 * (means.median() - means.min()) or means.max())
    drawn = runs[runs["counts"] & ((runs["loss"] <= top) | runs["best"])]["loss"]
    return _with_room(drawn.min(), drawn.max(), 0.08)


def _with_room(low: float, high: float, share: float) -> tuple[float, float]:
    """Widen a range by a share of it on both sides; what has no width gets some."""
    room = share * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


Styles = Mapping[str, Look]


def _shown(runs: pd.DataFrame, start: str) -> list[str]:
    """List what is drawn in the panel of a start: random, then the start as it is and as it was varied."""
    return list(runs[runs["start"].eq(RANDOM) | runs["base"].eq(start)]["start"].unique())


def _draw_curves(axes: Any, start: str, best: pd.DataFrame, styles: Styles) -> None:
    """Draw the loss over steps at the best rate: mean, and a band from the lowest to the highest seed.

    What is before training would leave no room for what differs.
    """
    for name in _shown(best, start):
        runs = best[best["start"] == name]
        points = runs["evaluation_points"].iloc[0]
        curves = pd.DataFrame(runs["report_loss"].tolist(), columns=points).iloc[:, 1:]  # runs x points after the first
        color, _, line, _ = styles[name]
        axes.plot(curves.columns, curves.mean(), line, color=color, linewidth=1.5, label=name)
        axes.fill_between(curves.columns, curves.min(), curves.max(), color=color, alpha=0.2, linewidth=0)
    _finish(axes, "steps", "loss")


def _draw_rates(axes: Any, start: str, runs: pd.DataFrame, styles: Styles, limits: tuple[float, float]) -> None:
    """Draw the final loss over learning rates: means, a dot for each run, a cross on top of an unstable rate."""
    height, best, names = limits[1] - limits[0], best_rates(runs), _shown(runs[runs["best"]], start)
    for i, name in enumerate(names):
        color, marker, line, fill = styles[name]
        own = runs[runs["start"] == name]
        counted = own[own["counts"]]
        means = counted.groupby("learning_rate")["loss"].mean()
        axes.plot(means.index, means, line, color=color, linewidth=1.5, label=name)
        near = counted[counted["loss"] < limits[1]]  # no half dots at the edge
        axes.plot(near["learning_rate"], near["loss"], ".", color=color, markersize=3)
        axes.plot([best[name]], [means[best[name]]], marker, color=color, markersize=6, fillstyle=fill)
        unstable = own[own["status"] == "unstable"]["learning_rate"].unique()
        top = limits[1] - (0.05 + 0.09 * i) * height  # a row for each start, so that no cross hides another
        axes.plot(unstable, [top] * len(unstable), "x", color=color, markersize=6, markeredgewidth=1.6)
    rates = sorted(runs["learning_rate"].unique())
    axes.set_xscale("log")
    axes.set_xlim(rates[0] / 1.6, rates[-1] * 1.6)
    # The best rates first, that of the panel's own start before random's: of two that are near, the first is labeled.
    first = [best[name] for name in reversed(names)]
    ticks = _apart([*first, *rates], (rates[-1] / rates[0]) ** 0.08)
    rotation = 90 if len(ticks) > 3 else 0  # more do not fit side by side
    axes.set_xticks(ticks, list(map(rate_text, ticks)), rotation=rotation)
    axes.set_xticks([], minor=True)
    axes.set_ylim(*limits)
    _finish(axes, "learning rate", "final loss")


def _apart(rates: Iterable[float], factor: float) -> list[float]:
    """Leave out rates that are nearer than a factor to one before, so that their labels do not overprint."""
    kept: list[float] = []
    for rate in rates:
        if all(max(rate / other, other / rate) >= factor for other in kept):
            kept.append(rate)
    return sorted(kept)


def _draw_differences(axes: Any, summary: Summary, styles: Styles) -> None:
    """Draw each start's difference to random with its interval, and every pair as a dot; left is better."""
    verdicts = [verdict for verdict in summary.verdicts if verdict.mean is not None]
    axes.axvline(0, color=INK, linewidth=0.8)
    half_widths, farthest = [], 0.0
    for y, verdict in enumerate(verdicts):
        color, marker, *_ = styles[verdict.start]
        pairs = list(verdict.differences.values())
        farthest = max([farthest, *map(abs, pairs)])
        axes.plot(pairs, [y + 0.22] * len(pairs), ".", color=color, markersize=4, alpha=0.7)
        face = "none"  # a mean without an interval, of a single pair, is hollow
        if verdict.low is not None:
            face = color
            axes.plot([verdict.low, verdict.high], [y, y], color=color, linewidth=1.8)
        if verdict.detectable is not None:
            half_widths.append(verdict.detectable)
        axes.plot([verdict.mean], [y], marker, color=color, markerfacecolor=face, markersize=6.5)
    # An interval that is far longer than usual leaves the picture, so that the others can be told apart.
    reach = 1.1 * max(4 * median(half_widths or [0.0]), farthest) or math.inf  # all may be zero
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -reach), min(high, reach))
    axes.set_ylim(len(verdicts) - 0.5, -0.6)  # the first start on top
    axes.set_yticks(range(len(verdicts)), [verdict.start.replace("+", "\n+") for verdict in verdicts])
    axes.locator_params(axis="x", nbins=4)
    _finish(axes, "final loss, start − random\n← start better · random better →")
    reference = verdicts[0].reference or math.nan
    per_cent = axes.secondary_xaxis("top", functions=(lambda x: 100 * x / reference, lambda x: x * reference / 100))
    per_cent.set_xlabel("per cent of random's loss")


def _draw_forgetting(axes: Any, start: str, runs: pd.DataFrame, styles: Styles) -> None:
    """Draw what starts forget over what they learn, a line over the learning rates; down and left is good."""
    for name in _shown(runs, start):
        color, marker, line, fill = styles[name]
        own = runs[runs["start"] == name]
        curve, best = own.groupby("learning_rate")[["loss", "rise"]].mean(), own[own["best"]]
        axes.plot(curve["loss"], curve["rise"], line, color=color, linewidth=1.2, label=name)
        axes.plot(best["loss"], best["rise"], ".", color=color, markersize=3)
        axes.plot(best["loss"].mean(), best["rise"].mean(), marker, color=color, markersize=6, fillstyle=fill)
    # What matters is near the best rates: rates far from them leave the picture.
    near = runs[runs["best"]]
    axes.set_xlim(*_with_room(near["loss"].min(), near["loss"].max(), 0.2))
    axes.set_ylim(*_with_room(near["rise"].min(), near["rise"].max(), 0.2))
    axes.locator_params(axis="x", nbins=4)
    _finish(axes, "final loss", "rise on other text")


def frontiers(runs: pd.DataFrame) -> pd.DataFrame:
    """Compute the least rise of the loss on other text by task loss: a row for each start, means over seeds.

    Columns are task losses, in per cent above random's at its best rate; see `equal_loss`.
    """
    columns = {}
    for i in range(-10, 13):  # from 5 % below to 6 % above, by half a per cent
        share = i / 200
        # NaN where a seed does not reach the loss: a mean over the others would jump there.
        columns[100 * share] = equal_loss(runs, share).mean(axis=1, skipna=False)
    return pd.DataFrame(columns)


def _draw_frontiers(axes: Any, names: Iterable[str], lines: pd.DataFrame, styles: Styles) -> None:
    """Draw what each start raises the loss on other text by at a task loss, at the best strength; down is better."""
    axes.axvline(0, color=INK, linewidth=0.6, linestyle=":")
    for name in names:
        if name in lines.index:
            axes.plot(lines.columns, lines.loc[name], styles[name].line, color=styles[name].color, label=name)
    axes.set_xlim(lines.columns[0], lines.columns[-1])
    _finish(axes, "task loss, %\nabove random's", "rise on other text")


def _finish(axes: Any, x_label: str, y_label: str = "") -> None:
    """Label axes, and set the look that all plots share."""
    axes.set_xlabel(x_label)
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel(y_label)
    axes.grid(alpha=0.15, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
