"""The tables of a comparison as text, for terminal, Markdown and HTML alike: differences, rates, regret, metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_init.comparison.cost_tables import cost_table, every_run, forgetting_table, scale_table
from lora_init.comparison.paired import paired_difference
from lora_init.comparison.run_measures import (
    METRICS,
    RunTable,
    all_rates,
    average,
    metric_values,
    random_target,
    steps_until,
)
from lora_init.comparison.runs import RANDOM, Group, best_of_all, mean_at, random_group, table_seeds
from lora_init.comparison.verdicts import final_losses, verdicts
from lora_init.comparison.wording import number, rate_text, seed_list, signed

# A smaller relative change of the loss is rounding: of base weights in bfloat16 that gave up what B A adds, say.
_CHANGED = 0.005


def run_tables(groups: Sequence[Group]) -> list[RunTable]:
    """Make all tables that there is something to put in."""
    tables = [
        _differences(groups),
        _rates(groups),
        _regret(groups),
        _best(groups),
        _before_training(groups),
        _metrics(groups),
        scale_table(groups),
        cost_table(groups),
        forgetting_table(groups),
        every_run(groups),
    ]
    return [table for table in tables if table.rows]


def _differences(groups: Sequence[Group]) -> RunTable:
    rows = [
        (v.label, signed(v.pairs.mean), _interval(v.pairs.low, v.pairs.high), str(v.pairs.n), v.outcome)
        for v in verdicts(groups)
    ]
    return RunTable(
        "differences",
        "Difference to random",
        "Final validation loss, start minus random, paired by seed, each at its own best rate. The interval is that "
        "of the paired t-test; below zero is better.",
        ("start", "mean difference", "95 % interval", "pairs", "verdict"),
        rows,
    )


def _interval(low: float | None, high: float | None) -> str:
    return "–" if low is None else f"{signed(low)} to {signed(high)}"


def _metrics(groups: Sequence[Group]) -> RunTable:
    random = random_group(groups)
    known = [metric for metric in METRICS if any(metric_values(group, metric) for group in groups)]
    rows = []
    for group in groups if known else ():
        cells = []
        for metric in known:
            values = metric_values(group, metric)
            pairs = paired_difference(values, metric_values(random, metric))
            mean = average(values.values())
            interval = "–"
            if group.variant != RANDOM and pairs.low is not None:
                interval = f"{pairs.low:+.3f} to {pairs.high:+.3f}".replace("-", "−")
            cells += ["–" if mean is None else f"{mean:.3f}", interval]
        rows.append((group.label, *cells))
    return RunTable(
        "metrics",
        "Metrics",
        "At the end of the runs at each start's best rate: the mean, and the 95 % interval of the difference to "
        "random, paired by seed; above zero is better. The verdicts rest on the loss alone.",
        ("start", *(head for metric in known for head in (METRICS[metric], "start − random"))),
        rows,
    )


def _rates(groups: Sequence[Group]) -> RunTable:
    seeds, rates = table_seeds(groups), all_rates(groups)
    rows = [(group.label, *(_rate_cell(group, rate, seeds) for rate in rates)) for group in groups]
    return RunTable(
        "learning_rates",
        "Final validation loss by learning rate",
        f"{_over(groups)} A star marks the rate at which a start is compared.",
        ("start", *map(rate_text, rates)),
        rows,
    )


def _over(groups: Sequence[Group]) -> str:
    if all(group.best is None for group in groups):
        return "No rate has a finished run and no unstable one."
    if seeds := table_seeds(groups):
        return f"Mean over {seed_list(seeds)}, which every start and rate has."
    return "No seed was run with every start and rate, so each cell averages the seeds it has."


def _rate_cell(group: Group, rate: float, seeds: set[int]) -> str:
    if rate not in group.cells:
        return "–"
    cell = group.cells[rate]
    if cell.unstable:
        ran = len(cell.unstable) + len(cell.finished)
        return f"unstable, {len(cell.unstable)} of {ran}"
    if not cell.finished:
        return "failed"
    return number(cell.mean(seeds or None)) + "*" * (rate == group.best)


def _regret(groups: Sequence[Group]) -> RunTable:
    seeds, rates = table_seeds(groups), all_rates(groups)
    best = best_of_all(groups, seeds)
    rows = [(group.label, *(_regret_cell(group, rate, seeds, best) for rate in rates)) for group in groups]
    return RunTable(
        "regret",
        "Regret by learning rate",
        f"Final validation loss above the best of all starts and rates, {number(best)}: what is lost by staying at a "
        f"rate untuned. {_over(groups)}",
        ("start", *map(rate_text, rates)),
        rows if not math.isnan(best) else [],
    )


def _regret_cell(group: Group, rate: float, seeds: set[int], best: float) -> str:
    loss = mean_at(group, rate, seeds)
    if loss is not None:
        return number(loss - best)
    return "unstable" if rate in group.cells and group.cells[rate].unstable else "–"


def _best(groups: Sequence[Group]) -> RunTable:
    target = random_target(groups)
    rows = []
    for group in groups:
        losses = list(final_losses(group).values())
        if group.best is not None:
            ends = f"{number(min(losses))} to {number(max(losses))}"
            mean = number(average(losses))
            rows.append((group.label, rate_text(group.best), str(len(losses)), mean, ends, _steps_cell(group, target)))
    known = "" if target is None else f", {number(target)}"
    return RunTable(
        "best",
        "Each start at its best rate",
        "Final validation loss over the seeds that finished. Steps: seed by seed, the first evaluation at which the "
        f"final loss of the best random run{known}, is reached.",
        ("start", "rate", "runs", "mean loss", "lowest to highest", "steps to random's best"),
        rows,
    )


def _before_training(groups: Sequence[Group]) -> RunTable:
    rows = []
    plain = _first_losses(random_group(groups))
    for group in groups:
        own = _first_losses(group)
        seeds = own.keys() & plain.keys()
        if any(abs(own[seed] - plain[seed]) > _CHANGED * plain[seed] for seed in seeds):
            gammas = sorted({run["gamma"] for run in group.best_runs.values() if run.get("gamma")})
            means = [number(average(losses[seed] for seed in seeds)) for losses in (plain, own)]
            rows.append((group.label, *means, ", ".join(f"{gamma:g}" for gamma in gammas) or "–"))
    return RunTable(
        "before",
        "Before training",
        "Starts that change the model's output: validation loss of the plain model and at step 0, and the gamma that "
        "was found on training batches set aside.",
        ("start", "plain model", "step 0", "gamma"),
        rows,
    )


def _first_losses(group: Group | None) -> dict[int, float]:
    runs = {} if group is None else group.best_runs
    return {seed: run["validation_loss"][0] for seed, run in runs.items() if run["validation_loss"]}


def _steps_cell(group: Group, target: float | None) -> str:
    if target is None:
        return "–"
    steps = [steps_until(run, target) for run in group.best_runs.values()]
    if not any(step is not None for step in steps):
        return "not reached"
    return ", ".join("never" if step is None else str(step) for step in steps)
