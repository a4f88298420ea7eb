"""compare(): train the same adapter from several starts, everything else equal, and say what was found."""

from __future__ import annotations

import difflib
import inspect
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import lora_init
from lora_init.comparison.findings import Summary, summarise
from lora_init.comparison.report import write_report
from lora_init.comparison.runs import Plan, Record, Run, RunDirectory, Variant, check_fair, open_runs, peek
from lora_init.comparison.starts import START_NAMES, AdapterShape, check_start
from lora_init.comparison.tasks import DataOptions
from lora_init.comparison.training import Training
from lora_init.comparison.workbench import ModelOptions, Workbench, set_up
from lora_init.errors import LoraInitError, require
from lora_init.layers.targets import find_targets

STARTS = ("random", "orthogonal", "eva-rho1", "eva", "eva-ranks")
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
FORMAT = 2


@dataclass(frozen=True)
class Comparison:
    """What `compare` did, or with `dry_run=True` would do.

    Attributes:
        directory: Where settings, runs and report are.
        settings: What all runs share.
        records: One for each run that ended, as in its file in `runs`.
        planned: All runs that belong to the comparison, those that ended among them.
        seconds_left: Estimate for the runs that are left; 0 if none is.
        summary: Verdicts, notes and results; see `findings`.
        files: Files of the report.
    """

    directory: Path
    settings: dict[str, Any]
    records: list[Record]
    planned: list[Run]
    seconds_left: float
    summary: Summary
    files: list[Path]


def compare(
    model: str,
    data: str | Path,
    output: str | Path,
    *,
    starts: Sequence[str | tuple[str, Any]] = STARTS,
    learning_rates: Sequence[float] = LEARNING_RATES,
    seeds: int | Sequence[int] = 3,
    sweep: str | None = None,
    match_scale: bool = False,
    rank: int = 8,
    lora_alpha: float = 16,
    target_modules: str | list[str] = "all-linear",
    steps: int = 100,
    batch_size: int = 8,
    warmup: float = 0.1,
    evaluation_points: Sequence[int] | None = None,
    statistics_batches: int = 32,
    dry_run: bool = False,
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
    progress: bool | None = None,
    **loading: Any,
) -> Comparison:
    """Train the same adapter shape from several starts, with the same data in the same order, and compare.

    Every start gets the same sweep of learning rates. Each run that ends is written to a file of its own in the output
    directory at once; called again with the same arguments, it goes on where it was. Starts, rates and seeds may be
    added to a directory.

    Args:
        model: Directory or hub id.
        data: See `load_batches`.
        output: Directory for the runs and the report.
        starts: Names, see `starts.prepare`, or pairs of a name of your own and an adapter directory, or a function of
            model and seed that returns a PeftModel.
        learning_rates: Tried for every start.
        seeds: How many, or which. A seed decides the order of the data and all that is random in a start.
        sweep: `"halving"`: all rates on the first seed, the best of them on the others; `"full"`: everything. Default:
            halving on a CPU.
        match_scale: Also run each start with A scaled to the size of the random one.
        rank: Average rank of a layer.
        lora_alpha: The adapter is scaled by lora_alpha / rank.
        target_modules: See `collect`.
        steps: Steps of each run.
        batch_size: Examples in a batch.
        warmup: Share of the steps in which the learning rate rises; then it falls to zero on a cosine.
        evaluation_points: Steps after which the validation loss is measured. Default: every quarter. 0 and the last
            always count.
        statistics_batches: Batches of the run's own training data that statistics are made from.
        dry_run: Only plan, and measure a few steps for the estimate. Nothing is written.
        command: How this was asked for, kept with the settings.
        say: Receives lines about the progress.
        progress: Show a progress bar on stderr; by default only on a terminal.
        **loading: How model and data are read: the fields of `tasks.DataOptions` and `workbench.ModelOptions`.

    Raises:
        LoraInitError: Anything a user can get wrong: arguments, data, starts, rates, or a directory with other settings
            or in use by another process.
        KeyboardInterrupt: Ctrl-C; the report is written from the runs that ended.
    """
    require("matplotlib", "scipy", "sklearn")  # for the report, at the end
    options = _read_options(loading)
    names, own = _read_starts(starts)
    sweep = sweep or ("full" if torch.cuda.is_available() else "halving")
    plan = Plan(
        names, list(learning_rates), list(range(seeds)) if isinstance(seeds, int) else list(seeds), sweep, match_scale
    )
    points = sorted({0, steps, *(evaluation_points or [round(steps * i / 4) for i in (1, 2, 3)])})
    training = Training(steps, batch_size, warmup, points)
    directory = Path(output).expanduser()
    shape = AdapterShape(rank, lora_alpha, target_modules)
    bench = set_up(model, data, directory, options, shape, training, statistics_batches, own)
    settings = {
        "format": FORMAT,
        **bench.settings(model_name(model)),
        **asdict(plan),
        **circumstances(),
        "command": command,
    }
    targets = find_targets(bench.loaded.model, target_modules, task_type=bench.shape.task_type).layers.values()
    variants = plan.variants(len({target.parameters(1) for target in targets}) == 1)
    if dry_run:
        there = peek(directory, settings)
        planned = plan.runs(variants, there)
        left = sum(run not in there for run in planned)
        seconds = left * bench.seconds_of_a_run() if left else 0.0
        records = list(there.values())
        return Comparison(directory, settings, records, planned, seconds, summarise(records, settings), [])
    with open_runs(directory, settings) as log:
        try:
            _run_all(bench, log, plan, variants, Progress(steps, say, progress))
        except BaseException as error:  # what went wrong matters more than the report
            if log.records:
                with suppress(LoraInitError):
                    write_report(directory)
            if isinstance(error, KeyboardInterrupt):
                kept = f"{len(log.records)} of {len(plan.runs(variants, log.records))} runs are kept, with their report"
                say(f"{directory}: {kept if log.records else 'no run had ended'}. The same command goes on from there.")
            raise
        records, planned, files = list(log.records.values()), plan.runs(variants, log.records), write_report(directory)
        return Comparison(directory, log.settings, records, planned, 0.0, summarise(records, log.settings), files)


def _read_options(loading: Mapping[str, Any]) -> tuple[DataOptions, ModelOptions]:
    """Tell arguments about the data from those about the model, and refuse those that are about neither."""
    groups = {group: [field.name for field in fields(group)] for group in (DataOptions, ModelOptions)}
    known = [*(name for names in groups.values() for name in names), *inspect.signature(compare).parameters]
    for name in loading:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise LoraInitError(f"compare() has no argument {name!r}. Closest: {close!r}.")
    chosen = {group: {name: loading[name] for name in names if name in loading} for group, names in groups.items()}
    return DataOptions(**chosen[DataOptions]), ModelOptions(**chosen[ModelOptions])


def _read_starts(starts: Sequence[str | tuple[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """Tell our starts from the user's own, and make sure before the work that they are there."""
    own = {start[0]: start[1] for start in starts if not isinstance(start, str)}
    names = [start if isinstance(start, str) else start[0] for start in starts]
    if not names or len(set(names)) < len(names):
        raise LoraInitError(f"starts={names}: expected names, each once.")
    for name in names:
        if name not in own:
            check_start(name)
        elif name in START_NAMES:
            raise LoraInitError(f"start {name!r} is one of ours. Give your own another name.")
        elif not callable(own[name]) and not Path(own[name]).expanduser().is_dir():
            raise LoraInitError(f"start {name!r}: {own[name]} is no adapter directory.")
    return names, own


def _run_all(bench: Workbench, log: RunDirectory, plan: Plan, variants: Sequence[Variant], progress: Progress) -> None:
    """Do what is planned and has not ended. Failed runs get one more chance each time this is called."""
    for run in [run for run, record in log.records.items() if record["status"] == "failed"]:
        del log.records[run]
    with progress:
        while True:
            planned = plan.runs(variants, log.records)
            left = [run for run in planned if run not in log.records]
            if not left:
                return
            progress.begin(left[0].title, len(planned), len(left))
            record = bench.carry_out(left[0], progress.step)
            check_fair([*log.records.values(), record])
            log.add(record)
            progress.end(record)


def model_name(model: str) -> str:
    """Name a model without the path to it: settings are shared."""
    path = Path(model).expanduser()
    return path.absolute().name if path.is_dir() else model


def circumstances() -> dict[str, Any]:
    """Describe what may differ between runs that are compared: threads, processor, versions."""
    versions = {package: version(package) for package in ("torch", "transformers", "peft")}
    return {
        "threads": torch.get_num_threads(),
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "versions": {"lora_init": lora_init.__version__, **versions, "python": platform.python_version()},
    }


class Progress:
    """Follows a comparison: a line for each run that ends, and a bar. Use it as a context manager around the runs.

    Args:
        steps: Steps of each run.
        say: Receives the lines.
        show: Show the bar; by default only on a terminal.
    """

    def __init__(self, steps: int, say: Callable[[str], None], show: bool | None = None) -> None:
        self._steps, self._say = steps, say
        self._show = sys.stderr.isatty() if show is None else show
        self._bar = tqdm(unit="step", disable=not self._show, dynamic_ncols=True)
        self._ended: list[float] = []  # seconds of each run

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, title: str, planned: int, left: int) -> None:
        """Say which run begins, how many there are in all and how many are left with it."""
        self._title, self._left = f"run {planned - left + 1}/{planned} {title}", left
        self._first = self._bar.n
        self._bar.set_description(self._title, refresh=False)
        self._bar.total = self._bar.n + left * self._steps
        self._bar.refresh()

    def step(self) -> None:
        """Count a step."""
        self._bar.update()

    def end(self, record: Mapping[str, Any]) -> None:
        """Say how a run ended, and how long the others may take."""
        self._bar.update(self._first + self._steps - self._bar.n)
        self._ended.append(record["run_seconds"])
        losses, how = record["validation_loss"], record["error"]
        if record["status"] == "finished":
            how = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
        line = f"{self._title}: {record['status']}, {how}, {record['run_seconds']:.0f} s"
        if self._left > 1:
            expected = (self._left - 1) * sum(self._ended) / len(self._ended)
            line += f"; {self._left - 1} left, about {duration(expected)}"
        if self._show:
            tqdm.write(line, file=sys.stderr)
        else:
            self._say(line)


def duration(seconds: float) -> str:
    """Say a time as people do.

    Example:
        >>> duration(42), duration(600), duration(9000)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
