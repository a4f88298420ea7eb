"""Drop-ins for `get_eva_state_dict` and `initialize_lora_eva_weights` of PEFT: change the import, keep the call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lora_init.adapters.eva_inputs import (
    LayerInputs,
    forward_fn_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from lora_init.adapters.eva_loop import EvaLoop
from lora_init.adapters.eva_weights import load_eva_state_dict, plain_name
from lora_init.collection.shards import length
from lora_init.collection.team import Team
from lora_init.errors import LoraInitError
from lora_init.layers.targets import ALL_LINEAR, find_targets

if TYPE_CHECKING:
    from peft import LoraConfig


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | Mapping[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Compute EVA's A for each layer, as `peft.tuners.lora.eva.get_eva_state_dict` does with the same arguments.

    What differs from PEFT: the data is read once, from its start, and no further than 512 batches; a layer is done when
    the directions it gets ranks for lie in the span of those before the last batch with a cosine of at least `tau`,
    where PEFT compares vector by vector and goes on while two of near-equal variance swap; a batch may have any number
    of tokens; ties in the rank distribution go to the earlier layer.

    Args:
        model: A PeftModel, or a plain model with `peft_config`. Modes, hooks and `requires_grad` are put back.
        dataloader: Batches.
        peft_config: Needed for a plain model. `r`, `rank_pattern`, `target_modules` and `eva_config` are used.
        forward_fn: Runs the model on a batch. It may be cut short after the last layer that is still needed.
        prepare_model_inputs_fn: Turns batch and config into what `prepare_layer_inputs_fn` gets; None passes the batch.
        prepare_layer_inputs_fn: Turns a layer's inputs into rows; a function, or a mapping from layer to function,
            where layers that it doesn't name count whole; None likewise. Not changed.
        adapter_name: Adapter of a PeftModel.
        gather_distributed_inputs: In a distributed run, merge the decompositions of all processes.
        show_progress_bar: Show a progress bar.

    Returns:
        For each layer that had rows, by its name in `model`, A float32 [rank, d_in] on the layer's device; [0, d_in]
        for a layer that gets no rank.

    Warns:
        UserWarning: As PEFT in a distributed run; and if the bound on batches ended the loop.

    Raises:
        ValueError: `peft_config` is missing, the dataloader is empty, or `prepare_layer_inputs_fn` names other layers.
        LoraInitError: (a ValueError) No layer is targeted or no layer had rows; another process failed.
    """
    wrapped = hasattr(model, "peft_config")
    if peft_config is None:
        if not wrapped:
            raise ValueError("peft_config is required if model is not a PeftModel")
        peft_config = cast("LoraConfig", model.peft_config[adapter_name])  # type: ignore[index]
    if peft_config.eva_config is None:
        from peft import EvaConfig

        peft_config = copy(peft_config)
        peft_config.eva_config = EvaConfig()
    if length(dataloader) == 0:
        raise ValueError("dataloader is empty")
    gather = gather_distributed_inputs and torch.distributed.is_available() and torch.distributed.is_initialized()
    if gather:
        warnings.warn(
            "torch.distributed is initialized and `gather_distributed_inputs` is True, therefore EVA merges what all "
            "ranks have seen. Ensure the model does not receive the same inputs on different ranks.",
            stacklevel=2,
        )
    modules = _adapter_layers(model, adapter_name) if wrapped else _target_layers(model, peft_config)
    if not modules:
        raise LoraInitError(f"no layer of {type(model).__name__} is targeted by the config, or has rows to learn from.")
    loop = EvaLoop(
        model,
        modules,
        peft_config,
        forward_fn or forward_fn_dict,
        prepare_model_inputs_fn,
        _layer_functions(modules, prepare_layer_inputs_fn),
        alike=(None, prepare_layer_inputs_fn_language_modeling),
    )
    with Team(alone=not gather) as team:
        with _adapter_switched_off(model, wrapped):
            loop.run(dataloader, show_progress_bar and team.rank == 0)
        if team.size > 1:
            loop.merge_processes(team)
    return loop.state_dict()


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | Mapping[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Give an EVA adapter its ranks and weights, as `peft.initialize_lora_eva_weights` does with the same arguments.

    What differs from PEFT, beside `get_eva_state_dict`: names in `eva_state_dict` may be those of the plain model; it
    is not emptied; `rank_pattern` and `alpha_pattern` keys may start with `^`, and those written do; the scaling is
    kept under rsLoRA too; layers whose rank changes stay float32 on a half-precision model.

    Args:
        model: A PeftModel whose adapter has `init_lora_weights="eva"`. Changed in place.
        dataloader: Batches; not needed with `eva_state_dict`.
        eva_state_dict: What `get_eva_state_dict` returned.
        forward_fn: See `get_eva_state_dict`, as for the arguments that follow.
        prepare_model_inputs_fn: See there.
        prepare_layer_inputs_fn: See there.
        adapter_name: Which adapter.
        gather_distributed_inputs: See there.
        show_progress_bar: See there.

    Warns:
        UserWarning: Layers that the state dict doesn't name are initialised by PEFT.

    Raises:
        ValueError: No PeftModel, several active adapters, another `init_lora_weights`, or neither data nor state dict.
        LoraInitError: (a ValueError) A tensor doesn't fit its layer.
    """
    if not hasattr(model, "peft_config"):
        raise ValueError("model must be a PeftModel")
    if len(model.active_adapters) > 1:  # type: ignore[arg-type]
        raise ValueError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    if model.peft_config[adapter_name].init_lora_weights != "eva":  # type: ignore[index, union-attr]
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model=model,
            dataloader=dataloader,
            forward_fn=forward_fn,
            prepare_model_inputs_fn=prepare_model_inputs_fn,
            prepare_layer_inputs_fn=prepare_layer_inputs_fn,
            adapter_name=adapter_name,
            gather_distributed_inputs=gather_distributed_inputs,
            show_progress_bar=show_progress_bar,
        )
    load_eva_state_dict(model, eva_state_dict, adapter_name)


def _adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """Find the layers of a PeftModel that have this adapter and that read rows."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.eva import UNSUPPORTED_LORA_MODULES

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and not isinstance(module, UNSUPPORTED_LORA_MODULES)
        and adapter_name in module.lora_A
        and isinstance(module, nn.Module)
    }


def _target_layers(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Find the layers of a plain model that the config targets; without `target_modules` all linear ones."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from transformers.pytorch_utils import Conv1D

    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        # PEFT's EVA takes this for a regular expression, which matches nothing.
        targets = find_targets(model, ALL_LINEAR, config.exclude_modules, config.task_type)
        return {name: model.get_submodule(name) for name in targets.layers}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and (config.target_modules is None or check_target_module_exists(config, name))
    }


def _layer_functions(
    modules: Mapping[str, nn.Module], given: LayerInputs | Mapping[str, LayerInputs] | None
) -> dict[str, LayerInputs | None]:
    if not isinstance(given, Mapping):
        return dict.fromkeys(modules, given)
    known = {plain_name(name) for name in modules}
    unknown = [name for name in given if plain_name(name) not in known]
    if unknown:
        raise ValueError(
            "prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: "
            f"{unknown}"
        )
    functions = {plain_name(name): function for name, function in given.items()}
    return {name: functions.get(plain_name(name)) for name in modules}


@contextmanager
def _adapter_switched_off(model: Any, wrapped: bool) -> Iterator[None]:
    """Run the base model alone; afterwards `requires_grad` is as before, which PEFT's own context doesn't see to."""
    if not wrapped:
        yield
        return
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
