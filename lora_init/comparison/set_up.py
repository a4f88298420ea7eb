"""What a comparison runs on: read the data, load the model, and put both on a `Workbench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_init.adapters.peft_model import check_modules_to_save
from lora_init.collection.collect import check_targets
from lora_init.comparison.starts import AdapterShape, check_quantized
from lora_init.comparison.tasks import CLASSIFICATION, LoadingOptions, load_task
from lora_init.comparison.training import Training
from lora_init.comparison.variants import Variant
from lora_init.comparison.workbench import Workbench
from lora_init.errors import LoraInitError
from lora_init.layers.identity import fingerprint
from lora_init.layers.targets import find_targets
from lora_init.loading.batches import Batches, load_other
from lora_init.loading.models import LoadedModel, ModelSource, open_model
from lora_init.on_demand import on_demand

STRENGTHS = (0.4, 0.55, 0.7, 0.85, 1.0, 1.15)  # that a trained adapter is evaluated at


@dataclass(frozen=True)
class Sources:
    """What starts are made from, apart from the model and the data."""

    statistics_batches: int  # see `Workbench`
    starts: Sequence[Variant] = ()  # those to make
    own: Mapping[str, Any] = field(default_factory=dict)  # see `Workbench`
    bank: str | None = None  # directory of a bank, for starts from one


def set_up(
    model: str, data: str | Path, directory: Path, options: LoadingOptions, shape: AdapterShape, training: Training,
    sources: Sources, folds: tuple[int | None, int | None] = (None, None),
) -> Workbench:  # fmt: skip
    """Read the data, load the model in the class that the task needs, and put both on a `Workbench`."""
    bank = None if sources.bank is None else on_demand("bank")(sources.bank)
    # The tokenizer and the data first: they are quick to fail, and say how many classes the model needs.
    source = open_model(model, trust_remote_code=options.trust_remote_code)
    has_float = _check_source(source, model, options, shape, sources.starts)
    task = load_task(data, source.tokenizer, options, training.batch_size, source.classes).cut(*folds)
    classifies = task.kind == CLASSIFICATION
    retain, replay = _load_texts(options, source.tokenizer, training.batch_size, classifies)
    # A function, since full training of a quantized model loads the float one for each of its runs.
    load = partial(_load, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code)
    if classifies:
        load = partial(load, task_type="SEQ_CLS", n_labels=len(task.classes))
        if options.dtype == "auto":  # the head is trained whole
            load = partial(load, dtype="float32")
    loaded = load(model, quantize=options.quantize)
    float_model = partial(load, str(options.weights or model)) if has_float else None
    if classifies:
        check_modules_to_save(loaded.model, (), loaded.task_type, loaded.drawn)
        if loaded.model.dtype != torch.float32:  # where --dtype says so
            raise LoraInitError("{dtype}: the head of a classifier is trained whole, in float32.", dtype=options.dtype)
    shape = replace(shape, task_type=loaded.task_type)
    if bank is not None:  # its adapters are of one model
        bank.check_base(fingerprint(loaded.model), type(loaded.model).__name__)
    # Without other text there is nothing to weigh the task against.
    strengths = STRENGTHS if retain and options.dial else ()
    return Workbench(
        loaded, task, retain, directory, shape, training, sources.statistics_batches, sources.own, bank,
        float_model, options.weights, strengths, replay,
    )  # fmt: skip


def _check_source(
    source: ModelSource, model: str, options: LoadingOptions, shape: AdapterShape, starts: Sequence[Variant]
) -> bool:
    """Refuse a model that the starts or the options do not go with; return whether there is a float model of it."""
    if options.label is None and source.task_type != "CAUSAL_LM":
        raise LoraInitError(
            f"model {model!r} is a {source.saved_as or source.auto_class}, and a comparison trains causal language "
            "models, or classifiers with --label COLUMN."
        )
    source.check_quantized(options.quantize)
    # The layers can be checked on a model without weights, before those are read; not every model can be made so.
    if (empty := source.empty()) is not None:
        check_targets(empty, find_targets(empty, shape.target_modules, task_type=source.task_type), shape.rank)
    is_quantized = options.quantize is not None or getattr(source.config, "quantization_config", None) is not None
    has_float = options.quantize is not None or options.weights is not None
    check_quantized(starts, is_quantized, has_float)
    if options.weights is not None and not is_quantized:
        raise LoraInitError(f"{{weights}}: model {model!r} is not quantized. Leave it out.", weights=options.weights)
    return has_float


def _load_texts(
    options: LoadingOptions, tokenizer: Any, batch_size: int, classifies: bool
) -> tuple[Batches | None, Batches | None]:
    """Read the text to measure forgetting on and the text to train on, too, where they are asked for."""
    retain = replay = None
    if options.retain_data is not None:
        if classifies:
            raise LoraInitError("retain_data is for language models: a classifier has no loss on text. Leave it out.")
        retain = load_other(
            options.retain_data, tokenizer, "retain_template", template=options.retain_template,
            samples=options.retain_samples, batch_size=batch_size, max_length=options.max_length,
        )  # fmt: skip
    if options.replay is not None:
        if classifies:
            raise LoraInitError("replay is for language models: a classifier has no loss on text. Leave it out.")
        # One text beside each step, so batches of one.
        replay = load_other(options.replay, tokenizer, batch_size=1, max_length=options.max_length)
    return retain, replay


def _load(
    model: str, *, trust_remote_code: bool, task_type: str | None = None, n_labels: int | None = None, **options: Any
) -> LoadedModel:
    opened = open_model(model, task_type=task_type, trust_remote_code=trust_remote_code)
    return opened.load(n_labels=n_labels, **options)
