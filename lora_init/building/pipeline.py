"""The steps from a model and data to an adapter, which `initialize`, `init`, the callback and `compare` share.

Each step is a function: it takes what it needs and returns what it made. `run` composes them for a model in memory,
`cli.init` for one that has a name, `comparison.starts` builds from what its runs share. The options travel as an
`InitConfig`, with the start in it; the batches travel as `Examples`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.init_config import InitConfig
from lora_init.adapters.model_handles import ModelHandle
from lora_init.adapters.peft_model import check_modules_to_save
from lora_init.building.build import build_from, buildable_start, check_adapter_options, check_experts
from lora_init.building.layer_start import BuildContext
from lora_init.building.quantized import QuantizationErrors, loss_or_distance, with_losses
from lora_init.building.step_size import LEAST, find_step_size, hold_out, most_held_out
from lora_init.collection.backward import NoGradientsError
from lora_init.collection.collect import collect
from lora_init.collection.losses import mean_loss
from lora_init.collection.processes import Processes
from lora_init.errors import LoraInitError, warn
from lora_init.layers.masks import encoder_of
from lora_init.layers.targets import HEADS, find_targets, heads_of, is_in, new_heads, output_embedding
from lora_init.loading.batches import Batches, as_batches, load_batches
from lora_init.loading.models import classes_of, task_of
from lora_init.planning.allocate import allocate_ranks
from lora_init.planning.plan import RankAllocation
from lora_init.starts.starts import CORRECTION, DEFAULT, DEFAULT_FOR_CLASSES, find_start
from lora_init.statistics.statistics import SPARE, Statistics


@dataclass(frozen=True)
class Examples:
    """Batches for the statistics, and held-out batches to measure a loss on, if the start needs one."""

    batches: Any  # what `collect` takes
    held_out: Sequence[Any] = ()
    classes: tuple[str, ...] = ()  # names of the classes, if the data have a label
    data: str = ""  # in words


def run(handle: ModelHandle, given: Any, config: InitConfig, tokenizer: Any = None) -> AdapterInit:
    """Make an adapter for a model in memory, from batches, or from data and a tokenizer.

    All processes of a distributed run call this together.
    """
    # Cheap refusals come before any data is read, and refusals of the data before the pass.
    check(config)
    handle.check(config.start)
    examples = take(given, handle.model, config, tokenizer)
    if not handle.in_place:  # else its LoraConfig says what is trained whole
        config = fit_to(handle.model, config, examples.classes)
    stats, config = collect_for(handle.model, examples, config)
    ranks = allocate_ranks(stats, config.ranks.rank, config.ranks.rho)
    init = build(handle.model, stats, ranks, config, examples.held_out)
    return replace(init, trains_head=handle.trains_head)


def take(given: Any, model: nn.Module, config: InitConfig, tokenizer: Any) -> Examples:
    """Read data with a tokenizer, or take batches; hold some out if the start needs a loss."""
    if tokenizer is not None:
        known = classes_of(getattr(model, "config", None))
        return split(*read(given, tokenizer, config, encoder_of(model) is not None, known), config.measures)
    # Batches were made by somebody else, so options of how to make them would be ignored without a word.
    idle = [name for name in (*vars(config.reading), *vars(config.sample)) if name in config.given]
    if idle:
        raise LoraInitError(f"{', '.join(idle)}: only texts are read like that. Pass tokenizer=, or leave it out.")
    _check_tokens(given)
    return split(as_batches(given, model, config.run.seed), (), config.measures)


def collect_for(
    model: nn.Module, examples: Examples, config: InitConfig, rho: float | None = None
) -> tuple[Statistics, InitConfig]:
    """Collect the statistics that the start needs; without gradients, the default start takes its place.

    The pass keeps `rho` times the rank, by default what the ranks need. The options that are returned name the start
    that was taken.
    """
    if config.start.needs_error or config.shape.use_dora or config.shape.lora_dropout:
        layers = find_targets(model, **vars(config.layers)).layers
        check_experts(layers.values(), config.shape)
        if config.start.needs_error:  # refuses before the pass what cannot be read after it
            QuantizationErrors(model, layers, config.correction.weights)

    def collect_by(config: InitConfig) -> Statistics:
        run = replace(config.run, gradients=config.needs_gradient, data=config.run.data or examples.data)
        options = {name: value for name, value in vars(run).items() if value is not None}
        return collect(
            model, examples.batches, **vars(config.layers), **options, rank=config.ranks.rank,
            rho=max(rho or config.ranks.rho, SPARE),
        )  # fmt: skip

    try:
        return collect_by(config), config
    except NoGradientsError as error:  # before any batch is read
        if config.method is not None:  # a start that was asked for is not exchanged
            raise
        warn(f"{error} So the start is {DEFAULT}, from what the layers read.")
    config = replace(config.with_options(gradients=False), start=find_start(DEFAULT))
    return collect_by(config), config


def choose(config: InitConfig, classifies: bool) -> InitConfig:
    """Find the start that was asked for, or the one that is recommended for the task."""
    method = config.method
    if method is None:
        method = DEFAULT_FOR_CLASSES if classifies else DEFAULT
    return replace(config, start=buildable_start(method))


def check(config: InitConfig, **place: Any) -> None:
    """Validate the options that need neither model nor data; `place` is where the adapter is to be saved."""
    check_adapter_options(config.start, config.shape, **place)
    for name, value in vars(config.correction).items():
        if value and not config.start.needs_error:
            raise LoraInitError(f"{{{name}}} is for the start {CORRECTION}. Leave it out.", **{name: value})
    rank, rho = config.ranks.rank, config.ranks.rho
    if config.start.one_rank and round(rho * rank) > rank:  # a rho that rounds to the rank moves nothing
        raise LoraInitError(
            "{method} with {rho}: it gives all layers one rank. Leave rho out.", method=config.start.name, rho=rho
        )


def fit_to(
    model: nn.Module, config: InitConfig, classes: Collection[str] = (), drawn: Collection[str] = ()
) -> InitConfig:
    """Add the model's task to the options, and its head to the modules that are trained whole; refuse other classes."""
    if classes and hasattr(model, "config"):
        _check_classes(model, classes)
    task = config.layers.task_type or _task_for(model, classes)
    if config.layers.task_type is None and task not in HEADS:  # PEFT needs a task type for the sake of a head only
        task = None
    if task in HEADS and output_embedding(model) is not None and not new_heads(model):
        raise LoraInitError(
            f"{{task_type}} trains a head, and {type(model).__name__} has none. Leave it out, or load a model that "
            "has, such as AutoModelForSequenceClassification.",
            task_type=task,
        )
    heads, trained_whole = HEADS.get(task or "", ()), [*(config.shape.modules_to_save or ())]
    # By the task type PEFT trains and saves the heads that it knows. Others are named.
    trained_whole += [name for name in heads_of(model) if not is_in(name, (*heads, *trained_whole))]
    check_modules_to_save(model, trained_whole, task, drawn)
    return config.with_options(task_type=task, modules_to_save=trained_whole)


def _task_for(model: nn.Module, classes: Collection[str]) -> str | None:
    """Return PEFT's task type for data with classes, else for the model."""
    if classes:
        return "SEQ_CLS"
    return task_of(model)


def _check_classes(model: Any, classes: Collection[str]) -> None:
    """Refuse data with other classes than the head of the model, or with the same in another order."""
    head: tuple[str, ...] = ()
    if heads_of(model):
        head = classes_of(model.config)
    if len(classes) != len(head):
        raise LoraInitError(
            f"the data have {len(classes)} classes, the model's head {len(head)}. Load the model by "
            f"AutoModelForSequenceClassification with num_labels={len(classes)}."
        )
    # Other names are fine: a fresh head has LABEL_0 and so on. The same names in another order are a mistake, since
    # the head was trained to count them as its config does.
    if {*classes} == {*head} and tuple(classes) != head:
        raise LoraInitError(
            f"the data count the classes as {', '.join(classes)}, the model's head as {', '.join(head)}. Pass "
            "known_classes=tuple(model.config.id2label.values()) to load_batches."
        )


def read(
    source: Any, tokenizer: Any, config: InitConfig, seq2seq: bool, known: Sequence[str]
) -> tuple[Batches, Sequence[Any]]:
    """Read the sample and, where a loss is measured, examples beyond it."""
    sample, run = config.sample, config.run
    options = dict(vars(sample))
    # Where an option was left open, what fits the model and the pass.
    if sample.seq2seq is None:
        options["seq2seq"] = seq2seq and sample.label is None
    if sample.known_classes is None:
        options["known_classes"] = known if sample.label is not None else ()
    if sample.needs_labels is None:
        options["needs_labels"] = config.needs_gradient or run.token_mask == "labels"
    load = partial(load_batches, source, tokenizer, **vars(config.reading), seed=run.seed)
    batches = load(**options)
    if (n := batches.n) < LEAST:
        warn(f"{n} example{'s' * (n > 1)}, and fewer than {LEAST} say little about the data. Give more.")
    more: Sequence[Any] = ()
    if config.measures and sample.samples is not None:  # None takes all examples, so there are none beyond
        options |= {"offset": sample.offset + sample.samples, "samples": most_held_out(sample.batch_size)}
        with suppress(LoraInitError):  # there are none
            more = load(**options)
    return batches, more


def split(batches: Any, more: Iterable[Any] = (), measured: bool = True) -> Examples:
    """Hold out examples if a loss is `measured`: from `more` if it has enough, else from the batches."""
    classes, words = tuple(getattr(batches, "classes", ())), getattr(batches, "description", "")
    if not measured:
        return Examples(batches, (), classes, words)
    held_out, others = hold_out(batches, more)
    if others is not batches and isinstance(batches, Batches):  # which keep a record of the sample
        n = sum(len(batch["input_ids"]) for batch in held_out)
        others, words = Batches(others, batches.settings | {"set aside": n}), f"{words}, {n} set aside"
    return Examples(others, held_out, classes, words)


def build(
    model: nn.Module,
    stats: Statistics,
    ranks: RankAllocation | int,
    config: InitConfig,
    held_out: Sequence[Any] = (),
    errors: QuantizationErrors | None = None,
) -> AdapterInit:
    """Build the adapter; the loss on the batches `held_out` decides the size of its step, or checks its correction."""
    start, shape, seed = config.start, config.shape, config.run.seed
    measurement: dict[str, Any] = dict(batches=held_out, forward=config.run.forward, loss=config.run.loss)

    # Each process holds out examples of its own. All must decide by one number, or they would train different adapters.
    def shared(loss_of: Callable[[nn.Module], float], model: nn.Module) -> float:
        loss = loss_of(model)
        with Processes() as processes:
            return statistics.fmean(processes.gather(loss))

    def build_with(gamma: float | None = shape.gamma) -> AdapterInit:
        return build_from(BuildContext(start, stats, replace(shape, gamma=gamma), seed, errors, model), ranks)

    if start.needs_error:
        errors = errors or QuantizationErrors(model, stats.targets, config.correction.weights)
        if not held_out:
            return build_with()
        loss_of = partial(shared, loss_or_distance(model, errors, **measurement))
        return with_losses(model, build_with(), errors, loss_of, config.correction.unchecked)
    if start.takes_step and held_out:
        return find_step_size(model, build_with, partial(shared, partial(mean_loss, **measurement)), shape.gamma)
    return build_with()


def _check_tokens(source: Any) -> None:
    """Refuse texts where batches are wanted."""
    if not isinstance(source, (list, tuple)) or not source:  # a loader is not begun only to look
        return
    first, columns = source[0], ""
    values = [first]
    if isinstance(first, Mapping):
        values = [*first.values()]
        columns = f" with the columns {', '.join(map(str, first))}"
    if any(isinstance(value, Tensor) for value in values):
        return
    if any(isinstance(value, str) or _is_conversation(value) for value in values):
        raise LoraInitError(f"batches are rows of text{columns}, and tokens are needed. Pass tokenizer=, the model's.")


def _is_conversation(value: Any) -> bool:
    """Return whether a value is a list of messages, as in data sets of chats."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and not any(isinstance(part, Tensor) for part in first.values())
