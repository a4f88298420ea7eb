"""What starts learn and what they forget: `python -m benchmarks.trade_off`, from the runs of `benchmarks.headroom`.

Writes `results/trade_off.svg`: for each language task a line over the learning rates of a start. Across, the loss on
the task, seed by seed against random at its best rate; up, the rise of the loss on other text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from lora_init.comparison.plots import COLORS, INK, RANDOM_COLOR
from lora_init.comparison.runs import best_rates, by_seed, read_runs, read_settings, run_table
from lora_init.comparison.wording import rate_text
from lora_init.starts.starts import RANDOM

RESULTS = Path(__file__).parent / "results"
TASKS = {"openbookqa": "OpenBookQA", "siqa": "SIQA", "hellaswag": "HellaSwag"}
SWEPT = {
    RANDOM: ("s", RANDOM_COLOR, "random"),
    "eva-rho1": ("^", COLORS[1], "eva-rho1"),
    "natural-gradient-step": ("o", COLORS[0], "natural-gradient-step"),
    "full": ("*", INK, "full fine-tuning"),
}
# At 2e-4, which nobody tuned, with an alpha larger by the factor in the name.
UNTUNED = {
    "eva-rho1-x2": ("^", COLORS[1], "eva-rho1, alpha 4 r, at 2e-4"),
    "natural-gradient-x5": ("D", COLORS[4], "natural-gradient, alpha 10 r, at 2e-4"),
}


def points(runs: pd.DataFrame) -> pd.DataFrame:
    """Compute means of a start and rate: `above` random at its best rate in per cent, `rise` of the other loss."""
    random = by_seed(runs).loc[RANDOM]
    counted = runs[runs["counts"]]
    above = 100 * (counted["loss"] - counted["seed"].map(random)) / random.mean()
    return counted.assign(above=above).groupby(["start", "learning_rate"])[["above", "rise"]].mean()


def draw(target: Path) -> None:
    """Draw a panel for each task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    drawn = {}
    for axes, (name, title) in zip(figure.subplots(1, len(TASKS), sharey=True), TASKS.items(), strict=True):
        directory = RESULTS / f"headroom-{name}"
        runs = run_table(read_runs(directory), read_settings(directory)["starts"])
        means, best = points(runs), best_rates(runs)
        axes.axvline(0, color=INK, linewidth=0.6)
        axes.axhline(0, color=INK, linewidth=0.6)
        for start, (marker, color, label) in SWEPT.items():
            own = means.loc[start]
            (line,) = axes.plot(own["above"], own["rise"], marker=marker, color=color, markersize=4, linewidth=1.3)
            axes.plot(*own.loc[best[start]], marker=marker, color=color, markersize=9)
            drawn[label] = line
        for start, (marker, color, label) in UNTUNED.items():
            (drawn[label],) = axes.plot(
                *means.loc[start].iloc[0], marker, color=color, markersize=11, markerfacecolor="white",
                markeredgewidth=2,
            )  # fmt: skip
        for rate, (x, y) in means.loc[RANDOM].iterrows():
            if x < 12:
                axes.annotate(rate_text(rate), (x, y), (5, 4), textcoords="offset points", fontsize=8)
        axes.set(title=title, xlim=(-4, 12), ylim=(-0.05, 0.6), xlabel="loss on the task above tuned random, %")
        axes.grid(alpha=0.15, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("rise of the loss on other text")
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_svg(figure, target)


def save_svg(figure: Any, target: Path) -> None:
    """Write a picture: sharp at any size, on white, and the same bytes again for the same numbers."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "lora_init"}):
        figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    draw(RESULTS / "trade_off.svg")
