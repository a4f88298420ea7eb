"""The command `lora-init compare`: which start is worth anything on this model and this data."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from typer import Argument, Option

from lora_init.adapters.init_config import DATA, LIST, Ranks, Reading, Sample, read_modules, read_names, unescape
from lora_init.cli.console import FAILED, importing, print_result, refuse_idle, running, say
from lora_init.cli.options import (
    FloatWeights,
    LoadingQuantized,
    MaxLength,
    ModelName,
    as_declared,
    read_numbers,
    read_share,
)
from lora_init.cli.tables import Cells
from lora_init.errors import LoraInitError
from lora_init.loading.examples import BATCH_SIZE
from lora_init.progress import duration
from lora_init.starts.starts import DEFAULT, DEFAULT_FOR_CLASSES, RANDOM

if TYPE_CHECKING:
    from rich.console import Console

    from lora_init.comparison.compare import Comparison
    from lora_init.comparison.findings import Summary

EXAMPLE = """\b
Examples:
$ lora-init compare MODEL sums.jsonl -o comparison --dry-run
$ lora-init compare MODEL quiz.csv --template '{question}' \\
    --completion ' {answer}' -o comparison --time 2h
$ lora-init compare MODEL reviews.csv --template '{text}' \\
    --label stars -o comparison --starts random,eva,lora-one
"""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """How data become a task, and what else is measured and trained on."""

    title: ClassVar = "Data"
    # Three sets apart: for training, for choosing rates, and for every figure of the report. Were a rate chosen by the
    # examples that it is reported on, the start with most rates would look best.
    train_samples: Annotated[int, dict(min=1, help="Training examples at most.")] = 1024
    # None for both: of few data they are a sixth and a third, so that half is left to train on, see `fold_sizes`.
    selection_samples: Annotated[
        int | None,
        dict(min=1, help="Examples that learning rates are chosen by. Default: 128, at most a sixth of the data."),
    ] = None
    report_samples: Annotated[
        int | None, dict(min=1, help="Examples that every figure is from. Default: 256, at most a third of the data.")
    ] = None
    max_length: MaxLength = 256
    data_seed: Annotated[int, dict(min=0, help="Seed of the split.")] = 0
    # Of a multiple choice the option with the highest log-likelihood is the answer.
    options: Annotated[
        str | None, dict(help="Column of the options, or yes,no: scores a multiple choice by log-likelihood.")
    ] = None
    answer: Annotated[str, dict(help="With --options: column that says which is right.")] = "answer"
    normalize: Annotated[bool, dict(help="With --options: divide the log-likelihood by the number of tokens.")] = False
    name: Annotated[str | None, dict(help="Name of the task in the report. Default: the data's name.")] = None
    # Its loss before and after training tells what was forgotten.
    retain_data: Annotated[str | None, dict(metavar=DATA, help="Text of another kind, to measure forgetting.")] = None
    # It is another kind of text, with columns of its own.
    retain_template: Annotated[str | None, dict(callback=unescape, help="How an example of it reads.")] = None
    retain_samples: Annotated[int, dict(min=1, help="Examples of it.")] = 64
    dial: Annotated[bool, dict(help="With --retain-data: evaluate each adapter at several strengths.")] = True
    # Each is weighed 0.25.
    replay: Annotated[str | None, dict(help="Text to train on, too, one beside the examples of each step.")] = None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How an adapter is trained from each start, and which runs there are."""

    title: ClassVar = "Runs"
    lora_alpha: Annotated[float | None, dict(help="The adapter is scaled by lora_alpha / rank. Default: rank x 2.")] = (
        None
    )
    target_modules: Annotated[str, dict(metavar=LIST, help="As for lora-init init.")] = "all-linear"
    steps: Annotated[int | None, dict(min=1, help="Steps of each run. Default: 100, with --time at most that.")] = None
    batch_size: Annotated[int, as_declared(Sample, "batch_size")] = BATCH_SIZE
    warmup: Annotated[float, dict(help="Share of the steps in which the learning rate rises.")] = 0.1
    # Lists are typed as texts, and read by `compare`.
    eval_points: Annotated[
        str | None,
        dict(metavar=LIST, help="Steps after which to measure, such as 10,20,50. Default: every quarter."),
    ] = None
    sweep: Annotated[
        Literal["halving", "full"] | None,
        dict(
            help="halving: all rates on two seeds, each start's best on the others. Default on a CPU.",
            show_default=False,
        ),
    ] = None
    # A best rate at the edge of those that were tried may not be the best, so the edge is moved.
    extend: Annotated[
        int, dict(min=0, help="Rates added on either side while a start's best is the lowest or the highest.")
    ] = 4
    # Its rates are a tenth of the others.
    full: Annotated[bool, dict(help="Also train all weights, to say how much there is to win.")] = False
    # As text, since several numbers are compared as starts of their own, such as eva+16-batches.
    statistics_batches: Annotated[
        str,
        dict(metavar=LIST, help="Training batches that statistics are made from; 4,16,64 compares these numbers."),
    ] = "32"
    # Half the width of a verdict's interval, as a share of random's loss.
    precision: Annotated[str | None, dict(help="Add seeds until every verdict is this precise, such as 1%.")] = None
    # Of this machine; --cluster is for others.
    workers: Annotated[
        int | None, dict(min=1, help="Processes that do runs side by side, a GPU each if there are any.")
    ] = None
    cluster: Annotated[
        str | None,
        dict(help="Do the runs on ray, ray://HOST:PORT, dask:tcp://HOST:PORT, slurm or slurm:OPTIONS.yaml."),
    ] = None
    gpus_per_run: Annotated[
        float, dict(help="With --cluster: GPUs, or the share of one, for a run, if there are any.")
    ] = 1


def compare(
    model: ModelName,
    data: Annotated[str, Argument(help="Data, as for lora-init init.", show_default=False)],
    *,
    output: Annotated[Path, Option("--output", "-o", help="Directory for runs and report.", show_default=False)],
    rank: Annotated[int, Option(**as_declared(Ranks, "rank"))] = 8,
    starts: Annotated[
        str | None,
        Option(
            metavar=LIST,
            help=f"Default: {RANDOM}, {DEFAULT} and {DEFAULT_FOR_CLASSES}. "
            "mine=DIRECTORY is an adapter of your own, eva+32-alpha has a lora_alpha of its own.",
        ),
    ] = None,
    learning_rates: Annotated[
        str | None,
        Option(
            metavar=LIST,
            help="Tried for every start. Default: three around its measured rate, as init prints it.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, Option(min=1, help="Seeds: 0, 1, 2 and so on. Default: 5, with a limit at most 32.")
    ] = None,
    reading: Reading,
    label: Annotated[str | None, Option(help="Column of the class: trains a classifier.")] = None,
    time: Annotated[
        str | None, Option(help="Limit, such as 20m or 2h: what is left open is made as small as that needs.")
    ] = None,
    dry_run: Annotated[
        bool, Option(help="Say what it would do and how long it takes; a step is measured, nothing kept.")
    ] = False,
    task: TaskOptions,
    runs: RunOptions,
    weights: FloatWeights = None,
    loading: LoadingQuantized,
    bank: Annotated[
        Path | None,
        Option(rich_help_panel="Starts from a bank", help="Bank for bank-nearest, -mixture, -generated and -mean."),
    ] = None,
) -> None:
    """Train the same adapter on MODEL and DATA from several starts, everything else equal, and compare.

    Given again, the same command goes on where it was stopped.
    """
    # Every run is a file, so a comparison that was stopped, or one with more seeds, goes on from those that are there.
    _check_cluster(data, runs.workers, runs.cluster, time)
    given = vars(reading) | vars(task) | vars(runs) | vars(loading)
    # Two options have other names than the arguments of `compare`.
    given["executor"], points = given.pop("cluster"), given.pop("eval_points")
    # Texts are read here, before the import, so that a misspelt one is refused at once.
    if starts is not None:
        given["starts"] = [_read_start(word) for word in read_names(starts)]
    if learning_rates is not None:
        given["learning_rates"] = read_numbers("--learning-rates", learning_rates, float)
    if points is not None:
        given["evaluation_points"] = read_numbers("--eval-points", points, int)
    given["target_modules"] = read_modules(runs.target_modules)
    given["statistics_batches"] = read_numbers("--statistics-batches", runs.statistics_batches, int)
    if time is not None:
        given["time"] = read_seconds(time)
    if runs.precision is not None:
        given["precision"] = read_share("--precision", runs.precision)
    if running.quiet:
        given["progress"] = False  # without -q a terminal decides
    with importing(model, data):
        from lora_init.comparison.compare import compare as run_comparison
    comparison = run_comparison(
        model, data, output, rank=rank, seeds=seeds, label=label, dry_run=dry_run, weights=weights, bank=bank,
        command=shlex.join(["lora-init", *sys.argv[1:]]), say=say, **given,
    )  # fmt: skip
    _print_comparison(comparison)


def _check_cluster(data: str, workers: int | None, cluster: str | None, time: str | None) -> None:
    """Refuse what workers cannot read, and what is for a cluster where none is named; say what a limit means there."""
    # Workers are processes, and each reads the data by its name.
    if data == "-" and (workers or cluster):
        raise LoraInitError("DATA '-': workers read the data, too, and standard input is read once. Name a file.")
    if cluster is None:
        refuse_idle(("gpus_per_run",), "that is for --cluster")
    if time and cluster:
        say("--time counts from now on, waiting in the queue included; runs that have not ended by then are canceled.")


def _print_comparison(comparison: Comparison) -> None:
    """Print a comparison or its outlook; exit with an error if runs failed."""
    if comparison.outlook is not None:  # of a dry run
        # A start is an object; in JSON its name stands for it.
        runs = [asdict(run) | {"start": str(run.start)} for run in comparison.planned]
        plan = {"runs": runs, **comparison.outlook.to_dict()}
        print_result(plan | {"data": comparison.settings["data"]}, show_outlook)
        return
    content = {"directory": str(comparison.directory), "settings": comparison.settings, "runs": comparison.records}
    content["verdicts"] = [asdict(verdict) for verdict in comparison.summary.verdicts]
    content["notes"] = comparison.summary.notes
    print_result(content, lambda console, _: show_comparison(console, comparison.summary), written=True)
    if not running.as_json:  # the directory is in the JSON
        say(f"{comparison.directory / 'report.html'}: written")
        if (comparison.directory / "best").exists():
            say(f"{comparison.directory / 'best'}: the trained adapter of the best start")
    # The others are compared all the same, but a script must see that something is missing.
    if any(record["status"] == "failed" for record in comparison.records):
        raise SystemExit(FAILED)


# What a dry run prints of runs that may be added, by the keys of `may_add` of an outlook.
_ADDED = {
    "rates": "{} more at rates beside a best one at the edge",
    "seeds": "{} more on seeds that are added where they still decide",
    "longer": "{} more of random for twice the steps, if a start is better",
}


def show_outlook(console: Console, ahead: Mapping[str, Any]) -> None:
    """Print what `Outlook` has."""
    from rich.table import Table

    from lora_init.comparison.wording import percent, rate_text

    # All rates run on the first seeds, `swept`; on the others only each start's best rate and its measured one.
    swept, others = ahead["swept"], ahead["others"]
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    # Where the width is short, rates are broken into lines; names and numbers stay whole.
    table.add_column("start", overflow="fold", no_wrap=True)
    table.add_column(f"learning rates on {_seeds(swept)}", overflow="fold")
    if others:
        table.add_column(f"on {_seeds(others)}", overflow="fold")
    table.add_column("runs", justify="right", overflow="fold", no_wrap=True)
    for start in ahead["starts"]:
        own = start["own_rate"]  # None without a measured rate
        row = [start["name"], " ".join(f"{rate_text(rate)}{'*' * (rate == own)}" for rate in start["rates"])]
        if others:
            row.append(f"the best and {rate_text(own)}*" if own else "the best")
        table.add_row(*row, str(start["runs"]))
    console.print(table)
    lines = []
    if any(start["own_rate"] for start in ahead["starts"]):
        lines.append("* is the measured rate, as init prints it.")
    lines.append(f"Data: {ahead['data']}.")
    counts = f"{ahead['n_runs']} runs, {ahead['ended']} ended"
    added = [_ADDED[what].format(n) for what, n in ahead["may_add"].items() if n]
    if added:
        counts += f"; at most {', '.join(added)}"
    lines.append(f"{counts}.")
    lines.append(_time_text(ahead))
    lines.append(_detectable(len(swept) + len(others), ahead, percent))
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _time_text(ahead: Mapping[str, Any]) -> str:
    """Write how long the runs take, with those that may be added and without."""
    least, most = duration(ahead["seconds"]), duration(ahead["most_seconds"])
    text = f"Time: about {least}"
    if most != least:  # as they are printed, to two digits
        text += f" to {most}"
    dial = ahead["dial_seconds"]
    if dial:
        text += f", {duration(dial)} of it to evaluate adapters at several strengths (--no-dial leaves it out)"
    return f"{text}; a step takes {ahead['pace']['step']:.2g} s."


def _seeds(which: Sequence[int]) -> str:
    numbers = ", ".join(map(str, which))
    if len(which) > 2 and which[-1] - which[0] == len(which) - 1:
        return f"seeds {which[0]} to {which[-1]}"
    return f"seeds {numbers}" if len(which) > 1 else f"seed {numbers}"


def _detectable(n_seeds: int, ahead: Mapping[str, Any], percent: Callable[[float], str]) -> str:
    """Write how small a difference this number of seeds and larger ones can show."""
    if n_seeds == 1:
        return "One seed shows no difference. Take 5."
    differences, scatter = ahead["detectable"], percent(ahead["scatter"])
    texts = [f"{n} seeds {percent(differences[n])}" for n in differences if n >= n_seeds]
    if not texts:
        return "Nothing is compared with random."
    return f"Detectable at best: with {', with '.join(texts)} of the loss, where runs scatter by {scatter} as ours did."


def show_comparison(console: Console, summary: Summary) -> None:
    """Print verdicts, notes and tables."""
    from rich.text import Text

    from lora_init.comparison.tables import run_tables

    # Everything is a `Text`: names of starts are the user's, and may have square brackets, which rich reads as markup.
    console.print(Text(summary.answer, "bold"))
    for caveat in [*summary.caveats, *summary.notes]:
        console.print(Text(f"note: {caveat}"))
    console.print(Text(f"\n{summary.facts}"))
    sentences = [summary.headroom, summary.headline, *(verdict.sentence for verdict in summary.verdicts)]
    sentences += [*summary.as_recommended, *summary.equal_time, *summary.forgetting, *summary.data_needed]
    for text in sentences:
        console.print(Text(text))
    console.print()
    for name, cells in run_tables(summary).items():
        if name != "runs":  # too many for a terminal; they are in the report
            console.print()
            console.print(Text(name.replace("_", " "), "bold"))
            console.print(Cells(cells.to_dict("records")))
    if summary.command:
        console.print(Text(f"\n{summary.command}"))


def _read_start(word: str) -> str | tuple[str, Path]:
    """Read the name of a start, or NAME=DIRECTORY of an adapter of the user's own."""
    name, equals, directory = word.partition("=")
    return (name, Path(directory)) if equals else word


def read_seconds(text: str) -> float:
    """Read a duration such as "90m" or "1h 30m", in seconds."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    part, compact = r"(\d+(?:\.\d+)?)([smhd])", text.replace(" ", "")
    if not re.fullmatch(f"(?:{part})+", compact):  # a bare number has no unit that could be guessed
        raise LoraInitError(f"--time {text!r}: expected a duration such as 90s, 30m, 2h or 1h30m.")
    return sum(float(number) * units[unit] for number, unit in re.findall(part, compact))
