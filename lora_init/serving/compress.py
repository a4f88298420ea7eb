"""How large the exported adapter is: one rank for all layers, or fewer ranks and the closest adapter of that size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_init.errors import LoraInitError
from lora_init.serving.engines import VLLM_RANKS
from lora_init.serving.trained import Layer, Trained, zero_layers


def fit(
    trained: Trained, rank: int | None, most: int | None, keep_ranks: bool, widths: Mapping[str, tuple[int, int]]
) -> tuple[Trained, dict[str, float], float]:
    """Bring all layers to one rank, or with `keep_ranks` to ranks of their own.

    Args:
        trained: The adapter, with one scaling.
        rank: The rank; of ranks of their own, the average.
        most: Most parameters. Without either, the smallest of `VLLM_RANKS` that is large enough.
        keep_ranks: Whether ranks may differ.
        widths: Widths of the base's layers, in model order.

    Returns:
        The adapter of that size; the relative error of the update of each layer that lost rank; and of all at once.

    Raises:
        LoraInitError: The budget is below rank 1 in every layer, or in any.
    """
    layers = dict(trained.layers)
    # A layer with DoRA and without an adapter has no magnitude to give it.
    if not keep_ranks and not trained.dora:
        layers |= zero_layers(trained, widths)
    costs = {name: sum(layer.widths) for name, layer in layers.items()}
    ranks = {name: layer.rank for name, layer in layers.items()}
    factors = {name: factorise(layer) for name, layer in layers.items()}
    if not keep_ranks:
        largest = max(ranks.values())
        chosen = rank or next((allowed for allowed in VLLM_RANKS if allowed >= largest), largest)
        ranks = dict.fromkeys(ranks, chosen if most is None else min(chosen, most // sum(costs.values())))
    elif most is not None:
        ranks = best_ranks(factors, costs, most)
    elif rank is not None:
        ranks = best_ranks(factors, dict.fromkeys(costs, 1), rank * len(costs))
    if not any(ranks.values()):
        raise LoraInitError(
            f"a budget of {most:,} parameters: rank 1 in all {len(costs)} layers takes {sum(costs.values()):,}."
        )
    relative, total = errors(factors, ranks)
    cut = {name: truncate(layers[name], factors[name], ranks[name]) for name in widths if ranks.get(name)}
    fitted = cut if keep_ranks else {name: layer.padded(ranks[name]) for name, layer in cut.items()}
    lost = {name: error for name, error in relative.items() if ranks[name] < layers[name].rank}
    return replace(trained, layers=fitted), lost, total


@dataclass(frozen=True, eq=False)
class Factors:
    """The singular value decomposition of one layer's B A, without its scaling.

    Attributes:
        left: Left singular vectors, float32 [d_out, k].
        values: Singular values, falling, float32 [k].
        right: Right singular vectors, float32 [k, d_in].
        energies: Squared singular values of scaling * B A: what each rank takes off the squared error.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    energies: tuple[float, ...]


def factorise(layer: Layer) -> Factors:
    """Decompose B A through QR of both: cost O((d_in + d_out) r^2), and no [d_out, d_in] is ever made."""
    q_out, r_out = torch.linalg.qr(layer.b.float())
    q_in, r_in = torch.linalg.qr(layer.a.float().T)
    # The small product in float64: it costs nothing, and float32 loses the small values of a wide spectrum.
    u, values, vh = torch.linalg.svd(r_out.double() @ r_in.double().T, full_matrices=False)
    energies = (layer.scaling * values).square().tolist()
    return Factors(q_out @ u.float(), values.float(), vh.float() @ q_in.T, tuple(energies))


def truncate(layer: Layer, factors: Factors, rank: int) -> Layer:
    """Make the best approximation of a rank (Eckart-Young); a layer of no higher rank stays as it is."""
    if rank >= layer.rank:
        return layer
    root = factors.values[:rank].sqrt()
    a, b = root[:, None] * factors.right[:rank], factors.left[:, :rank] * root
    return replace(layer, a=a.to(layer.a.dtype), b=b.to(layer.b.dtype))


def errors(factors: Mapping[str, Factors], ranks: Mapping[str, int]) -> tuple[dict[str, float], float]:
    """Compute the relative error that ranks leave in Frobenius norm, of each layer's update and of all at once."""
    whole = {name: math.fsum(found.energies) for name, found in factors.items()}
    lost = {name: math.fsum(found.energies[ranks[name] :]) for name, found in factors.items()}
    relative = {name: math.sqrt(lost[name] / whole[name]) if whole[name] else 0.0 for name in factors}
    total = math.fsum(whole.values())
    return relative, math.sqrt(math.fsum(lost.values()) / total) if total else 0.0


def best_ranks(factors: Mapping[str, Factors], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Give ranks to the largest singular values of the trained updates until the budget is spent.

    Args:
        factors: Decompositions of all layers.
        costs: What one rank of each layer costs.
        budget: The most that may be spent. Where all cost the same, no other choice has a smaller error.
    """
    ranks, spent = dict.fromkeys(factors, 0), 0
    gains = [(energy / costs[name], name) for name, found in factors.items() for energy in found.energies]
    for _, name in sorted(gains, key=lambda pair: -pair[0]):
        if spent + costs[name] <= budget:
            ranks[name] += 1
            spent += costs[name]
    return ranks
