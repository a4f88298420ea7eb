"""From statistics and ranks to an adapter."""

from __future__ import annotations

import difflib
import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.initializers import (
    GRADIENT_METHODS,
    METHODS,
    check_rank,
    layer_generator,
    missing_components,
    zero_b,
)
from lora_init.errors import LoraInitError
from lora_init.layers.experts import expert_group
from lora_init.layers.targets import Target, is_in
from lora_init.planning.plan import RankAllocation
from lora_init.statistics.statistics import Statistics

__all__ = ["AdapterInit", "build_adapter"]


def build_adapter(
    stats: Statistics,
    ranks: Mapping[str, int] | int | None = None,
    method: str = "eva",
    whiten: bool = False,
    lora_alpha: float = 16,
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_dropout: float = 0.0,
    modules_to_save: Sequence[str] = (),
    seed: int = 0,
    gamma: float | None = None,
) -> AdapterInit:
    """Compute the start of every layer's adapter. No model is needed.

    Args:
        stats: What `collect` returned.
        ranks: What `allocate_ranks` returned; or one rank for all layers; or a mapping from layer to rank, where layers
            that it doesn't name get none. Default: `allocate_ranks(stats)` at the rank they were made for.
            The scaling is relative to the average rank: `ranks.rank`, or that of the mapping's values, rounded.
        method: `"eva"`, `"random"` (PEFT's Kaiming uniform), `"random-scaled"` (with as much energy in A x as `"eva"`),
            `"gaussian"` or `"orthogonal"`, see `initializers`. From statistics with gradients also `"eva-grad"`,
            `"grad-a"`, `"natural-gradient"`, `"natural-gradient-scaled"` (B = 0 in these), `"natural-gradient-step"`,
            `"lora-one"` (the output changes) and `"lora-ga"` (the base weights change), see `gradient_starts`.
        whiten: With `"eva"`: scale the rows as PEFT's `EvaConfig(whiten=True)` does.
        lora_alpha: Numerator of the scaling, which is lora_alpha / rank in every layer whatever its own rank.
        use_rslora: Scale by lora_alpha / sqrt(rank) instead.
        use_dora: Let PEFT add DoRA's magnitude vectors.
        lora_dropout: Dropout on what A reads, in training.
        modules_to_save: As in PEFT: endings of the names of modules that are trained whole, such as `"lm_head"`. Layers
            in them get no adapter.
        seed: Seed of the random numbers. Each layer's depend on it and on the layer's name only.
        gamma: With `"lora-ga"` (default 16), `"lora-one"` and `"natural-gradient-step"` (1024): A and B are divided by
            its root, so a larger one is a smaller step. `find_step_size` searches the best for the last two.

    Warns:
        UserWarning: The data had fewer directions than ranks in some layer, so random orthogonal ones fill up.

    Raises:
        LoraInitError: An unknown method or layer, a rank that is negative, larger than d_in or than the statistics can
            serve, no layer left, no gradients in the statistics, or an impossible lora_alpha, lora_dropout or gamma.
    """
    _check_method(method, gamma, use_dora)
    if whiten and method != "eva":
        raise LoraInitError(f"whiten=True needs method='eva'; method={method!r} has no variances to divide by.")
    if not (0.0 < lora_alpha < math.inf):
        raise LoraInitError(f"lora_alpha={lora_alpha!r} must be a positive number; 16 is the default.")
    if not 0.0 <= lora_dropout < 1.0:
        raise LoraInitError(f"lora_dropout={lora_dropout!r} must be at least 0 and less than 1.")
    if isinstance(modules_to_save, str):
        raise LoraInitError(f"modules_to_save={modules_to_save!r} must be a list of names, as in PEFT.")
    plan, rank = _plan(stats, ranks, modules_to_save)
    _check_experts([stats.targets[name] for name in plan], use_dora, lora_dropout)
    weights, explained, filled = {}, {}, []
    for name, layer_rank in plan.items():
        spectrum = stats[name]
        if method == "eva":
            check_rank(spectrum, layer_rank, f"layer {name!r}: ")
            filled += [name] if missing_components(spectrum, layer_rank) else []
        if method in GRADIENT_METHODS:
            weights[name] = _start_by_gradient(stats, name, layer_rank, method, seed, gamma)
        else:
            weights[name] = _start_by_input(stats, name, layer_rank, method, seed, whiten)
        explained[name] = float(spectrum.explained_variance_ratio[:layer_rank].sum())
    if filled:
        warnings.warn(
            f"{len(filled)} layers got more rank than their data has directions (first: {filled[0]!r}, "
            f"{stats[filled[0]].n_components} found for rank {plan[filled[0]]}). Random orthogonal directions fill up; "
            "more data would give more.",
            stacklevel=2,
        )
    return AdapterInit(
        weights=weights,
        targets={name: stats.targets[name] for name in plan},
        unsupported={name: kind for name, kind in stats.unsupported.items() if not is_in(name, modules_to_save)},
        rank=rank,
        lora_alpha=lora_alpha,
        use_rslora=use_rslora,
        use_dora=use_dora,
        lora_dropout=lora_dropout,
        method=method,
        whiten=whiten,
        seed=seed,
        left_out=tuple(name for name in stats if name not in plan),
        explained=explained,
        provenance=stats.provenance,
        modules_to_save=tuple(modules_to_save),
        gamma=_gamma(method, gamma) or None,
    )


def _start_by_input(
    stats: Statistics, name: str, rank: int, method: str, seed: int, whiten: bool
) -> tuple[Tensor, Tensor]:
    options = {"whiten": whiten} if method == "eva" else {}
    experts = {expert_group(name, i): own for i, own in enumerate(stats.of_experts(name))}
    spectra = experts or {name: stats[name]}
    a = torch.cat([METHODS[method](s, rank, layer_generator(seed, n), **options) for n, s in spectra.items()])
    shape_a, shape_b = stats.targets[name].shapes(rank)
    return a.reshape(shape_a), zero_b(*shape_b)


def _start_by_gradient(
    stats: Statistics, name: str, rank: int, method: str, seed: int, gamma: float | None
) -> tuple[Tensor, Tensor]:
    chosen, gradient = GRADIENT_METHODS[method], stats.gradient(name)
    try:
        a, b = chosen.start(stats[name], gradient, rank, layer_generator(seed, name), _gamma(method, gamma))
    except LoraInitError as error:
        raise LoraInitError(f"layer {name!r}: {error}") from None
    return a.contiguous(), b.contiguous()


def _gamma(method: str, gamma: float | None) -> float:
    """Take the default of a method where none was asked for; 0 where B is zero."""
    if gamma is not None:
        return gamma
    return GRADIENT_METHODS[method].gamma if method in GRADIENT_METHODS else 0.0


def _check_method(method: str, gamma: float | None, use_dora: bool) -> None:
    known = (*METHODS, *GRADIENT_METHODS)
    if method not in known:
        raise LoraInitError(f"method={method!r} is unknown. Choose one of {', '.join(map(repr, known))}.")
    has_b = method in GRADIENT_METHODS and GRADIENT_METHODS[method].gamma > 0.0
    if gamma is not None and not (has_b and 0.0 < gamma < math.inf):
        scaled = ", ".join(repr(name) for name, one in GRADIENT_METHODS.items() if one.gamma)
        raise LoraInitError(f"gamma={gamma!r} with method={method!r}: it is a positive number, for {scaled}.")
    if has_b and use_dora:
        raise LoraInitError(
            f"method={method!r} starts with B other than zero, and DoRA's magnitudes are those at B = 0."
        )


def _check_experts(targets: list[Target], use_dora: bool, lora_dropout: float) -> None:
    experts = next((target.name for target in targets if target.experts), None)
    for what, is_there in (
        ("use_dora=True", use_dora),
        (f"lora_dropout={lora_dropout:g}", lora_dropout > 0.0),
        ("transformers' Conv1D layers in the same adapter", any(target.kind == "Conv1D" for target in targets)),
    ):
        if experts and is_there:
            raise LoraInitError(f"{experts!r}: PEFT does not adapt parameters with {what}. Leave out one of the two.")


def _plan(
    stats: Statistics, ranks: Mapping[str, int] | int | None, modules_to_save: Sequence[str]
) -> tuple[dict[str, int], int]:
    """Return the rank of each layer that gets one, in model order, and the rank that the scaling is relative to."""
    if ranks is None:
        from lora_init.planning.allocate import allocate_ranks

        ranks = allocate_ranks(stats, rank=stats.provenance.rank)
    if isinstance(ranks, RankAllocation):
        ranks.check(stats)
    if not isinstance(ranks, Mapping):
        ranks = dict.fromkeys(stats, _whole_number(ranks, "ranks="))
    unknown = next((name for name in ranks if name not in stats), None)
    if unknown is not None:
        close = difflib.get_close_matches(unknown, list(stats), n=1, cutoff=0.0)
        raise LoraInitError(
            f"ranks name {unknown!r}, which the statistics don't have. Closest: {close[0]!r}."
            if close
            else "the statistics hold no layer. Collect them from a model with linear layers."
        )
    asked = {name: _whole_number(ranks[name], f"layer {name!r}: rank ") for name in stats if name in ranks}
    for name, rank in asked.items():
        width = stats.targets[name].in_features
        if rank > width:
            raise LoraInitError(f"layer {name!r}: rank {rank} is larger than its input width {width}.")
        groups = stats.targets[name].groups
        if rank % groups:
            raise LoraInitError(
                f"layer {name!r}: rank {rank} is no multiple of its {groups} groups, which PEFT needs. "
                f"Give it {rank - rank % groups or groups}, or exclude it."
            )
    plan = {name: rank for name, rank in asked.items() if rank > 0 and not is_in(name, modules_to_save)}
    if not plan and any(asked.values()):
        raise LoraInitError(f"modules_to_save={list(modules_to_save)} hold every layer: no adapter is left to build.")
    if not plan:
        raise LoraInitError(
            f"all {len(stats)} layers have rank 0, so there is no adapter to build. Ask for a higher rank."
        )
    average = getattr(ranks, "rank", None)
    return plan, int(average) if average else max(1, round(sum(asked.values()) / len(asked)))


def _whole_number(value: Any, where: str) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise LoraInitError(f"{where}{value!r} must be a whole number, 0 or more.")
    return number
