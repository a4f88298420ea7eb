"""What is read off the runs of a start at its best rate, and the form of a table of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_init.comparison.run_log import Record
from lora_init.comparison.runs import Group, final_loss, random_group

METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1", "mcc": "MCC"}


@dataclass(frozen=True)
class RunTable:
    """A table as text.

    Attributes:
        name: Short, for code that picks one.
        title: What it shows.
        caption: How to read it.
        head: Names of the columns.
        rows: Cells; the first of a row names it.
    """

    name: str
    title: str
    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def metric_values(group: Group | None, metric: str) -> dict[int, float]:
    """Give a metric at the end of a variant's runs at its best rate, by seed; seeds without it are left out."""
    runs = group.best_runs if group else {}
    return {seed: float(v) for seed, run in runs.items() if (v := (run.get("metrics") or {}).get(metric)) is not None}


def all_rates(groups: Iterable[Group]) -> list[float]:
    """List every learning rate that was tried, rising."""
    return sorted({rate for group in groups for rate in group.cells})


def random_target(groups: Sequence[Group]) -> float | None:
    """Give the lowest final validation loss of any finished run of random at a rate that counts; None without one."""
    random = random_group(groups)
    cells = random.cells.values() if random else ()
    return min((final_loss(run) for cell in cells if cell.counts for run in cell.finished.values()), default=None)


def steps_until(run: Record, target: float) -> int | None:
    """Find the first evaluation point at which a run's validation loss is no higher than the target; None if never."""
    points = zip(run["evaluation_points"], run["validation_loss"], strict=False)
    return next((int(step) for step, loss in points if loss is not None and loss <= target), None)


def average(values: Iterable[float | None]) -> float | None:
    """Average what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def retained(run: Record) -> tuple[float, float] | None:
    """Give the loss on retained text before and after a run; None if it was not measured."""
    losses = run.get("retain_loss") or [None]
    return None if None in losses else (float(losses[0]), float(losses[1]))
