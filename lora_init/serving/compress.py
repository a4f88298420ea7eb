"""How large the exported adapter is: one rank for all layers, or fewer ranks and the closest adapter of that size."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, replace

from torch import Tensor

from lora_init.errors import LoraInitError
from lora_init.layers.targets import PREFIX
from lora_init.serving.engines import VLLM_RANKS, vllm_rank
from lora_init.serving.trained import Layer, Trained, zero_layers
from lora_init.statistics.gradient_spectrum import product_svd


def fit(
    trained: Trained, rank: int | None, most: int | None, keep_ranks: bool, widths: Mapping[str, tuple[int, int]]
) -> tuple[Trained, dict[str, float], float]:
    """Bring all layers to one rank, or with `keep_ranks` to ranks of their own, of `rank` on average.

    Return the adapter, the relative error of the update of each layer that lost rank, and the error of all together.
    """
    layers = dict(trained.layers)
    # A layer with DoRA and without an adapter has no magnitude to give it.
    if not keep_ranks and not trained.dora:
        layers |= zero_layers(trained, widths)
    check_most_rank(rank, max(min(layer.widths) for layer in layers.values()))
    factors: dict[str, Factors] = {}
    if not keep_ranks:
        ranks = _one_rank(layers, rank, most)
    elif rank is None and most is None:
        ranks = {name: layer.rank for name, layer in layers.items()}
    else:
        factors = {name: factorise(layer) for name, layer in layers.items()}
        # Without an adapter PEFT would not read these either.
        kept = {name for name, layer in layers.items() if layer.magnitude is not None}
        kept |= {name for name in layers if f"{PREFIX}{name}.base_layer.bias" in trained.others}
        ranks = _own_ranks(layers, factors, rank, most, kept)
    if not any(ranks.values()):
        total = sum(_costs(layers).values())
        raise LoraInitError(f"a budget of {most:,} parameters: rank 1 in all {len(layers)} layers takes {total:,}.")
    return _with_ranks(replace(trained, layers=layers), ranks, factors, keep_ranks, [*widths, *layers])


def _costs(layers: Mapping[str, Layer]) -> dict[str, int]:
    """Count the parameters of one rank of each layer, of all its experts."""
    return {name: max(layer.experts, 1) * sum(layer.widths) for name, layer in layers.items()}


def _one_rank(layers: Mapping[str, Layer], rank: int | None, most: int | None) -> dict[str, int]:
    """Choose one rank for all layers: the one given, or that for which vLLM makes room; less under a budget."""
    chosen = rank or vllm_rank(max(layer.rank for layer in layers.values()))
    if most is not None:
        chosen = min(chosen, most // sum(_costs(layers).values()))
    return dict.fromkeys(layers, chosen)


def _own_ranks(
    layers: Mapping[str, Layer], factors: Mapping[str, Factors], rank: int | None, most: int | None, kept: Set[str]
) -> dict[str, int]:
    """Choose a rank for each layer, under a budget of parameters or of ranks; the `kept` have at least one."""
    if most is not None:
        prices, budget = _costs(layers), most
    else:
        prices, budget = dict.fromkeys(layers, 1), (rank or 0) * len(layers)
    ranks = best_ranks(factors, prices, budget, kept)
    dropped = next((name for name in layers if name in kept and not ranks[name]), None)
    if dropped is not None:
        raise LoraInitError(
            f"layer {dropped!r} has a bias or magnitudes of its own, and the budget is below rank 1. Give more."
        )
    return ranks


def _with_ranks(
    trained: Trained, ranks: Mapping[str, int], factors: Mapping[str, Factors], keep_ranks: bool, order: Iterable[str]
) -> tuple[Trained, dict[str, float], float]:
    """Truncate the layers that lose rank, and fill up the others unless each keeps its rank; return what `fit` does."""
    layers = trained.layers
    lossy = [name for name, layer in layers.items() if ranks[name] < layer.rank]
    if lossy and not factors:
        factors = {name: factorise(layer) for name, layer in layers.items()}
    relative, total = errors(factors, ranks) if lossy else ({}, 0.0)
    fitted = {}
    for name in dict.fromkeys(order):
        if ranks.get(name):
            layer = truncate(layers[name], factors[name], ranks[name]) if name in lossy else layers[name]
            fitted[name] = layer if keep_ranks else layer.padded(ranks[name])
    return replace(trained, layers=fitted), {name: relative[name] for name in lossy}, total


def check_most_rank(rank: int | None, widest: int) -> None:
    """Refuse a rank that no layer can have."""
    if rank is not None and rank > max(widest, VLLM_RANKS[-1]):
        raise LoraInitError(
            f"{{rank}}: no layer of this adapter can have more than rank {widest}. Choose less.", rank=rank
        )


@dataclass(frozen=True, eq=False)
class Factors:
    """The singular value decomposition of one layer's B A, without its scaling; of each expert for itself."""

    left: Tensor  # left singular vectors, float32 [d_out, k], or [experts, d_out, k] as all of these
    values: Tensor  # singular values, falling, float32 [k]
    right: Tensor  # right singular vectors, float32 [k, d_in]
    # squared singular values of scaling * B A: what each rank takes off the squared error, of all experts
    energies: tuple[float, ...]


def factorise(layer: Layer) -> Factors:
    """Decompose B A through QR of both: cost O((d_in + d_out) r^2), and no [d_out, d_in] is ever made."""
    left, values, right = product_svd(layer.b, layer.a, layer.rank)
    energies = (layer.scaling * values).square().reshape(-1, values.shape[-1]).sum(0).tolist()
    return Factors(left.float(), values.float(), right.float(), tuple(energies))


def truncate(layer: Layer, factors: Factors, rank: int) -> Layer:
    """Make the best approximation of a rank (Eckart-Young), of each expert; one of no higher rank stays as it is."""
    if rank >= layer.rank:
        return layer
    root = factors.values[..., :rank].sqrt()
    a, b = root[..., None] * factors.right[..., :rank, :], factors.left[..., :rank] * root[..., None, :]
    return replace(layer, a=a.to(layer.a.dtype), b=b.to(layer.b.dtype))


def errors(factors: Mapping[str, Factors], ranks: Mapping[str, int]) -> tuple[dict[str, float], float]:
    """Compute the relative error that ranks leave in Frobenius norm, of each layer's update and of all at once."""
    whole = {name: math.fsum(spectrum.energies) for name, spectrum in factors.items()}
    lost = {name: math.fsum(spectrum.energies[ranks[name] :]) for name, spectrum in factors.items()}
    relative = {name: math.sqrt(lost[name] / whole[name]) if whole[name] else 0.0 for name in factors}
    total = math.fsum(whole.values())
    return relative, math.sqrt(math.fsum(lost.values()) / total) if total else 0.0


def error_at(trained: Trained, rank: int) -> float:
    """Compute the relative error of the whole update at one rank for all layers."""
    factors = {name: factorise(layer) for name, layer in trained.layers.items()}
    return errors(factors, dict.fromkeys(factors, rank))[1]


def best_ranks(
    factors: Mapping[str, Factors], costs: Mapping[str, int], budget: int, kept: Collection[str] = ()
) -> dict[str, int]:
    """Spend a budget of ranks on the largest singular values of trained updates, first ranks of `kept` layers first.

    Where all ranks cost the same, no other choice has a smaller error.
    """
    ranks, spent = dict.fromkeys(factors, 0), 0
    gains = [
        (math.inf if name in kept and i == 0 else energy / costs[name], name)
        for name, spectrum in factors.items()
        for i, energy in enumerate(spectrum.energies)
    ]
    for _, name in sorted(gains, key=lambda pair: -pair[0]):
        if spent + costs[name] <= budget:
            ranks[name] += 1
            spent += costs[name]
    return ranks
