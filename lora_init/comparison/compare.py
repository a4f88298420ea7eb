"""compare(): train the same adapter from several starts, everything else equal, and report what was found."""

from __future__ import annotations

import inspect
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_init.adapters.init_config import SCALING
from lora_init.comparison.budget import STAGES, RunBudget
from lora_init.comparison.clusters import open_executor
from lora_init.comparison.findings import Summary, summarise
from lora_init.comparison.outlook import Outlook, look_ahead, measure
from lora_init.comparison.report import keep_best, write_report
from lora_init.comparison.runs import (
    SETTINGS_FILE,
    Record,
    Run,
    RunDirectory,
    RunPlan,
    check_there,
    open_runs,
    peek,
    read_settings,
)
from lora_init.comparison.set_up import Sources, set_up
from lora_init.comparison.size import SIZES, RequestedSize, Size, fit
from lora_init.comparison.starts import AdapterShape, read_start
from lora_init.comparison.tables import run_tables
from lora_init.comparison.tasks import LoadingOptions
from lora_init.comparison.variants import Variant, by_batches
from lora_init.comparison.workbench import Workbench, circumstances
from lora_init.comparison.workers import Job, Worker, describe, elsewhere, here, processes, run_all
from lora_init.errors import LoraInitError, check_number, check_switches, did_you_mean, is_number, is_whole, require
from lora_init.files import as_path, as_plain
from lora_init.layers.targets import Target, find_targets
from lora_init.loading.models import find_device
from lora_init.loading.reader import classes_in_words
from lora_init.packages import check_takes
from lora_init.planning.lora_config import alpha_for
from lora_init.starts.starts import DEFAULT, DEFAULT_FOR_CLASSES, FULL, RANDOM

if TYPE_CHECKING:
    import pandas as pd

# Arguments that mean nothing without another one, by that one.
_DEPENDENT = {"options": ("answer", "normalize"), "retain_data": ("retain_template", "retain_samples", "dial")}


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `compare` did, or with `dry_run=True` would do.

    Attributes:
        directory: Where settings, runs and report are.
        settings: What all runs share.
        records: One for each run that ended, as in its file in `runs`.
        planned: All runs that belong to the comparison, those that ended among them.
        summary: Verdicts, notes and results; see `findings`.
        files: Files of the report.
        outlook: With `dry_run=True` what it would do and take, and what it can show.
    """

    directory: Path
    settings: dict[str, Any]
    records: list[Record]
    planned: list[Run]
    summary: Summary
    files: list[Path]
    outlook: Outlook | None = None

    def __repr__(self) -> str:
        done = f"{len(self.records)} of {len(self.planned)} runs in {self.directory}"
        return f"Comparison({done}: {self.summary.headline})"

    def _repr_html_(self) -> str:
        table, differences = "", run_tables(self.summary).get("differences")
        if differences is not None:  # there is none before the first run has ended
            table = differences.to_html(index=False, border=0)
        return f"<p>{escape(repr(self))}</p>{table}"

    def to_pandas(self) -> pd.DataFrame:
        """Return a table with a row for each run: start, learning rate, seed, losses, cost."""
        return self.summary.table.copy()


def compare(
    model: str,
    data: str | Path,
    output: str | Path,
    *,
    starts: Sequence[str | tuple[str, Any]] | None = None,
    learning_rates: Sequence[float] | None = None,
    seeds: int | Sequence[int] | None = None,
    sweep: str | None = None,
    extend: int = 4,
    full: bool = False,
    rank: int = 8,
    lora_alpha: float | None = None,
    target_modules: str | list[str] = "all-linear",
    steps: int | None = None,
    batch_size: int = 8,
    warmup: float = 0.1,
    evaluation_points: Sequence[int] | None = None,
    statistics_batches: int | Sequence[int] = 32,
    bank: str | Path | None = None,
    time: float | None = None,
    precision: float | None = None,
    workers: int | None = None,
    executor: Any = None,
    gpus_per_run: float = 1,
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
            model and seed that returns a PeftModel. Default: `random`, `eva` and `natural-gradient`.
        learning_rates: Tried for every start, on the first two seeds. Default: three for each start, around the rate
            that a forward pass predicts for it, see `learning_rate`.
        seeds: How many, or which. A seed decides the order of the data and all that is random in a start. Default: 5,
            with `time` or `precision` at most 32.
        sweep: `"halving"`: other seeds at the best rate alone; `"full"`: everything. Default: halving on a CPU.
        extend: How often half a decade is added to a start's rates while the best is the lowest or the highest, on
            either side.
        full: Also train all weights, at rates of a tenth, to say how much there is to win.
        rank: Average rank of a layer.
        lora_alpha: The adapter is scaled by lora_alpha / rank, but for starts with an alpha of their own, as in
            `eva+32-alpha`. Default: twice the rank.
        target_modules: See `collect`.
        steps: Steps of each run. Default: 100, with `time` at most that.
        batch_size: Examples in a batch.
        warmup: Share of the steps in which the learning rate rises; then it falls to zero on a cosine.
        evaluation_points: Steps after which the loss to report is measured. Default: every quarter. 0 and the last
            always count.
        statistics_batches: Batches of the run's own training data that statistics are made from. With several numbers
            each start from data is run with each, as `NAME+16-batches`. No example is read twice: where the data make
            fewer, with four set aside for the size of a step, that is the number.
        bank: Directory of a bank of this model, for the starts `bank-nearest`, `bank-mixture`, `bank-generated` and
            `bank-mean`. It should not hold the task that is compared on.
        time: Seconds that it may take. What is left open (starts, steps, examples to select by and to report) is then
            made as small as needed to come to an answer, see `size.SIZES`. With it, and with `precision`, seeds are
            spent where they still decide, see `RunBudget`. The queue of an executor counts: its runs are then canceled.
        precision: Half the width of an interval at which a verdict is precise enough, as a share of random's loss.
        workers: Processes of this machine that do runs side by side, each with a GPU of its own if there are any.
        executor: Does the runs instead: any `concurrent.futures.Executor`, such as `Client.get_executor()` of Dask, an
            executor of submitit, or the name of a cluster: `"ray"`, `"ray://HOST:PORT"`, `"dask:tcp://HOST:PORT"`,
            `"slurm"` or `"slurm:OPTIONS.yaml"`.
        gpus_per_run: GPUs, or the share of one, that a run asks a named cluster for, if it has any.
        dry_run: Only plan, and measure a step, see `Outlook`. Nothing is written.
        command: How this was asked for, kept with the settings.
        say: Receives lines about the progress.
        progress: Show a progress bar on stderr; by default only on a terminal.
        **loading: How model and data are read: the fields of `tasks.LoadingOptions`.

    Raises:
        LoraInitError: Anything a user can get wrong: arguments, data, starts, rates, or a directory with other settings
            or in use by another process.
        KeyboardInterrupt: Ctrl-C; the report is written from the runs that ended.
    """
    # First all that can be refused from the arguments alone: to load the model and to run it take time.
    _check_model(model, rank, batch_size)
    check_switches(full=full, dry_run=dry_run)
    check_takes(say, "say=", "text")
    options = _read_options(loading)
    find_device(options.device)
    batches = _read_batches(statistics_batches)
    directory = as_path(output, "output").absolute()
    variants, own = _read_starts(starts, full, bank, goes_on=(directory / SETTINGS_FILE).exists())
    budget = RunBudget(time, precision)
    if sweep is None:
        sweep = _sweep_by_default(budget)
    seeds = _read_seeds(seeds, budget)
    plan = RunPlan(variants, _read_rates(learning_rates), seeds, sweep, extend)
    points = _read_points(steps, extend, evaluation_points)
    requested = RequestedSize(options, steps, batch_size, warmup, points, starts)
    check_there(directory)
    pool = _find_executor(workers, executor, gpus_per_run, directory)
    size = _kept_size(directory)
    if lora_alpha is None:
        lora_alpha = alpha_for(SCALING, rank)
    check_number("lora_alpha", lora_alpha, above=True)
    shape = AdapterShape(as_plain(rank), as_plain(lora_alpha), target_modules)
    sources = Sources(batches[0], variants, own, _absolute(bank))

    # Other processes make a workbench of their own by the same call: it can be pickled, and its paths are absolute.
    make_bench = partial(set_up, _absolute(str(model)), _absolute(data), directory, options, shape, sources=sources)
    bench = make_bench(training=requested.training())
    say(f"data: {bench.task.data}{_classes_in_words(bench.task.rows_of)}")

    # Model and data decide what the arguments left open: numbers of batches, rates and, under a limit, the size.
    plan = replace(plan, starts=by_batches(plan.starts, _possible_batches(bench, variants, batches, say)))
    targets = find_targets(bench.loaded.model, target_modules, task_type=bench.shape.task_type).layers
    alike = _ranks_cost_the_same(targets)
    if learning_rates is None:
        requested = replace(requested, rates=bench.measured_rates(plan.measured(alike), dry_run))
    # A start is built for its rate to be measured, but for a dry run, which may have measured random in its place.
    bench.check([start for start in plan.starts if dry_run or str(start) not in requested.rates])
    lay_out = partial(requested.lay_out, bench, plan)
    if size is None:
        size = SIZES[0]
        if time:
            size = fit(lay_out, measure(bench), budget, steps is None)
    bench, plan = lay_out(size)
    plan = _with_kept_rates(plan, directory)
    make_bench = partial(make_bench, training=bench.training, folds=requested.folds(size))

    settings = {**bench.settings(model_name(model)), **plan.settings(), **circumstances(), **budget.settings()}
    settings |= {"command": command, "init": _init_command(model, data, options, bench)}
    if size != SIZES[0]:  # a comparison of full size has no such key
        settings["size"] = asdict(size)
    due = partial(budget.due, plan, plan.compared(alike))

    if dry_run:
        ended = peek(directory, settings)  # nothing is written, so the directory need not be locked
        records, planned = list(ended.values()), due(ended)[0]
        outlook = look_ahead(bench, plan, planned, ended, workers or 1)
        return Comparison(Path(output), settings, records, planned, summarise(records, settings), [], outlook)
    if pool is None:
        worker = here(bench, _shows_progress(progress))
    else:
        # An executor that the caller passed stays open: it may be of use to the caller afterwards.
        is_ours = pool is not executor
        worker = elsewhere(pool, Job(make_bench, describe(bench, model_name(model))), is_ours, workers)
        del bench, lay_out  # a GPU may have room for the workers' models only
    with open_runs(directory, settings) as log, closing(worker):
        _do_runs(log, worker, due, budget, output, say)
        records, planned, files = list(log.records.values()), due(log.records)[0], write_report(directory)
        # The settings of the log, which has the starts, rates and seeds of earlier calls, too.
        return Comparison(Path(output), log.settings, records, planned, summarise(records, log.settings), files)


def _shows_progress(progress: bool | None) -> bool:
    return sys.stderr.isatty() if progress is None else progress


def _sweep_by_default(budget: RunBudget) -> str:
    """Choose to try all rates with all seeds where that is quick and nothing limits it."""
    return "full" if torch.cuda.is_available() and not budget.limited else "halving"


def _kept_size(directory: Path) -> Size | None:
    """Read the size of a comparison that is resumed; None for a new one."""
    if not (directory / SETTINGS_FILE).exists():
        return None
    stored = read_settings(directory).get("size")
    if not stored:  # it is written where a limit made the comparison smaller
        return SIZES[0]
    return Size(**stored)


def _classes_in_words(rows_of: Mapping[str, int]) -> str:
    return f"; {classes_in_words(rows_of)}" if rows_of else ""


def _ranks_cost_the_same(targets: Mapping[str, Target]) -> bool:
    return len({target.parameters(1) for target in targets.values()}) == 1


def _do_runs(
    log: RunDirectory,
    worker: Worker,
    due: Callable[..., Any],
    budget: RunBudget,
    output: str | Path,
    say: Callable[[str], None],
) -> None:
    """Carry out what is due, and keep the best adapter; if that ends early, write the report of what is there."""
    try:
        run_all(due, log, worker, budget, say)
        if budget.fits(0.0):  # the best adapter is one more training
            keep_best(log, worker, say)
    except BaseException as error:  # Ctrl-C is no `Exception`
        if log.records:
            with suppress(LoraInitError, OSError):  # what went wrong before matters more
                write_report(log.path)
        if isinstance(error, KeyboardInterrupt):
            say(f"{output}: {_kept_in_words(log.records, due)}. The same command goes on from there.")
        raise


def _kept_in_words(records: Mapping[Run, Record], due: Callable[..., Any]) -> str:
    """Describe in words which runs an interrupted comparison has kept."""
    if not records:
        return "no run had ended"
    return f"{len(records)} of {len(due(records)[0])} runs are kept, with their report"


def _read_seeds(seeds: int | Sequence[int] | None, budget: RunBudget) -> list[int]:
    """Read which seeds, or how many; by default five, and under a limit as many as it may spend."""
    if seeds is None:
        seeds = STAGES[-1] if budget.limited else 5
    if not is_whole(seeds):
        return _listed(seeds)
    check_number("seeds", seeds, 1, whole=True)
    return list(range(seeds))


def _read_rates(learning_rates: Any) -> list[Any]:
    if learning_rates is None:  # until they are measured, any rate stands for all
        return [1.0]
    return _listed(learning_rates)


def _check_model(model: Any, rank: Any, batch_size: Any) -> None:
    require("matplotlib", "scipy", "sklearn")  # they are needed at the end, and their absence should not wait for it
    if not isinstance(model, (str, Path)):
        raise LoraInitError(f"compare() takes a directory or hub id in this place and got a {type(model).__name__}.")
    check_number("rank", rank, 1, whole=True)
    check_number("batch_size", batch_size, 1, whole=True)


def _find_executor(workers: int | None, given: Any, gpus: float, directory: Path) -> Any:
    """Return what does the runs; None for this process."""
    if workers is not None:
        check_number("workers", workers, 1, whole=True)
    if workers and given is not None:
        raise LoraInitError("{workers} is for this machine, and a cluster has its own. Leave one out.", workers=workers)
    if is_number(gpus) and gpus != 1 and not isinstance(given, str):
        raise LoraInitError("{gpus_per_run} is for the name of a cluster. Leave it out.", gpus_per_run=gpus)
    if not is_number(gpus) or not (0 <= gpus <= 1 or (1 < gpus < math.inf and gpus == int(gpus))):
        raise LoraInitError("{gpus_per_run}: expected a share of one GPU, or a whole number.", gpus_per_run=gpus)
    if workers:
        return processes(workers)
    return None if given is None else open_executor(given, gpus, directory)


def _read_starts(
    starts: Sequence[str | tuple[str, Any]] | None, full: bool, bank: str | Path | None, goes_on: bool
) -> tuple[list[Variant], dict[str, Any]]:
    """Read the starts, and by name where the user's own ones come from."""
    starts = _with_reference(_check_starts(starts), full)
    variants = [read_start(start) for start in starts]
    own = {}
    for start, variant in zip(starts, variants, strict=True):
        if isinstance(start, str):
            continue
        # The source is looked up by `Variant.base`, in which nothing follows a plus.
        if not variant.is_plain:
            raise LoraInitError(f"start '{variant}': what follows a plus says how a start is run. Choose another name.")
        own[start[0]] = _absolute(start[1])
    listed, from_bank = [*map(str, variants)], [one for one in variants if one.start and "bank" in one.start.needed]
    if not variants or len(set(variants)) < len(variants):
        raise LoraInitError("{starts}: expected names, each once.", starts=listed)
    if bank is None and from_bank:
        raise LoraInitError(
            "{starts}: those from a bank need {bank}, the directory of lora-init bank.", starts=listed, bank=...
        )
    if bank is not None and not from_bank and not goes_on:  # whose other starts may be from this bank
        raise LoraInitError("{bank}: no start is from a bank. Leave it out, or add bank-nearest.", bank=bank)
    return variants, own


def _check_starts(starts: Any) -> list[str | tuple[str, Any]]:
    """Return a list of names and pairs: of a name alone that name, of None the recommended starts.

    Raises:
        LoraInitError: It is something else, or a text of several names.
    """
    if starts is None:
        starts = [RANDOM, DEFAULT, DEFAULT_FOR_CLASSES]
    if not isinstance(starts, (str, Sequence, Set)):
        raise LoraInitError("{starts}: expected names, or pairs of a name and an adapter.", starts=starts)
    if isinstance(starts, str):
        if "," in starts:  # as on the command line
            raise LoraInitError(f"{{starts}} is one text. Pass a list: starts={starts.split(',')}.", starts=starts)
        starts = [starts]
    for start in starts:
        if not isinstance(start, (str, tuple)):
            raise LoraInitError(f"starts has {start!r}: expected names, or pairs of a name and an adapter of your own.")
    return list(starts)


def _with_reference(starts: list[str | tuple[str, Any]], full: bool) -> list[str | tuple[str, Any]]:
    """Put random, which all are compared with, before the starts, and full training behind them if asked for."""
    if full and FULL not in starts:
        starts = [*starts, FULL]
    if starts and RANDOM not in starts:  # an empty list is refused later, and not filled here
        starts = [RANDOM, *starts]
    return starts


def _listed(numbers: Any) -> list[Any]:
    if hasattr(numbers, "tolist"):  # of numpy or torch
        numbers = numbers.tolist()
    # A text is listed as it is, since it is refused in words later; its letters would be nonsense.
    if isinstance(numbers, str) or not isinstance(numbers, Iterable):
        numbers = [numbers]
    return [as_plain(number) for number in numbers]  # torch's generators take no numbers of numpy


def _read_points(steps: int | None, extend: int, points: Any) -> list[int] | None:
    """Return the steps to measure after, once the numbers that they are counted in are known to be whole."""
    check_number("extend", extend, 0, whole=True)
    if steps is not None:
        check_number("steps", steps, 1, whole=True)
    listed = None if points is None else _listed(points)
    for point in listed or ():  # a step that no run comes to would not be measured, and nobody be told
        check_number("evaluation_points", point, 0, whole=True)
    return listed


def _read_batches(given: int | Sequence[int]) -> list[int]:
    batches = _listed(given)
    all_whole = all(map(is_whole, batches))  # before `min`, which cannot order numbers and words
    if not batches or not all_whole or min(batches) < 1 or len(set(batches)) < len(batches):
        raise LoraInitError("{statistics_batches}: expected numbers of batches, each once.", statistics_batches=batches)
    return batches


def _possible_batches(
    bench: Workbench, variants: Sequence[Variant], batches: Sequence[int], say: Callable[[str], None]
) -> list[int]:
    """Return the numbers of batches, each at most what the data make; refuse starts whose name asks for more."""
    for variant in variants:
        wanted = variant.batches or 1
        if bench.n_batches(wanted) < wanted:
            raise LoraInitError(f"start '{variant}': the training data make {bench.n_batches(wanted)} batches for it.")
    if (most := bench.n_batches(max(batches))) < max(batches):
        say(f"Statistics are from at most {most} batches: the training data make no more, and some are set aside.")
    return list(dict.fromkeys(min(number, most) for number in batches))  # two may have become the same number


def _with_kept_rates(plan: RunPlan, directory: Path) -> RunPlan:
    """Take measured rates from the directory of a resumed comparison: on another machine a last digit may differ."""
    if plan.learning_rates or not (directory / SETTINGS_FILE).exists():
        return plan
    kept = read_settings(directory).get("recommended") or {}
    return replace(plan, recommended={**plan.recommended, **kept})


def _absolute(source: Any) -> Any:
    """Return a path that means the same in another process; a hub id, a function and data in memory stay."""
    if not isinstance(source, (str, Path)):
        return source
    path = Path(source).expanduser()
    if not path.exists():
        return source
    return str(path.absolute())


def _read_options(given: Mapping[str, Any]) -> LoadingOptions:
    """Read the arguments of `compare` that say how model and data are read; refuse any other."""
    known = [field.name for field in fields(LoadingOptions)]
    for name in given:
        if name not in known:
            every = [*known, *inspect.signature(compare).parameters]
            raise LoraInitError(f"compare() has no argument {name}=. {did_you_mean(name, every)}")
    arguments = dict(given)
    for name in ("retain_data", "replay", "weights"):
        arguments[name] = _absolute(given.get(name))
    options, defaults = LoadingOptions(**arguments), LoadingOptions()
    for needed, names in _DEPENDENT.items():
        for name in names:
            value = getattr(options, name)
            if value != getattr(defaults, name) and getattr(options, needed) is None:
                unused = f"{{{name}}} goes with {{{needed}}}. Give both, or leave it out."
                raise LoraInitError(unused, **{needed: ..., name: value})
    return options


def _init_command(model: str, data: str | Path, options: LoadingOptions, bench: Workbench) -> str | None:
    """Write the command that makes an adapter as a run does; the start, its data and its alpha are left open.

    None if `init` cannot read the answers, since their column has letters or positions.
    """
    if not bench.task.spelled_out:
        return None
    modules, completion, split = bench.shape.target_modules, options.completion or None, options.split
    if completion is None and options.options:  # to `init` a multiple choice is text: a prompt, and the right option
        completion = f" {{{options.answer}}}"
    if not isinstance(modules, str):
        modules = ",".join(modules)
    values = {
        "--template": options.template,
        "--format": options.format,
        "--completion": completion,
        "--label": options.label,
        "--subset": options.subset,
        "--split": None if split == "train" else split,  # the default of `init`, too
        "--batch-size": bench.training.batch_size,
        "--max-length": options.max_length,
        "--rank": bench.shape.rank,
        "--target-modules": modules,
        "--dtype": options.dtype,
        "--quantize": options.quantize,
    }
    words = ["lora-init", "init", str(model), str(data)]
    for name, value in values.items():
        if value is not None:
            words += [name, str(value)]
    if options.trust_remote_code:
        words.append("--trust-remote-code")
    return shlex.join(words)


def model_name(model: str) -> str:
    """Name a model without the path to it: settings are shared."""
    path = Path(model).expanduser()
    return path.absolute().name if path.is_dir() else model
