"""The runs of a comparison: which belong to it, the directory that keeps them, and each start's best learning rate."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from filelock import FileLock, Timeout

from lora_init.adapters.initializers import GRADIENT_METHODS
from lora_init.comparison.starts import PEFT_STARTS
from lora_init.errors import LoraInitError
from lora_init.files import write_whole

Record = dict[str, Any]


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


@dataclass(frozen=True)
class Run:
    """One training. `learning_rate` is None while it depends on runs that have not ended."""

    variant: Variant
    seed: int
    learning_rate: float | None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Run:
        """Find the run that a record is about."""
        variant = Variant(record["start"], bool(record["matched_scale"]), bool(record["equal_parameters"]))
        return cls(variant, int(record["seed"]), float(record["learning_rate"]))

    @property
    def title(self) -> str:
        """Describe the run in a few words."""
        rate = "best rate" if self.learning_rate is None else f"{self.learning_rate:g}"
        return f"{self.variant.label}, {rate}, seed {self.seed}"

    @property
    def file(self) -> str:
        """The name of its file: no two runs have the same, whatever a start is called."""
        how = "+matched-scale" * self.variant.matched_scale + "+equal-parameters" * self.variant.equal_parameters
        return f"{quote(self.variant.start, safe='')}{how}_{self.learning_rate}_seed{self.seed}.json"


# Starts whose ranks move between layers and with them the number of parameters; eva-frozen-a also trains no A.
_MOVES_RANKS = ("eva", "eva-uncentred", "eva-frozen-a", "gradient-ranks")
# Starts whose A has the size of the random one already, or another on purpose, or is part of a change to the base
# weights, or of a step whose size is that of the product of A and B: nothing to match.
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
class Plan:
    """What is compared: every start at every rate, and on how many seeds.

    `"full"` is every variant at every rate with every seed. `"halving"` is every rate on the first seed, and on the
    others the best of them alone. Should that one be unstable on another seed, the next best takes its place; a variant
    that has no stable rate has no other seeds.

    Attributes:
        starts: Names of starts.
        learning_rates: Tried for every start.
        seeds: Each decides the order of the data and all that is random in a start.
        sweep: `"halving"` or `"full"`.
        match_scale: Also run starts with A scaled to the size of the random one, where that differs.
    """

    starts: Sequence[str]
    learning_rates: Sequence[float]
    seeds: Sequence[int]
    sweep: str
    match_scale: bool = False

    def __post_init__(self) -> None:
        rates, seeds = self.learning_rates, self.seeds
        wrong = [rate for rate in rates if not 0.0 < rate < math.inf]
        if wrong or not rates:
            raise LoraInitError(
                f"learning_rates: {wrong[0] if wrong else 'none'}; expected positive numbers, such as 1e-4."
            )
        if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds) or len(set(rates)) < len(rates):
            raise LoraInitError(
                f"seeds={list(seeds)}, learning_rates={list(rates)}: expected different ones, seeds >= 0."
            )
        if self.sweep not in ("halving", "full"):
            raise LoraInitError(f"sweep={self.sweep!r} is unknown. Choose halving or full.")

    def variants(self, ranks_cost_the_same: bool) -> list[Variant]:
        """List each start, and beside it what makes it comparable.

        Args:
            ranks_cost_the_same: Whether a rank costs as many parameters in one layer as in another; if not, starts that
                move ranks, or train no A, are also run at the parameter count of the random start.
        """
        plain = [Variant(start) for start in self.starts]
        moving = [v for v in plain if v.start in _MOVES_RANKS]
        differing = [v for v in moving if v.start == "eva-frozen-a" or not ranks_cost_the_same]
        equal = [replace(v, equal_parameters=True) for v in differing]
        matched = [replace(v, matched_scale=True) for v in plain if self.match_scale and v.start not in _UNMATCHED]
        return [*plain, *equal, *matched]

    def runs(self, variants: Sequence[Variant], records: Mapping[Run, Record]) -> list[Run]:
        """List all runs in the order to do them in, those that have ended among them.

        Args:
            variants: From `variants`.
            records: Runs that have ended.
        """
        first = [Run(variant, self.seeds[0], rate) for rate in self.learning_rates for variant in variants]
        if self.sweep == "full":
            return first + [Run(v, s, rate) for s in self.seeds[1:] for rate in self.learning_rates for v in variants]
        best = Results.of(
            record
            for run, record in records.items()
            if run.seed in self.seeds and run.learning_rate in self.learning_rates
        ).best
        swept = {v for v in variants if all(run in records for run in first if run.variant == v)}
        # Seed by seed, so that what is there when it is stopped can be paired.
        return first + [
            Run(variant, seed, best[variant.label] if variant in swept else None)
            for seed in self.seeds[1:]
            for variant in variants
            if variant not in swept or variant.label in best
        ]


def check_fair(records: Iterable[Mapping[str, Any]]) -> None:
    """Make sure that runs that are compared were given the same data in the same order.

    Raises:
        LoraInitError: Runs of one seed saw other data.
    """
    order: dict[int, tuple[str, str]] = {}
    for record in records:
        if record["status"] == "finished":
            name = f"{record['start']} at {record['learning_rate']:g}"
            seen, other = order.setdefault(record["seed"], (record["data_order"], name))
            if seen != record["data_order"]:
                raise LoraInitError(
                    f"seed {record['seed']}: {name} saw other data than {other}. The data or the library changed "
                    "between runs; start again in another directory."
                )


METRICS = ("accuracy", "macro_f1", "mcc")
_NUMBERS = (
    "trainable_parameters", "a_scale", "gamma", "gradient_norm", "initialisation_seconds", "initialisation_passes",
    "training_seconds", "peak_memory_bytes",
)  # fmt: skip
_OTHERS = ("error", "ranks", "evaluation_points", "validation_loss", "retain_loss")


@dataclass(frozen=True, eq=False)
class Results:
    """What the runs measured, as a table.

    Attributes:
        frame: A row for each run, in the order random, then that of the settings, by rate and seed. Its columns are
            those of `RunRecord`, and `label`, `loss` (the final validation loss, NaN unless finished), `first_loss`,
            the metrics, `retained_before`, `retained_after`, `intruders`, `intruders_of` and `intruder_energy`.
        best: The learning rate at which each start is compared, by label; a start without a rate that counts has none.
    """

    frame: pd.DataFrame
    best: dict[str, float]

    @classmethod
    def of(cls, records: Iterable[Record], starts: Iterable[str] = ()) -> Results:
        """Arrange records, those of random first, then in the order of `starts`."""
        records = list(records)
        order = list(dict.fromkeys([RANDOM.start, *starts, *(record["start"] for record in records)]))

        def place(record: Record) -> tuple[Any, ...]:
            how = record["matched_scale"] + 2 * record["equal_parameters"]
            return order.index(record["start"]), how, record["learning_rate"], record["seed"]

        rows = [_row(record) for record in sorted(records, key=place)]
        frame = pd.DataFrame(rows, columns=list(_row(_NO_RUN)))
        counted = _counted(frame)
        best = {label: float(_means(own).idxmin()[1]) for label, own in counted.groupby("label", sort=False)}
        return cls(frame, best)

    @property
    def variants(self) -> dict[str, Variant]:
        """The variants that have runs, by label."""
        return {row.label: row.variant for row in self.frame.itertuples()}

    @property
    def rates(self) -> list[float]:
        """Every learning rate that was tried, rising."""
        return sorted(self.frame["learning_rate"].unique())

    @cached_property
    def counted(self) -> pd.DataFrame:
        """The finished runs of the rates that count: those with no unstable run."""
        return _counted(self.frame)

    @cached_property
    def at_best(self) -> pd.DataFrame:
        """The finished runs at each start's best rate."""
        return self.counted[self.counted["learning_rate"] == self.counted["label"].map(self.best)]

    @cached_property
    def shared_seeds(self) -> set[int]:
        """The seeds that finished for every start and rate that counts; empty if there is none."""
        return _shared_seeds(self.counted)

    @cached_property
    def means(self) -> pd.Series:
        """Mean final loss by label and rate, over the shared seeds, or over each one's own if there are none."""
        return _means(self.counted)

    def by_seed(self, column: str = "loss") -> pd.DataFrame:
        """Arrange what was measured at the best rates: a row for each start, a column for each seed."""
        found = self.at_best.pivot(index="label", columns="seed", values=column)
        return found.reindex([label for label in self.variants if label in found.index])


_NO_RUN: Record = {"start": "", "matched_scale": False, "equal_parameters": False, "seed": 0, "learning_rate": 0.0}


def _row(record: Record) -> dict[str, Any]:
    """Flatten a record: what is a number becomes one, NaN where it was not measured."""
    run, losses = Run.of(record), record.get("validation_loss") or []
    finite = bool(losses) and all(loss is not None and math.isfinite(loss) for loss in losses)
    status = record.get("status", "failed")
    status = "unstable" if status == "finished" and not finite else status
    before, after = record.get("retain_loss") or (None, None)
    metrics, intruders = record.get("metrics") or {}, record.get("intruders") or {}
    numbers = {
        **{name: record.get(name) for name in _NUMBERS},
        **{name: metrics.get(name) for name in METRICS},
        "first_loss": losses[0] if losses else None,
        "loss": losses[-1] if status == "finished" else None,
        "retained_before": before,
        "retained_after": after,
        "intruders": intruders.get("count"),
        "intruders_of": intruders.get("of"),
        "intruder_energy": intruders.get("energy_share"),
    }
    return {
        "label": run.variant.label,
        "variant": run.variant,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "status": status,
        **{name: record.get(name) for name in _OTHERS},
        **{name: math.nan if value is None else float(value) for name, value in numbers.items()},
    }


def _counted(frame: pd.DataFrame) -> pd.DataFrame:
    unstable = frame["status"].eq("unstable").groupby([frame["label"], frame["learning_rate"]]).transform("any")
    return frame[frame["status"].eq("finished") & ~unstable.astype(bool)]


def _shared_seeds(counted: pd.DataFrame) -> set[int]:
    seeds = [set(cell["seed"]) for _, cell in counted.groupby(["label", "learning_rate"])]
    return set.intersection(*seeds) if seeds else set()


def _means(counted: pd.DataFrame) -> pd.Series:
    """Compare rates on the seeds that all of them have: with `halving` those are the seeds of the sweep."""
    seeds = _shared_seeds(counted)
    kept = counted[counted["seed"].isin(seeds)] if seeds else counted
    return kept.groupby(["label", "learning_rate"])["loss"].mean()


SETTINGS_FILE, RUNS, LOCK, HOLDER = "settings.json", "runs", ".lock", ".lock-holder"
# More of these may be asked of a directory that has some: they shape no single run.
_GROWING = ("starts", "learning_rates", "seeds")
_FREE = ("sweep", "match_scale", "threads", "versions", "processor", "command")


class RunDirectory:
    """The runs of a comparison in their directory, one file each. `open_runs` makes it.

    Attributes:
        path: Where it is.
        settings: What all runs share, and the starts, rates and seeds asked for so far.
        records: The runs that ended.
    """

    def __init__(self, path: Path, settings: dict[str, Any], records: dict[Run, Record]) -> None:
        self.path, self.settings, self.records = path, settings, records

    def add(self, record: Mapping[str, Any]) -> None:
        """Keep a run that ended; it is on the disk, whole, when this returns.

        Raises:
            LoraInitError: It cannot be written; the other runs are as they were.
        """
        run, text = Run.of(record), json.dumps(_finite(record), allow_nan=False)
        with _said_in_one_line(self.path):
            write_whole(self.path / RUNS / run.file, f"{text}\n".encode())
        self.records[run] = json.loads(text)


@contextmanager
def open_runs(path: Path, settings: Mapping[str, Any]) -> Iterator[RunDirectory]:
    """Make the directory of a comparison, or go on with what is there; no other process can meanwhile.

    Args:
        path: Directory.
        settings: What all runs share. Starts, rates and seeds are added to those of the directory.

    Raises:
        LoraInitError: The directory has runs with other settings, holds something else, cannot be written, or is in use
            by another process.
    """
    with _said_in_one_line(path):
        path.mkdir(parents=True, exist_ok=True)
        if not (path / SETTINGS_FILE).exists():
            _refuse_old(path)
            if {entry.name for entry in path.iterdir()} - {LOCK, HOLDER, RUNS}:
                raise LoraInitError(
                    f"{path} is not empty and has no {SETTINGS_FILE}, so it holds no comparison. "
                    "Name another directory."
                )
    with _held(path):
        with _said_in_one_line(path):
            (path / RUNS).mkdir(exist_ok=True)
            merged = dict(settings)
            if (path / SETTINGS_FILE).exists():
                merged = _merged(path, read_settings(path), merged)
            write_whole(path / SETTINGS_FILE, (json.dumps(merged, indent=2) + "\n").encode())
        yield RunDirectory(path, merged, {Run.of(record): record for record in read_runs(path)})


def peek(path: Path, settings: Mapping[str, Any]) -> dict[Run, Record]:
    """Read the runs in a directory, if there are any, and change nothing.

    Raises:
        LoraInitError: They have other settings, or are damaged.
    """
    _refuse_old(path)
    if not (path / SETTINGS_FILE).exists():
        return {}
    _merged(path, read_settings(path), settings)
    return {Run.of(record): record for record in read_runs(path)}


def read_settings(path: Path) -> dict[str, Any]:
    """Read `settings.json`.

    Raises:
        LoraInitError: It is missing or no JSON object, or the directory is of an older version.
    """
    _refuse_old(path)
    file = path / SETTINGS_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoraInitError(f"{file}: cannot be read ({error}). Name the directory of a comparison.") from error
    if not isinstance(content, dict):
        raise LoraInitError(f"{file}: not an object. Name the directory of a comparison.")
    return content


def read_runs(path: Path) -> list[Record]:
    """Read the runs of a directory, sorted by the names of their files.

    Raises:
        LoraInitError: A file is not a run.
    """
    found = []
    for file in sorted((path / RUNS).glob("*.json")):
        try:
            record = json.loads(file.read_bytes())
            Run.of(record)
        except (ValueError, KeyError, TypeError) as error:
            raise LoraInitError(f"{file}: not a run ({error!r}). Remove the file; the run is repeated.") from error
        found.append(record)
    return found


def _refuse_old(path: Path) -> None:
    if (path / "runs.jsonl").exists():
        raise LoraInitError(
            f"{path} is a comparison of an older version, which kept all runs in runs.jsonl; this one keeps a file for "
            "each run and does not read it. Name another directory."
        )


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold the directory; a second process says at once who does."""
    holder = path / HOLDER
    try:
        lock = FileLock(path / LOCK, timeout=0).acquire()
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise LoraInitError(
            f"{path} is in use by {who}. Wait until that comparison has ended, or name another directory."
        ) from None
    with lock:
        with _said_in_one_line(path):
            write_whole(holder, f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            with suppress(OSError):
                holder.unlink()


@contextmanager
def _said_in_one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LoraInitError(
            f"{path}: cannot be written: {error.strerror or error}. The runs that ended before are kept. "
            "Free some space and give the same command again."
        ) from error


def _merged(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    differing = [
        f"{name} was {_short(old.get(name))}, now {_short(new.get(name))}"
        for name in [*new, *(name for name in old if name not in new)]
        if name not in (*_GROWING, *_FREE) and old.get(name) != json.loads(json.dumps(new.get(name)))
    ]
    if differing:
        raise LoraInitError(
            f"{path} has runs of another configuration: {'; '.join(differing)}. "
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
