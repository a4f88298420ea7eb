"""How large the exported adapter is: one rank for all layers, or fewer ranks and the closest adapter of that size.

The closest matrix of a lower rank keeps the largest singular values (Eckart and Young), and the squared error in
Frobenius norm is the sum of the squares of those that it drops. The squared errors of layers add up, so a budget goes
to the largest singular values of all layers.
"""

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
    factors: dict[str, Factors] = {}  # made only where something has to be dropped
    if not keep_ranks:
        ranks = _one_rank(layers, rank, most)
    elif rank is None and most is None:  # there is nothing to compress
        ranks = {name: layer.rank for name, layer in layers.items()}
    else:
        factors = _factorise_all(layers)
        kept: set[str] = set()
        for name, layer in layers.items():
            # Without an adapter PEFT would read neither a layer's magnitude nor its bias or weight.
            beside = {f"{PREFIX}{name}.base_layer.{end}" for end in ("bias", "weight")}
            if layer.magnitude is not None or not beside.isdisjoint(trained.others):
                kept.add(name)
        ranks = _own_ranks(layers, factors, rank, most, kept)
    if not any(ranks.values()):
        total = sum(_costs(layers).values())
        raise LoraInitError(f"a budget of {most:,} parameters: rank 1 in all {len(layers)} layers takes {total:,}.")
    return _with_ranks(replace(trained, layers=layers), ranks, factors, keep_ranks, [*widths, *layers])


def _costs(layers: Mapping[str, Layer]) -> dict[str, int]:
    """Count the parameters of one rank of each layer, of all its experts."""
    # A rank is a row of A, d_in numbers, and a column of B, d_out numbers.
    return {name: max(layer.experts, 1) * sum(layer.widths) for name, layer in layers.items()}


def _one_rank(layers: Mapping[str, Layer], rank: int | None, most: int | None) -> dict[str, int]:
    """Choose one rank for all layers: the one given, or that for which vLLM makes room; less under a budget."""
    chosen = rank or vllm_rank(max(layer.rank for layer in layers.values()))
    if most is not None:  # 0 where not even rank 1 is in the budget, which `fit` refuses
        chosen = min(chosen, most // sum(_costs(layers).values()))
    return dict.fromkeys(layers, chosen)


def _own_ranks(
    layers: Mapping[str, Layer], factors: Mapping[str, Factors], rank: int | None, most: int | None, kept: Set[str]
) -> dict[str, int]:
    """Choose a rank for each layer, under a budget of parameters or of ranks; the `kept` have at least one."""
    if most is not None:
        prices, budget = _costs(layers), most
    else:  # `rank` is the average over all layers, whatever a rank of each costs
        prices, budget = dict.fromkeys(layers, 1), (rank or 0) * len(layers)
    ranks = best_ranks(factors, prices, budget, kept)
    for name in layers:
        if name in kept and not ranks[name]:
            raise LoraInitError(
                f"layer {name!r} has a bias, weight or lengths of its own, and the budget is below rank 1. Give more."
            )
    return ranks


def _with_ranks(
    trained: Trained, ranks: Mapping[str, int], factors: Mapping[str, Factors], keep_ranks: bool, order: Iterable[str]
) -> tuple[Trained, dict[str, float], float]:
    """Truncate the layers that lose rank, and fill up the others unless each keeps its rank; return what `fit` does."""
    layers = trained.layers
    lossy = [name for name, layer in layers.items() if ranks[name] < layer.rank]
    relative: dict[str, float] = {}
    total = 0.0
    if lossy:
        if not factors:
            factors = _factorise_all(layers)
        relative, total = errors(factors, ranks)
    fitted = {}
    for name in dict.fromkeys(order):  # of the model: layers that were added stand last in `layers`
        if not ranks.get(name):
            continue
        layer = layers[name]
        if name in lossy:
            layer = truncate(layer, factors[name], ranks[name])
        if not keep_ranks:
            layer = layer.padded(ranks[name])
        fitted[name] = layer
    return replace(trained, layers=fitted), {name: relative[name] for name in lossy}, total


def check_most_rank(rank: int | None, widest: int) -> None:
    """Refuse a rank that no layer can have."""
    # A rank above the widest layer is padding, and allowed up to the largest that vLLM makes room for.
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
    # k or experts x k -> k: a rank is taken from all experts of a layer at once
    energies = (layer.scaling * values).square().reshape(-1, values.shape[-1]).sum(0).tolist()
    return Factors(left.float(), values.float(), right.float(), tuple(energies))


def _factorise_all(layers: Mapping[str, Layer]) -> dict[str, Factors]:
    return {name: factorise(layer) for name, layer in layers.items()}


def truncate(layer: Layer, factors: Factors, rank: int) -> Layer:
    """Make the best approximation of a rank (Eckart-Young), of each expert; one of no higher rank stays as it is."""
    if rank >= layer.rank:
        return layer
    # Both get the roots of the singular values, so that A and B are of one size: A rank x d_in, B d_out x rank.
    root = factors.values[..., :rank].sqrt()
    a, b = root[..., None] * factors.right[..., :rank, :], factors.left[..., :rank] * root[..., None, :]
    return replace(layer, a=a.to(layer.a.dtype), b=b.to(layer.b.dtype))


def errors(factors: Mapping[str, Factors], ranks: Mapping[str, int]) -> tuple[dict[str, float], float]:
    """Compute the relative error that ranks leave in Frobenius norm, of each layer's update and of all at once."""
    relative, wholes, losses = {}, [], []
    for name, spectrum in factors.items():
        whole, lost = math.fsum(spectrum.energies), math.fsum(spectrum.energies[ranks[name] :])
        relative[name] = math.sqrt(lost / whole) if whole else 0.0  # a layer that does nothing loses nothing
        wholes.append(whole)
        losses.append(lost)
    total = math.fsum(wholes)
    return relative, math.sqrt(math.fsum(losses) / total) if total else 0.0


def error_at(trained: Trained, rank: int) -> float:
    """Compute the relative error of the whole update at one rank for all layers."""
    factors = _factorise_all(trained.layers)
    return errors(factors, dict.fromkeys(factors, rank))[1]


def best_ranks(
    factors: Mapping[str, Factors], costs: Mapping[str, int], budget: int, kept: Collection[str] = ()
) -> dict[str, int]:
    """Spend a budget of ranks on the largest singular values of trained updates, first ranks of `kept` layers first.

    Where all ranks cost the same, no other choice has a smaller error. Where they do not, the energy per parameter
    counts: the greedy rule of the knapsack problem.
    """
    ranks, spent = dict.fromkeys(factors, 0), 0
    gains = []  # by the energy of a rank for its price, the layer
    for name, spectrum in factors.items():
        for i, energy in enumerate(spectrum.energies):
            gain = energy / costs[name]
            if name in kept and i == 0:
                gain = math.inf
            gains.append((gain, name))
    # A layer's energies fall, so its ranks come in their order. The sort is stable: of equal ones, the first layer's.
    for _, name in sorted(gains, key=lambda pair: -pair[0]):
        if spent + costs[name] <= budget:  # else a later rank of a smaller layer may still be in the budget
            ranks[name] += 1
            spent += costs[name]
    return ranks
