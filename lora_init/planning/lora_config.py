"""PEFT's LoraConfig as plain values: how scaling, ranks and layers are written there, and read."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_init.errors import LoraInitError
from lora_init.layers.targets import matches


def scaling_of(lora_alpha: float, rank: int, use_rslora: bool = False) -> float:
    """Return what B A x is multiplied by in PEFT: lora_alpha / rank, or lora_alpha / sqrt(rank)."""
    if use_rslora:
        return lora_alpha / math.sqrt(rank)
    return lora_alpha / rank


def alpha_for(scaling: float, rank: int, use_rslora: bool = False) -> float:
    """Return the alpha with which a layer of this rank has this scaling; an int where it is whole.

    Example:
        >>> alpha_for(scaling_of(16, 13), 26)
        32
    """
    divisor: float = math.sqrt(rank) if use_rslora else rank
    alpha = scaling * divisor
    # A product of floats misses a whole number by rounding, and some trainers take whole numbers only.
    if math.isclose(alpha, round(alpha)):
        return round(alpha)
    return alpha


def exact_pattern(names: Iterable[str]) -> str:
    """Write a regular expression that matches these full names and nothing else."""
    # Anchored at the start, too: PEFT's own prefix `(.*\.)?` then matches nothing, and no longer name does.
    return f"^(?:{'|'.join(re.escape(name) for name in names)})$"


def to_patterns(values: Mapping[str, float], default: float) -> dict[str, Any]:
    """Write `rank_pattern` or `alpha_pattern` of a LoraConfig: one key for each value, for all layers that have it.

    PEFT tries every key on every layer, and Python's cache of regular expressions ends at 512: with a key a layer it
    takes minutes for a thousand layers.

    Example:
        >>> to_patterns({"up": 8, "down": 4, "gate": 4}, default=8)
        {'^(?:down|gate)$': 4}
    """
    groups: dict[float, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    groups.pop(default, None)  # what `r` or `lora_alpha` says already
    return {exact_pattern(names): value for value, names in groups.items()}


def from_patterns(patterns: Mapping[str, Any] | None, names: Iterable[str], default: Any) -> dict[str, Any]:
    """Read `rank_pattern` or `alpha_pattern` as PEFT does: a key ends where the name ends, and the first match wins."""
    patterns = patterns or {}
    try:
        # Compiled once: Python caches 512 expressions, and a plan may have more keys.
        compiled = {key: re.compile(rf"(.*\.)?({key})$") for key in patterns}
    except re.error as error:
        raise LoraInitError(f"a key of the pattern {dict(patterns)} is no regular expression: {error}.") from error
    values: dict[str, Any] = {}
    for name in names:
        values[name] = patterns.get(_first_match(compiled, name), default)
    return values


def _first_match(compiled: Mapping[str, re.Pattern[str]], name: str) -> str:
    for key, expression in compiled.items():
        if expression.match(name):
            return key
    return name  # as in PEFT's get_pattern_key: without a match, the name itself is the key


def listed_or_pattern(names: Collection[str], others: Iterable[str]) -> list[str] | str:
    """Select layers by their full names and none of the others; by a pattern where a list would take others too.

    PEFT takes a name in a list for an ending.
    """
    if any(matches(names, name, "target_modules") for name in others):
        return exact_pattern(names)
    return list(names)


def lora_config(
    ranks: Mapping[str, int],
    rank: int,
    scaling: float,
    target_modules: str | Collection[str],
    use_rslora: bool = False,
    **others: Any,
) -> dict[str, Any]:
    """Write the configuration of an adapter in which each layer has its rank, and all have one scaling.

    `rank` is its `r`: patterns name the layers of other ranks; one of rank 0 has no adapter. Empty `others` are left
    out: older readers refuse keys that they do not know.
    """
    if not isinstance(target_modules, str):
        target_modules = list(target_modules)
    rank_pattern = to_patterns({name: own for name, own in ranks.items() if own}, rank)
    # PEFT divides each layer's alpha by its own rank, so layers of other ranks need another alpha for the same scaling.
    alpha_pattern = {key: alpha_for(scaling, own, use_rslora) for key, own in rank_pattern.items()}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha_for(scaling, rank, use_rslora),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": 0.0,
        "target_modules": target_modules,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_lora_weights": True,
    }
    for name, value in {"use_rslora": use_rslora, **others}.items():
        if value:
            config[name] = value
    return config
