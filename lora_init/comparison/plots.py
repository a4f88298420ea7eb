"""The pictures of a comparison, each as inline SVG that follows the page's colours and as a PNG file."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from textwrap import wrap
from typing import Any

from lora_init.comparison.run_measures import retained
from lora_init.comparison.run_plots import (
    DARK,
    INK,
    curve_limits,
    draw_curves,
    draw_differences,
    draw_forgetting,
    draw_rates,
    panels,
    rate_limits,
)
from lora_init.comparison.run_summary import Summary
from lora_init.comparison.runs import Group
from lora_init.planning.html_page import inline_svg
from lora_init.planning.plan_plots import draw_heat_map

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
