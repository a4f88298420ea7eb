"""The tables of a comparison as text, for terminal, Markdown and HTML alike. What each shows, the template says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from lora_init.comparison.findings import Summary, Verdict, interval, number, paired, rate_text, signed
from lora_init.comparison.runs import METRICS, RANDOM, Results

_METRIC_NAMES = {"accuracy": "accuracy", "macro_f1": "macro F1", "mcc": "MCC"}


def run_tables(summary: Summary) -> dict[str, pd.DataFrame]:
    """Make all tables that there is something to put in, without columns that are empty throughout.

    Returns:
        Tables of text by name; the first column of each names the row.
    """
    results = summary.results
    if results.frame.empty:
        return {}
    tables = {"differences": _differences(summary.verdicts), "learning_rates": _rates(results)}
    if results.best:
        tables |= {
            "best": _best(results),
            "metrics": _metrics(results),
            "cost": _cost(results),
            "forgetting": _forgetting(results),
        }
    tables = {name: table.fillna("–").rename_axis("start").reset_index() for name, table in tables.items()}
    tables["runs"] = _every_run(results)
    tables = {name: table.loc[:, (table != "–").any()] for name, table in tables.items()}
    return {name: table for name, table in tables.items() if table.shape[1] > 1}


def _written(values: pd.Series, write: str) -> pd.Series:
    return values.map(lambda value: "–" if math.isnan(value) else format(value, write))


def _differences(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    rows = {
        verdict.label: {
            "mean difference": signed(verdict.mean),
            "95 % interval": "–" if verdict.low is None else f"{signed(verdict.low)} to {signed(verdict.high)}",
            "pairs": str(len(verdict.differences)),
            "verdict": verdict.outcome,
        }
        for verdict in verdicts
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def _rates(results: Results) -> pd.DataFrame:
    cells = {}
    for (label, rate), runs in results.frame.groupby(["label", "learning_rate"], sort=False):
        star = "*" if results.best.get(label) == rate else ""
        cells[label, rate] = _rate_cell(runs) or f"{number(results.means[label, rate])}{star}"
    table = pd.Series(cells).unstack().reindex(index=list(results.variants), columns=results.rates)
    return table.rename(columns=rate_text)


def _rate_cell(runs: pd.DataFrame) -> str:
    ended = runs["status"].value_counts()
    if "unstable" in ended:
        return f"unstable, {ended['unstable']} of {ended['unstable'] + ended.get('finished', 0)}"
    return "" if "finished" in ended else "failed"


def _best(results: Results) -> pd.DataFrame:
    losses, first = results.by_seed(), results.by_seed("first_loss")
    labels = pd.Series(losses.index, losses.index)
    target = results.counted[results.counted["label"] == RANDOM.label]["loss"].min()
    gammas = results.at_best.groupby("label")["gamma"].unique()
    return pd.DataFrame(
        {
            "rate": labels.map(results.best).map(rate_text),
            "runs": losses.count(axis=1).map(str),
            "mean loss": losses.mean(axis=1).map(number),
            "lowest to highest": losses.min(axis=1).map(number) + " to " + losses.max(axis=1).map(number),
            "steps to random's best": labels.map(lambda label: _steps_cell(results, label, target)),
            "loss at step 0": first.mean(axis=1).map(number),
            "gamma": labels.map(gammas).map(
                lambda found: ", ".join(f"{g:g}" for g in sorted(g for g in found if g == g))
            ),
        }
    ).replace("", "–")


def _steps_cell(results: Results, label: str, target: float) -> str:
    """Say at which evaluation each run of a start is first as good as the target."""
    runs = results.at_best[results.at_best["label"] == label]
    steps = []
    for points, losses in zip(runs["evaluation_points"], runs["validation_loss"], strict=True):
        reached = [step for step, loss in zip(points, losses, strict=True) if loss <= target]
        steps.append(str(reached[0]) if reached else "never")
    return "–" if math.isnan(target) else ", ".join(steps)


def _metrics(results: Results) -> pd.DataFrame:
    columns = {}
    for metric in METRICS:
        values = results.by_seed(metric)
        columns[_METRIC_NAMES[metric]] = _written(values.mean(axis=1), ".3f")
        ends = {label: interval(paired(results, label, metric).values()) for label in values.index}
        columns[f"{_METRIC_NAMES[metric]}, start − random"] = pd.Series(
            {
                label: f"{found[0]:+.3f} to {found[1]:+.3f}".replace("-", "−")
                for label, found in ends.items()
                if found and label != RANDOM.label
            },
            values.index,
            dtype=object,
        )
    return pd.DataFrame(columns)


def _cost(results: Results) -> pd.DataFrame:
    means = results.at_best.groupby("label", sort=False).mean(numeric_only=True)
    return pd.DataFrame(
        {
            "parameters": _written(means["trainable_parameters"], ",.0f"),
            "scale of A": means["a_scale"].map(number),
            "first gradient": means["gradient_norm"].map(number),
            "start, s": _written(means["initialisation_seconds"], ",.1f"),
            "passes": _written(means["initialisation_passes"], ",.0f"),
            "training, s": _written(means["training_seconds"], ",.1f"),
            "peak, MB": _written(means["peak_memory_bytes"] / 1e6, ",.0f"),
        }
    )


def _forgetting(results: Results) -> pd.DataFrame:
    means = results.at_best.groupby("label", sort=False).mean(numeric_only=True)
    return pd.DataFrame(
        {
            "retained before": means["retained_before"].map(number),
            "retained after": means["retained_after"].map(number),
            "change": (means["retained_after"] - means["retained_before"]).map(signed),
            "intruders": _written(means["intruders"], ",.1f"),
            "of": _written(means["intruders_of"], ",.0f"),
            "share of energy": _written(means["intruder_energy"], ".1%"),
        }
    )


def _every_run(results: Results) -> pd.DataFrame:
    frame = results.frame
    return pd.DataFrame(
        {
            "start": frame["label"],
            "rate": frame["learning_rate"].map(rate_text),
            "seed": frame["seed"].map(str),
            "status": frame["status"],
            "validation loss": frame["validation_loss"].map(lambda losses: " ".join(map(number, losses or [])) or "–"),
            **{_METRIC_NAMES[metric]: _written(frame[metric], ".3f") for metric in METRICS},
            "retained": frame["retained_after"].map(number),
            "training, s": _written(frame["training_seconds"], ",.1f"),
        }
    )
