"""Runs of a comparison by start, learning rate and seed: which rate is a start's best, and which runs don't count."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_init.adapters.initializers import GRADIENT_METHODS
from lora_init.comparison.starts import PEFT_STARTS
from lora_init.errors import LoraInitError
from lora_init.files import write_whole

SETTINGS_FILE, RUNS_FILE = "settings.json", "runs.jsonl"
# What tells one run from another.
KEYS = ("task", "start", "matched_scale", "equal_parameters", "seed", "learning_rate")
# More of these may be asked of a directory that has some: they shape no single run.
_GROWING = ("starts", "learning_rates", "seeds")
_FREE = ("sweep", "match_scale", "threads", "versions", "processor", "command")

Record = dict[str, Any]


class RunLog:
    """The runs of a comparison in their directory. Opening one makes it, or goes on with what is there.

    Attributes:
        directory: Where it is.
        settings: What all runs share, and the starts, rates and seeds asked for so far.
        records: The runs that ended, by `KEYS`; of two for the same run the later.

    Raises:
        LoraInitError: The directory has runs with other settings, or holds something else, or cannot be written.
    """

    def __init__(self, directory: str | Path, settings: Mapping[str, Any]) -> None:
        self.directory = Path(directory).expanduser()
        self._runs = self.directory / RUNS_FILE
        self.settings = dict(settings)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if (self.directory / SETTINGS_FILE).exists():
                self.settings = _merged(self.directory, read_settings(self.directory), self.settings)
            elif any(self.directory.iterdir()):
                raise LoraInitError(
                    f"{self.directory} is not empty and has no {SETTINGS_FILE}, so it holds no comparison. "
                    "Name another directory."
                )
            write_whole(self.directory / SETTINGS_FILE, (json.dumps(self.settings, indent=2) + "\n").encode())
            self._drop_torn_line()
        except OSError as error:
            raise self._unwritable(error) from error
        self.records = {run_key(record): record for record in read_runs(self.directory)}

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a run that ended; it is on the disk when this returns.

        Raises:
            LoraInitError: It cannot be written; the runs before it are as they were.
        """
        line = (json.dumps(_finite(record), allow_nan=False) + "\n").encode()
        size = self._runs.stat().st_size if self._runs.exists() else 0
        try:
            with self._runs.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.truncate(self._runs, size)  # half a line
            raise self._unwritable(error) from error
        self.records[run_key(record)] = json.loads(line)

    def _drop_torn_line(self) -> None:
        """Cut off what a run that was killed while it wrote has left."""
        if self._runs.exists():
            content = self._runs.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(self._runs, whole)

    def _unwritable(self, error: OSError) -> LoraInitError:
        return LoraInitError(
            f"{self.directory}: cannot be written: {error.strerror or error}. The runs that ended before are kept. "
            "Free some space and give the same command again."
        )


def peek(directory: Path, settings: Mapping[str, Any]) -> dict[tuple[Any, ...], Record]:
    """Read the runs in a directory, if there are any, and change nothing.

    Raises:
        LoraInitError: They have other settings, or are damaged.
    """
    if not (directory / SETTINGS_FILE).exists():
        return {}
    _merged(directory, read_settings(directory), settings)
    return {run_key(record): record for record in read_runs(directory)}


def run_key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Tell a run from others."""
    return tuple(record[name] for name in KEYS)


def read_settings(directory: Path) -> dict[str, Any]:
    """Read `settings.json`.

    Raises:
        LoraInitError: It is missing or no JSON object.
    """
    path = directory / SETTINGS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoraInitError(f"{path}: cannot be read ({error}). Name the directory of a comparison.") from error
    if not isinstance(content, dict):
        raise LoraInitError(f"{path}: not an object. Name the directory of a comparison.")
    return content


def read_runs(directory: Path) -> list[Record]:
    """Read `runs.jsonl`, whole lines only; of two for the same run the later, in its own place.

    Raises:
        LoraInitError: A line is not a run.
    """
    path = directory / RUNS_FILE
    if not path.exists():
        return []
    found: dict[tuple[Any, ...], Record] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            key = run_key(record)
        except (ValueError, KeyError, TypeError) as error:
            raise LoraInitError(
                f"{path}, line {number}: not a run ({error}). Remove the line; the run is repeated."
            ) from error
        found.pop(key, None)
        found[key] = record
    return list(found.values())


def _merged(directory: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    differing = [
        f"{name} was {_short(old.get(name))}, now {_short(new.get(name))}"
        for name in [*new, *(name for name in old if name not in new)]
        if name not in (*_GROWING, *_FREE) and old.get(name) != json.loads(json.dumps(new.get(name)))
    ]
    if differing:
        raise LoraInitError(
            f"{directory} has runs of another configuration: {'; '.join(differing)}. "
            "Name another directory, or use the settings of this one."
        )
    grown = {name: [*old[name], *(value for value in new[name] if value not in old[name])] for name in _GROWING}
    return {**new, **grown}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _finite(value: Any) -> Any:
    """Write NaN and infinity as null, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


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
        if status == "finished" and not _all_finite(run):
            status = "unstable"
        getattr(cell, status)[seed] = run
    return cells


def _all_finite(run: Record) -> bool:
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


# Starts whose ranks move between layers and with them the number of parameters; eva-frozen-a also trains no A.
_MOVES_RANKS = ("eva", "eva-uncentred", "eva-frozen-a", "gradient-ranks")
# Starts whose A has the size of the random one already, or another on purpose, or is part of a change to the base
# weights or of a step whose size is A's and B's together: nothing to match.
_UNMATCHED = (
    "random",
    "random-scaled",
    "natural-gradient-scaled",
    "eva-ranks",
    "gradient-ranks",
    *PEFT_STARTS,
    *(name for name, method in GRADIENT_METHODS.items() if method.gamma),
)


@dataclass(frozen=True)
class Run:
    """One training. `learning_rate` is None while it depends on runs that have not ended."""

    variant: Variant
    seed: int
    learning_rate: float | None

    def key(self, task: str) -> tuple[Any, ...]:
        """Return what `run_log.run_key` makes of its record."""
        v = self.variant
        return task, v.start, v.matched_scale, v.equal_parameters, self.seed, self.learning_rate

    @property
    def title(self) -> str:
        """Describe the run in a few words."""
        rate = "best rate" if self.learning_rate is None else f"{self.learning_rate:g}"
        return f"{self.variant.label}, {rate}, seed {self.seed}"


def variants(starts: Iterable[str], match_scale: bool, ranks_cost_the_same: bool) -> list[Variant]:
    """List each start, and beside it what makes it comparable.

    Args:
        starts: Names of starts.
        match_scale: Also run starts with A scaled to the size of the random one, where that differs.
        ranks_cost_the_same: Whether a rank costs as many parameters in one layer as in another; if not, starts that
            move ranks, or train no A, are also run at the parameter count of the random start.
    """
    plain = [Variant(start) for start in starts]
    moving = [v for v in plain if v.start in _MOVES_RANKS]
    differing = [v for v in moving if v.start == "eva-frozen-a" or not ranks_cost_the_same]
    equal = [replace(v, equal_parameters=True) for v in differing]
    matched = [replace(v, matched_scale=True) for v in plain if match_scale and v.start not in _UNMATCHED]
    return [*plain, *equal, *matched]


def plan_runs(
    task: str,
    variants: Sequence[Variant],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    sweep: str,
    records: Mapping[tuple[Any, ...], Record],
) -> list[Run]:
    """List all runs in the order to do them in, those that have ended among them.

    `"full"` is every variant at every rate with every seed. `"halving"` is every rate on the first seed, and on the
    others the best of them alone. Should that one be unstable on another seed, the next best takes its place; a variant
    that has no stable rate has no other seeds.

    Args:
        task: Name of the task.
        variants: From `variants`.
        learning_rates: At least one.
        seeds: At least one.
        sweep: `"halving"` or `"full"`.
        records: Runs that have ended, by key.
    """
    first = [Run(variant, seeds[0], rate) for rate in learning_rates for variant in variants]
    if sweep == "full":
        return first + [Run(v, seed, rate) for seed in seeds[1:] for rate in learning_rates for v in variants]
    others: dict[Variant, list[Run]] = {}
    for variant in variants:
        swept = [records.get(run.key(task)) for run in first if run.variant == variant]
        done = [
            record
            for seed in seeds
            for rate in learning_rates
            if (record := records.get(Run(variant, seed, rate).key(task))) is not None
        ]
        best = None if None in swept else best_rate(done)
        if None in swept or best is not None:
            others[variant] = [Run(variant, seed, best) for seed in seeds[1:]]
    # Seed by seed, so that what is there when it is stopped can be paired.
    return first + [runs[i] for i in range(len(seeds) - 1) for runs in others.values()]


def check_fair(records: Iterable[Mapping[str, Any]], own: Container[str] = ()) -> None:
    """Make sure that runs that are compared were given the same: data in the same order, and parameters.

    Args:
        records: Runs that have ended.
        own: Starts of the user's own, which have the size that they have.

    Raises:
        LoraInitError: Runs of one seed saw other data, or starts of one size have other numbers of parameters.
    """
    order: dict[int, tuple[str, str]] = {}
    parameters: dict[str, tuple[int, str]] = {}
    for record in records:
        if record["status"] != "finished":
            continue
        name = f"{record['start']} at {record['learning_rate']:g}"
        seen = order.setdefault(record["seed"], (record["data_order"], name))
        if seen[0] != record["data_order"]:
            raise LoraInitError(
                f"seed {record['seed']}: {name} saw other data than {seen[1]}. The data or the library changed between "
                "runs; start again in another directory."
            )
        size = "frozen" if record["start"] == "eva-frozen-a" else "equal"
        if record["ranks"] is None and record["start"] not in own:
            trained = record["trainable_parameters"]
            count, other = parameters.setdefault(size, (trained, name))
            if count != trained:
                raise LoraInitError(
                    f"{name} trains {trained:,} parameters and {other} {count:,}, with the same ranks. "
                    "They cannot be compared."
                )


def check_plan(
    learning_rates: Sequence[float], seeds: Sequence[int], steps: int, points: Sequence[int], warmup: float, sweep: str
) -> None:
    """Check what a plan is made from.

    Raises:
        LoraInitError: A rate that is not positive, no seed, points that do not rise, or shares outside 0 to 1.
    """
    wrong = [rate for rate in learning_rates if not 0.0 < rate < float("inf")]
    if wrong or not learning_rates:
        raise LoraInitError(
            f"learning_rates: {wrong[0] if wrong else 'none'}; expected positive numbers, such as 1e-4."
        )
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds) or len(set(learning_rates)) < len(learning_rates):
        raise LoraInitError(
            f"seeds={list(seeds)}, learning_rates={list(learning_rates)}: expected different ones, seeds >= 0."
        )
    if steps < 1 or list(points) != sorted(set(points)) or points[0] != 0 or points[-1] != steps:
        raise LoraInitError(f"evaluation points {list(points)}: expected rising steps from 0 to {steps}.")
    if not 0.0 <= warmup < 1.0:
        raise LoraInitError(f"warmup={warmup}: expected a share of the steps, at least 0 and less than 1.")
    if sweep not in ("halving", "full"):
        raise LoraInitError(f"sweep={sweep!r} is unknown. Choose halving or full.")
