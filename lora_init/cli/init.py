"""The command `lora-init init`: from a model and data to an adapter directory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
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
from lora_init.cli.console import busy, given, importing, is_quiet, print_result, process_group, process_rank, say
from lora_init.cli.options import (
    Device,
    Dtype,
    FloatWeights,
    MaxLength,
    Quantize,
    Reading,
    Samples,
    TrustRemoteCode,
    read_modules,
    read_names,
)
from lora_init.cli.summary import show_summary, summary_of
from lora_init.errors import LoraInitError, require
from lora_init.files import check_writable
from lora_init.loading.sources import FILE_TYPES

if TYPE_CHECKING:
    from torch import nn

    from lora_init.adapters.starts import Start
    from lora_init.loading.batches import Batches
    from lora_init.loading.models import ModelSource
    from lora_init.planning.plan import RankAllocation
    from lora_init.statistics.statistics import Statistics

TokenMask = Literal["attention", "labels"]
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
    reading: Reading,
    label: Annotated[str | None, Option(help="Column of the class: an adapter and a head for a classifier.")] = None,
    statistics: Annotated[
        Path | None, Option(help="File for the statistics; the same command continues it, later ones need no DATA.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what it would do and cost; no weights are read.")] = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace the adapter, and statistics of other data or settings.")
    ] = False,
    samples: Samples = 512,
    batch_size: Annotated[int, Option(min=1, help="Examples in a batch.")] = 8,
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
    max_batches: Annotated[int, Option(min=1, help="Batches at most; fewer if the start would not change.")] = 64,
    skip_bad_batches: Annotated[int, Option(min=0, help="Batches that may fail, and are then left out.")] = 0,
    seed: Annotated[int, Option(min=0, help="Seed of the sample and of all else that is random.")] = 0,
    task_type: Annotated[str | None, Option(help="PEFT's task type. Default: what the checkpoint is for.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    quantize: Quantize = None,
    weights: FloatWeights = None,
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
        from lora_init.adapters.measured import build_measured
        from lora_init.adapters.peft_model import check_modules_to_save
        from lora_init.loading.batches import load_batches
        from lora_init.loading.models import find_device
    adapter: dict[str, Any] = {
        "gamma": gamma, "whiten": whiten, "lora_alpha": lora_alpha, "use_dora": use_dora,
        "modules_to_save": read_names(modules_to_save),
    }  # fmt: skip
    from_bank = _is_from_bank(method, bank, data)
    file, there = _find_statistics(data, statistics, label, token_mask)
    start = BANK_WAYS[by] if from_bank else find_start(method or _by_default(label, there if data is None else None))
    _check_start(start, data, learning_rate, quantize, weights, unchecked)
    check_adapter_options(start, **adapter, output=output, overwrite=overwrite)
    find_device(device)
    budget = _read_budget(ranks_from, rank, rho, start, there)
    gradients = gradients or start.by_gradient
    with busy(f"reading {model} and the data"):
        source = _open(model, task_type, label, trust_remote_code, gradients and data is not None, quantize, start)
        read = partial(
            load_batches, data, source.tokenizer, **vars(reading), batch_size=batch_size, max_length=max_length,
            seed=seed, seq2seq=source.seq2seq and label is None, needs_labels=gradients or token_mask == "labels",
            label=label, known_classes=source.classes,
        )  # fmt: skip
        # Before the weights, which take longer.
        aside, batches = _read_examples(None if data is None else read, start, samples, batch_size)
    selection: dict[str, Any] = {
        "target_modules": read_modules(target_modules),
        "exclude_modules": read_modules(exclude_modules) if exclude_modules else None,
        "target_parameters": read_names(target_parameters) or None,
        "task_type": source.task_type,
    }
    settings: dict[str, Any] = {
        "rank": budget.rank, "rho": budget.of_pass, "center": center, "token_mask": token_mask, "gradients": gradients,
        "max_batches": max_batches, "seed": seed, "skip_bad_batches": skip_bad_batches,
    }  # fmt: skip
    if dry_run:
        from lora_init.cli.dry_run import estimate, show_estimate

        settings |= {"dtype": dtype, "device": device, "freeze_a": freeze_a, "use_dora": use_dora, "quantize": quantize}
        print_result(estimate(source, batches, selection, settings), show_estimate)
        return
    with busy(f"loading {model}"):
        loaded = source.load(dtype=dtype, device=device, quantize=quantize, **_head(batches, there, seed))
    check_modules_to_save(loaded.model, adapter["modules_to_save"], loaded.task_type, loaded.drawn)
    if bank is not None:
        start_from(
            bank, loaded, batches, aside, there, by=by, rank=budget.rank, gamma=gamma, similarity=similarity,
            lora_alpha=lora_alpha or start.lora_alpha(budget.rank), output=output, overwrite=overwrite,
        )  # fmt: skip
        return
    budget.check_model(loaded.model, model)
    if batches is None:
        stats = _as_it_is(there, loaded.model, selection)
    else:
        run = partial(_collect, loaded.model, batches, file, overwrite)
        by_default = {"rho": rho or find_start(DEFAULT).rho, "gradients": False} if method is None else None
        stats, start = _learn(run, selection | settings, start, by_default)
    if process_rank():
        return
    ranks = budget.allocate(stats, start)
    build = partial(
        build_adapter, stats, ranks, start.name, **adapter, use_rslora=use_rslora, freeze_a=freeze_a, seed=seed
    )
    with busy(f"computing the start {start.name}"):
        built = replace(
            build_measured(loaded.model, stats, start, build, aside, gamma, weights=weights, unchecked=unchecked),
            learning_rate=learning_rate,
        )
    directory = built.save_pretrained(output, overwrite=overwrite, model=loaded.model)
    print_result(summary_of(model, stats, ranks, directory, file, built), show_summary, written=True)


# Options that say nothing without the thing that they are about: how DATA are read, how the pass over them is made, ...
_OF_DATA = (*(one.name for one in fields(Reading)), "label", "samples", "batch_size", "max_length")
_OF_PASS = ("gradients", "max_batches", "skip_bad_batches", "token_mask", "center")
_OF_BANK = ("by", "similarity")
_OF_OWN_START = (
    "rho", "ranks_from", "target_modules", "exclude_modules", "target_parameters", "whiten", "use_rslora", "use_dora",
    "freeze_a", "modules_to_save", "dry_run", "label", "learning_rate", *_OF_PASS,
)  # fmt: skip


def _by_default(label: str | None, there: Statistics | None) -> str:
    """Name the start that is recommended for the data, or for the statistics that are there in their place."""
    from lora_init.adapters.recommended import default_start

    made = there.provenance if there else None
    return default_start(label is not None or (made is not None and made.gradients and "classes" in made.settings))


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


def _find_statistics(
    data: str | None, statistics: Path | None, label: str | None, token_mask: str
) -> tuple[Path | None, Statistics | None]:
    """Name the statistics file and read it if it is there; refuse to go without data where it does not replace them."""
    from lora_init.statistics.statistics import Statistics

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
    if data is None:
        _refuse_idle((*_OF_DATA, *_OF_PASS), f"without DATA nothing is read; {file} is used as it is")
    return file, Statistics.load(file) if file is not None and file.exists() else None


def _check_start(
    start: Start,
    data: str | None,
    learning_rate: float | None,
    quantize: str | None,
    weights: str | None,
    unchecked: bool,
) -> None:
    """Refuse a start without the data for its step, options about a quantized base for others, and what is missing."""
    if learning_rate is not None and not 0.0 < learning_rate < math.inf:
        raise LoraInitError(f"--learning-rate {learning_rate:g}: expected a positive number such as 2e-4.")
    if data is None and start.takes_step:
        raise LoraInitError(
            f"--method {start.name} finds the size of its step by the loss on examples, and DATA is missing."
        )
    if quantize is not None:
        require("bitsandbytes")
    idle = [name for name, value in (("--weights", weights), ("--unchecked", unchecked)) if value]
    if idle and not start.by_error:
        raise LoraInitError(f"{', '.join(idle)}: for --method {_named(by_error=True)} alone. Leave it out.")


@dataclass(frozen=True)
class _Budget:
    """What the ranks may cost.

    Attributes:
        plan: The plan that has all ranks, if one was named.
        rank: Average rank.
        rho: What was asked for; None for what the start is recommended with.
        of_pass: rho of the pass.
    """

    plan: RankAllocation | None
    rank: int
    rho: float | None
    of_pass: float

    def check_model(self, model: nn.Module, name: str) -> None:
        """Refuse a plan for another model."""
        from lora_init.layers.identity import fingerprint

        if self.plan is not None:
            self.plan.check_model(fingerprint(model), f"{type(model).__name__} {name}")

    def allocate(self, stats: Statistics, start: Start) -> RankAllocation:
        """Give the plan, or make it."""
        from lora_init.planning.allocate import allocate_ranks

        return self.plan or allocate_ranks(stats, rank=self.rank, rho=self.rho or start.rho)


def _read_budget(
    ranks_from: Path | None, rank: int | None, rho: float | None, start: Start, there: Statistics | None
) -> _Budget:
    """Read the plan. The pass has the rho of a file that is there, if it serves.

    With a plan it has that of the file which the plan is from, or what the plan takes.
    """
    from lora_init.planning.plan import load_plan

    of_file = there.provenance.settings.get("rho", start.rho) if there else start.rho
    if ranks_from is None:
        return _Budget(None, rank or RANK, rho, rho or max(start.rho, of_file))
    if (rank, rho) != (None, None):
        raise LoraInitError("--ranks names a plan, which has all ranks. Leave --rank and --rho out.")
    plan = load_plan(ranks_from)
    if there is not None:
        return _Budget(plan, there.provenance.rank, None, of_file)
    return _Budget(plan, plan.rank, None, max(1.0, max(plan.values()) / plan.rank))


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

    Refuses a gradient whose loss texts do not make, and a base that cannot be quantized, or is not and should be.
    """
    from lora_init.layers.targets import HEADS
    from lora_init.loading.models import open_model

    if label is not None and task_type not in (None, "SEQ_CLS"):
        raise LoraInitError(f"--label makes this a classification, and --task-type {task_type} does not. Give one.")
    task_type = task_type if label is None else "SEQ_CLS"
    source = open_model(model, task_type=task_type, trust_remote_code=trust_remote_code)
    source.check_quantized(quantize, needed=start.by_error)
    if by_gradient and source.task_type in HEADS and label is None:
        other = "Name their column: --label COLUMN." if source.task_type == "SEQ_CLS" else "Use initialize() in Python."
        raise LoraInitError(f"gradients for the task type {source.task_type} need classes, not texts alone. {other}")
    return source


def _head(batches: Batches | None, there: Statistics | None, seed: int) -> dict[str, Any]:
    """Say how many classes a new head has and what it is drawn from: as the data say, or the file in their place."""
    if batches is not None:
        return {"n_labels": len(batches.classes) or None, "seed": seed}
    assert there is not None  # checked with the data
    made = there.provenance
    return {"n_labels": len(made.settings.get("classes", ())) or None, "seed": made.seed}


def _read_examples(
    read: Callable[..., Batches] | None, start: Start, samples: int, batch_size: int
) -> tuple[list[Any], Batches | None]:
    """Read the sample; for the size of a step set examples aside, beyond the sample if there are enough."""
    if read is None:
        return [], None
    batches = read(samples=samples)
    if not (start.takes_step or start.by_error):
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


def _as_it_is(stats: Statistics | None, model: nn.Module, selection: Mapping[str, Any]) -> Statistics:
    """Use a statistics file without data; refuse it if it is of another model or other layers."""
    from lora_init.layers.identity import fingerprint
    from lora_init.layers.targets import find_targets

    assert stats is not None  # checked with the data
    made = stats.provenance
    if made.fingerprint != fingerprint(model):
        origin = f"{made.model_class} {made.model_id}".strip()
        raise LoraInitError(f"{stats.path} was made from another model ({origin}). Name the file of this one.")
    found = find_targets(model, **selection)
    wanted, there = {*found.layers, *found.unsupported}, {*stats, *stats.unsupported}
    if wanted != there:
        raise LoraInitError(
            f"{stats.path} is not about the layers that --target-modules and --target-parameters select: "
            f"{len(wanted - there)} are missing, {len(there - wanted)} too many. Select those that it is about."
        )
    _say_used(stats)
    return stats


def _learn(
    run: Callable[[Mapping[str, Any]], Statistics],
    settings: dict[str, Any],
    start: Start,
    by_default: dict[str, Any] | None,
) -> tuple[Statistics, Start]:
    """Collect what a start needs; without gradients, where there are none and nobody asked for them.

    `by_default` are the settings for that, None where the start was asked for. Gives the start, too.
    """
    from lora_init.collection.backward import NoGradientsError

    try:
        return run(settings), start
    except NoGradientsError as error:
        if by_default is None:
            raise
        say(f"warning: {error} So the start is {DEFAULT}, from what the layers read.")
        return run(settings | by_default), find_start(DEFAULT)


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
        _say_used(stats)
    return stats


def _say_used(stats: Statistics) -> None:
    made = stats.provenance
    until = "" if made.complete else ", of a pass that was interrupted"
    say(f"{stats.path}: used as it is ({made.data or 'data not described'}; {made.n_batches} batches{until})")
