"""compare(): train the same adapter from several starts, everything else equal, and say what was found."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import lora_init
from lora_init.comparison.report import write_report
from lora_init.comparison.runs import Record, Run, RunLog, check_fair, check_plan, peek, plan_runs, variants
from lora_init.comparison.starts import START_NAMES, check_start
from lora_init.comparison.tables import Summary, summarise
from lora_init.comparison.tasks import CLASSIFICATION, Task, load_task
from lora_init.comparison.workbench import Workbench
from lora_init.errors import LoraInitError
from lora_init.layers.targets import find_targets
from lora_init.loading.batches import Batches, load_batches
from lora_init.loading.models import LoadedModel, load_model, load_tokenizer


def set_up(
    model: str,
    data: str | Path,
    directory: Path,
    *,
    name: str | None = None,
    batch_size: int,
    max_length: int = 256,
    retain_data: str | Path | None = None,
    retain_template: str | None = None,
    retain_samples: int = 64,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    subset: str | None = None,
    split: str = "train",
    template: str | None = None,
    completion: str | None = None,
    label: str | None = None,
    options: str | None = None,
    answer: str | None = None,
    normalize: bool = False,
    train_samples: int = 1024,
    validation_samples: int = 128,
    data_seed: int = 0,
    **shared: Any,
) -> Workbench:
    """Read the data, load the model in the class that the task needs, and put both on a workbench.

    Args:
        model: Directory or hub id.
        data: See `load_task`, as for `subset` to `data_seed` and `max_length`.
        directory: Of the comparison.
        name: Name of the task in the report. Default: that of the data.
        batch_size: Examples in a batch.
        retain_data: Text of another kind: its loss before and after training tells what was forgotten.
        retain_template: How an example of it reads.
        retain_samples: Examples of it.
        dtype: Of the base model's weights; adapters are float32.
        device: Where the model runs.
        trust_remote_code: Allow code that comes with the model.
        **shared: Further fields of `Workbench`.

    Raises:
        LoraInitError: Data or model cannot be read, or do not go together.
    """
    # The tokenizer and the data first: they are quick to fail, and say how many classes the model needs.
    tokenizer = load_tokenizer(model, trust_remote_code)
    task = load_task(
        data, tokenizer, template=template, completion=completion, label=label, options=options, answer=answer,
        normalize=normalize, subset=subset, split=split, train_samples=train_samples,
        validation_samples=validation_samples, max_length=max_length, batch_size=batch_size, data_seed=data_seed,
    )  # fmt: skip
    retain: Batches | None = None
    if retain_data is not None:
        if task.kind == CLASSIFICATION:
            raise LoraInitError("retain_data is for language models: a classifier has no loss on text. Leave it out.")
        retain = load_batches(
            retain_data, tokenizer, template=retain_template, samples=retain_samples, batch_size=batch_size,
            max_length=max_length,
        )  # fmt: skip
    loaded = _load(model, task, dtype, device, trust_remote_code)
    return Workbench(
        loaded=loaded, task=task, retain=retain, name=name or task.label, directory=directory, batch_size=batch_size,
        **shared,
    )  # fmt: skip


def model_name(model: str) -> str:
    """Name a model without the path to it: settings are shared."""
    path = Path(model).expanduser()
    return path.absolute().name if path.is_dir() else model


def circumstances() -> dict[str, Any]:
    """Describe what may differ between runs that are compared: threads, processor, versions."""
    return {
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "versions": {
            "lora_init": lora_init.__version__,
            **{package: version(package) for package in ("torch", "transformers", "peft")},
            "python": platform.python_version(),
        },
    }


def _load(model: str, task: Task, dtype: str, device: str, trust_remote_code: bool) -> LoadedModel:
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    if task.kind == CLASSIFICATION:
        loaded = load_model(model, task_type="SEQ_CLS", n_labels=len(task.classes), **options)
        loaded.model.config.pad_token_id = task.padding
        if loaded.model.dtype != torch.float32:
            raise LoraInitError(f"dtype={dtype!r}: the head of a classifier is trained whole, and needs float32.")
        return loaded
    loaded = load_model(model, **options)
    if loaded.task_type != "CAUSAL_LM":
        raise LoraInitError(
            f"model {model!r} is a {type(loaded.model).__name__}, and a comparison trains causal language models, or "
            "classifiers with --label COLUMN."
        )
    return loaded


def _processor() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


# Steps of the first run after which its time is extrapolated.
_STEPS_TO_ESTIMATE = 3


class Progress:
    """Follows a comparison. Use it as a context manager around the runs.

    Args:
        steps: Steps of each run.
        say: Receives the lines.
        show: Show the bar; by default only on a terminal.
    """

    def __init__(self, steps: int, say: Callable[[str], None], show: bool | None = None) -> None:
        self._steps = steps
        self._say = say
        self._show = sys.stderr.isatty() if show is None else show
        self._bar: tqdm[Any] | None = None
        self._done_steps, self._estimated = 0, False
        self._planned = self._left = 0
        self._title = ""

    def __enter__(self) -> Progress:
        self._bar = tqdm(unit="step", disable=not self._show, dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, title: str, planned: int, left: int) -> None:
        """Say which run begins, how many there are in all and how many are left with it."""
        self._planned, self._left, self._done_steps, self._title = planned, left, 0, title
        if self._bar is not None:
            self._bar.set_description(f"run {planned - left + 1}/{planned} {title}", refresh=False)
            self._bar.total = self._bar.n + left * self._steps
            self._bar.refresh()

    def step(self, expected_seconds: float) -> None:
        """Count a step. After the first few, the whole time is estimated and said."""
        self._done_steps += 1
        if self._bar is not None:
            self._bar.update()
        if not self._estimated and self._done_steps == min(_STEPS_TO_ESTIMATE, self._steps):
            self._estimated = True
            self._line(f"{self._left} of {self._planned} runs left, about {duration(expected_seconds * self._left)}")

    def end(self, record: Mapping[str, Any]) -> None:
        """Say how a run ended."""
        if self._bar is not None:
            self._bar.update(self._steps - self._done_steps)
        number = self._planned - self._left + 1
        losses = record["validation_loss"] or []
        how = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}" if record["status"] == "finished" else record["error"]
        self._line(
            f"run {number}/{self._planned} {self._title}: {record['status']}, {how}, {record['run_seconds']:.0f} s"
        )

    def _line(self, text: str) -> None:
        if self._show:
            tqdm.write(text, file=sys.stderr)
        else:
            self._say(text)


def duration(seconds: float) -> str:
    """Say a time as people do.

    Example:
        >>> duration(42), duration(600), duration(9000)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


STARTS = ("random", "orthogonal", "eva-rho1", "eva", "eva-ranks")
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Comparison:
    """What `compare` did, or with `dry_run=True` would do.

    Attributes:
        directory: Where settings, runs and report are.
        settings: What all runs share.
        records: One for each run that ended, as in `runs.jsonl`.
        planned: All runs that belong to the comparison, those that ended among them.
        seconds_left: Estimate for the runs that are left; 0 if none is.
        summary: Verdicts, notes and tables; see `run_summary`.
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

    Every start gets the same sweep of learning rates. Each run that ends is appended to `runs.jsonl` in the output
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
        **loading: How model and data are read: `template`, `completion`, `label`, `options`, `answer`, `normalize`,
            `subset`, `split`, `train_samples`, `validation_samples`, `max_length`, `data_seed`, see `tasks.load_task`;
            `name`, `retain_data`, `retain_template`, `retain_samples`, `dtype`, `device`, `trust_remote_code`, see
            `bench_setup.set_up`.

    Raises:
        LoraInitError: Anything a user can get wrong: data, starts, rates, or a directory with other settings.
        KeyboardInterrupt: Ctrl-C; the report is written from the runs that ended.
    """
    names, own = _read_starts(starts)
    chosen_seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    points = sorted({0, steps, *(evaluation_points or [round(steps * i / 4) for i in (1, 2, 3)])})
    sweep = sweep or ("full" if torch.cuda.is_available() else "halving")
    check_plan(learning_rates, chosen_seeds, steps, points, warmup, sweep)
    directory = Path(output).expanduser()
    bench = set_up(
        model, data, directory, own=own, rank=rank, lora_alpha=lora_alpha, target_modules=target_modules, steps=steps,
        batch_size=batch_size, warmup=warmup, evaluation_points=points, statistics_batches=statistics_batches,
        **loading,
    )  # fmt: skip
    settings: dict[str, Any] = {
        **bench.settings(model_name(model)),
        "starts": names,
        "learning_rates": list(learning_rates),
        "seeds": chosen_seeds,
        "sweep": sweep,
        "match_scale": match_scale,
        **circumstances(),
        "command": command,
    }
    loaded = bench.loaded
    targets = find_targets(loaded.model, target_modules, task_type=loaded.task_type).layers.values()
    all_variants = variants(names, match_scale, len({target.parameters(1) for target in targets}) == 1)

    def plan(records: dict[tuple[Any, ...], Record]) -> list[Run]:
        return plan_runs(bench.name, all_variants, learning_rates, chosen_seeds, sweep, records)

    if dry_run:
        there = peek(directory, settings)
        planned = plan(there)
        left = sum(run.key(bench.name) not in there for run in planned)
        seconds = left * bench.seconds_of_a_run() if left else 0.0
        return Comparison(
            directory, settings, list(there.values()), planned, seconds, summarise(there.values(), settings), []
        )
    log = RunLog(directory, settings)
    try:
        _run_all(bench, log, plan, Progress(steps, say, progress))
    except BaseException:  # Ctrl-C too leaves a report of what ended; what went wrong matters more than the report
        if log.records:
            with suppress(LoraInitError):
                write_report(directory)
        raise
    records = list(log.records.values())
    return Comparison(
        directory, log.settings, records, plan(log.records), 0.0, summarise(records, log.settings),
        write_report(directory),
    )  # fmt: skip


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


def _run_all(
    bench: Workbench, log: RunLog, plan: Callable[[dict[tuple[Any, ...], Record]], list[Run]], progress: Progress
) -> None:
    """Do what is planned and has not ended. Failed runs get one more chance each time this is called."""
    for key in [key for key, record in log.records.items() if record["status"] == "failed"]:
        del log.records[key]
    with progress:
        while True:
            planned = plan(log.records)
            left = [run for run in planned if run.key(bench.name) not in log.records]
            if not left:
                return
            progress.begin(left[0].title, len(planned), len(left))
            record = bench.carry_out(left[0], lambda run: progress.step(bench.expected_seconds(run)))
            check_fair([*log.records.values(), record], bench.own)
            log.append(record)
            progress.end(record)
