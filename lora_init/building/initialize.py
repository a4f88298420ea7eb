"""initialize(): from a model and data, or from a trainer, to a model with an adapter, in one call."""

from __future__ import annotations

import sys
import time
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.config import read_config
from lora_init.adapters.init_config import InitConfig, Options, takes
from lora_init.adapters.model_handles import ModelHandle
from lora_init.adapters.peft_model import check_in_memory, check_plain, is_filled
from lora_init.building.pipeline import choose, run
from lora_init.errors import LoraInitError, warn
from lora_init.layers.targets import HEADS, find_targets, is_in
from lora_init.layers.wrappers import is_below, is_offloaded, plain_names
from lora_init.trainers.registry import find_handle, find_trainer, is_trainer

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from lora_init.trainers.trainers import TrainerIntegration


# What `initialize` takes beside the options. Only `takes` reads these two classes: they make its signature.
@dataclass(frozen=True)
class _Given:
    model: nn.Module | Any
    batches: Any = None
    _: KW_ONLY
    tokenizer: Any = None
    config: LoraConfig | None = None
    adapter_name: str | None = None
    learning_rate: Literal["measured"] | None = None


@dataclass(frozen=True)
class _Arguments(Options, _Given):  # fields come in the order of the bases, the last one first
    method: str | None = None


@takes(_Arguments)
def initialize(
    model: nn.Module | Any,
    batches: Any = None,
    rank: int | None = None,
    rho: float | None = None,
    method: str | None = None,
    *,
    tokenizer: Any = None,
    config: LoraConfig | None = None,
    adapter_name: str | None = None,
    learning_rate: Literal["measured"] | None = None,
    **options: Any,
) -> PeftModel | Any:
    """Start an adapter in one call: read data, collect statistics, allocate ranks, build it, put it on the model.

    Given a trainer, it learns from the very batches that the trainer is about to train on (its collator, its template,
    its packing, its labels, in its order), and the trainer then trains the adapter. A trainer that was made with a
    `peft_config`, a `LoraConfig`, gets an adapter of that rank, alpha, dropout and of those layers; `rho` still moves
    ranks between them. A trainer that was made with a plain model gets the adapter that the arguments describe. Pass a
    `peft_config` to `DPOTrainer`: without one it loads a second model as its reference, and keeps it.

    Args:
        model: The plain model; one with a fresh adapter from `add_adapter` of transformers or diffusers; a
            `SentenceTransformer` or `CrossEncoder`; or, before `train()`, a `Trainer` of transformers, one of TRL's or
            one of sentence-transformers'.
        batches: What `collect` takes; or, with a tokenizer, what `load_batches` takes: files, a pattern, a hub id, rows
            in memory; or texts for a `SentenceTransformer`, pairs for a `CrossEncoder`. Default: the trainer's data.
        rank: Average rank of a layer, 16 by default. If a trainer has a `peft_config`, neither this argument nor one
            below may contradict it.
        rho: At most round(rho * rank) in one layer. Default: 1, the same rank everywhere, which every engine serves.
        method: See `build_adapter`. Default: `"natural-gradient"` for classes (`label`, here or of `load_batches`, or a
            trainer of a classifier) if they give gradients, else `"eva"`. See there, too, `whiten`, `lora_alpha`,
            `use_rslora`, `use_dora`, `lora_dropout`, `modules_to_save` and `freeze_a`. The head of a classifier is
            trained whole in any case and saved with the adapter, since a checkpoint may lack it: by the task type, or
            among `modules_to_save`.
        tokenizer: The model's tokenizer, where `batches` are texts and no tokens yet.
        config: PEFT's `LoraConfig`, instead of `rank`, `target_modules`, `lora_alpha` and the like: rank, scaling,
            dropout, modules that are trained whole, and the layers that PEFT selects by it (`exclude_modules`,
            `layers_to_transform` and so on). A setting beyond these raises an error that names it, and so does an
            argument that contradicts the config.
        adapter_name: PEFT's name for the adapter. Default: the name of a fresh adapter on it, else "default".
        learning_rate: With a trainer, `"measured"` sets its learning rate to the one that the pass predicts for its
            steps. Other optimizers than AdamW raise, and so do other losses than the model's own, such as DPO's:
            nothing was measured for them. By default the trainer keeps its rate, and a warning says if it is far off.
        **options: All other arguments of `collect`, of `build_adapter` and, with a tokenizer, of `load_batches`
            (`label`, whose classes are in the order of the model's `id2label` if it names them). Without `gamma` a
            method that steps sets four batches aside, and at least 16 examples, but at most a quarter of the data, and
            takes the size of its step by the loss on them, see `find_step_size`. If that is fewer than 16 different
            examples, a warning says so. With `"qera"`, `weights` is the float model that `model` was quantized from, a
            directory or hub id, by default what it was loaded from, and is read tensor by tensor; `unchecked` accepts a
            correction that does not lower the loss on the examples set aside. `seed` decides all that is random.

    Returns:
        The PeftModel; also `trainer.model` from then on. Where the adapter is in place, or inside a model of
        sentence-transformers, that model.

    Raises:
        LoraInitError: As `load_batches`, `collect`, `allocate_ranks`, `build_adapter`, `find_step_size` and
            `AdapterInit.apply` do; before any batch is read, where that can be known then. A trainer that has begun, or
            whose adapter is not a fresh LoRA adapter. The trainer is unchanged then.
    """
    _check_learning_rate(learning_rate, model)
    init_config = InitConfig.from_arguments("initialize()", method, **options, **_without_none(rank=rank, rho=rho))
    classifies = init_config.sample.label is not None or bool(getattr(batches, "classes", ()))
    if not is_trainer(model):
        _check_plain_model(model, batches)
        handle = find_handle(model)
        if config is not None:
            if not handle.wraps_anew:
                raise LoraInitError("config= is for a plain model, and this one has an adapter with a LoraConfig.")
            init_config = read_config(handle.model, config, init_config)
        name = handle.name_of_adapter(adapter_name)
        _check_targets(handle.model, init_config)
        with handle.opened(choose(init_config, classifies)) as opened:
            fed, read = handle.feed(batches, opened)
            return _applied(run(handle, fed, read, tokenizer), handle, name)
    _check_beside_trainer(config, batches, tokenizer)
    began, integration = time.perf_counter(), find_trainer(model)
    if learning_rate:
        integration.check_rate()  # before the pass: it refuses optimizers and losses that no rate was measured for
    name = integration.handle.name_of_adapter(adapter_name)
    with integration.opened(choose(init_config, classifies or integration.classifies)) as (read, own):
        given = own if batches is None else batches
        init = run(integration.handle, given, read, tokenizer)
        init = replace(init, length=integration.length_after(init, own_data=batches is None))
        adapted = _applied(init, integration.handle, name)
    integration.hand_over(adapted)
    if learning_rate and init.rate:
        integration.set_rate(init.rate.rate)
    if integration.is_measured and init.rate:
        # After the rate was set, so that only a rate of the caller's can be far off.
        for text in init.rate.far_off(integration.learning_rate, integration.optimizer, integration.schedule):
            warn(text)
    if init_config.run.progress is not False and integration.is_main_process:
        _print_made(init, integration, time.perf_counter() - began)
    return adapted


def _check_targets(model: nn.Module, init_config: InitConfig) -> None:
    """Refuse, before the pass, a model of which layers that would get an adapter are offloaded."""
    if is_offloaded(model):
        targets, modules = find_targets(model, **vars(init_config.layers)).layers, plain_names(model)
        check_in_memory({one.module: modules[one.module] for one in targets.values()}, "initialize()")


def _without_none(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def _check_learning_rate(learning_rate: Any, model: Any) -> None:
    """Refuse any value but "measured", and that without a trainer."""
    asked = learning_rate is not None
    if asked and not (isinstance(learning_rate, str) and learning_rate == "measured" and is_trainer(model)):
        raise LoraInitError(
            f"learning_rate={learning_rate!r}: 'measured' sets the rate of a trainer. For a model call learning_rate()."
        )


def _check_plain_model(model: Any, batches: Any) -> None:
    """Refuse to begin without batches, and with a model that is none or has an adapter that is trained."""
    if batches is None:
        raise LoraInitError("batches are missing: what collect takes, such as load_batches(data, tokenizer).")
    if not is_filled(model):
        check_plain(model, "initialize()")


def _check_beside_trainer(config: LoraConfig | None, batches: Any, tokenizer: Any) -> None:
    """Refuse what a trainer brings itself."""
    if config is not None:
        raise LoraInitError("config= is for a plain model. Give it to the trainer, as peft_config.")
    if batches is None and tokenizer is not None:
        raise LoraInitError("{tokenizer} is for batches of your own. Leave it out.", tokenizer=...)


def _print_made(init: AdapterInit, integration: TrainerIntegration, seconds: float) -> None:
    """Print in a line what was made of how much data, and how to train it."""
    how = init.how_to_train
    if not integration.has_plain_loss:
        how = f"Its learning rate is for you to tune: none was measured for the loss of {integration.name}."
    ranks = sorted(init.ranks.values())
    of_layer = " to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))  # one number where all are equal
    took = f"{init.provenance.n_batches} batches of {integration.batch_size} examples, {seconds:.1f} s"
    print(f"{init.method}: {len(ranks)} layers, rank {of_layer}, {took}. {how}", file=sys.stderr)


def _applied(init: AdapterInit, handle: ModelHandle, adapter_name: str) -> Any:
    """Put the adapter on; warn of a start whose training is lost without what only the model has now."""
    adapted = handle.put(init, adapter_name)
    heads = init.provenance.settings.get("heads", ())
    whole = (*init.modules_to_save, *HEADS.get(init.provenance.task_type or "", ()))
    new = []
    for name in heads:
        is_part = any(is_below(name, other) for other in heads if other != name)
        if not is_part and not is_in(name, whole):
            new.append(name)
    if new and any(name not in heads for name in init.targets):  # where all are a user's own, they are the model
        warn(
            f"{', '.join(new)}: no part of the checkpoint's class, and its weights are neither trained nor saved. If "
            f"they are random, train it whole: modules_to_save={new}."
        )
    if init.corrects_base:
        start = "START"
        if adapter_name != "default":  # PEFT saves others into folders of their names
            start = f"START/{adapter_name}"
        warn(
            f"method={init.method!r} changed the base weights, so what is trained now does not fit the plain base. "
            f"Call save_pretrained('START') of the model returned before training: `lora-init export --start {start}` "
            "needs that to make an adapter for the plain base of what was saved after it."
        )
    return adapted
