"""One table and one picture from several comparisons: `python -m benchmarks.starts benchmarks/results/*/runs.jsonl`.

Every number is relative, so that tasks can stand side by side: 100 x (loss / loss to compare with - 1), in per cent.
Prints Markdown and writes `results/starts.png`.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.settings import table
from lora_init.comparison.findings import final_losses, rate_text, verdicts
from lora_init.comparison.plots import COLORS, RANDOM_COLOR, line_style, looks
from lora_init.comparison.runs import (
    RANDOM,
    Group,
    best_of_all,
    group_runs,
    mean_at,
    random_group,
    read_runs,
    read_settings,
    table_seeds,
)
from lora_init.comparison.tables import all_rates

UNTUNED = (1e-4, 3e-4)
# All starts are in the table; more lines than these hide each other.
DRAWN = (
    "random", "orthogonal", "random-scaled", "eva-rho1", "lora-ga", "natural-gradient", "natural-gradient-step"
)  # fmt: skip


def against_random(groups: Sequence[Group], group: Group) -> str:
    """Difference to random at each one's own best rate with its 95 % interval; bold if zero is outside."""
    random = random_group(groups)
    if random is None or group.variant == RANDOM:
        return "–"
    mean = statistics.fmean(final_losses(random).values())
    pairs = next(verdict.pairs for verdict in verdicts(groups) if verdict.label == group.label)
    if pairs.mean is None or pairs.low is None or pairs.high is None:
        return "–"
    low, middle, high = (
        f"{100 * value / mean:+.1f}".replace("-", "−") for value in (pairs.low, pairs.mean, pairs.high)
    )
    text = f"{middle} ({low} to {high})"
    return f"**{text}**" if pairs.low > 0 or pairs.high < 0 else text


def regrets(groups: Sequence[Group], group: Group, rate: float) -> float:
    """What is lost at a rate against the best of all starts and rates, in per cent; NaN where it was not run."""
    seeds = table_seeds(groups)
    mean = mean_at(group, rate, seeds)
    return math.nan if mean is None else 100 * (mean / best_of_all(groups, seeds) - 1)


def draw(tasks: dict[str, list[Group]], target: Path) -> None:
    """Draw a panel for each task: regret over the learning rate, a line for each start."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(tasks), 3.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    drawn = {}
    markers = looks(group for groups in tasks.values() for group in groups)
    colors = dict(zip(DRAWN, [RANDOM_COLOR[0], *(light for light, _ in COLORS)], strict=False))
    for axes, (name, groups) in zip(panels, tasks.items(), strict=True):
        for group in sorted((g for g in groups if g.label in DRAWN), key=lambda g: DRAWN.index(g.label)):
            color, (_, marker) = colors[group.label], markers[group.label]
            rates = list(group.cells)
            values = [regrets(groups, group, rate) for rate in rates]
            (drawn[group.label],) = axes.plot(
                rates, values, line_style(group.variant), marker=marker, markersize=4, linewidth=1.4, color=color
            )
        axes.set_xscale("log")
        rates = all_rates(groups)
        axes.set_xticks(rates, [rate_text(rate) for rate in rates], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("learning rate")
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=-0.1)  # of all panels
    panels[0].set_ylabel("final loss above the best of all")
    figure.legend(
        drawn.values(),
        drawn.keys(),
        loc="outside lower center",
        ncols=min(len(drawn), 2 * len(tasks)),
        frameon=False,
        fontsize=9,
    )
    figure.savefig(target, dpi=110)


def main(logs: Sequence[str]) -> None:
    """Print the table of all comparisons and draw them."""
    tasks: dict[str, list[Group]] = {}
    for log in logs:
        directory = Path(log).parent
        tasks[directory.name] = group_runs(read_runs(directory), read_settings(directory)["starts"])
    labels = list(dict.fromkeys(group.label for groups in tasks.values() for group in groups))
    rows = []
    for label in labels:
        found = {name: next((g for g in groups if g.label == label), None) for name, groups in tasks.items()}
        differences = [against_random(tasks[name], group) if group else "–" for name, group in found.items()]
        untuned = []
        for rate in UNTUNED:
            values = [regrets(tasks[name], group, rate) for name, group in found.items() if group]
            known = values and not any(map(math.isnan, values))
            untuned.append(f"{min(values):.1f} to {max(values):.1f}" if known else "–")
        rows.append([label, *differences, *untuned])
    print(table(["start", *tasks, *(f"lost at {rate_text(rate)}" for rate in UNTUNED)], rows))
    draw(tasks, Path(__file__).parent / "results" / "starts.png")


if __name__ == "__main__":
    main(sys.argv[1:])
