"""The runs of a comparison: which belong to it, the directory that keeps them, and the table that all is read from."""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

import pandas as pd

from lora_init.comparison.variants import REFERENCE, Variant
from lora_init.errors import LoraInitError, did_you_mean, is_number, is_whole
from lora_init.files import as_plain, check_output, locked, parse_json, read_json, write_whole
from lora_init.starts.starts import FULL, RANDOM

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training. `learning_rate` is None while it depends on runs that have not ended."""

    start: Variant
    seed: int
    learning_rate: float | None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Run:
        """Find the run that a record is about."""
        return cls(Variant.parse(record["start"]), int(record["seed"]), float(record["learning_rate"]))

    @property
    def title(self) -> str:
        """Describe the run in a few words."""
        rate = "best rate" if self.learning_rate is None else f"{self.learning_rate:g}"
        return f"{self.start}, {rate}, seed {self.seed}"

    @property
    def file(self) -> str:
        """The name of its file: no two runs have the same, whatever a start is called."""
        return f"{quote(str(self.start), safe='+')}_{self.learning_rate}_seed{self.seed}.json"


SWEEP_SEEDS = 2
APART = 3  # the factor between the rates around one that a forward pass tells


@dataclass(frozen=True)
class RunPlan:
    """What is compared: every start at its own best learning rate, and on how many seeds.

    All starts are run at all rates on the first two seeds, and the rate with the lowest mean loss on the examples to
    select by is a start's best. While that is the lowest or the highest rate, half a decade more is tried on that side.
    With `"halving"` the other seeds are run at the best rate alone, with `"full"` at every rate. Should the best be
    unstable on another seed, the next best takes its place; a start that has no stable rate has no other seeds.
    Without a list of rates each start has three, a factor of three apart, around the rate that a forward pass tells
    (`measured_rate`); at that one it is run on all seeds.
    """

    starts: Sequence[Variant]  # what is compared
    # tried for every start, and a tenth of them for `full`; empty for three around each start's rate in `recommended`.
    # A single one is taken as it is, and no neighbor is tried
    learning_rates: Sequence[float]
    seeds: Sequence[int]  # each decides the order of the data and all that is random in a start
    sweep: str  # `"halving"` or `"full"`
    extend: int = 2  # how often rates are added on either side
    # the learning rate that a forward pass predicts for each start
    recommended: Mapping[str, float] = field(default_factory=dict)
    tuned: bool = True  # whether others than `random` are run at other rates, too

    def __post_init__(self) -> None:
        rates, seeds = self.learning_rates, self.seeds
        if not all(is_number(value) for value in (*rates, *seeds)):
            raise LoraInitError(
                "{learning_rates} and {seeds}: expected numbers.", learning_rates=list(rates), seeds=list(seeds)
            )
        any_rate = rates or self.recommended
        in_range = all(0.0 < rate <= 1.0 for rate in rates)
        if not any_rate or len(set(rates)) < len(rates) or not in_range:
            raise LoraInitError(
                "{learning_rates}: expected positive numbers up to 1, each once.", learning_rates=list(rates)
            )
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or not all(map(is_whole, seeds)):
            raise LoraInitError("{seeds}: expected whole numbers from 0 on, each once.", seeds=list(seeds))
        if not isinstance(self.sweep, str) or self.sweep not in ("halving", "full"):
            raise LoraInitError(
                f"{{sweep}} is unknown. {did_you_mean(str(self.sweep), ('halving', 'full'))}", sweep=self.sweep
            )

    def settings(self) -> dict[str, Any]:
        """Return the plan in plain values."""
        packages = {}
        for variant in self.starts:
            if variant.start and variant.start.package:  # a start that another package brings
                packages[str(variant)] = variant.start.package
        values = asdict(self) | {"starts": [*map(str, self.starts)]}
        if packages:
            values["packages"] = packages
        return values

    def compared(self, ranks_cost_the_same: bool) -> list[Variant]:
        """List the starts, and after them those that are run once more with equal parameters.

        Where a rank costs more parameters in one layer than in another, starts that move ranks, or train no A, are also
        run with as many parameters as `random` has.
        """
        equalized = []
        for start in self.starts:
            if start.differs_in_parameters(ranks_cost_the_same):
                equalized.append(replace(start, equal_parameters=True))
        return list(dict.fromkeys([*self.starts, *equalized]))  # they may have been asked for, too

    def measured(self, ranks_cost_the_same: bool) -> list[Variant]:
        """List the starts whose rate is measured: with equal parameters one with a frozen A alone.

        That one has a higher rank, which wants a lower rate. Others keep the rate of the start that they are a way of.
        """
        measured = list(self.starts)
        for start in self.compared(ranks_cost_the_same):
            if start not in measured and start.recipe is not None and start.recipe.freeze_a:
                measured.append(start)
        return measured

    def runs(self, starts: Sequence[Variant], records: Mapping[Run, Record]) -> list[Run]:
        """List all runs in the order to do them in, those that have ended among them. Rates are added as runs end."""
        grids = {start: self._grid(start, records) for start in starts}
        rates: set[float] = set().union(*grids.values())
        sweep = []
        for seed in self.swept:  # seed by seed, so that a comparison that is stopped has pairs
            for rate in sorted(rates):
                sweep += [Run(start, seed, rate) for start in starts if rate in grids[start]]
        waiting = {run.start for run in sweep if run not in records}
        best = {start: self._best(start, grids[start], records) for start in starts}
        return list(dict.fromkeys(sweep + self._after_sweep(starts, waiting, best)))

    def _after_sweep(
        self, starts: Sequence[Variant], waiting: Collection[Variant], best: Mapping[Variant, float | None]
    ) -> list[Run]:
        """List the runs with the other seeds: at the best rate, None while it is not known, and at a start's own."""
        runs = []
        for seed in self.seeds[len(self.swept) :]:
            for start in starts:
                rate = best[start]
                if start in waiting:  # the best so far may not stay the best
                    rate = None
                elif rate is None:  # no rate is stable, and the start has no other seeds
                    continue
                # Its own predicted rate on all seeds: the report judges each start at it, untuned.
                runs += [Run(start, seed, each) for each in (rate, *self._rate_of_its_own(start))]
        return runs

    @property
    def swept(self) -> Sequence[int]:
        """The seeds that every rate is run with."""
        return self.seeds if self.sweep == "full" else self.seeds[:SWEEP_SEEDS]

    @property
    def extends(self) -> bool:
        """Whether rates may be added."""
        return self.extend > 0 and len(self.learning_rates) != 1

    def given_rates(self, start: Variant) -> list[float]:
        """List the rates that are tried with a start in any case."""
        if self.learning_rates:
            rates = list(self.learning_rates)
            if start.base == FULL:  # rounded: 0.003 / 10 is 0.00030000000000000003
                rates = [float(f"{rate / 10:.4g}") for rate in rates]
            return sorted(rates)
        factors = (1 / APART, 1, APART) if self.tuned or start == REFERENCE else (1,)
        own = self._rate_of_its_own(start)
        return [float(f"{own[0] * factor:.2g}") for factor in factors] if own else []

    def _rate_of_its_own(self, start: Variant) -> list[float]:
        """Return a list of the rate that a pass predicts for a start, or of none if no pass was made for it."""
        rate = predicted_rate(start, self.recommended)
        return [] if rate is None else [rate]

    def _grid(self, start: Variant, records: Mapping[Run, Record]) -> list[float]:
        """List the rates to try with a start, as far as the runs that ended tell.

        The additions are computed again from the given rates at each call, so they depend on the records alone.
        """
        grid = given = self.given_rates(start)
        if not self.extends or len(given) < 2:  # of a single rate nobody asks whether another were better
            return grid
        for _ in range(2 * self.extend):  # as often on either side at most
            runs = self._runs_at(start, self.swept, grid)
            if not all(run in records for run in runs):
                break
            more = self._next_rates(grid, given, self._best(start, grid, records), [records[run] for run in runs])
            if more == grid:
                break
            grid = more
        return grid

    def _next_rates(
        self, grid: list[float], given: list[float], best: float | None, records: Iterable[Record]
    ) -> list[float]:
        """Add half a decade on the side where the best rate is at the edge; below, too, where rates are unstable."""
        n_below, n_above = bisect_left(grid, given[0]), len(grid) - bisect_right(grid, given[-1])
        # Where no rate is stable, a lower one may be; where all failed for another reason, it would not help.
        too_high = best is None and any(record["status"] == "unstable" for record in records)
        if (best == grid[0] or too_high) and n_below < self.extend:
            return [half_decade(grid[0], up=False), *grid]
        if best == grid[-1] and n_above < self.extend:
            return [*grid, half_decade(grid[-1], up=True)]
        return grid

    def _best(self, start: Variant, rates: Iterable[float], records: Mapping[Run, Record]) -> float | None:
        runs = self._runs_at(start, self.seeds, rates)
        return choose_rate(records[run] for run in runs if run in records)

    @staticmethod
    def _runs_at(start: Variant, seeds: Iterable[int], rates: Iterable[float]) -> list[Run]:
        return [Run(start, seed, rate) for seed, rate in product(seeds, rates)]


def predicted_rate(start: Variant, recommended: Mapping[str, float]) -> float | None:
    """Find the rate that a pass predicts for a start or for what it varies; for `full` a tenth of random's.

    `recommended` has the rates that were measured, by name. None if there is none for the start.
    """
    if start.base == FULL and RANDOM in recommended:
        return float(f"{recommended[RANDOM] / 10:.2g}")
    # With equal parameters a frozen A alone is measured: others have the rate of the start, with its alpha and batches.
    for measured in (start, replace(start, equal_parameters=False), Variant(start.base)):
        if str(measured) in recommended:
            return recommended[str(measured)]
    return None


def choose_rate(records: Iterable[Record]) -> float | None:
    """Choose the best rate of a start: the lowest mean loss on the examples to select by.

    The mean is over the seeds that all rates have (with `halving` the seeds of the sweep), or over each one's own.
    A rate with an unstable run is not chosen; None if there is no other.
    """
    losses: dict[float, dict[int, float]] = {}  # by rate and seed
    unstable = set()
    for record in records:
        rate, status = record["learning_rate"], _status(record)
        if status == "unstable":
            unstable.add(rate)
        elif status == "finished":
            losses.setdefault(rate, {})[record["seed"]] = record["selection_loss"]
    for rate in unstable:  # also if it finished with other seeds
        losses.pop(rate, None)
    if not losses:
        return None
    shared = set.intersection(*map(set, losses.values()))
    means = {}
    for rate, own in losses.items():
        means[rate] = fmean(own[seed] for seed in shared or own)
    return min(means, key=lambda rate: (means[rate], rate))  # of equal ones the lower rate


def half_decade(rate: float, up: bool) -> float:
    """Return the next learning rate on a grid of half decades.

    Example:
        >>> half_decade(1e-3, up=True), half_decade(3e-3, up=True), half_decade(1e-4, up=False)
        (0.003, 0.01, 3e-05)
    """
    # The grid is 1, 3, 10, 30: its steps are 3 and 10 / 3 in turn, and the leading digit tells which one is next. Of
    # rates as 3e-4, rounded, that digit may be 2.999.
    in_the_middle = 10 ** (math.log10(rate) % 1) > 2.9
    if up:
        factor = 10 / 3 if in_the_middle else 3.0
        return float(f"{rate * factor:.4g}")
    factor = 3.0 if in_the_middle else 10 / 3
    return float(f"{rate / factor:.4g}")


METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1", "mcc": "MCC"}  # names in records, and in the report
_NUMBERS = [
    *METRICS, "plain_loss", "float_loss", "selection_loss", "loss", "first_loss", "retained_before", "retained_after",
    "trainable_parameters", "a_scale", "gamma", "initialisation_seconds", "training_seconds", "peak_memory_bytes",
]  # fmt: skip
_COLUMNS = [
    "start", "base", "any_batches", "batches", "learning_rate", "seed", "status", "error", "data_order",
    "evaluation_points", "report_loss", "circumstances", "node", "dial",
    *_NUMBERS,
]  # fmt: skip


def run_table(records: Iterable[Record], starts: Iterable[str] = ()) -> pd.DataFrame:
    """Arrange runs as the table that findings, tables and pictures are read from: a row for each run.

    Rows go by start (random first, then as in `starts`, each before what is scaled or resized of it), rate and seed.
    Columns are the fields of `RunRecord`, its metrics, what its `Variant` says, and what is computed here: `loss` is
    the final one to report, NaN unless finished; `counts` whether the run finished and no run of that rate was
    unstable; `best` whether the rate is also the start's best, by the mean loss on the examples to select by.
    """
    rows = [_row(record) for record in records]
    bases = [RANDOM]  # in the order of the table; `index` finds the first of several
    bases += [Variant.parse(start).base for start in starts]
    bases += [row["base"] for row in rows]
    order = itemgetter("any_batches", "batches", "learning_rate", "seed")
    rows.sort(key=lambda row: (bases.index(row["base"]), *order(row)))
    table = pd.DataFrame(rows, columns=_COLUMNS)
    table[_NUMBERS] = table[_NUMBERS].astype(float)  # None becomes NaN
    table["rise"] = table["retained_after"] - table["retained_before"]
    unstable = table["status"].eq("unstable").groupby([table["start"], table["learning_rate"]]).transform("any")
    table["counts"] = table["status"].eq("finished") & ~unstable.astype(bool)
    best = {start: choose_rate(own) for start, own in groupby(rows, key=itemgetter("start"))}  # neighbors, as sorted
    table["best"] = table["counts"] & table["learning_rate"].eq(table["start"].map(best))
    return table


def _status(record: Mapping[str, Any]) -> str:
    """Return how a run ended; one that finished without a finite loss was unstable."""
    losses = [*(record.get("report_loss") or [None]), record.get("selection_loss")]  # JSON has null for NaN
    finite = all(loss is not None and math.isfinite(loss) for loss in losses)
    return "unstable" if record["status"] == "finished" and not finite else str(record["status"])


def _row(record: Record) -> dict[str, Any]:
    """Flatten a record."""
    losses, retained = record.get("report_loss") or [None], record.get("retain_loss") or [None, None]
    status, variant = _status(record), Variant.parse(record["start"])
    return {
        **record,
        "base": variant.base,
        "any_batches": str(replace(variant, batches=None)),  # starts that differ in these alone have the same
        "batches": variant.batches or 0,  # a number, as rows are sorted by it
        **(record.get("metrics") or {}),
        "status": status,
        "first_loss": losses[0],
        "loss": losses[-1] if status == "finished" else None,  # of a run that ended early it is no final one
        "retained_before": retained[0],
        "retained_after": retained[1],
    }


def rate_means(table: pd.DataFrame) -> pd.Series:
    """Compute the mean final loss by start and rate, over all seeds that the rate was run with."""
    return table[table["counts"]].groupby(["start", "learning_rate"])["loss"].mean()


def best_rates(table: pd.DataFrame) -> dict[str, float]:
    """Return the learning rate at which each start is compared; a start without a rate that counts has none."""
    return dict(table[table["best"]].groupby("start", sort=False)["learning_rate"].first())


def by_seed(table: pd.DataFrame, column: str = "loss") -> pd.DataFrame:
    """Arrange what was measured at the best rates: a row for each start, a column for each seed."""
    best = table[table["best"]]
    # `pivot` sorts by name; the table has the order of the report.
    return best.pivot(index="start", columns="seed", values=column).reindex(best["start"].unique())


SETTINGS_FILE, RUNS = "settings.json", "runs"
PACKED = "runs.jsonl"  # runs in one file, a line each, as `benchmarks.evidence` leaves them; new ones get files in RUNS
BEST, BEST_RUN = "best", "run.json"  # the directory of the best adapter, and in it the record of its run
FORMAT = 3
# Lists that may grow from call to call: they shape no single run.
_GROWING = ("starts", "learning_rates", "seeds")
# Settings that may differ from call to call: which runs are done, how they were asked for, and circumstances, which the
# notes of a report mention where they differ.
_FREE = (
    "sweep",
    "extend",
    "match_scale",
    "tuned",
    "size",
    "threads",
    "versions",
    "processor",
    "command",
    "init",
    "budget",
    "folds",
)
# Hashes and the like by name. Older directories may lack these: the keys that both have must match.
_HASHES = ("examples", "config", "own", "packages", "recommended")


@dataclass
class RunDirectory:
    """The runs of a comparison in their directory, a file for each new one. `open_runs` makes it."""

    path: Path  # where it is
    settings: dict[str, Any]  # what all runs share, and the starts, rates and seeds asked for so far
    records: dict[Run, Record]  # the runs that ended

    def add(self, record: Mapping[str, Any]) -> None:
        """Keep a run that ended; it is on the disk, whole, when this returns."""
        run = Run.of(record)
        for other, theirs in self.records.items():
            # The whole comparison rests on this: with one seed all starts see the same batches in the same order.
            # A run that ended early, or trains longer, has another hash all the same.
            finished = record["status"] == theirs["status"] == "finished"
            same_length = theirs["evaluation_points"][-1:] == record["evaluation_points"][-1:]
            comparable = finished and other.seed == run.seed and same_length
            if comparable and theirs["data_order"] != record["data_order"]:
                raise LoraInitError(
                    f"{run.title} saw other data than {other.title}. The data or the library changed between runs; "
                    "start again in another directory."
                )
        kept = json.loads(json.dumps(as_plain(record)), parse_constant=lambda _: None)  # JSON has no NaN
        write_whole(self.path / RUNS / run.file, f"{json.dumps(kept)}\n".encode())
        self.records[run] = kept  # as it will be read again


def check_there(path: Path) -> None:
    """Check that a comparison may be written here: one is there, or nothing."""
    check_output(path, "folder")
    if not path.is_dir() or (path / SETTINGS_FILE).exists():
        return
    # Names with a dot belong to the lock and to temporary files that a kill has left.
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
    if names - {RUNS, "statistics"}:  # statistics for measured rates are there before the settings
        raise LoraInitError(
            f"{path} is not empty and has no {SETTINGS_FILE}, so it holds no comparison. Name another directory."
        )


@contextmanager
def open_runs(path: Path, settings: Mapping[str, Any]) -> Iterator[RunDirectory]:
    """Make the directory of a comparison, or resume the one that is there; other processes are locked out meanwhile."""
    check_there(path)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path, "Wait until that comparison has ended, or name another directory."):
        ended = peek(path, settings)
        (path / RUNS).mkdir(exist_ok=True)
        merged = dict(settings)
        if (path / SETTINGS_FILE).exists():
            merged |= _merge_growing(read_settings(path), settings)
        write_whole(path / SETTINGS_FILE, (json.dumps(as_plain(merged), indent=2) + "\n").encode())
        yield RunDirectory(path, merged, ended)


def _merge_growing(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Merge what was asked for before with what is asked for now, so that the report knows of all runs."""
    merged: dict[str, Any] = {}
    for name in _GROWING:
        merged[name] = list(dict.fromkeys([*old[name], *new[name]]))
    for name in _HASHES:
        if name in old or name in new:
            merged[name] = old.get(name, {}) | new.get(name, {})
    return merged


def peek(path: Path, settings: Mapping[str, Any]) -> dict[Run, Record]:
    """Read the runs in a directory, if there are any, and change nothing."""
    if (path / SETTINGS_FILE).exists():
        # Through JSON, since what was read from the file has lists for tuples and text for keys.
        _check_same(path, read_settings(path), json.loads(json.dumps(as_plain(settings))))
    return {Run.of(record): record for record in read_runs(path)}


def read_settings(path: Path) -> dict[str, Any]:
    """Read `settings.json`."""
    if not (path / SETTINGS_FILE).exists():
        raise LoraInitError(f"{path / SETTINGS_FILE}: no such file. Name the directory of a comparison.")
    content = read_json(path / SETTINGS_FILE)
    if content.get("format") != FORMAT:
        raise LoraInitError(
            f"{path} is a comparison of another version (format {content.get('format')}, this one has {FORMAT}): up to "
            "format 2 rates were chosen on the examples that are reported, so new runs would not be comparable. Name "
            "another directory."
        )
    return content


def read_runs(path: Path) -> list[Record]:
    """Read the runs of a directory: those in `runs.jsonl`, in its order, then the files in `runs`, by name.

    Of two records of a run the one in `runs` counts: it is the later one.
    """
    packed = path / PACKED
    texts = []  # where each stands, what it is, and the text itself
    if packed.exists():
        for number, line in enumerate(packed.read_bytes().splitlines(), 1):
            texts.append((f"{packed}, line {number}", "line", line))
    for file in sorted((path / RUNS).glob("*.json")):
        texts.append((str(file), "file", file.read_bytes()))
    records: dict[Run, Record] = {}
    for where, kind, text in texts:
        try:
            record = parse_json(text)
            records[Run.of(record)] = record
        except (ValueError, KeyError, TypeError) as error:
            raise LoraInitError(f"{where}: not a run ({error!r}). Remove the {kind}; the run is repeated.") from error
    return list(records.values())


def _excerpts(*texts: str) -> list[str]:
    """Cut long texts to where they differ."""
    places = enumerate(zip(*texts, strict=False))
    differs = next((place for place, letters in places if len({*letters}) > 1), min(map(len, texts)))
    begin = max(0, differs - 40) if max(map(len, texts)) > 120 else 0
    cut = []
    for text in texts:
        end = "..." if len(text) > begin + 120 else ""
        cut.append("..." * (begin > 0) + text[begin : begin + 120] + end)
    return cut


def _check_same(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    differing = []
    for name in dict.fromkeys([*new, *old]):  # a setting that only one of them has differs, too, unless it is None
        before, now = old.get(name), new.get(name)
        if name not in (*_GROWING, *_FREE, *_HASHES) and before != now:
            differing.append("{} was {}, now {}".format(name, *_excerpts(repr(before), repr(now))))
    if differing:
        raise LoraInitError(
            f"{path} has runs of another configuration: {'; '.join(differing)}. "
            "Name another directory, or use the settings of this one."
        )
    changed = []
    for name in _HASHES:
        for which, now in new.get(name, {}).items():
            if old.get(name, {}).get(which, now) != now:  # a key that is new may be added
                changed.append(which)
    if changed:
        raise LoraInitError(
            f"{path} has runs of which this was other content: {', '.join(changed)}. New ones could not be compared "
            "with them: name another directory or, for a start of your own, another start."
        )
