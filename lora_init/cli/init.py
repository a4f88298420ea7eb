"""The command `lora-init init`: from a model and data to an adapter directory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from typer import Argument, Option

from lora_init.adapters.starts import (
    BANK_WAY,
    BANK_WAYS,
    DEFAULT,
    DEFAULT_FOR_CLASSES,
    FROM_BANK,
    RANDOM,
    STARTS,
    Start,
    buildable,
    find_start,
)
from lora_init.cli.bank import start_from
from lora_init.cli.console import (
    Completion,
    DataFormat,
    Device,
    Dtype,
    MaxLength,
    Samples,
    Template,
    TrustRemoteCode,
    busy,
    given,
    importing,
    is_quiet,
    print_result,
    process_group,
    process_rank,
    read_modules,
    read_names,
    say,
)
from lora_init.cli.tables import correction_facts, finite, quantisation_name
from lora_init.errors import LoraInitError, require
from lora_init.files import check_writable
from lora_init.loading.sources import FILE_TYPES

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from lora_init.adapters.adapter_init import AdapterInit
    from lora_init.adapters.starts import Start
    from lora_init.loading.batches import Batches
    from lora_init.loading.models import ModelSource
    from lora_init.planning.plan import RankAllocation
    from lora_init.statistics.statistics import Statistics

TokenMask = Literal["attention", "labels"]
Quantization = Literal["nf4", "fp4", "int8"]
if TYPE_CHECKING:
    Method: TypeAlias = str
    BankWay: TypeAlias = str
else:  # the registry decides what there is, starts of other packages among them
    Method, BankWay = Literal[(*buildable(), FROM_BANK)], Literal[tuple(BANK_WAYS)]

RANK = 16


def _named(**facts: bool) -> str:
    """Name the starts of this package that `init` makes and of which all these facts are true."""
    ours = [one for one in STARTS if one.made_by == "lora_init"]
    return ", ".join(one.name for one in ours if all(getattr(one, fact) == value for fact, value in facts.items()))


def _each(fact: str) -> str:
    """List a number of the starts that have one of their own, and that of all others."""
    ours = [one for one in STARTS if one.made_by == "lora_init"]
    usual = getattr(find_start(RANDOM), fact)
    own = [f"{getattr(one, fact):g} for {one.name}" for one in ours if getattr(one, fact) != usual]
    return ", ".join([*own, f"else {usual:g}"])


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
            help=f"File ({', '.join(FILE_TYPES)}, also with .gz), pattern or folder of files, hub id, or - for JSON "
            "lines on standard input; see --format. Not needed if the --statistics file exists.",
            show_default=False,
        ),
    ] = None,
    *,
    output: Annotated[Path, Option("--output", "-o", help="Adapter directory to write.", show_default=False)],
    rank: Annotated[int | None, Option(min=1, help="Average rank of a layer.", show_default=str(RANK))] = None,
    method: Annotated[
        Method | None,
        Option(
            metavar="START",
            help=f"How the adapter starts. With backward passes: {_named(by_gradient=True)}. B is not zero with "
            f"{_named(b_is_zero=False)} and {FROM_BANK}. Default: {DEFAULT}; with --label {DEFAULT_FOR_CLASSES}.",
        ),
    ] = None,
    lora_alpha: Annotated[
        float | None, Option(help=f"The adapter is scaled by lora_alpha / rank. Default: rank x {_each('scaling')}.")
    ] = None,
    learning_rate: Annotated[
        float | None,
        Option(help="What it says to train with, as lora-init compare found it. Default: what was measured."),
    ] = None,
    template: Template = None,
    completion: Completion = None,
    label: Annotated[str | None, Option(help="Column of the class: an adapter and a head for a classifier.")] = None,
    statistics: Annotated[
        Path | None, Option(help="File kept every minute, and gone on from by the same command; serves without DATA.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what it would do and cost; no weights are read.")] = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace the adapter, and statistics of other data or settings.")
    ] = False,
    data_format: DataFormat = None,
    subset: Annotated[str | None, Option(help="Configuration of a hub data set.")] = None,
    split: Annotated[str, Option(help="Split of a hub data set or a folder.")] = "train",
    samples: Samples = 256,
    batch_size: Annotated[int, Option(min=1, help="Examples in a batch.")] = 4,
    max_length: MaxLength = 512,
    target_modules: Annotated[
        str,
        Option(help="all-linear, attention, mlp, cross-attention, names, or a regular expression for full names."),
    ] = "all-linear",
    exclude_modules: Annotated[str | None, Option(help="Names, or a regular expression, to leave out.")] = None,
    target_parameters: Annotated[str | None, Option(help="Names of fused parameters of experts.")] = None,
    modules_to_save: Annotated[str | None, Option(help="Modules to train whole, such as lm_head.")] = None,
    rho: Annotated[
        float | None,
        Option(min=1.0, help=f"At most rho x rank in one layer. Default: {_each('rho')}."),
    ] = None,
    ranks_from: Annotated[Path | None, Option("--ranks", help="Plan of lora-init ranks, for --rank and --rho.")] = None,
    use_rslora: Annotated[bool, Option("--use-rslora", help="Scale by lora_alpha / sqrt(rank).")] = False,
    use_dora: Annotated[bool, Option("--use-dora", help="Add DoRA's magnitudes.")] = False,
    freeze_a: Annotated[bool, Option("--freeze-a", help="Train B alone: see the adapter's README.md.")] = False,
    gradients: Annotated[bool, Option("--gradients", help="Run backward passes, too, for later use.")] = False,
    whiten: Annotated[bool, Option("--whiten", help="With eva: scale each row by its variance.")] = False,
    gamma: Annotated[
        float | None,
        Option(
            help="Where B is not zero: larger is a smaller step. Default: searched"
            f"{''.join(f'; {one.name} {one.gamma:g}' for one in STARTS if one.corrects_base)}."
        ),
    ] = None,
    center: Annotated[bool, Option(help="Subtract the mean: PCA. Without: the second moment.")] = True,
    token_mask: Annotated[TokenMask, Option(help="Count all tokens but padding, or those with a label.")] = "attention",
    max_batches: Annotated[int, Option(min=1, help="Batches at most; fewer if nothing changes any more.")] = 64,
    skip_bad_batches: Annotated[int, Option(min=0, help="Batches that may fail, and are then left out.")] = 0,
    seed: Annotated[int, Option(min=0, help="Seed of the sample and of all else that is random.")] = 0,
    task_type: Annotated[str | None, Option(help="PEFT's task type. Default: what the checkpoint is for.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    quantize: Annotated[
        Quantization | None, Option(help="Quantise the base while it is loaded, as QLoRA does, by bitsandbytes.")
    ] = None,
    weights: Annotated[
        str | None, Option(help="With qera: the float model that MODEL was quantised from. Default: MODEL itself.")
    ] = None,
    unchecked: Annotated[
        bool, Option("--unchecked", help="With qera: write it even if the loss on examples set aside does not fall.")
    ] = False,
    bank: Annotated[Path | None, Option(help="With from-bank: directory of lora-init bank.")] = None,
    by: Annotated[BankWay, Option(help="With from-bank: how its adapters are used.")] = BANK_WAY,
    similarity: Annotated[
        Literal["embeddings", "subspaces", "both"],
        Option(help="With from-bank: what is compared; subspaces takes the --statistics file of this data."),
    ] = "embeddings",
) -> None:
    """Compute an adapter for MODEL from a sample of DATA and write it as a PEFT directory."""
    with importing(model, data):
        from lora_init.adapters.build import build_adapter, check_adapter_options
        from lora_init.adapters.peft_model import check_modules_to_save
        from lora_init.layers.identity import fingerprint
        from lora_init.loading.batches import load_batches
        from lora_init.loading.models import find_device
        from lora_init.planning.allocate import allocate_ranks
    options: dict[str, Any] = {
        "gamma": gamma, "whiten": whiten, "lora_alpha": lora_alpha, "use_dora": use_dora,
        "modules_to_save": read_names(modules_to_save),
    }  # fmt: skip
    start = _choose(method, by, _is_from_bank(method, bank, data), label, data, statistics)
    _check_quantised(start, quantize, weights, unchecked)
    if learning_rate is not None and not 0.0 < learning_rate < math.inf:
        raise LoraInitError(f"--learning-rate {learning_rate:g}: expected a positive number such as 2e-4.")
    check_adapter_options(start, **options, output=output, overwrite=overwrite)
    sets_aside, gradients = start.takes_step or start.by_error, gradients or start.by_gradient
    find_device(device)
    file = _check_sources(data, statistics, start.name if start.takes_step else "", label, token_mask)
    given_rho, (plan, rank, rho, rho_of_pass) = rho, _read_budget(ranks_from, rank, rho, start, file)
    with busy(f"reading {model} and the data"):
        source = _open(model, task_type, label, trust_remote_code, gradients and data is not None, quantize, start)
        read = partial(
            load_batches, data, source.tokenizer, template=template, completion=completion,
            format=data_format, subset=subset, split=split, batch_size=batch_size, max_length=max_length, seed=seed,
            seq2seq=source.seq2seq and label is None, needs_labels=gradients or token_mask == "labels", label=label,
            known_classes=source.classes,
        )  # fmt: skip
        batches = read(samples=samples) if data is not None else None  # before the weights, which take longer
        aside, batches = _read_aside(read if sets_aside else None, batches, samples, batch_size)
    selection: dict[str, Any] = {
        "target_modules": read_modules(target_modules),
        "exclude_modules": read_modules(exclude_modules) if exclude_modules else None,
        "target_parameters": read_names(target_parameters) or None,
        "task_type": source.task_type,
    }
    settings: dict[str, Any] = {
        "rank": rank, "rho": rho_of_pass, "center": center, "token_mask": token_mask, "gradients": gradients,
        "max_batches": max_batches, "seed": seed, "skip_bad_batches": skip_bad_batches,
    }  # fmt: skip
    if dry_run:
        from lora_init.cli.dry_run import estimate, show_estimate

        settings |= {"dtype": dtype, "device": device, "freeze_a": freeze_a, "use_dora": use_dora, "quantise": quantize}
        print_result(estimate(source, batches, selection, settings), show_estimate)
        return
    with busy(f"loading {model}"):
        loaded = source.load(dtype=dtype, device=device, quantise=quantize, **_head(batches, file, seed))
    check_modules_to_save(loaded.model, options["modules_to_save"], loaded.task_type, loaded.drawn)
    if bank is not None:
        start_from(
            bank, loaded, batches, aside, file, by=by, rank=rank, lora_alpha=lora_alpha or start.lora_alpha(rank),
            gamma=gamma, similarity=similarity, output=output, overwrite=overwrite,
        )  # fmt: skip
        return
    if plan is not None:
        plan.check_model(fingerprint(loaded.model), f"{type(loaded.model).__name__} {model}")
    fall_back = method is None and {"rho": given_rho or find_start(DEFAULT).rho, "gradients": False}
    stats, start = _learn(loaded.model, batches, file, overwrite, selection, settings, start, fall_back or {})
    if process_rank():
        return
    ranks = plan or allocate_ranks(stats, rank=rank, rho=given_rho or start.rho)
    build = partial(
        build_adapter, stats, ranks, start.name, **options, use_rslora=use_rslora, freeze_a=freeze_a, seed=seed
    )
    built = _built(loaded.model, build, start, aside, gamma, stats=stats, weights=weights, unchecked=unchecked)
    built = replace(built, learning_rate=learning_rate)
    directory = built.save_pretrained(output, overwrite=overwrite, model=loaded.model)
    print_result(summary_of(model, stats, ranks, directory, file, built), show_summary, written=True)


# Options that say nothing without the thing that they are about: how DATA are read, how the pass over them is made, ...
_OF_DATA = (
    "template", "completion", "label", "data_format", "subset", "split", "samples", "batch_size", "max_length",
)  # fmt: skip
_OF_PASS = ("gradients", "max_batches", "skip_bad_batches", "token_mask", "center")
_OF_BANK = ("by", "similarity")
_OF_OWN_START = (
    "rho", "ranks_from", "target_modules", "exclude_modules", "target_parameters", "whiten", "use_rslora", "use_dora",
    "freeze_a", "modules_to_save", "dry_run", "label", "learning_rate", *_OF_PASS,
)  # fmt: skip


def _choose(
    method: str | None, by: str, from_bank: bool, label: str | None, data: str | None, statistics: Path | None
) -> Start:
    """Look the start up; where none was asked for, the one that is recommended for such data."""
    from lora_init.adapters.recommended import default_start
    from lora_init.statistics.statistics import Statistics

    if from_bank:
        return BANK_WAYS[by]
    classifies = label is not None
    if method is None and data is None and statistics is not None and statistics.expanduser().is_file():
        made = Statistics.load(statistics.expanduser()).provenance
        classifies = made.gradients and "classes" in made.settings
    return find_start(method or default_start(classifies))


def _refuse_idle(arguments: tuple[str, ...], why: str) -> None:
    idle = given(arguments)
    if idle:
        raise LoraInitError(f"{', '.join(idle)}: {why}. Leave {'it' if len(idle) == 1 else 'them'} out.")


def _is_from_bank(method: str | None, bank: Path | None, data: str | None) -> bool:
    """Tell it, and refuse options that would say nothing."""
    from_bank = method == FROM_BANK
    if from_bank != (bank is not None) or (from_bank and data is None):
        raise LoraInitError("--method from-bank and --bank go together, and need DATA: examples of the new task.")
    if from_bank:
        _refuse_idle(_OF_OWN_START, "a bank's adapters decide that")
    else:
        _refuse_idle(_OF_BANK, "that is for --method from-bank")
    return from_bank


def _check_sources(
    data: str | None, statistics: Path | None, method: str, label: str | None, token_mask: str
) -> Path | None:
    """Refuse to go without data where the file does not replace them, or a step `method` needs them; name the file."""
    if label is not None and token_mask == "labels":
        raise LoraInitError(f"--label {label}: a class is no --token-mask labels. Leave it out.")
    file = statistics.expanduser() if statistics else None
    if file is not None and not file.parent.is_dir():
        raise LoraInitError(f"--statistics {file}: the directory {file.parent} doesn't exist. Create it first.")
    if file is not None and data is not None:
        check_writable(file, overwrite=True, kind="statistics file")
    if data is None and file is None:
        raise LoraInitError("DATA is missing. Name it, or name with --statistics a file that exists.")
    if data is None and file is not None and not file.exists():
        raise LoraInitError(f"--statistics {file}: no such file. Name one that exists, or DATA to make it from.")
    if data is None and method:
        raise LoraInitError(
            f"--method {method} finds the size of its step by the loss on examples, and DATA is missing."
        )
    if data is None:
        _refuse_idle((*_OF_DATA, *_OF_PASS), f"without DATA nothing is read; {file} is used as it is")
    return file


def _read_budget(
    ranks_from: Path | None, rank: int | None, rho: float | None, start: Start, file: Path | None
) -> tuple[RankAllocation | None, int, float, float]:
    """Read the plan; give rank and rho of the ranks, and rho of the pass: that of a file which is there, if it serves.

    With a plan both are what the file has that it is from, or what it takes.
    """
    from lora_init.planning.plan import load_plan
    from lora_init.statistics.statistics import Statistics

    made = Statistics.load(file).provenance if file is not None and file.exists() else None
    of_file = made.settings.get("rho", start.rho) if made else start.components
    if ranks_from is None:
        of_pass = max(start.rho, of_file) if rho is None else max(rho, start.components)
        return None, rank or RANK, rho or start.rho, of_pass
    if (rank, rho) != (None, None):
        raise LoraInitError("--ranks names a plan, which has all ranks. Leave --rank and --rho out.")
    plan = load_plan(ranks_from)
    if made is not None:
        return plan, made.rank, of_file, of_file
    needed = max(start.components, max(plan.values()) / plan.rank)
    return plan, plan.rank, needed, needed


def _open(
    model: str,
    task_type: str | None,
    label: str | None,
    trust_remote_code: bool,
    by_gradient: bool,
    quantize: str | None,
    start: Start,
) -> ModelSource:
    """Read what a model is, for classes if the data have them.

    Refuses a gradient whose loss texts do not make, and a base that cannot be quantised, or is not and should be.
    """
    from lora_init.layers.targets import HEADS
    from lora_init.loading.models import open_model

    if label is not None and task_type not in (None, "SEQ_CLS"):
        raise LoraInitError(f"--label makes this a classification, and --task-type {task_type} does not. Give one.")
    task_type = task_type if label is None else "SEQ_CLS"
    source = open_model(model, task_type=task_type, trust_remote_code=trust_remote_code)
    source.check_quantised(quantize, needed=start.by_error)
    if by_gradient and source.task_type in HEADS and label is None:
        other = "Name their column: --label COLUMN." if source.task_type == "SEQ_CLS" else "Use initialize() in Python."
        raise LoraInitError(f"gradients for the task type {source.task_type} need classes, not texts alone. {other}")
    return source


def _head(batches: Batches | None, file: Path | None, seed: int) -> dict[str, Any]:
    """Say how many classes a new head has and what it is drawn from: as the data say, or the file in their place."""
    from lora_init.statistics.statistics import Statistics

    if batches is not None:
        return {"n_labels": len(batches.classes) or None, "seed": seed}
    assert file is not None  # checked with the data
    made = Statistics.load(file).provenance
    return {"n_labels": len(made.settings.get("classes", ())) or None, "seed": made.seed}


def _read_aside(
    read: Callable[..., Batches] | None, batches: Batches | None, samples: int, batch_size: int
) -> tuple[list[Any], Batches | None]:
    """Set examples aside for the size of a step, beyond the sample if there are enough; give what is left of it."""
    if read is None or batches is None:
        return [], batches
    from lora_init.adapters.step_size import most_aside, set_aside
    from lora_init.loading.batches import Batches

    beyond: list[Any] = []
    with suppress(LoraInitError):  # there are none
        beyond = read(offset=samples, samples=most_aside(batch_size))
    aside, others = set_aside(batches, beyond)
    if others is batches:
        return aside, batches
    n = sum(len(batch["input_ids"]) for batch in aside)
    left = Batches(others, batches.settings | {"set aside": n})
    left.classes, left.description = batches.classes, f"{batches.description}, {n} set aside"
    return aside, left


def _as_it_is(file: Path, model: nn.Module, selection: Mapping[str, Any]) -> Statistics:
    """Load a statistics file to use it without data; refuse it if it is of another model or other layers."""
    from lora_init.layers.identity import fingerprint
    from lora_init.layers.targets import find_targets
    from lora_init.statistics.statistics import Statistics

    stats = Statistics.load(file)
    made = stats.provenance
    if made.fingerprint != fingerprint(model):
        origin = f"{made.model_class} {made.model_id}".strip()
        raise LoraInitError(f"{file} was made from another model ({origin}). Name the file of this one.")
    found = find_targets(model, **selection)
    wanted, there = {*found.layers, *found.unsupported}, {*stats, *stats.unsupported}
    if wanted != there:
        raise LoraInitError(
            f"{file} is not about the layers that --target-modules and --target-parameters select: "
            f"{len(wanted - there)} are missing, {len(there - wanted)} too many. Select those that it is about."
        )
    _say_used(file, stats)
    return stats


def _learn(
    model: nn.Module, batches: Batches | None, file: Path | None, overwrite: bool, selection: Mapping[str, Any],
    settings: Mapping[str, Any], start: Start, fall_back: Mapping[str, Any],
) -> tuple[Statistics, Start]:  # fmt: skip
    """Load or collect what a start needs; without gradients, where there are none and nobody asked for them.

    `fall_back` are the settings for that, empty where the start was asked for. Gives the start, too.
    """
    from lora_init.collection.backward import NoGradientsError

    if batches is None:
        assert file is not None  # checked with the data
        return _as_it_is(file, model, selection), start
    run = partial(_collect, model, batches, file, overwrite)
    try:
        return run({**selection, **settings}), start
    except NoGradientsError as error:
        if not fall_back:
            raise
        say(f"warning: {error} So the start is {DEFAULT}, from what the layers read.")
        return run({**selection, **settings, **fall_back}), find_start(DEFAULT)


def _collect(
    model: nn.Module, batches: Batches, file: Path | None, overwrite: bool, settings: Mapping[str, Any]
) -> Statistics:
    """Make the pass, or what is left of it, or nothing of it if the file has all."""
    from lora_init.collection.collect import Interrupted, OtherSettingsError, collect

    progress = False if is_quiet() else None
    run = partial(collect, model, batches, data=batches.description, statistics=file, progress=progress, **settings)
    before = file.stat().st_mtime_ns if file and file.exists() else None
    try:
        stats = run()
    except OtherSettingsError as error:
        if not overwrite:
            raise LoraInitError(
                f"{error.difference} Pass --overwrite to collect again, or leave DATA out to use the file as it is."
            ) from None
        stats = run(overwrite=True)
    except (Interrupted, Exception) as stop:
        found: Statistics | None = getattr(stop, "statistics", None)
        if file is not None and found is not None:
            n_batches = found.provenance.n_batches
            say(f"{file}: kept the statistics of {n_batches} batches. The same command goes on after them.")
        elif found is not None or isinstance(stop, Interrupted):
            say("nothing was kept. --statistics FILE keeps what a pass has found, and goes on from there.")
        raise
    if file is not None and before is not None and file.stat().st_mtime_ns == before:
        _say_used(file, stats)
    return stats


def _say_used(file: Path, stats: Statistics) -> None:
    made = stats.provenance
    until = "" if made.complete else ", of a pass that was interrupted"
    say(f"{file}: used as it is ({made.data or 'data not described'}; {made.n_batches} batches{until})")


def _built(
    model: nn.Module,
    build: Callable[..., AdapterInit],
    start: Start,
    aside: list[Any],
    gamma: float | None,
    *,
    stats: Statistics,
    weights: str | None,
    unchecked: bool,
) -> AdapterInit:
    """Build the adapter; where its B is not zero, by the loss on batches set aside."""
    from lora_init.adapters.quantised import QuantisationErrors, loss_or_distance, with_losses
    from lora_init.adapters.step_size import find_step_size
    from lora_init.collection.losses import mean_loss

    if start.by_error:
        with busy("reading what rounding took from the weights"):
            errors = QuantisationErrors(model, stats.targets, weights)
            built = build(errors=errors)
            if not aside:  # a statistics file, and no data
                return built
            return with_losses(model, built, errors, loss_or_distance(model, errors, aside), unchecked)
    if start.takes_step:
        return find_step_size(model, lambda tried: build(gamma=tried), lambda changed: mean_loss(changed, aside), gamma)
    return build()


def _check_quantised(start: Start, quantize: str | None, weights: str | None, unchecked: bool) -> None:
    """Refuse options about a quantised base where there is none, and what is not installed."""
    if quantize is not None:
        require("bitsandbytes")
    idle = [name for name, value in (("--weights", weights), ("--unchecked", unchecked)) if value]
    if idle and not start.by_error:
        raise LoraInitError(f"{', '.join(idle)}: for --method {_named(by_error=True)} alone. Leave it out.")


def how_to_load(model: str, directory: Path, built: AdapterInit) -> str:
    """Say how the adapter is loaded for training."""
    if built.corrects_base or built.freeze_a:
        return f"as {directory / 'README.md'} shows"
    classes, base = built.provenance.settings.get("classes"), "base_model"
    if classes:
        labels = dict(enumerate(map(str, classes)))
        base = f"AutoModelForSequenceClassification.from_pretrained({model!r}, id2label={labels})"
    return f"PeftModel.from_pretrained({base}, {str(directory)!r}, is_trainable=True)"


def summary_of(
    model: str, stats: Statistics, ranks: RankAllocation, directory: Path, file: Path | None, built: AdapterInit
) -> dict[str, Any]:
    """Put what `lora-init init` did into plain values."""
    from lora_init.adapters.directory import WEIGHTS_FILE, AdapterDirectory
    from lora_init.serving.support import serving_note

    made = stats.provenance
    shares = {name: share for name, share in stats.held_out.items() if math.isfinite(share)}
    worst = min(shares, key=shares.__getitem__, default=None)
    before, after = built.losses or (None, None)
    is_special = built.corrects_base or built.changes_output or built.freeze_a
    special = [f"{built.start_in_words()}."] if is_special else []
    if made.quantisation:
        special.append(f"the base was quantised ({quantisation_name(made.quantisation)}): train and serve on the same.")
    base_change = built.method if built.corrects_base else ""
    written, size = AdapterDirectory(directory), (directory / WEIGHTS_FILE).stat().st_size / 10**6
    return {
        "adapter": str(directory),
        "statistics": str(file) if file else None,
        "model": made.model_id,
        "model_class": made.model_class,
        "data": made.data,
        "classes": made.settings.get("classes", []),
        "rank": ranks.rank,
        "ranks": dict(ranks),
        "method": built.method,
        "lora_alpha": built.lora_alpha,
        "scaling": built.scaling,
        "parameters": built.n_parameters(),
        "megabytes": size,
        "megabytes_at_one_rank": _at_one_rank(built) * size,
        "uniform_parameters": sum(
            target.parameters(ranks.rank, built.freeze_a, built.use_dora) for target in stats.targets.values()
        ),
        "n_samples": made.n_samples,
        "n_batches": made.n_batches,
        "stop_reason": made.stop_reason,
        "n_components": max(len(stats.explained_variance(name)) for name in stats),
        "held_out": worst
        and {"median": finite(median(shares.values())), "min": finite(shares[worst]), "min_layer": worst},
        "gamma": built.gamma,
        "loss_before": finite(before),
        "loss_at_start": finite(after),
        "correction": built.correction if built.errors else None,
        "quantisation": made.quantisation,
        "seconds": made.seconds,
        "serving": serving_note(ranks, written.config, written.shapes, base_change),
        "load": how_to_load(model, directory, built),
        "recommended": built.recommended,
        "train": built.fit.how_to_train(),
        "notes": [*special, *made.notes, *ranks.notes, *_judged(built), *_beyond(built, ranks)],
    }


def _judged(built: AdapterInit) -> list[str]:
    """Say that labels went into a start: of 256 examples, a third held out, it made a held-out loss 20 % lower."""
    seen = "it has seen the labels of these examples: judge what you train from it by others."
    return [seen] if built.start.by_gradient else []


def _beyond(built: AdapterInit, ranks: RankAllocation) -> list[str]:
    """Say that DoRA's magnitudes come on top of a budget that a plan was made for."""
    counts = ranks.budget is not None and ranks.budget.unit in ("parameters", "bytes")
    return [f"{ranks.budget} does not count DoRA's magnitudes."] if built.use_dora and counts else []


def _at_one_rank(built: AdapterInit) -> float:
    """Say how many times as large the adapter is with its largest rank in every layer, as `export` makes it."""
    largest = max(built.ranks.values())
    costs = {name: target.parameters(1) for name, target in built.targets.items()}
    return largest * sum(costs.values()) / sum(rank * costs[name] for name, rank in built.ranks.items())


def show_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Print what `summary_of` returned: start and size, how to train, who takes it, how to load it, where more is."""
    ranks, directory = summary["ranks"], summary["adapter"]
    given = [rank for rank in ranks.values() if rank]
    corrected = correction_facts(summary["correction"]) if summary["correction"] else {}
    size, at_one = summary["megabytes"], summary["megabytes_at_one_rank"]
    export = f" `export` makes {at_one:.1f} MB of it at one rank, {size:.1f} MB with --keep-ranks."
    lines = [
        f"{directory}: {summary['method']}, rank {min(given)} to {max(given)} (average {summary['rank']}) in "
        f"{len(given)} of {len(ranks)} layers, lora_alpha {summary['lora_alpha']:g} (scaling {summary['scaling']:g}), "
        f"{summary['parameters']:,} parameters.",
        summary["train"],
        *(f"{name}: {text}" for name, text in corrected.items()),
        f"{size:.1f} MB. {summary['serving']}" + export * (min(given) < max(given)),
        f"Load it: {summary['load']}",
        *(f"note: {note}" for note in summary["notes"]),
        f"Ranks, data and what they capture: lora-init inspect {directory}",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
