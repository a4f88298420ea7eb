"""Tensors of an adapter's file that take the model: modules trained whole, PEFT's own start."""

from __future__ import annotations

import difflib
from collections.abc import Collection

import torch
from torch import Tensor, nn

from lora_init.adapters.initializers import kaiming, layer_generator, zero_b
from lora_init.errors import LoraInitError
from lora_init.layers.targets import find_targets


def check_modules_to_save(model: nn.Module, modules_to_save: Collection[str]) -> None:
    """Check that each name is the ending of a module's, as PEFT matches it, which leaves out silently what is not.

    Raises:
        LoraInitError: One is not.
    """
    names = [name for name, _ in model.named_modules() if name]
    for ending in modules_to_save:
        if not any(name.endswith(ending) for name in names):
            endings = sorted({name.rpartition(".")[2] for name in names})
            close = difflib.get_close_matches(ending.rpartition(".")[2], endings, n=3, cutoff=0.4)
            hint = f" Closest: {', '.join(close)}." if close else ""
            raise LoraInitError(f"modules_to_save: {ending!r} is no module of {type(model).__name__}.{hint}")


def head_tensors(model: nn.Module, heads: tuple[str, ...]) -> dict[str, Tensor]:
    """Read the weights of the heads that PEFT trains whole, under the names they have in an adapter's file.

    Args:
        model: The plain model, or the same after `attach`.
        heads: Endings of the modules' names, matched as PEFT matches `modules_to_save`.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        inside_wrapper = ".original_module" in name or ".modules_to_save" in name
        if heads and name.endswith(heads) and not inside_wrapper:
            state = getattr(module, "original_module", module).state_dict()
            tensors |= {f"base_model.model.{name}.{key}": value.detach().cpu().clone() for key, value in state.items()}
    return tensors


def own_start_tensors(model: nn.Module, unsupported: Collection[str], rank: int, seed: int) -> dict[str, Tensor]:
    """Draw PEFT's own start for layers that have no spectrum, so that PEFT finds all that it looks for in the file.

    Those of an embedding, a linear layer and a convolution; PEFT draws what else it misses, and says so.

    Args:
        model: The plain model, or the same after `attach`.
        unsupported: Names of the layers.
        rank: Their rank.
        seed: Seed of the numbers; each layer's depend on it and on the layer's name.
    """
    tensors: dict[str, Tensor] = {}
    for name, wrapped in model.named_modules():
        if name not in unsupported:
            continue
        layer = getattr(wrapped, "base_layer", wrapped)
        generator, prefix = layer_generator(seed, name), f"base_model.model.{name}"
        if isinstance(layer, nn.Embedding):
            tensors[f"{prefix}.lora_embedding_A"] = torch.zeros(rank, layer.num_embeddings)
            tensors[f"{prefix}.lora_embedding_B"] = torch.randn(layer.embedding_dim, rank, generator=generator)
        elif not isinstance(layer, nn.MultiheadAttention):
            target = find_targets(nn.ModuleDict({"layer": layer}), ["layer"]).layers["layer"]
            a, b = target.shapes(rank)
            tensors[f"{prefix}.lora_A.weight"] = kaiming(rank, target.in_features, generator).reshape(a)
            tensors[f"{prefix}.lora_B.weight"] = zero_b(*b)
    return tensors
