"""The parts of a report: what each table and picture shows, and the tables as text, for terminal and pages alike.

To add a table, write its function and add a `Part` to `PARTS`, whose order is that of the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from lora_init.adapters.starts import RANDOM
from lora_init.comparison.effects import effects
from lora_init.comparison.findings import Summary, steps_of_start
from lora_init.comparison.runs import METRICS, best_rates, by_seed, rate_means
from lora_init.comparison.wording import number, percent, rate_text, share


@dataclass(frozen=True)
class Part:
    """A part of the report: a heading, what it shows, and a table or a picture of the same name, or both.

    Attributes:
        title: The heading.
        caption: What table and picture show.
        table: Makes the table of text, a row for each start, or each run with its start in a column of that name. None
            if there is a picture alone.
        leads: Whether it stands before the verdicts.
        of_best: Whether the table is of runs at each start's best rate, so that there is none before there are such.
    """

    title: str
    caption: str
    table: Callable[[Summary], pd.DataFrame] | None = None
    leads: bool = False
    of_best: bool = False


def run_tables(summary: Summary) -> dict[str, pd.DataFrame]:
    """Make all tables that there is something to put in, without columns that are empty throughout.

    Returns:
        Tables of text by name; the first column of each names the row.
    """
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
        table = table.loc[:, (table != "–").any()]
        tables |= {name: table} if table.shape[1] > 1 else {}
    return tables


def _written(values: pd.Series, write: str) -> pd.Series:
    return values.map(lambda value: "–" if math.isnan(value) else format(value, write))


def _differences(summary: Summary) -> pd.DataFrame:
    rows = {}
    for verdict in summary.verdicts:
        row = rows[verdict.start] = {"difference": number(verdict.mean, "+"), "verdict": verdict.outcome}
        if verdict.mean is not None and verdict.reference:
            row |= {
                "in per cent": percent(verdict.mean / verdict.reference, "+"),
                "pairs": str(len(verdict.differences)),
            }
        if verdict.low is not None and verdict.high is not None and verdict.showable is not None and verdict.reference:
            row["interval"] = " to ".join(percent(end / verdict.reference, "+") for end in (verdict.low, verdict.high))
            row["could be shown"] = percent(verdict.showable / verdict.reference)
        if verdict.closed is not None:
            row["of the headroom"] = share(verdict.closed)
    columns = ["difference", "in per cent", "interval", "could be shown", "of the headroom", "pairs", "verdict"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def _rates(summary: Summary) -> pd.DataFrame:
    runs = summary.table
    cells, best, means = {}, best_rates(runs), rate_means(runs)
    for (start, rate), own in runs.groupby(["start", "learning_rate"], sort=False):
        star = "*" if best.get(start) == rate else ""
        cells[start, rate] = _rate_cell(own) or f"{number(means[start, rate])}{star}"
    table = pd.Series(cells).unstack().reindex(index=runs["start"].unique())
    return table.sort_index(axis="columns").rename(columns=rate_text)


def _rate_cell(runs: pd.DataFrame) -> str:
    ended = runs["status"].value_counts()
    if "unstable" in ended:
        return f"unstable, {ended['unstable']} of {ended['unstable'] + ended.get('finished', 0)}"
    return "" if "finished" in ended else "failed"


def _best(summary: Summary) -> pd.DataFrame:
    runs = summary.table
    losses, best = by_seed(runs), runs[runs["best"]].groupby("start", sort=False)
    target = runs[runs["counts"] & runs["start"].eq(RANDOM)]["loss"].min()
    gammas = {start: ", ".join(f"{g:g}" for g in sorted(own["gamma"].dropna().unique())) for start, own in best}
    return pd.DataFrame(
        {
            "rate": best["learning_rate"].first().map(rate_text),
            "runs": losses.count(axis=1).map(str),
            "mean loss": losses.mean(axis=1).map(number),
            "lowest to highest": losses.min(axis=1).map(number) + " to " + losses.max(axis=1).map(number),
            "steps to random's best": pd.Series({start: _steps_cell(own, target) for start, own in best}),
            "loss at step 0": best["first_loss"].mean().map(number),
            "gamma": pd.Series(gammas).replace("", "–"),
        },
        losses.index,
    )


def _steps_cell(runs: pd.DataFrame, target: float) -> str:
    """Say at which evaluation each run of a start is first as good as the target."""
    steps = []
    for points, losses in zip(runs["evaluation_points"], runs["report_loss"], strict=True):
        reached = [step for step, loss in zip(points, losses, strict=True) if loss <= target]
        steps.append(str(reached[0]) if reached else "never")
    return "–" if math.isnan(target) else ", ".join(steps)


def _metrics(summary: Summary) -> pd.DataFrame:
    columns = {}
    for metric, name in METRICS.items():
        values = by_seed(summary.table, metric)
        columns[name] = _written(values.mean(axis=1), ".3f")
        found = effects(values, RANDOM)
        said = {start: f"{x.low:+.3f} to {x.high:+.3f}".replace("-", "−") for start, x in found.items()}
        columns[f"{name}, start − random"] = pd.Series(said, values.index, dtype=object)
    return pd.DataFrame(columns)


def _means(runs: pd.DataFrame) -> pd.DataFrame:
    """Average the runs at each start's best rate."""
    return runs[runs["best"]].groupby("start", sort=False).mean(numeric_only=True)


def _cost(summary: Summary) -> pd.DataFrame:
    means, took = _means(summary.table), steps_of_start(summary.table)
    return pd.DataFrame(
        {
            "parameters": _written(means["trainable_parameters"], ",.0f"),
            "scale of A": means["a_scale"].where(means["a_scale"] > 0).map(number),
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
        "Final loss, start minus random, paired by seed, each at its own best rate; below zero is better. Per cent are "
        "of random's loss; the headroom is what full fine-tuning gains over it. Intervals are from one layout of "
        "starts and seeds and hold for all starts together; what could be shown is half their width. Picture: large "
        "markers are means over seeds, hollow if there is one seed and so no interval. Dots below: one pair each. A "
        "line that ends at the edge goes on beyond it.",
        _differences,
        leads=True,
    ),
    "learning_curves": Part(
        "Learning curves",
        "Loss on the examples to report over steps from the first evaluation in training on, each start at its own "
        "best rate: the mean, and a band from the lowest to the highest seed. Grey is random, the same in every panel. "
        "One start run in several ways: a whole line, then dashed, dotted and dash-dotted, in the order of the tables.",
    ),
    "learning_rates": Part(
        "Final loss by learning rate",
        "Picture: means over the seeds that each rate has, with a dot for each run. The large marker is the rate at "
        "which a start is compared; a cross at the top is a rate with an unstable run. Grey is random. Table: means "
        "over the seeds that all starts and rates have; a star marks the rate at which a start is compared.",
        _rates,
    ),
    "best": Part(
        "Each start at its best rate",
        "Final loss over the seeds that finished. Steps: seed by seed, the first evaluation at which the final loss of "
        "the best random run is reached. A start that changes the model's output begins with another loss; gamma is "
        "what its step was divided by, found on training batches set aside.",
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
        "Means of the runs at each start's best rate. Scale of A: root mean square of the norms of its rows; if a "
        "difference goes away with matched scale, the scale was what made it. Start: with its statistics and the "
        "search of its step; in steps: as many steps of the same training take as long.",
        _cost,
        of_best=True,
    ),
    "forgetting": Part(
        "Forgetting",
        "Retained: loss on text of another kind. Table: means of the runs at each start's best rate. Picture: a line "
        "over all learning rates of a start, a dot for each run at its best, a large marker for their mean; down and "
        "left is better. Grey is random. A line that ends at the edge goes on beyond it.",
        _forgetting,
        leads=True,
        of_best=True,
    ),
    "runs": Part(
        "Every run",
        "Loss on the examples to report at each evaluation point, the first before training.",
        _every_run,
    ),
}
