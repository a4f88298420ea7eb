"""The tables of a comparison as text, for terminal, Markdown and HTML alike. What each shows, the template says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from lora_init.adapters.starts import RANDOM
from lora_init.comparison.effects import effects
from lora_init.comparison.findings import Summary, Verdict, steps_of_start
from lora_init.comparison.runs import METRICS, best_rates, by_seed, rate_means
from lora_init.comparison.wording import number, percent, rate_text, share


def run_tables(summary: Summary) -> dict[str, pd.DataFrame]:
    """Make all tables that there is something to put in, without columns that are empty throughout.

    Returns:
        Tables of text by name; the first column of each names the row.
    """
    runs = summary.table
    if runs.empty:
        return {}
    tables = {"differences": _differences(summary.verdicts), "learning_rates": _rates(runs)}
    if runs["best"].any():
        means = runs[runs["best"]].groupby("start", sort=False).mean(numeric_only=True)
        tables |= {"best": _best(runs), "metrics": _metrics(runs)}
        tables |= {"cost": _cost(means, steps_of_start(runs)), "forgetting": _forgetting(means)}
    tables = {name: table.fillna("–").rename_axis("start").reset_index() for name, table in tables.items()}
    tables["runs"] = _every_run(runs)
    tables = {name: table.loc[:, (table != "–").any()] for name, table in tables.items()}
    return {name: table for name, table in tables.items() if table.shape[1] > 1}


def _written(values: pd.Series, write: str) -> pd.Series:
    return values.map(lambda value: "–" if math.isnan(value) else format(value, write))


def _differences(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    rows = {}
    for verdict in verdicts:
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


def _rates(runs: pd.DataFrame) -> pd.DataFrame:
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


def _best(runs: pd.DataFrame) -> pd.DataFrame:
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


def _metrics(runs: pd.DataFrame) -> pd.DataFrame:
    columns = {}
    for metric, name in METRICS.items():
        values = by_seed(runs, metric)
        columns[name] = _written(values.mean(axis=1), ".3f")
        found = effects(values, RANDOM)
        said = {start: f"{x.low:+.3f} to {x.high:+.3f}".replace("-", "−") for start, x in found.items()}
        columns[f"{name}, start − random"] = pd.Series(said, values.index, dtype=object)
    return pd.DataFrame(columns)


def _cost(means: pd.DataFrame, took: pd.Series) -> pd.DataFrame:
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


def _forgetting(means: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "retained before": means["retained_before"].map(number),
            "retained after": means["retained_after"].map(number),
            "change": means["rise"].map(lambda change: number(change, "+")),
        }
    )


def _every_run(runs: pd.DataFrame) -> pd.DataFrame:
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
