"""Fourteen starts on five tasks, one table and one picture from all runs: `python -m benchmarks.starts`.

Every number is relative, so that tasks can stand side by side: 100 x (loss / loss to compare with - 1), in per cent.
Prints Markdown and writes `results/starts.svg`.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.settings import table
from lora_init.comparison.findings import verdicts
from lora_init.comparison.plots import COLORS, RANDOM_COLOR, looks
from lora_init.comparison.runs import SETTINGS_FILE, by_seed, rate_means, read_runs, run_table
from lora_init.comparison.wording import rate_text
from lora_init.files import read_json
from lora_init.starts.starts import RANDOM

RESULTS = Path(__file__).parent / "results"
TASKS = ("siqa", "openbookqa", "boolq", "minilm-siqa-kinds", "minilm-boolq")

UNTUNED = (1e-4, 3e-4)
# All starts are in the table; more lines than these hide each other.
DRAWN = (
    "random", "orthogonal", "random-scaled", "eva-rho1", "lora-ga", "natural-gradient", "natural-gradient-step"
)  # fmt: skip


def against_random(runs: pd.DataFrame) -> dict[str, str]:
    """Difference to random at each one's own best rate with its 95 % interval; bold if zero is outside."""
    mean = by_seed(runs).loc[RANDOM].mean()
    found = {}
    for verdict in verdicts(runs):
        if verdict.mean is not None and verdict.low is not None and verdict.high is not None:
            ends = (verdict.low, verdict.mean, verdict.high)
            low, middle, high = (f"{100 * value / mean:+.1f}".replace("-", "−") for value in ends)
            text = f"{middle} ({low} to {high})"
            found[verdict.start] = f"**{text}**" if verdict.outcome in ("better", "worse") else text
    return found


def regrets(runs: pd.DataFrame) -> pd.DataFrame:
    """What is lost at each rate against the best of all starts and rates, in per cent; a row for each start."""
    means = rate_means(runs)
    return 100 * (means / means.min() - 1).unstack().sort_index(axis="columns")


def draw(tasks: dict[str, pd.DataFrame], target: Path) -> None:
    """Draw a panel for each task: regret over the learning rate, a line for each start."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(tasks), 3.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    drawn = {}
    styles = looks(start for runs in tasks.values() for start in runs["start"])
    colors = dict(zip(DRAWN, [RANDOM_COLOR, *COLORS], strict=True))
    for axes, (name, runs) in zip(panels, tasks.items(), strict=True):
        lost = regrets(runs)
        for start in (start for start in DRAWN if start in lost.index):
            (drawn[start],) = axes.plot(
                lost.columns, lost.loc[start], styles[start].line, marker=styles[start].marker, markersize=4,
                linewidth=1.4, color=colors[start],
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(lost.columns, list(map(rate_text, lost.columns)), minor=False)
        axes.set_xticks([], minor=True)
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("learning rate")
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=-0.1)  # of all panels
    panels[0].set_ylabel("final loss above the best of all")
    columns = min(len(drawn), 2 * len(tasks))
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    figure.savefig(target, dpi=110)


def read_tasks() -> dict[str, pd.DataFrame]:
    """Read the runs of each task; settings of format 2 have the starts where those of today have them."""
    return {
        name: run_table(read_runs(RESULTS / name), read_json(RESULTS / name / SETTINGS_FILE)["starts"])
        for name in TASKS
    }


def main() -> None:
    """Print the table of all comparisons and draw them."""
    tasks = read_tasks()
    differences = {name: against_random(runs) for name, runs in tasks.items()}
    lost = {name: regrets(runs) for name, runs in tasks.items()}
    rows = []
    for start in dict.fromkeys(start for runs in tasks.values() for start in runs["start"]):
        untuned = []
        for rate in UNTUNED:
            values = [found.loc[start, rate] for found in lost.values() if start in found.index]
            known = values and not pd.isna(values).any()
            untuned.append(f"{min(values):.1f} to {max(values):.1f}" if known else "–")
        rows.append([start, *(found.get(start, "–") for found in differences.values()), *untuned])
    print(table(["start", *tasks, *(f"lost at {rate_text(rate)}" for rate in UNTUNED)], rows))
    draw(tasks, RESULTS / "starts.svg")


if __name__ == "__main__":
    main()
