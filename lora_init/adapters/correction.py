"""What an adapter adds at its start, taken off again: from the base weights, or from each layer's output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.adapters.adapter_files import (
    LORA_A,
    LORA_B,
    PREFIX,
    WEIGHTS_FILE,
    adapted_layers,
    read_config,
    read_shapes,
)
from lora_init.errors import LoraInitError
from lora_init.layers.targets import Target, find_targets
from lora_init.layers.wrappers import unwrapped

Weights = Mapping[str, tuple[Tensor, Tensor]]


def check_correctable(model: nn.Module, names: Iterable[str]) -> None:
    """Make sure that the base weights can give up what an adapter adds.

    Raises:
        LoraInitError: A layer is quantised.
    """
    for name in names:
        weight: Any = model.get_submodule(name).weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise LoraInitError(
                f"layer {name!r} is quantised, so that its weight cannot give up what B A adds. "
                "Load the model in float, or pass correct_base=False to apply()."
            )


@torch.no_grad()
def correct_weights(model: nn.Module, targets: Mapping[str, Target], weights: Weights, scaling: float) -> None:
    """Take scaling * B A off the base weights, in place.

    Args:
        model: The plain model, or the same after PEFT has wrapped its layers.
        targets: Kind of each layer.
        weights: A and B of each layer.
        scaling: What their product is multiplied by.
    """
    for name, (a, b) in weights.items():
        layer: Any = model.get_submodule(name)
        weight = getattr(layer, "base_layer", layer).weight
        added = scaling * (b.to(weight.device) @ a.to(weight.device))
        weight.copy_(weight.float() - (added.T if targets[name].kind == "Conv1D" else added))


def correct_outputs(model: nn.Module, weights: Weights, scaling: float) -> None:
    """Take scaling * B A x off the output of each layer by a hook, and leave the base weights alone."""
    for name, (a, b) in weights.items():
        layer: Any = model.get_submodule(name)
        device = next(layer.parameters()).device
        layer.register_forward_hook(partial(_less, a.to(device, copy=True), b.to(device) * scaling))


def correct_base(model: nn.Module, directory: str | Path) -> None:
    """Make the base weights ready for an adapter directory of a start that needs that, such as `lora-ga`.

    Takes off in place what the adapter adds before its training; then `PeftModel.from_pretrained(model, directory,
    is_trainable=True)` leaves the output as it was. Once trained,
    `save_pretrained(other, path_initial_model_for_weight_conversion=directory)` of the PeftModel writes an ordinary
    adapter of twice the rank, for the plain base.

    Args:
        model: The plain model.
        directory: From `AdapterInit.save_pretrained` or `lora-init init`.

    Raises:
        LoraInitError: Not an adapter directory, one of another model, or quantised weights.
    """
    from safetensors.torch import load_file

    model, directory = unwrapped(model), Path(directory).expanduser()
    config = read_config(directory)
    names = adapted_layers(read_shapes(directory))
    missing = next((name for name in names if name not in dict(model.named_modules())), None)
    if missing is not None:
        raise LoraInitError(f"{directory} has layer {missing!r}, and {type(model).__name__} does not. Give its base.")
    found = find_targets(model, names).layers
    check_correctable(model, names)
    tensors = load_file(directory / WEIGHTS_FILE)
    weights = {name: (tensors[f"{PREFIX}{name}{LORA_A}"], tensors[f"{PREFIX}{name}{LORA_B}"]) for name in names}
    rank = config["r"] ** (0.5 if config.get("use_rslora") else 1.0)
    correct_weights(model, found, weights, config["lora_alpha"] / rank)


def _less(a: Tensor, b: Tensor, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    x = args[0]
    less: Tensor = output - ((x.to(a.dtype) @ a.T) @ b.T).to(output.dtype)
    return less
