"""Subtract from base weights what an adapter adds before its training, so that the model's output does not change.

A start such as LoRA-GA's has an A and a B other than zero. Put on as it is, it would change the model before the first
step. So the base gives up s B A: the layer computes (W - s B A) x + s B A x = W x, and trains from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.adapters.directory import LORA_A, LORA_B, ORIGIN_FILE, AdapterDirectory
from lora_init.adapters.peft_model import check_plain
from lora_init.errors import LoraInitError
from lora_init.layers.identity import fingerprint
from lora_init.layers.targets import PREFIX, is_conv1d
from lora_init.layers.wrappers import unwrapped
from lora_init.planning.lora_config import scaling_of
from lora_init.starts.weights import LoraWeights, Weights


def check_correctable(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse layers that are missing, quantized or tied: nothing can be subtracted from their weights."""
    modules = dict(model.named_modules())
    # How many modules hold each weight. By identity, since tied modules hold one and the same Parameter.
    owners: Counter[int] = Counter()
    for module in modules.values():
        owners.update(map(id, module.parameters(recurse=False)))
    for name in names:
        if name not in modules:
            raise LoraInitError(f"{type(model).__name__} has no layer {name!r}. Give the base of this adapter.")
        weight = modules[name].weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise LoraInitError(
                f"layer {name!r} is quantized, so that its weight cannot give up what B A adds. "
                "Load the model in float, or pass correct_base=False to apply()."
            )
        if weight.is_meta or hasattr(weight, "full_tensor"):
            raise LoraInitError(
                f"layer {name!r} is offloaded or sharded, so that its weight cannot give up what B A adds. Load the "
                "model whole, correct it, and shard it afterwards."
            )
        if owners[id(weight)] > 1:
            raise LoraInitError(
                f"layer {name!r} shares its weight with another module, as tied embeddings do, which must not give up "
                "what B A adds. Leave it out of the targets, or pass correct_base=False to apply()."
            )


@torch.no_grad()
def correct_weights(model: nn.Module, weights: Weights, scaling: float) -> None:
    """Take scaling * B A off the base weights, in place, also where PEFT has wrapped the layers already."""
    for name, (a, b) in weights.items():
        layer: Any = model.get_submodule(name)
        plain = getattr(layer, "base_layer", layer)
        added = scaling * (b @ a).to(plain.weight.device)  # [d_out, d_in]
        if is_conv1d(plain):  # transformers' Conv1D keeps [d_in, d_out]
            added = added.T
        # Subtracted in float32 and rounded once, to the type of the weight.
        plain.weight.copy_(plain.weight.float() - added)


def correct_outputs(model: nn.Module, weights: Weights, scaling: float) -> None:
    """Take scaling * B A x off the output of each layer by a hook, and leave the base weights alone."""
    for name, (a, b) in weights.items():
        layer: Any = model.get_submodule(name)
        device = next(layer.parameters()).device
        # Copies: the hook subtracts the start for as long as the model lives, whatever becomes of `weights`.
        layer.register_forward_hook(partial(_subtract, a.to(device, copy=True), b.to(device) * scaling))


def _subtract(a: Tensor, b: Tensor, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    # tokens x d_in -> tokens x r -> tokens x d_out; B A as a matrix would take the memory of the weight
    return output - ((args[0].to(a.dtype) @ a.T) @ b.T).to(output.dtype)


def correct_base(model: nn.Module, directory: str | Path) -> None:
    """Subtract from the base weights what an untrained adapter adds, as starts such as `lora-ga` need it.

    The weights are changed in place; then `PeftModel.from_pretrained(model, directory,
    is_trainable=True)` does not change the output. Once trained,
    `save_pretrained(other, path_initial_model_for_weight_conversion=directory)` of the PeftModel writes an ordinary
    adapter of twice the rank, for the plain base.

    Args:
        model: The plain model.
        directory: From `AdapterInit.save_pretrained` or `lora-init init`.

    Raises:
        LoraInitError: Not an adapter directory, a trained one, one of another model, or quantized weights.
    """
    check_plain(model, "correct_base()")
    model, files = unwrapped(model), AdapterDirectory(directory)
    if not files.is_start:
        raise LoraInitError(
            f"{files.path} has no {ORIGIN_FILE} of its weights, so it is no adapter before training. Name what "
            "`lora-init init` wrote."
        )
    # The fingerprint depends on the weights, so a base that was corrected already is refused here, too.
    made_for = files.origin.get("provenance", {}).get("fingerprint")
    if made_for and made_for != fingerprint(model):
        raise LoraInitError(
            f"{files.path} was made for another model than this {type(model).__name__}, or its weights have been "
            "corrected already. Load the base model anew, in float32 or bfloat16."
        )
    check_correctable(model, files.layers)
    tensors, config = files.tensors(), files.config
    weights = {}
    for name in files.layers:
        weights[name] = LoraWeights(tensors[PREFIX + name + LORA_A], tensors[PREFIX + name + LORA_B])
    scaling = scaling_of(config["lora_alpha"], config["r"], bool(config.get("use_rslora")))
    correct_weights(model, weights, scaling)
