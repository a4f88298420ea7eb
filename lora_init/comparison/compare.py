"""compare(): train the same adapter from several starts, everything else equal, and say what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_init.comparison.bench_setup import circumstances, model_name, set_up
from lora_init.comparison.experiment import Run, check_fair, check_plan, plan_runs, variants
from lora_init.comparison.report import write_report
from lora_init.comparison.run_log import Record, RunLog, peek
from lora_init.comparison.run_progress import Progress
from lora_init.comparison.run_summary import Summary, summarise
from lora_init.comparison.starts import START_NAMES, check_start
from lora_init.comparison.workbench import Workbench
from lora_init.errors import LoraInitError
from lora_init.layers.targets import find_targets

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
