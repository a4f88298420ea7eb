"""The parts of a report: what each table and picture shows, and the tables as text, for terminal and pages alike.

To add a table, write its function and add a `Part` to `PARTS`, which has the order of the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from lora_init.comparison.effects import effects
from lora_init.comparison.findings import Summary, forgotten, steps_of_start
from lora_init.comparison.runs import METRICS, best_rates, by_seed, rate_means
from lora_init.comparison.wording import number, percent, rate_text, share
from lora_init.starts.starts import RANDOM


@dataclass(frozen=True)
class Part:
    """A part of the report: a heading, what it shows, and a table or a picture of the same name, or both."""

    title: str
    caption: str
    table: Callable[[Summary], pd.DataFrame] | None = None  # a row for each start, or runs with a column `start`
    leads: bool = False  # whether it stands before the verdicts
    of_best: bool = False  # whether the table is of runs at each start's best rate: none before there are such


def run_tables(summary: Summary) -> dict[str, pd.DataFrame]:
    """Return the tables that there is something to put in, by name, as text and without empty columns."""
    if summary.table.empty:
        return {}
    any_best = summary.table["best"].any()
    tables: dict[str, pd.DataFrame] = {}
    for name, part in PARTS.items():
        if part.table is None or (part.of_best and not any_best):
            continue
        table = part.table(summary)
        if "start" not in table.columns:
            table = table.fillna("–").rename_axis("start").reset_index()
        table = table.loc[:, (table != "–").any()]  # without the columns that say nothing
        if table.shape[1] > 1:  # more than the names of the starts
            tables[name] = table
    return tables


def _written(values: pd.Series, write: str) -> pd.Series:
    return values.map(lambda value: _number_cell(value, write))


def _number_cell(value: float, write: str) -> str:
    return "–" if math.isnan(value) else format(value, write)


def _differences(summary: Summary) -> pd.DataFrame:
    rows = {}
    for verdict in summary.verdicts:
        row = rows[verdict.start] = {"difference": number(verdict.mean, "+"), "verdict": verdict.outcome}
        if verdict.mean is not None and verdict.reference:
            row |= {
                "in per cent": percent(verdict.mean / verdict.reference, "+"),
                "pairs": str(len(verdict.differences)),
            }
        low, high, detectable = verdict.low, verdict.high, verdict.detectable
        if low is not None and high is not None and detectable is not None and verdict.reference:
            row["interval"] = " to ".join(percent(end / verdict.reference, "+") for end in (low, high))
            row["detectable"] = percent(detectable / verdict.reference)
        if verdict.closed is not None:
            row["of the headroom"] = share(verdict.closed)
    columns = ["difference", "in per cent", "interval", "detectable", "of the headroom", "pairs", "verdict"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def _rates(summary: Summary) -> pd.DataFrame:
    runs = summary.table
    cells, best, means = {}, best_rates(runs), rate_means(runs)
    for (start, rate), own in runs.groupby(["start", "learning_rate"], sort=False):
        cell = _no_mean_cell(own)
        if not cell:
            cell = number(means[start, rate])
            if best.get(start) == rate:
                cell += "*"
        cells[start, rate] = cell
    table = pd.Series(cells).unstack().reindex(index=runs["start"].unique())  # `unstack` sorts by name
    return table.sort_index(axis="columns").rename(columns=rate_text)


def _no_mean_cell(runs: pd.DataFrame) -> str:
    """Write why the runs of a rate have no mean; empty if they have one."""
    ended = runs["status"].value_counts()
    if "unstable" in ended:  # a single one is enough for the rate not to count
        return f"unstable, {ended['unstable']} of {ended['unstable'] + ended.get('finished', 0)}"
    return "" if "finished" in ended else "failed"


def _best(summary: Summary) -> pd.DataFrame:
    runs = summary.table
    losses, best = by_seed(runs), runs[runs["best"]].groupby("start", sort=False)
    target = runs[runs["counts"] & runs["start"].eq(RANDOM)]["loss"].min()  # NaN without random
    gammas, steps = {}, {}
    for start, own in best:
        gammas[start] = _gammas_cell(own)
        steps[start] = _steps_cell(own, target)
    return pd.DataFrame(
        {
            "rate": best["learning_rate"].first().map(rate_text),
            "lora_alpha": _written(pd.Series(summary.alphas), "g"),
            "runs": losses.count(axis=1).map(str),
            "mean loss": losses.mean(axis=1).map(number),
            "lowest to highest": losses.min(axis=1).map(number) + " to " + losses.max(axis=1).map(number),
            "steps to random's best": pd.Series(steps),
            "loss at step 0": best["first_loss"].mean().map(number),
            "gamma": pd.Series(gammas),
        },
        losses.index,  # which leaves out what has no run that counts
    )


def _gammas_cell(runs: pd.DataFrame) -> str:
    """Write the gammas of a start, which differ by seed; most starts have none."""
    gammas = sorted(runs["gamma"].dropna().unique())
    return ", ".join(f"{gamma:g}" for gamma in gammas) or "–"


def _steps_cell(runs: pd.DataFrame, target: float) -> str:
    """Return at which evaluation each run of a start is first as good as the target."""
    if math.isnan(target):
        return "–"
    cells = []
    for points, losses in zip(runs["evaluation_points"], runs["report_loss"], strict=True):
        cell = "never"
        for step, loss in zip(points, losses, strict=True):
            if loss <= target:
                cell = str(step)
                break
        cells.append(cell)
    return ", ".join(cells)


def _metrics(summary: Summary) -> pd.DataFrame:
    columns = {}
    for metric, name in METRICS.items():
        values = by_seed(summary.table, metric)
        columns[name] = _written(values.mean(axis=1), ".3f")
        intervals = {}
        for start, effect in effects(values, RANDOM).items():
            intervals[start] = f"{effect.low:+.3f} to {effect.high:+.3f}".replace("-", "−")
        # An empty mapping would make a column of floats, which takes no dash.
        columns[f"{name}, start − random"] = pd.Series(intervals, values.index, dtype=object)
    return pd.DataFrame(columns)


def _means(runs: pd.DataFrame) -> pd.DataFrame:
    """Average the runs at each start's best rate."""
    return runs[runs["best"]].groupby("start", sort=False).mean(numeric_only=True)


def _cost(summary: Summary) -> pd.DataFrame:
    means, took = _means(summary.table), steps_of_start(summary.table)
    return pd.DataFrame(
        {
            "parameters": _written(means["trainable_parameters"], ",.0f"),
            "scale of A": means["a_scale"].where(means["a_scale"] > 0).map(number),  # `full` has no A
            "start, s": _written(means["initialisation_seconds"], ",.1f"),
            "start, in steps": _written(took.reindex(means.index), ",.1f"),
            "training, s": _written(means["training_seconds"], ",.1f"),
            "peak, MB": _written(means["peak_memory_bytes"] / 1e6, ",.0f"),
        }
    )


def _forgetting(summary: Summary) -> pd.DataFrame:
    means = _means(summary.table)
    return pd.DataFrame(
        {
            "retained before": means["retained_before"].map(number),
            "retained after": means["retained_after"].map(number),
            "change": means["rise"].map(lambda change: number(change, "+")),
        }
    )


def _frontiers(summary: Summary) -> pd.DataFrame:
    by_start = {}
    # Adapters that were evaluated at one strength alone have the table of forgetting.
    if any(isinstance(dial, list) for dial in summary.table["dial"]):
        by_start = forgotten(summary.table)
    rows = {}
    for start, lost in by_start.items():
        row = rows[start] = {"rise on other text": number(lost.rise, "+")}
        if lost.effect:
            row["start − random"] = number(lost.effect.mean, "+")
            row["interval"] = f"{number(lost.effect.low, '+')} to {number(lost.effect.high, '+')}"
    return pd.DataFrame.from_dict(rows, orient="index", columns=["rise on other text", "start − random", "interval"])


def _every_run(summary: Summary) -> pd.DataFrame:
    runs = summary.table
    return pd.DataFrame(
        {
            "start": runs["start"],
            "rate": runs["learning_rate"].map(rate_text),
            "seed": runs["seed"].map(str),
            "status": runs["status"],
            "loss": runs["report_loss"].map(lambda losses: " ".join(map(number, losses or [])) or "–"),
            **{name: _written(runs[metric], ".3f") for metric, name in METRICS.items()},
            "retained": runs["retained_after"].map(number),
            "training, s": _written(runs["training_seconds"], ",.1f"),
        }
    )


PARTS = {
    "differences": Part(
        "Difference to random",
        "How much lower or higher each start ends than random with the same seed, each at its own best learning rate; "
        "below zero is better. The interval is where the true difference lies, in 95 % of comparisons for all starts "
        "at once; a difference of half its width could have been shown. Large markers: means. Small dots: one seed "
        "each.",
        _differences,
        leads=True,
    ),
    "frontiers": Part(
        "What is kept at the same task loss",
        "Each trained adapter was evaluated at several strengths: weaker, it forgets less and does less of the task. "
        "At each task loss the line is the least rise of the loss on other text, over rates and strengths; lower is "
        "better. Grey is random. The table is at the task loss of random at its best rate, the dotted line, or at "
        "most 0.5 % above.",
        _frontiers,
        leads=True,
        of_best=True,
    ),
    "learning_curves": Part(
        "Learning curves",
        "Loss on the examples to report while training, each start at its own best learning rate: the mean, and a "
        "band from the lowest to the highest seed. Grey is random. The same start run in other ways has broken lines.",
    ),
    "learning_rates": Part(
        "Final loss by learning rate",
        "Means over seeds, and a dot for each run. The large marker, in the table a star, is the rate at which a "
        "start is compared; a cross is a rate at which a run was unstable. Grey is random. What lies far above is "
        "left out.",
        _rates,
    ),
    "best": Part(
        "Each start at its best rate",
        "Final loss over seeds. Steps to random's best: for each seed the first evaluation that is as good as the "
        "best run of random ends. Loss at step 0 differs for a start that changes the model's output; gamma is what "
        "its step was divided by.",
        _best,
        of_best=True,
    ),
    "metrics": Part(
        "Metrics",
        "At the end of the runs at each start's best rate: the mean, and the interval of the difference to random; "
        "above zero is better. The verdicts rest on the loss alone.",
        _metrics,
        of_best=True,
    ),
    "cost": Part(
        "Cost",
        "Means of the runs at each start's best rate. Scale of A: root mean square of the norms of its rows. Start: "
        "its statistics, itself and the search of its step; in steps: as many steps of training take as long.",
        _cost,
        of_best=True,
    ),
    "forgetting": Part(
        "Forgetting",
        "Loss on text of another kind before and after training. Table: at each start's best rate. Picture: a line "
        "over the learning rates of a start, a dot for each run at its best, a large marker for their mean; down and "
        "left is better. Grey is random.",
        _forgetting,
        of_best=True,
    ),
    "runs": Part(
        "Every run",
        "Loss on the examples to report at each evaluation point, the first before training.",
        _every_run,
    ),
}
