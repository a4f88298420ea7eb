"""What `lora-init init` runs on: a model and data by their names, a file of statistics, a plan of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lora_init.adapters.init_config import InitConfig, PassOptions, Reading, Sample
from lora_init.adapters.peft_model import check_modules_to_save
from lora_init.building.build import check_experts
from lora_init.building.pipeline import Examples, check, collect_for, fit_to, read, split
from lora_init.cli.commands import offered
from lora_init.cli.console import busy, given, refuse_idle, running, say
from lora_init.cli.options import Length, LoadingQuantized
from lora_init.collection.collect import OtherSettingsError, check_targets
from lora_init.errors import LoraInitError
from lora_init.files import check_writable
from lora_init.layers.identity import differing_config, dtype_of, fingerprint, model_config
from lora_init.layers.targets import HEADS, find_targets
from lora_init.loading.models import LoadedModel, ModelSource, find_device, open_model
from lora_init.planning.allocate import allocate_ranks
from lora_init.planning.plan import RankAllocation, load_plan
from lora_init.rates.training_length import TrainingLength
from lora_init.statistics.statistics import SPARE, Statistics


@dataclass(frozen=True)
class Names:
    """What the command names: where things are, and where they go."""

    model: str
    data: str | None
    output: Path
    overwrite: bool
    file: Path | None  # of statistics
    ranks_from: Path | None  # a plan


@dataclass(frozen=True)
class Opened:
    """What was read before the weights."""

    model: ModelSource
    examples: Examples  # without batches, if there is no DATA
    length: TrainingLength


def are_of_classes(names: Names, stored: Statistics | None) -> bool:
    """Return whether there are statistics of classes, and no data."""
    if names.data is not None or not stored:
        return False
    # The start that is recommended for classes needs gradients.
    return stored.provenance.gradients and "classes" in stored.provenance.settings


def check_named(
    names: Names, config: InitConfig, stored: Statistics | None, device: str
) -> tuple[InitConfig, RankAllocation | None, float]:
    """Refuse what can be refused before anything is read.

    Returns the options with the rank of the plan, the plan if it is known, and how many times the rank a pass keeps.
    """
    start = config.start
    if names.data is None and start.takes_step:
        raise LoraInitError(
            f"--method {start.name} finds the size of its step by the loss on examples, and DATA is missing."
        )
    check(config, output=names.output, overwrite=names.overwrite)
    find_device(device)  # refuses a GPU that is not there
    # A pass keeps more directions than the rank, so that a plan may give a layer more than the average.
    ranks, rho_of_file = config.ranks, SPARE
    if stored:
        rho_of_file = stored.provenance.rho or SPARE
    if names.ranks_from is None:
        plan = None
        if stored is not None and names.data is None:
            # Without data the file has all that ranks are made from; it may have less than is asked for.
            plan = allocate_ranks(stored, ranks.rank, ranks.rho)
        return config, plan, max(ranks.rho, rho_of_file)
    if given(("rank", "rho")):
        raise LoraInitError("--ranks names a plan, which has all ranks. Leave --rank and --rho out.")
    plan = load_plan(names.ranks_from)
    if stored is not None:
        return config.with_options(rank=stored.provenance.rank), plan, rho_of_file
    # A new pass keeps enough for the largest rank of the plan.
    return config.with_options(rank=plan.rank), plan, max(1.0, max(plan.values()) / plan.rank)


def read_named(
    names: Names, config: InitConfig, loading: LoadingQuantized, stored: Statistics | None, training: Length
) -> tuple[Opened, InitConfig]:
    """Read what the model is, and the data, before the weights, which take longer."""
    with busy(f"reading {names.model} and the data"):
        opened = _open(names, config, loading)
        config = config.with_options(task_type=opened.task_type)
        # A model without weights shows the layers, so that a name that matches none is refused in a second. Some
        # classes cannot be made so; their layers are checked once the weights are there.
        if (empty := opened.empty()) is not None:
            targets = find_targets(empty, **vars(config.layers))
            check_targets(empty, targets, config.ranks.rank)
            check_experts(targets.layers.values(), config.shape)
            check_modules_to_save(empty, config.shape.modules_to_save)
        if names.data is None:
            rows = stored.provenance.settings.get("rows") if stored else None  # the file knows how many there were
            return Opened(opened, Examples(None), training.plan(rows)), config
        batches, beyond = read(names.data, opened.tokenizer, config, opened.seq2seq, opened.classes)
        length = training.plan(batches.settings.get("rows"))
        examples = split(batches, beyond, config.measures)
        say(f"data: {examples.data}")
        return Opened(opened, examples, length), config


def _open(names: Names, config: InitConfig, loading: LoadingQuantized) -> ModelSource:
    """Read what a model is, for classes if the data have them; refuse one that the start cannot be made for."""
    label, task_type = config.sample.label, config.layers.task_type
    if label is not None and task_type not in (None, "SEQ_CLS"):
        raise LoraInitError(f"--label makes this a classification, and --task-type {task_type} does not. Give one.")
    if label is not None:
        task_type = "SEQ_CLS"
    opened = open_model(names.model, task_type=task_type, trust_remote_code=loading.trust_remote_code)
    opened.check_quantized(loading.quantize, needed=config.start.needs_error)
    # A gradient is of the task's own loss, and a head's loss needs more than a text.
    if config.needs_gradient and names.data is not None and opened.task_type in HEADS and label is None:
        head, remedy = opened.task_type, "Use initialize() in Python."
        if head == "SEQ_CLS":
            remedy = "Name their column: --label COLUMN."
        raise LoraInitError(f"gradients for the task type {head} need classes, not texts alone. {remedy}")
    return opened


def load_named(
    names: Names, opened: Opened, config: InitConfig, loading: LoadingQuantized, stored: Statistics | None,
    plan: RankAllocation | None,
) -> tuple[LoadedModel, InitConfig]:  # fmt: skip
    """Read the weights, check that the plan is for them, and fit the options to them."""
    classes, seed = opened.examples.classes, config.run.seed  # of a new head
    if names.data is None and stored is not None:  # the same head as the one that the statistics are of
        classes, seed = stored.provenance.settings.get("classes", ()), stored.provenance.seed
    loaded = loading.load(opened.model, seed=seed, n_labels=len(classes) or None)
    model: nn.Module = loaded.model
    if plan is not None and names.ranks_from is not None:
        plan.check_model(fingerprint(model), f"{type(model).__name__} {names.model}")
    return loaded, fit_to(model, config, opened.examples.classes, loaded.drawn)


def collect_named(
    names: Names, model: nn.Module, examples: Examples, config: InitConfig, stored: Statistics | None, rho: float
) -> tuple[Statistics, InitConfig]:
    """Use the statistics file as it is, continue it, or make it."""
    if stored is not None and names.data is None:
        _check_made_for(stored, model, config)
        _say_used(stored)
        return stored, config
    time_before = _time_written(names.file)
    config = config.with_options(statistics=names.file, progress=False if running.quiet else None)
    with _saying_what_is_kept(names.file):
        # First without overwriting, also where --overwrite is given: a file of the same settings is still used.
        try:
            stats, config = collect_for(model, examples, config, rho)
        except OtherSettingsError as error:
            if not names.overwrite:
                raise LoraInitError(
                    f"{error.difference} Pass --overwrite to collect again, or leave DATA out to use the file as it is."
                ) from None
            stats, config = collect_for(model, examples, config.with_options(overwrite=True), rho)
    # A file that was not written again was used as it is.
    if time_before is not None and time_before == _time_written(names.file):
        _say_used(stats)
    return stats, config


def find_statistics(names: Names, config: InitConfig) -> Statistics | None:
    """Read the statistics file if it exists; refuse a command without DATA if it does not."""
    if config.sample.label is not None and config.run.token_mask == "labels":
        raise LoraInitError(f"--label {config.sample.label}: a class is no --token-mask labels. Leave it out.")
    file = names.file
    if names.data is not None:
        if file is not None:
            check_writable(file, overwrite=True, kind="statistics file")
    elif file is None:
        raise LoraInitError("DATA is missing. Name it, or name with --statistics a file that exists.")
    elif not file.exists():
        raise LoraInitError(f"--statistics {file}: no such file. Name one that exists, or DATA to make it from.")
    else:
        refuse_idle([*offered(Reading, Sample), *_OF_PASS], f"without DATA nothing is read; {file} is used as it is")
    if file is None or not file.exists():
        return None
    return Statistics.load(file)


# Not the seed, which the start has a use for, too.
_OF_PASS = [name for name in offered(PassOptions) if name != "seed"]


def _check_made_for(stats: Statistics, model: nn.Module, config: InitConfig) -> None:
    made = stats.provenance
    if made.fingerprint != fingerprint(model):
        origin = f"{made.model_class} {made.model_id}".strip()
        raise LoraInitError(f"{stats.path} was made from another model ({origin}). Name the file of this one.")
    # The fingerprint is of weights alone; the same weights compute something else under another config.
    if odd := differing_config(made.settings, model_config(model)):
        raise LoraInitError(f"{stats.path} was made from this model with {odd}. Make it anew: name DATA.")
    # Only a type that was typed: by default the checkpoint decides, and the file is used all the same.
    if given(("dtype",)) and made.settings.get("dtype", dtype_of(model)) != dtype_of(model):
        raise LoraInitError(f"{stats.path} was made in {made.settings['dtype']}. Leave --dtype out, or name DATA.")
    if given(("task_type",)) and made.task_type != config.layers.task_type:
        raise LoraInitError(f"{stats.path} is for task type {made.task_type}. Leave --task-type out, or name DATA.")
    targets = find_targets(model, **vars(config.layers))
    wanted, measured = {*targets.layers, *targets.unsupported}, {*stats, *stats.unsupported}
    if wanted != measured:
        raise LoraInitError(
            f"{stats.path} is not about the layers that --target-modules and --target-parameters select: "
            f"{len(wanted - measured)} are missing, {len(measured - wanted)} too many. Select those that it is about."
        )


def _time_written(file: Path | None) -> int | None:
    if file is None or not file.exists():
        return None
    return file.stat().st_mtime_ns


@contextmanager
def _saying_what_is_kept(file: Path | None) -> Iterator[None]:
    """Print what is kept of a pass that was stopped."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as stop:
        # `collect` puts what it had on the exception that ended it.
        kept: Statistics | None = getattr(stop, "statistics", None)
        if file is not None and kept is not None:
            n_batches = kept.provenance.n_batches
            say(f"{file}: kept the statistics of {n_batches} batches. The same command goes on after them.")
        elif kept is not None or isinstance(stop, KeyboardInterrupt):
            reason = "the pass had found nothing yet" if file else "--statistics FILE keeps what a pass has found"
            say(f"nothing was kept: {reason}. The same command begins anew.")
        raise


def _say_used(stats: Statistics) -> None:
    made = stats.provenance
    until = "" if made.complete else ", of a pass that was interrupted"
    say(f"{stats.path}: used as it is ({made.data or 'data not described'}; {made.n_batches} batches{until})")
