"""initialize(): from a model and data, or from a trainer, to a model with an adapter, in one call."""

from __future__ import annotations

import inspect
import statistics
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_init.adapters.build import build_adapter, buildable_start, check_adapter_options
from lora_init.adapters.config import default, only_given, read_config, with_defaults
from lora_init.adapters.measured import LossOf, build_measured
from lora_init.adapters.peft_model import check_modules_to_save, check_plain
from lora_init.adapters.quantized import QuantizationErrors
from lora_init.adapters.recommended import Fit, default_start
from lora_init.adapters.starts import DEFAULT, Start
from lora_init.adapters.step_size import set_aside
from lora_init.adapters.trainers import (
    adapter_dtype,
    classifies_by_own_loss,
    hand_over,
    has_plain_loss,
    is_trainer,
    opened,
)
from lora_init.collection.backward import NoGradientsError
from lora_init.collection.collect import collect
from lora_init.collection.processes import Processes
from lora_init.errors import LoraInitError
from lora_init.layers.masks import encoder_of
from lora_init.layers.targets import HEADS, find_targets, heads_of, is_in
from lora_init.loading.batches import Batches, as_batches, load_batches
from lora_init.loading.models import classes_of, task_of
from lora_init.planning.allocate import allocate_ranks

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def initialize(
    model: nn.Module | Any,
    batches: Any = None,
    rank: int = default(16),
    rho: float | None = None,
    method: str | None = None,
    *,
    tokenizer: Any = None,
    config: LoraConfig | None = None,
    target_modules: str | Collection[str] = default("all-linear"),
    whiten: bool = False,
    lora_alpha: float | None = default(None),
    use_rslora: bool = default(False),
    use_dora: bool = default(False),
    lora_dropout: float = default(0.0),
    modules_to_save: Sequence[str] = default(()),
    gamma: float | None = None,
    freeze_a: bool = False,
    weights: str | Path | None = None,
    unchecked: bool = False,
    adapter_name: str = "default",
    seed: int = 0,
    **options: Any,
) -> PeftModel:
    """Do all of it in one call: read data, collect statistics, allocate ranks, build the adapter, put it on the model.

    Given a trainer, it learns from the very batches that the trainer is about to train on (its collator, its template,
    its packing, its labels, in its order), and the trainer then trains the adapter. A trainer that was made with a
    `peft_config`, a `LoraConfig`, gets an adapter of that rank, alpha, dropout and of those layers; `rho` still moves
    ranks between them. A trainer that was made with a plain model gets what the arguments say. With `DPOTrainer` give a
    `peft_config`: without one it has loaded a second model as its reference, which stays.

    Args:
        model: The plain model; or a `Trainer` of transformers or one of TRL's, before `train()`.
        batches: What `collect` takes; or, with a tokenizer, what `load_batches` takes: files, a pattern, a hub id, rows
            in memory. Default: those of the trainer.
        rank: Average rank of a layer. What a trainer's `peft_config` says otherwise is refused, here and below.
        rho: At most round(rho * rank) in one layer; 1 gives every layer the same rank. Default: what the method is
            recommended with, 2 for `"eva"`.
        method: See `build_adapter`. Default: `"natural-gradient"` for classes (`label`, here or of `load_batches`, or a
            trainer of a classifier) if they give gradients, else `"eva"`. See there, too, `whiten`, `lora_alpha`,
            `use_rslora`, `use_dora`, `lora_dropout`, `modules_to_save` and `freeze_a`. The head of a classifier is
            trained whole in any case and saved with the adapter, since a checkpoint may lack it: by the task type, or
            among `modules_to_save`.
        tokenizer: The model's tokenizer, where `batches` are texts and no tokens yet.
        config: PEFT's `LoraConfig`, in place of `rank`, `target_modules`, `lora_alpha` and the like: rank, scaling,
            dropout, modules that are trained whole, and the layers that PEFT selects by it (`exclude_modules`,
            `layers_to_transform` and so on). What it sets beyond that is refused by its name, and so is an argument
            that says otherwise.
        target_modules: See `collect`.
        gamma: See `build_adapter`. By default a method that steps sets four batches aside, and at least 16 examples,
            but at most a quarter of the data, and takes the size of its step by the loss on them, see `find_step_size`.
            If that is fewer than 16 different examples, a warning says so.
        weights: With `"qera"`: the float model that `model` was quantized from, a directory or hub id. Default: what it
            was loaded from. It is read tensor by tensor.
        unchecked: With `"qera"`: accept a correction that does not lower the loss on the examples set aside.
        adapter_name: PEFT's name for the adapter.
        seed: Seed of the decomposition and of random initializations.
        **options: Passed on to `collect` (`exclude_modules`, `task_type` and so on) and, with a tokenizer, to
            `load_batches` (`template`, `format`, `samples` and so on; `label`, whose classes are in the order of the
            model's `id2label` if it names them).

    Returns:
        The PeftModel; also `trainer.model` from then on.

    Raises:
        LoraInitError: As `load_batches`, `collect`, `allocate_ranks`, `build_adapter`, `find_step_size` and
            `AdapterInit.apply` do; before any batch is read, where that can be known then. A trainer that has begun, or
            whose adapter is not a fresh LoRA adapter; it is as it was then.
    """
    if method is None:
        return _by_default({**locals()})
    shape: dict[str, Any] = dict(
        rank=rank, target_modules=target_modules, lora_alpha=lora_alpha, use_rslora=use_rslora, use_dora=use_dora,
        lora_dropout=lora_dropout, modules_to_save=modules_to_save,
    )  # fmt: skip
    start = buildable_start(method)
    if is_trainer(model):
        _refuse_config(config)
        dtype = adapter_dtype(model)
        with opened(model, method, only_given(shape), options) as (plain, settings, own):
            source = dict(batches=own) if batches is None else dict(batches=batches, tokenizer=tokenizer)
            adapted = initialize(
                plain, **source, rho=rho, method=method, whiten=whiten, gamma=gamma, freeze_a=freeze_a,
                weights=weights, unchecked=unchecked, adapter_name=adapter_name, seed=seed, **settings,
            )  # fmt: skip
        hand_over(model, adapted, dtype)
        _warn_if_far_off(start, adapted.peft_config[adapter_name], freeze_a, model)
        return adapted
    if batches is None:
        raise LoraInitError("batches are missing: what collect takes, such as load_batches(data, tokenizer).")
    check_plain(model, "initialize()")
    shape, options = _as_asked(model, config, shape, options)
    _warn_if_far_off(start, config, freeze_a)
    adapter = with_defaults(shape) | dict(method=method, whiten=whiten)
    rank, target_modules, use_rslora = (adapter.pop(name) for name in ("rank", "target_modules", "use_rslora"))
    check_adapter_options(**adapter, gamma=gamma)
    rho = rho or start.rho
    if start.one_rank and round(rho * rank) > rank:
        raise LoraInitError(f"method={method!r} with rho={rho:g}: it gives all layers one rank. Pass rho=1.")
    options["task_type"] = task = options.get("task_type") or _task_with_head(model, batches, "label" in options)
    whole = [*adapter["modules_to_save"]]
    adapter["modules_to_save"] = [
        *whole,
        *(h for h in heads_of(model) if not is_in(h, (*HEADS.get(task or "", ()), *whole))),
    ]
    check_modules_to_save(model, adapter["modules_to_save"])
    if start.by_gradient:
        options.setdefault("gradients", True)
    if tokenizer is not None:
        batches, options = _read(model, batches, tokenizer, seed, options)
    else:
        _check_classes(model, getattr(batches, "classes", ()))
    measured = start.by_error or (gamma is None and start.takes_step)
    _check_readable(start, model, target_modules, options, weights)
    aside, others = set_aside(as_batches(batches, model, seed)) if measured else ([], batches)
    stats = collect(model, others, target_modules, rank=rank, rho=rho, seed=seed, **options)
    build = partial(
        build_adapter, stats, allocate_ranks(stats, rank=rank, rho=rho), use_rslora=use_rslora, seed=seed,
        freeze_a=freeze_a, **adapter,
    )  # fmt: skip
    init = build_measured(
        model, stats, start, build, aside, gamma, weights=weights, unchecked=unchecked,
        forward=options.get("forward"), loss=options.get("loss"), shared=_in_all_processes,
    )  # fmt: skip
    if start.corrects_base:
        _warn_of_changed_base(method, adapter_name)
    return init.apply(model, adapter_name)


def _in_all_processes(loss_of: LossOf) -> LossOf:
    """Take the mean over processes: each has batches of its own, and all must do the same with the result."""

    def mean(model: nn.Module) -> float:
        loss = loss_of(model)
        with Processes() as processes:
            return statistics.fmean(processes.gather(loss))

    return mean


def _refuse_config(config: LoraConfig | None) -> None:
    if config is not None:
        raise LoraInitError("config= is for a plain model. Give it to the trainer, as peft_config.")


def _warn_of_changed_base(method: str, adapter_name: str) -> None:
    start = "START" if adapter_name == "default" else f"START/{adapter_name}"  # where PEFT saves it
    warnings.warn(
        f"method={method!r} changed the base weights, so what is trained now does not fit the plain base. Call "
        f"save_pretrained('START') of the model returned before training: `lora-init export --start {start}` needs "
        "that to make an adapter for the plain base of what was saved after it.",
        stacklevel=3,
    )


def _as_asked(
    model: nn.Module, config: LoraConfig | None, shape: dict[str, Any], options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put what a LoraConfig says in the place of the arguments about the adapter, and of the options for `collect`."""
    if config is None:
        return shape, options
    decided = {name: value for name, value in options.items() if name in ("task_type", "target_parameters")}
    said = read_config(model, config, {**only_given(shape), **decided})
    others = {name: value for name, value in said.items() if name not in shape}
    return {name: said[name] for name in shape}, {**options, **others}


def _check_readable(
    start: Start,
    model: nn.Module,
    target_modules: str | Collection[str],
    options: Mapping[str, Any],
    weights: str | Path | None,
) -> None:
    """Refuse before the pass, for a start that needs the float weights, what cannot be read."""
    if start.by_error:
        chosen = {name: options.get(name) for name in ("exclude_modules", "task_type", "target_parameters")}
        QuantizationErrors(model, find_targets(model, target_modules, **chosen).layers, weights)


def _warn_if_far_off(start: Start, config: Any, freeze_a: bool, trainer: Any = None) -> None:
    """Also of a user's `config` alone, which does not tell whether its lora_alpha was given or is PEFT's 8."""
    if config is None or (trainer is not None and not has_plain_loss(trainer)):  # for other losses none was measured
        return
    fit = Fit(start, config.r, config.lora_alpha, config.use_rslora, config.use_dora, freeze_a)
    for said in fit.far_off(trainer and trainer.args):
        warnings.warn(said, stacklevel=3)


def _by_default(arguments: dict[str, Any]) -> PeftModel:
    """Call `initialize` with the method that is recommended: by the gradient for classes, unless there is none."""
    arguments |= arguments.pop("options")
    trainer = arguments["model"]
    classifies = (
        "label" in arguments
        or bool(getattr(arguments["batches"], "classes", ()))
        or (is_trainer(trainer) and classifies_by_own_loss(trainer))
    )
    try:
        return initialize(**arguments | {"method": default_start(classifies)})
    except NoGradientsError as error:
        warnings.warn(f"{error} So the start is {DEFAULT}, from what the layers read.", stacklevel=3)
        return initialize(**arguments | {"method": DEFAULT})


def _read(
    model: nn.Module, source: Any, tokenizer: Any, seed: int, options: Mapping[str, Any]
) -> tuple[Batches, dict[str, Any]]:
    """Draw batches of texts; also return the options that are left, for `collect`."""
    names = inspect.signature(load_batches).parameters
    reading = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    classifies, head = "label" in reading, classes_of(getattr(model, "config", None))
    reading = {"seq2seq": encoder_of(model) is not None and not classifies, "known_classes": head, **reading}
    reading.setdefault("needs_labels", rest.get("gradients", False) or rest.get("token_mask") == "labels")
    batches = load_batches(source, tokenizer, seed=seed, **reading)
    _check_classes(model, batches.classes)
    return batches, {"data": batches.description, **rest}


def _task_with_head(model: nn.Module, batches: Any, labelled: bool) -> str | None:
    """Return PEFT's task type for which it trains a head whole: of classes, or of the model's class."""
    task = "SEQ_CLS" if labelled or getattr(batches, "classes", None) else task_of(model)
    return task if task in HEADS else None


def _check_classes(model: nn.Module, classes: Sequence[str]) -> None:
    """Refuse classes of the data that are not those of the model's head, in number and order."""
    head = classes_of(getattr(model, "config", None))
    if not classes or not hasattr(model, "config"):
        return
    if len(classes) != len(head) or not heads_of(model):
        n_outputs = len(head) if heads_of(model) else 0
        raise LoraInitError(
            f"the data have {len(classes)} classes, the model's head {n_outputs}. Load the model by "
            f"AutoModelForSequenceClassification with num_labels={len(classes)}."
        )
    if {*classes} == {*head} and tuple(classes) != head:
        raise LoraInitError(
            f"the data count the classes as {', '.join(classes)}, the model's head as {', '.join(head)}. Pass "
            "known_classes=tuple(model.config.id2label.values()) to load_batches."
        )
