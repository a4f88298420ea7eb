"""What a comparison will do, before it does it: runs by start, the split, the time, and what it can show at best."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from lora_init.comparison.effects import detectable
from lora_init.comparison.findings import is_judged
from lora_init.comparison.runs import Record, Run, RunPlan
from lora_init.comparison.starts import StartInputs, prepare
from lora_init.comparison.tasks import CLASSIFICATION, item_length
from lora_init.comparison.training import Training, evaluate, train
from lora_init.comparison.variants import REFERENCE, Variant
from lora_init.comparison.workbench import Workbench
from lora_init.starts.starts import FULL

# How far runs of one start scatter over seeds, as a share of the loss: the median of our comparisons, see
# `benchmarks/results`; 0.2 to 1.6 % on language, 2 to 11 % on classes.
_SCATTER, _SCATTER_OF_CLASSES = 0.005, 0.03
_ENOUGH_SEEDS = 5  # as many as a comparison has by default: with another number, what five could show is listed, too
# A pass for statistics over a forward pass, and one with gradients.
_PASS, _PASS_WITH_GRADIENTS = 1.2, 3.5


@dataclass(frozen=True)
class Pace:
    """Seconds that things take, measured on a batch of usual length."""

    step: float  # of training the random start
    example: float  # scoring it


@dataclass(frozen=True)
class Outlook:
    """What `compare(..., dry_run=True)` says beforehand."""

    starts: list[dict[str, Any]]  # `name`, `rates` with the first seeds, `own_rate` with all, number of `runs`
    swept: list[int]  # seeds that all rates are run with
    others: list[int]  # seeds that only the best rate is run with, and one's own
    folds: dict[str, int]  # examples to train on, to select by, to report
    n_runs: int  # those that ended among them
    ended: int
    may_add: dict[str, int]  # at most: `rates` at the edge, `seeds` under a limit, random for `longer`
    most_runs: int
    pace: Pace
    seconds: float  # for the runs that are left, one after the other
    dial_seconds: float  # of it, to evaluate adapters at several strengths
    most_seconds: float  # if it grows as far as it may
    detectable: dict[int, float]  # by number of seeds: the smallest difference to be shown, as a share of the loss
    scatter: float  # standard deviation of a run as a share of the loss, if it is as in our runs

    def to_dict(self) -> dict[str, Any]:
        """Return it in plain values."""
        return asdict(self)


def look_ahead(
    bench: Workbench, plan: RunPlan, planned: Sequence[Run], ended: Mapping[Run, Record], n_workers: int = 1
) -> Outlook:
    """Report what a comparison will do, and measure one step for the time that it takes."""
    names = _starts_of(plan, planned)
    judged = [start for start in names if is_judged(str(start))]
    swept, seeds = list(plan.swept), list(plan.seeds)
    rows = [_row(start, plan, planned) for start in names]
    pace = measure(bench)
    left = [run for run in planned if run not in ended]
    may_add = _may_add(plan, names, planned, ended, any_judged=bool(judged))
    of_run = seconds_of_run(bench, pace)
    seconds = len(left) * of_run + seconds_of_statistics(bench, pace, left)
    # The same condition as in `Workbench`.
    n_dialed = sum(not run.start.changes_base and run.start.base != FULL for run in left)
    # A longer run of random is counted with twice the steps, the least that `longer_random` asks for.
    most = seconds + sum(may_add.values()) * of_run + may_add["longer"] * bench.training.steps * pace.step
    scatter = _SCATTER_OF_CLASSES if bench.task.kind == CLASSIFICATION else _SCATTER
    differences = {}
    for n in sorted({len(seeds), _ENOUGH_SEEDS}):
        in_deviations = detectable(len(judged), n)
        if in_deviations is not None:  # with one seed, or no start to judge, nothing can be shown
            differences[n] = in_deviations * scatter
    return Outlook(
        starts=rows,
        swept=swept,
        others=[seed for seed in seeds if seed not in swept],
        folds=bench.folds,
        n_runs=len(planned),
        ended=len(planned) - len(left),
        may_add=may_add,
        most_runs=len(planned) + sum(may_add.values()),
        pace=pace,
        seconds=seconds / n_workers,  # as workers share the runs
        dial_seconds=n_dialed * _scored_at_strengths(bench) * pace.example / n_workers,
        most_seconds=most / n_workers,
        detectable=differences,
        scatter=scatter,
    )


def _starts_of(plan: RunPlan, planned: Sequence[Run]) -> list[Variant]:
    """List the starts that have runs: in the order of the plan, and after them those that were added."""
    with_runs = list(dict.fromkeys(run.start for run in planned))
    of_plan = [start for start in plan.starts if start in with_runs]
    return list(dict.fromkeys([*of_plan, *with_runs]))


def _row(start: Variant, plan: RunPlan, planned: Sequence[Run]) -> dict[str, Any]:
    """Describe what is planned with a start."""
    rates, n_runs = set(), 0
    for run in planned:
        if run.start == start:
            n_runs += 1
            if run.learning_rate is not None:  # else it is the best one, which is not known yet
                rates.add(run.learning_rate)
    return {"name": str(start), "rates": sorted(rates), "own_rate": plan.recommended.get(str(start)), "runs": n_runs}


def _may_add(
    plan: RunPlan, names: Sequence[Variant], planned: Sequence[Run], ended: Mapping[Run, Record], any_judged: bool
) -> dict[str, int]:
    """Count the runs that may be added to those planned, by what they are for."""
    later = set(plan.runs(names, ended)).difference(planned)
    return {
        "rates": plan.extend * len(plan.swept) * len(names) if plan.extends else 0,  # counted for one side
        "seeds": len(later),  # under a limit, those of later stages
        "longer": len(plan.seeds) if any_judged else 0,  # one for each seed, should a start be better
    }


def measure(bench: Workbench) -> Pace:
    """Time a step and the scoring of a batch, both for the second time: the first one asks for memory."""
    order = bench.task.order(0, bench.training.steps, bench.training.batch_size)
    sizes = [len(items) * max(map(item_length, items)) for items in order]  # tokens of each batch, padding included
    mean = fmean(sizes)
    nearest = min(range(len(order)), key=lambda i: abs(sizes[i] - mean))
    usual = order[nearest]
    probe = replace(bench.task, train=usual, report=usual, selection=usual)
    single_step = Training(1, len(usual), 0.0, [0, 1])
    prepared = prepare(REFERENCE, StartInputs(bench.loaded.model, bench.shape, 0))
    try:
        for _ in range(2):  # with no loss too high: time is all that is wanted
            result = train(prepared.peft_model, probe, single_step, learning_rate=1e-6, seed=0, plain_loss=math.inf)
        began = time.perf_counter()
        evaluate(prepared.peft_model, probe, usual)
        return Pace(result.training_seconds, (time.perf_counter() - began) / len(usual))
    finally:
        prepared.release()


def seconds_of_run(bench: Workbench, pace: Pace) -> float:
    """Estimate a run: its steps, and the examples that are scored on the way and at the end."""
    task, points = bench.task, len(bench.training.evaluation_points)
    n_choices = sum(len(item.choices) for item in task.report)  # at the end, each option
    scored = len(task.report) * points + len(task.selection) + n_choices
    scored += _n_retained(bench) + _scored_at_strengths(bench)
    return bench.training.steps * pace.step + scored * pace.example


def _scored_at_strengths(bench: Workbench) -> int:
    """Count the examples that are scored at other strengths than 1, at which a run is scored in any case."""
    return max(0, len(bench.strengths) - 1) * (len(bench.task.report) + _n_retained(bench))


def _n_retained(bench: Workbench) -> int:
    """Count the examples of other text whose loss tells forgetting."""
    return sum(len(batch["input_ids"]) for batch in bench.retain or ())


def seconds_of_statistics(bench: Workbench, pace: Pace, left: Iterable[Run]) -> float:
    """Estimate the passes for statistics: one for each seed, number of batches, and kind."""
    passes = set()  # starts and rates share them, see `Workbench.statistics`
    for run in left:
        recipe = run.start.recipe
        if recipe and recipe.reads_data:
            passes.add((run.seed, run.start.batches, recipe.center, recipe.needs_gradient))
    cost = {True: _PASS_WITH_GRADIENTS, False: _PASS}
    n_batches = 0.0  # in forward passes
    for _, batches, _, needs_gradient in passes:
        n_batches += bench.n_batches(batches) * cost[needs_gradient]
    return n_batches * bench.training.batch_size * pace.example
