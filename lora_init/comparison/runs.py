"""Runs of a comparison by start, learning rate and seed: which rate is a start's best, and which runs don't count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lora_init.comparison.run_log import Record


@dataclass(frozen=True)
class Variant:
    """A start and how it was run.

    Attributes:
        start: Name of the start.
        matched_scale: The rows of A were scaled to the random start's norm.
        equal_parameters: The ranks were chosen for as many parameters as the random start has.
    """

    start: str
    matched_scale: bool = False
    equal_parameters: bool = False

    @property
    def label(self) -> str:
        """The name in tables and plots."""
        how = [self.matched_scale * "matched scale", self.equal_parameters * "equal parameters"]
        return ", ".join([self.start, *filter(None, how)])


RANDOM = Variant("random")


@dataclass
class Cell:
    """The runs of a variant at one learning rate, by seed."""

    finished: dict[int, Record] = field(default_factory=dict)
    unstable: dict[int, Record] = field(default_factory=dict)
    failed: dict[int, Record] = field(default_factory=dict)

    @property
    def runs(self) -> dict[int, Record]:
        """All runs, whatever became of them."""
        return dict(sorted({**self.finished, **self.unstable, **self.failed}.items()))

    def status(self, seed: int) -> str:
        """Say what became of a run."""
        return "finished" if seed in self.finished else "unstable" if seed in self.unstable else "failed"

    @property
    def counts(self) -> bool:
        """Whether the rate can be averaged: something finished, and nothing was unstable."""
        return bool(self.finished) and not self.unstable

    def mean(self, seeds: Iterable[int] | None = None) -> float | None:
        """Average the final validation loss over seeds; None if the rate doesn't count or none of them finished."""
        losses = [final_loss(run) for seed, run in self.finished.items() if seeds is None or seed in seeds]
        return math.fsum(losses) / len(losses) if losses and self.counts else None


@dataclass(frozen=True)
class Group:
    """All runs of a variant.

    Attributes:
        variant: Which start.
        cells: Runs by learning rate, rising.
        best: The rate to compare at; None if no rate counts.
    """

    variant: Variant
    cells: dict[float, Cell]
    best: float | None

    @property
    def label(self) -> str:
        """The name in tables and plots."""
        return self.variant.label

    @property
    def best_runs(self) -> dict[int, Record]:
        """The finished runs at the best rate, by seed."""
        return self.cells[self.best].finished if self.best is not None else {}


def final_loss(run: Record) -> float:
    """Give a run's last validation loss; NaN if it has none."""
    losses = run.get("validation_loss") or [None]
    return math.nan if losses[-1] is None else float(losses[-1])


def best_rate(records: Iterable[Record]) -> float | None:
    """Pick the learning rate with the lowest mean final validation loss among the runs of one variant.

    Rates are compared on the seeds that all of them have: with `--sweep halving` that is the seed of the sweep. A rate
    where a run was unstable is out, whatever its other runs did. The lower of two equal rates is taken.

    Returns:
        The rate; None if none has a finished run and no unstable one.
    """
    return _best(_cells(records))


def group_runs(records: Iterable[Record], starts: Iterable[str] = ()) -> list[Group]:
    """Sort runs by variant: random first, then the order of `starts`, then that of the records.

    Of two records of one run the later counts.
    """
    by_variant: dict[Variant, list[Record]] = {}
    for record in records:
        variant = Variant(record["start"], bool(record["matched_scale"]), bool(record["equal_parameters"]))
        by_variant.setdefault(variant, []).append(record)
    order = list(dict.fromkeys([RANDOM.start, *starts, *(variant.start for variant in by_variant)]))
    variants = sorted(by_variant, key=lambda v: (order.index(v.start), v.matched_scale + 2 * v.equal_parameters))
    groups = []
    for variant in variants:
        cells = _cells(by_variant[variant])
        groups.append(Group(variant, cells, _best(cells)))
    return groups


def shared_seeds(cells: Iterable[Cell]) -> set[int]:
    """Find the seeds that finished in every cell that counts; those are what rates can be compared on."""
    seeds = [set(cell.finished) for cell in cells if cell.counts]
    return set.intersection(*seeds) if seeds else set()


def _cells(records: Iterable[Record]) -> dict[float, Cell]:
    latest = {(record["learning_rate"], record["seed"]): record for record in records}
    cells: dict[float, Cell] = {}
    for (rate, seed), run in sorted(latest.items(), key=lambda item: item[0]):
        cell = cells.setdefault(rate, Cell())
        status = run["status"]
        if status == "finished" and not _finite(run):
            status = "unstable"
        getattr(cell, status)[seed] = run
    return cells


def _finite(run: Record) -> bool:
    losses = run.get("validation_loss") or [None]
    return all(loss is not None and math.isfinite(loss) for loss in losses)


def _best(cells: Mapping[float, Cell]) -> float | None:
    seeds = shared_seeds(cells.values()) or None
    means = {rate: mean for rate, cell in cells.items() if (mean := cell.mean(seeds)) is not None}
    return min(means, key=lambda rate: means[rate], default=None)


def random_group(groups: Iterable[Group]) -> Group | None:
    """Find the runs of plain random, which all others are compared with; None without a rate that counts."""
    return next((group for group in groups if group.variant == RANDOM and group.best is not None), None)


def table_seeds(groups: Iterable[Group]) -> set[int]:
    """Find the seeds on which all starts and rates can be compared; empty if no seed was run everywhere."""
    return shared_seeds(cell for group in groups for cell in group.cells.values())


def mean_at(group: Group, rate: float, seeds: set[int]) -> float | None:
    """Average the final validation loss at a rate over those seeds, or over a cell's own if there are none."""
    return group.cells[rate].mean(seeds or None) if rate in group.cells else None


def best_of_all(groups: Iterable[Group], seeds: set[int]) -> float:
    """Give the lowest mean final validation loss of all starts and rates; NaN if nothing finished."""
    means = (mean_at(group, rate, seeds) for group in groups for rate in group.cells)
    return min((mean for mean in means if mean is not None), default=math.nan)


def parameters(group: Group) -> int | None:
    """Give the trainable parameters of a variant; None if no run got so far."""
    runs = [run for cell in group.cells.values() for run in cell.runs.values()]
    return next((int(run["trainable_parameters"]) for run in runs if run.get("trainable_parameters")), None)
