"""Give a PeftModel the ranks and weights of an EVA state dict: plan first, then change layers one by one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lora_init.adapters.peft_model import exact_pattern, selects
from lora_init.errors import LoraInitError

if TYPE_CHECKING:
    from peft import LoraConfig

# PeftModel puts this in front of the names of the model it wraps.
_PREFIX = "base_model.model."


def plain_name(name: str) -> str:
    """Name a layer as the unwrapped model does."""
    return name.removeprefix(_PREFIX)


def pattern_value(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Look a layer up in `rank_pattern` or `alpha_pattern`: the first key that its plain name ends in."""
    from peft.utils.other import get_pattern_key

    # PEFT's EVA asks with the prefixed name, which no key that starts with ^ can match.
    return (pattern or {}).get(get_pattern_key(list(pattern or {}), plain_name(name)), default)


@dataclass
class _Change:
    """What one adapter layer shall become. `weight` is None where the state dict has nothing for it."""

    name: str
    layer: Any
    weight: Tensor | None
    rank: int
    alpha: float
    old_rank: int


def load_eva_state_dict(model: nn.Module, eva_state_dict: Mapping[str, Tensor], adapter_name: str) -> None:
    """Set A, rank and scaling of every LoRA layer from an EVA state dict, and write the config to match.

    Layers of rank 0 lose their adapter. Layers that the state dict doesn't name are initialised by PEFT.

    Args:
        model: A PeftModel with the adapter.
        eva_state_dict: Layer name, as in the PeftModel or as in the plain model, to A [rank, d_in]. Not changed.
        adapter_name: Which adapter.

    Warns:
        UserWarning: Some layers are not in the state dict.

    Raises:
        LoraInitError: A tensor has another width than its layer. Nothing was changed.
    """
    config = cast("LoraConfig", model.peft_config[adapter_name])  # type: ignore[index]
    changes, other_names = _plan(model, config, eva_state_dict, adapter_name)
    how = copy(config)
    with torch.no_grad():
        for change in changes:
            _carry_out(model, change, how, adapter_name)
    kept = [change for change in changes if change.rank > 0]
    names = [plain_name(change.name) for change in kept]
    exact = not any(selects(names, name) for name in other_names)
    # A set, as PEFT itself turns every list into one.
    config.target_modules = set(names) if exact else exact_pattern(names)  # type: ignore[assignment]
    config.rank_pattern = {_key(c.name): c.rank for c in kept if c.rank != config.r}
    config.alpha_pattern = {_key(c.name): c.alpha for c in kept if c.alpha != config.lora_alpha}
    missing = [plain_name(change.name) for change in changes if change.weight is None]
    if missing:
        warnings.warn(
            "the following layers were initialized with init_lora_weights=True because they were not found in the eva "
            f"state_dict: {missing}\nEmbeddings, convolutions and nn.MultiheadAttention have no rows to learn from, "
            "and neither has a layer that no batch reached",
            stacklevel=3,
        )


def _plan(
    model: nn.Module, config: LoraConfig, eva_state_dict: Mapping[str, Tensor], adapter_name: str
) -> tuple[list[_Change], list[str]]:
    from peft.tuners.lora import LoraLayer

    weights = {plain_name(name): weight for name, weight in eva_state_dict.items()}
    changes, other_names = [], []
    for name, module in model.named_modules():
        plain = plain_name(name)
        ours = isinstance(module, LoraLayer) and adapter_name in module.r and ".base_layer." not in name
        if not ours:
            other_names.append(plain)
            continue
        weight = weights.get(plain)
        old_rank = int(pattern_value(config.rank_pattern, name, config.r))
        alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
        if weight is None:
            changes.append(_Change(name, module, None, old_rank, alpha, old_rank))
            continue
        if weight.dim() != 2 or weight.shape[1] != module.in_features:
            raise LoraInitError(
                f"layer {plain!r}: the eva state_dict has a tensor of shape {tuple(weight.shape)}, expected "
                f"[rank, {module.in_features}]. Compute it on this model."
            )
        rank = weight.shape[0]
        if rank != old_rank and config.eva_config is not None and config.eva_config.adjust_scaling_factors:
            # Keeps the layer's scaling. PEFT takes rank / old_rank under rsLoRA too, which changes it.
            ratio = rank / old_rank
            alpha = alpha * (ratio**0.5 if config.use_rslora else ratio)
        changes.append(_Change(name, module, weight, rank, alpha, old_rank))
    return changes, other_names


def _carry_out(model: nn.Module, change: _Change, config: LoraConfig, adapter_name: str) -> None:
    layer = change.layer
    if change.rank == 0:
        parent, _, child = change.name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
        return
    if change.weight is None:
        config.init_lora_weights = True
        layer.update_layer(adapter_name=adapter_name, r=change.rank, lora_alpha=change.alpha, config=config)
        return
    a = layer.lora_A[adapter_name].weight
    if change.rank != change.old_rank or a.is_meta:
        config.init_lora_weights = "eva"  # B = 0, and A is about to be filled
        layer.update_layer(adapter_name=adapter_name, r=change.rank, lora_alpha=change.alpha, config=config)
        # update_layer falls back to the base layer's type; adapters of half-precision models are float32.
        layer.lora_A[adapter_name].to(a.dtype)
        layer.lora_B[adapter_name].to(a.dtype)
    layer.lora_A[adapter_name].weight.copy_(change.weight)


def _key(name: str) -> str:
    return f"^{re.escape(plain_name(name))}"
