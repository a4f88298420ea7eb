"""The command `lora-init init`: from a model and data to an adapter directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from typer import Argument, Option

from lora_init.adapters.asked import Asked, Layers, Pass, Ranks, Reading, Sample, Shape
from lora_init.adapters.starts import (
    BANK_WAY,
    BANK_WAYS,
    DEFAULT,
    DEFAULT_FOR_CLASSES,
    FROM_BANK,
    STARTS,
    Start,
    buildable,
)
from lora_init.cli.bank import start_from
from lora_init.cli.console import (
    busy,
    given,
    importing,
    is_quiet,
    offered,
    print_result,
    process_group,
    process_rank,
    say,
)
from lora_init.cli.options import Device, Dtype, Quantize, TrustRemoteCode
from lora_init.cli.summary import show_summary, summary_of
from lora_init.errors import LoraInitError, require
from lora_init.files import check_writable
from lora_init.loading.sources import FILE_TYPES

if TYPE_CHECKING:
    from torch import nn

    from lora_init.loading.models import ModelSource
    from lora_init.planning.plan import RankAllocation
    from lora_init.statistics.statistics import Statistics

if TYPE_CHECKING:
    Method: TypeAlias = str
    BankWay: TypeAlias = str
else:  # the registry decides what there is, starts of other packages among them
    Method, BankWay = Literal[(*buildable(), FROM_BANK)], Literal[tuple(BANK_WAYS)]


def _named(**facts: bool) -> str:
    """Return the names of the starts of this package that `init` makes and of which all these facts are true."""
    ours = [one for one in STARTS if one.function]
    return ", ".join(one.name for one in ours if all(getattr(one, fact) == value for fact, value in facts.items()))


EXAMPLE = """\b
Examples:
$ lora-init init MODEL sums.jsonl --rank 16 -o adapter
$ lora-init init MODEL quiz.csv --template '{question}' \\
    --completion ' {answer}' -o adapter
$ lora-init init MODEL reviews.csv --template '{text}' \\
    --label stars -o adapter
"""


@process_group()
def init(
    model: Annotated[str, Argument(help="Model directory or hub id.", show_default=False)],
    data: Annotated[
        str | None,
        Argument(
            help="File, pattern or folder of files, hub id, or - for JSON lines on standard input. Files are "
            f"{', '.join(FILE_TYPES)}, also with .gz; see --format. Not needed if the --statistics file exists.",
            show_default=False,
        ),
    ] = None,
    *,
    output: Annotated[Path, Option("--output", "-o", help="Adapter directory to write.", show_default=False)],
    ranks: Ranks,
    method: Annotated[
        Method | None,
        Option(
            metavar="START",
            help=f"How the adapter starts. Default: {DEFAULT}, with --label {DEFAULT_FOR_CLASSES}. There are "
            f"{', '.join(buildable())} and {FROM_BANK}. With backward passes: {_named(by_gradient=True)}. "
            f"B is not zero with {_named(b_is_zero=False)} and {FROM_BANK}.",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        Option(
            rich_help_panel="The adapter",
            help="What it says to train with, as lora-init compare found it. Default: the rate of the rule.",
        ),
    ] = None,
    steps: Annotated[
        int | None, Option(min=1, help="Steps that it will be trained for. Default: an epoch in batches of 8.")
    ] = None,
    reading: Reading,
    sample: Sample,
    statistics: Annotated[
        Path | None, Option(help="File for the statistics; the same command continues it, later ones need no DATA.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what it would do and cost; no weights are read.")] = False,
    overwrite: Annotated[
        bool,
        Option(
            "--overwrite",
            rich_help_panel="Output",
            help="Replace the adapter, and statistics of other data or settings.",
        ),
    ] = False,
    layers: Layers,
    ranks_from: Annotated[
        Path | None,
        Option("--ranks", help="Plan of lora-init ranks, for --rank and --rho.", rich_help_panel="Layers and ranks"),
    ] = None,
    shape: Shape,
    run: Pass,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    quantize: Quantize = None,
    bank: Annotated[
        Path | None, Option(help="With from-bank: directory of lora-init bank.", rich_help_panel="Starts from a bank")
    ] = None,
    by: Annotated[
        BankWay, Option(help="With from-bank: how its adapters are used.", rich_help_panel="Starts from a bank")
    ] = BANK_WAY,
    similarity: Annotated[
        Literal["embeddings", "subspaces", "both"],
        Option(
            help="With from-bank: what is compared; subspaces takes the --statistics file of this data.",
            rich_help_panel="Starts from a bank",
        ),
    ] = "embeddings",
) -> None:
    """Compute an adapter for MODEL from a sample of DATA and write it as a PEFT directory."""
    with importing(model, data):
        from lora_init.adapters import pipeline
        from lora_init.collection.collect import OtherSettingsError
        from lora_init.layers.identity import fingerprint
        from lora_init.loading.models import find_device
    from_bank = _is_from_bank(method, bank, data)
    file, there = _find_statistics(data, statistics, sample.label, run.token_mask)
    # Which start is recommended is a question about the data, or about the statistics that are there in their place.
    made = there.provenance if there else None
    of_classes = data is None and made is not None and made.gradients and "classes" in made.settings
    start = BANK_WAYS[by] if from_bank else pipeline.choose_start(method, sample.label is not None or of_classes)
    _check_start(start, data, learning_rate, quantize, shape)
    asked = Asked(method, reading, sample, ranks, layers, shape, run)
    pipeline.check(asked, start, output=output, overwrite=overwrite)
    find_device(device)
    plan, rank, rho = _budget(ranks_from, ranks, there, data)
    asked = asked.but(rank=rank)
    with busy(f"reading {model} and the data"):
        needs_loss = (run.gradients or start.by_gradient) and data is not None
        source = _open(model, asked, start, trust_remote_code, needs_loss, quantize)
        asked = asked.but(task_type=source.task_type)
        examples = pipeline.Examples(None)
        if data is not None:  # before the weights, which take longer
            found = pipeline.read(
                data, source.tokenizer, asked, start, seq2seq=source.seq2seq, known=source.classes
            )  # fmt: skip
            examples = pipeline.split(*found, start.measures(shape.gamma))
    if dry_run:
        from lora_init.cli.dry_run import estimate, show_estimate

        settings = {
            "rank": asked.ranks.rank, "rho": rho, "gradients": run.gradients or start.by_gradient,
            "max_batches": run.max_batches, "dtype": dtype, "device": device, "freeze_a": shape.freeze_a,
            "use_dora": shape.use_dora, "quantize": quantize,
        }  # fmt: skip
        print_result(estimate(source, examples.batches, vars(asked.layers), settings), show_estimate)
        return
    with busy(f"loading {model}"):
        classes, seed = examples.classes, run.seed  # of a new head
        if data is None and made is not None:
            classes, seed = made.settings.get("classes", ()), made.seed
        loaded = source.load(dtype=dtype, device=device, quantize=quantize, seed=seed, n_labels=len(classes) or None)
    asked = pipeline.fit_to(loaded.model, asked, examples.classes, loaded.drawn)
    if bank is not None:
        start_from(
            bank, loaded, examples.batches, [*examples.aside], there, by=by, similarity=similarity,
            rank=asked.ranks.rank, shape=shape, output=output, overwrite=overwrite,
        )  # fmt: skip
        return
    if plan is not None:
        plan.check_model(fingerprint(loaded.model), f"{type(loaded.model).__name__} {model}")
    if there is not None and data is None:
        stats = _as_it_is(there, loaded.model, asked.layers)
    else:
        asked = asked.but(statistics=file, progress=False if is_quiet() else None)
        before = _written(file)
        with _saying_what_is_kept(file):
            try:
                stats, start = pipeline.learn(loaded.model, examples, asked, start, rho)
            except OtherSettingsError as error:
                if not overwrite:
                    raise LoraInitError(
                        f"{error.difference} Pass --overwrite to collect again, or leave DATA out to use the file as "
                        "it is."
                    ) from None
                stats, start = pipeline.learn(loaded.model, examples, asked.but(overwrite=True), start, rho)
        if before is not None and before == _written(file):
            _say_used(stats)
    if process_rank():
        return
    with busy(f"computing the start {start.name}"):
        plan = plan or pipeline.allocate(stats, asked, start)
        built = pipeline.build(loaded.model, stats, plan, start, asked, examples.aside)
    built = replace(built, learning_rate=learning_rate, steps=steps)
    directory = built.save_pretrained(output, overwrite=overwrite, model=loaded.model)
    print_result(summary_of(model, stats, plan, directory, file, built), show_summary, written=True)


# Options that say nothing without the thing that they are about: how DATA are read, how the pass over them is made, ...
_OF_DATA = offered(Reading, Sample)
_OF_PASS = [name for name in offered(Pass) if name != "seed"]
_OF_BANK = ["by", "similarity"]
_WITH_BANK = ("task_type", "lora_alpha", "gamma", "weights", "unchecked", "seed")
_OF_OWN_START = ["rho", "ranks_from", "dry_run", "label", "learning_rate", "steps"]
_OF_OWN_START += [name for name in offered(Layers, Shape, Pass) if name not in _WITH_BANK]


def _refuse_idle(arguments: Sequence[str], why: str) -> None:
    idle = given(arguments)
    if idle:
        raise LoraInitError(f"{', '.join(idle)}: {why}. Leave {'it' if len(idle) == 1 else 'them'} out.")


def _is_from_bank(method: str | None, bank: Path | None, data: str | None) -> bool:
    """Return whether the start is from a bank, and refuse options that would say nothing."""
    from_bank = method == FROM_BANK
    if from_bank != (bank is not None) or (from_bank and data is None):
        raise LoraInitError("--method from-bank and --bank go together, and need DATA: examples of the new task.")
    if bank is not None:
        from lora_init.bank.store import open_bank

        open_bank(bank)
        _refuse_idle(_OF_OWN_START, "a bank's adapters decide that")
    else:
        _refuse_idle(_OF_BANK, "that is for --method from-bank")
    return from_bank


def _find_statistics(
    data: str | None, statistics: Path | None, label: str | None, token_mask: str
) -> tuple[Path | None, Statistics | None]:
    """Return the statistics file, read if it is there; refuse to go without data where it does not replace them."""
    from lora_init.statistics.statistics import Statistics

    if label is not None and token_mask == "labels":
        raise LoraInitError(f"--label {label}: a class is no --token-mask labels. Leave it out.")
    file = statistics.expanduser() if statistics else None
    if file is not None and data is not None:
        check_writable(file, overwrite=True, kind="statistics file")
    if data is None and file is None:
        raise LoraInitError("DATA is missing. Name it, or name with --statistics a file that exists.")
    if data is None and file is not None and not file.exists():
        raise LoraInitError(f"--statistics {file}: no such file. Name one that exists, or DATA to make it from.")
    if data is None:
        _refuse_idle([*_OF_DATA, *_OF_PASS], f"without DATA nothing is read; {file} is used as it is")
    return file, Statistics.load(file) if file is not None and file.exists() else None


def _check_start(
    start: Start, data: str | None, learning_rate: float | None, quantize: str | None, shape: Shape
) -> None:
    """Refuse a start without the data for its step, options about a quantized base for others, and what is missing."""
    if learning_rate is not None and not 0.0 < learning_rate < 1.0:
        raise LoraInitError(f"--learning-rate {learning_rate:g}: expected a number between 0 and 1, such as 2e-4.")
    if data is None and start.takes_step:
        raise LoraInitError(
            f"--method {start.name} finds the size of its step by the loss on examples, and DATA is missing."
        )
    if quantize is not None:
        require("bitsandbytes")
    idle = [name for name, value in (("--weights", shape.weights), ("--unchecked", shape.unchecked)) if value]
    if idle and not start.by_error:
        raise LoraInitError(f"{', '.join(idle)}: for --method {_named(by_error=True)} alone. Leave it out.")


def _budget(
    ranks_from: Path | None, ranks: Ranks, there: Statistics | None, data: str | None
) -> tuple[RankAllocation | None, int, float]:
    """Read the plan; and rank and rho of the pass from a file that is there, if it serves, or from the plan."""
    from lora_init.adapters.pipeline import SPARE
    from lora_init.planning.allocate import allocate_ranks
    from lora_init.planning.plan import load_plan

    if there is not None and data is None and ranks_from is None:
        allocate_ranks(there, ranks.rank, ranks.rho)  # refuses more than was collected
    of_file = (there.provenance.rho if there else None) or SPARE
    if ranks_from is None:
        return None, ranks.rank, max(ranks.rho, of_file)
    if given(("rank", "rho")):
        raise LoraInitError("--ranks names a plan, which has all ranks. Leave --rank and --rho out.")
    plan = load_plan(ranks_from)
    if there is not None:
        return plan, there.provenance.rank, of_file
    return plan, plan.rank, max(1.0, max(plan.values()) / plan.rank)


def _open(
    model: str, asked: Asked, start: Start, trust_remote_code: bool, needs_loss: bool, quantize: str | None
) -> ModelSource:
    """Read what a model is, for classes if the data have them; refuse one that the start cannot be made for."""
    from lora_init.layers.targets import HEADS
    from lora_init.loading.models import open_model

    label, task_type = asked.sample.label, asked.layers.task_type
    if label is not None and task_type not in (None, "SEQ_CLS"):
        raise LoraInitError(f"--label makes this a classification, and --task-type {task_type} does not. Give one.")
    task_type = task_type if label is None else "SEQ_CLS"
    source = open_model(model, task_type=task_type, trust_remote_code=trust_remote_code)
    source.check_quantized(quantize, needed=start.by_error)
    if needs_loss and source.task_type in HEADS and label is None:
        other = "Name their column: --label COLUMN." if source.task_type == "SEQ_CLS" else "Use initialize() in Python."
        raise LoraInitError(f"gradients for the task type {source.task_type} need classes, not texts alone. {other}")
    return source


def _as_it_is(stats: Statistics, model: nn.Module, layers: Layers) -> Statistics:
    """Use a statistics file without data; refuse it if it is of another model or other layers."""
    from lora_init.layers.identity import fingerprint
    from lora_init.layers.targets import find_targets

    made = stats.provenance
    if made.fingerprint != fingerprint(model):
        origin = f"{made.model_class} {made.model_id}".strip()
        raise LoraInitError(f"{stats.path} was made from another model ({origin}). Name the file of this one.")
    found = find_targets(model, **vars(layers))
    wanted, there = {*found.layers, *found.unsupported}, {*stats, *stats.unsupported}
    if wanted != there:
        raise LoraInitError(
            f"{stats.path} is not about the layers that --target-modules and --target-parameters select: "
            f"{len(wanted - there)} are missing, {len(there - wanted)} too many. Select those that it is about."
        )
    _say_used(stats)
    return stats


def _written(file: Path | None) -> int | None:
    return file.stat().st_mtime_ns if file is not None and file.exists() else None


@contextmanager
def _saying_what_is_kept(file: Path | None) -> Iterator[None]:
    """Print what is kept of a pass that did not come to its end."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as stop:
        found: Statistics | None = getattr(stop, "statistics", None)
        if file is not None and found is not None:
            n_batches = found.provenance.n_batches
            say(f"{file}: kept the statistics of {n_batches} batches. The same command goes on after them.")
        elif found is not None or isinstance(stop, KeyboardInterrupt):
            say("nothing was kept. --statistics FILE keeps what a pass has found, and goes on from there.")
        raise


def _say_used(stats: Statistics) -> None:
    made = stats.provenance
    until = "" if made.complete else ", of a pass that was interrupted"
    say(f"{stats.path}: used as it is ({made.data or 'data not described'}; {made.n_batches} batches{until})")
