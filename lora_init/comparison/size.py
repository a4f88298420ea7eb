"""How large a comparison is: what is asked for or, under a limit of time, the most that comes to an answer in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_init.comparison.budget import RunBudget
from lora_init.comparison.outlook import Pace, seconds_of_run, seconds_of_statistics
from lora_init.comparison.runs import SWEEP_SEEDS, RunPlan
from lora_init.comparison.tasks import CLASSIFICATION, REPORT, SELECTION, LoadingOptions
from lora_init.comparison.training import Training
from lora_init.comparison.workbench import Workbench
from lora_init.errors import LoraInitError
from lora_init.progress import duration
from lora_init.rates.learning_rate import LearningRate
from lora_init.starts.starts import DEFAULT, DEFAULT_FOR_CLASSES, RANDOM


@dataclass(frozen=True)
class Size:
    """What a limit of time may make smaller, where it was left open."""

    steps: int = 100
    report: int = REPORT  # examples at most
    selection: int = SELECTION
    seeds: int = 5  # that the time must be enough for; more are added while time is left
    starts: int = 2  # that are compared with random, where they were left open
    tuned: bool = True  # whether these are run at all learning rates, and not at the rate of a forward pass alone


# From all that is done without a limit to the least that can be an answer.
SIZES = (
    Size(),
    Size(100, 128, 64, 5, tuned=False),
    Size(100, 128, 64, 4, starts=1, tuned=False),
    Size(64, 128, 64, 4, starts=1, tuned=False),
    Size(48, 96, 48, 3, starts=1, tuned=False),
    Size(32, 64, 32, 3, starts=1, tuned=False),
    Size(24, 64, 32, 3, starts=1, tuned=False),
)


@dataclass(frozen=True)
class RequestedSize:
    """What a user has said of the size; None leaves it open."""

    loading: LoadingOptions
    steps: int | None
    batch_size: int
    warmup: float
    evaluation_points: Sequence[int] | None
    starts: Sequence[Any] | None = ()  # None leaves them open, too
    rates: Mapping[str, LearningRate] = field(default_factory=dict)  # of each start, if none were asked for

    def training(self, size: Size = SIZES[0]) -> Training:
        """Return how every run trains."""
        steps = self.steps or size.steps
        points = self.evaluation_points
        if points is None:
            points = []
            if size == SIZES[0]:  # a smaller size has no time for a curve
                points = [round(steps * i / 4) for i in (1, 2, 3)]
        return Training(steps, self.batch_size, self.warmup, sorted({0, steps, *points}))

    def folds(self, size: Size) -> tuple[int | None, int | None]:
        """Return how many examples to report and to select by there may be at most; None for what was asked for."""
        report = size.report if self.loading.report_samples is None else None
        selection = size.selection if self.loading.selection_samples is None else None
        return report, selection

    def lay_out(self, bench: Workbench, plan: RunPlan, size: Size) -> tuple[Workbench, RunPlan]:
        """Return the workbench and the plan of a comparison of this size."""
        starts = list(plan.starts)
        if self.starts is None:
            bases = self._first_bases(bench, plan, size)
            starts = [start for start in starts if start.base in bases]
        training = self.training(size)
        if self.rates:
            rates = {name: rate.of_steps(training.steps).rate for name, rate in self.rates.items()}
            plan = replace(plan, learning_rates=[], recommended=rates)
        # What was measured before training is of other examples.
        bench = replace(bench, task=bench.task.cut(*self.folds(size)), training=training, _before={})
        return bench, replace(plan, starts=starts, tuned=size.tuned or bool(plan.learning_rates))

    @staticmethod
    def _first_bases(bench: Workbench, plan: RunPlan, size: Size) -> list[str]:
        """List the starts that a comparison of this size has, the recommended one for the task first after random."""
        recommended = DEFAULT_FOR_CLASSES if bench.task.kind == CLASSIFICATION else DEFAULT
        bases = [RANDOM, recommended, *(start.base for start in plan.starts)]
        return list(dict.fromkeys(bases))[: 1 + size.starts]


def fit(lay_out: Callable[[Size], tuple[Workbench, RunPlan]], pace: Pace, budget: RunBudget, is_open: bool) -> Size:
    """Return the largest size that comes to an answer in the time that is left.

    If the smallest size takes longer, it is refused, unless the steps were asked for (`is_open` is false): the runs of
    such a comparison may be done in several calls.
    """
    for size in SIZES:
        needed = _seconds_to_answer(*lay_out(size), size.seeds, pace)
        if budget.fits(1.1 * needed):  # what is estimated is not exact
            return size
    if not is_open:
        return SIZES[0]
    bench, plan = lay_out(SIZES[-1])
    raise LoraInitError(
        f"within {duration(budget.seconds or 0.0)} there is no answer: the least time for one is about "
        f"{duration(1.1 * needed + budget.spent)}: {', '.join(map(str, plan.starts))}, {bench.training.steps} steps of "
        f"{pace.step:.2g} s a run, {SIZES[-1].seeds} seeds. {_levers(bench, plan, needed, pace)}. Or give it that by "
        "{time}, shorten examples by {max_length}, take fewer in a batch by {batch_size}, or choose a smaller model.",
        time=...,
        max_length=...,
        batch_size=...,
        learning_rates=...,
        seeds=SIZES[-1].seeds - 1,
        steps=bench.training.steps // 2,
    )


def _levers(bench: Workbench, plan: RunPlan, needed: float, pace: Pace) -> str:
    """Write what would save time, the most first."""
    seeds, half = SIZES[-1].seeds, bench.training.steps // 2
    shorter = replace(bench, training=replace(bench.training, steps=half, evaluation_points=[0, half]))
    single_rate = replace(plan, learning_rates=[*plan.learning_rates, 1e-3][:1])  # any rate: its number alone counts
    seconds_with = {
        "a single one of {learning_rates}": _seconds_to_answer(bench, single_rate, seeds, pace),
        "{seeds}": _seconds_to_answer(bench, plan, seeds - 1, pace),
        "{steps}": _seconds_to_answer(shorter, plan, seeds, pace),
    }
    phrases = []
    for name, seconds in sorted(seconds_with.items(), key=lambda item: item[1]):
        phrases.append(f"{name} saves {duration(1.1 * (needed - seconds))}")
    return ", ".join(phrases)


def _seconds_to_answer(bench: Workbench, plan: RunPlan, n_seeds: int, pace: Pace) -> float:
    """Estimate the runs on so many seeds, a rate beyond the edge, random for twice the steps, and the best adapter."""
    plan = replace(plan, seeds=plan.seeds[:n_seeds])
    runs = plan.runs(plan.starts, {})
    # A rate beyond the edge is swept, random for twice the steps counts as two runs a seed, and the adapter as one.
    n_runs = len(runs) + SWEEP_SEEDS + 2 * len(plan.seeds) + 1
    return n_runs * seconds_of_run(bench, pace) + seconds_of_statistics(bench, pace, runs)
