"""Policies: what one more rank in a layer is worth.

A policy is one function from the spectra of all layers to the worth of each rank. `allocate` then takes ranks by
falling worth until the budget is spent, so that a policy holds no rule about budgets, limits or ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_init.errors import LoraInitError, did_you_mean
from lora_init.layers.targets import Target
from lora_init.planning.budgets import BoolArray, FloatArray, IntArray
from lora_init.statistics.spectrum import Spectrum
from lora_init.statistics.statistics import Statistics


@dataclass(frozen=True, eq=False)
class Spectra:
    """What n layers' components explain, at most K components each.

    Attributes:
        names: Layer names.
        targets: Their kinds and widths.
        ratios: Explained-variance ratio of each component, falling, [n, K]; 0 beyond what a layer has.
        reached: Share of the variance that the first r components explain, [n, K + 1]: column r. 1 where rows are
            constant: there is nothing to explain.
        collected: Components that each layer has, [n].
        starved: Layers that have fewer components than were asked for, because their data has no more, [n].
    """

    names: list[str]
    targets: list[Target]
    ratios: FloatArray
    reached: FloatArray
    collected: IntArray
    starved: BoolArray

    @property
    def most_collected(self) -> int:
        """Components of the layer that has most: what the pass was asked for, if data and widths allowed it."""
        return int(self.ratios.shape[1])

    def reached_at(self, ranks: IntArray) -> FloatArray:
        """Give the share of its variance that each layer's rank explains, [n]."""
        return np.take_along_axis(self.reached, ranks[:, None], axis=1)[:, 0]

    @property
    def widths(self) -> IntArray:
        """Parameters that one rank of each layer costs, d_in + d_out of a linear one, [n]."""
        return np.array([target.cost for target in self.targets], dtype=np.int64)


def _stacked(rows: Sequence[Any], n_columns: int) -> FloatArray:
    """Stack rows of unequal length, cut or filled with 0, [n, n_columns]."""
    stacked = np.zeros((len(rows), n_columns))
    for filled, row in zip(stacked, rows, strict=True):
        filled[: len(row)] = row[:n_columns]
    return stacked


def stack_spectra(stats: Statistics, names: Sequence[str]) -> Spectra:
    """Stack the variances of layers; components are not read."""
    # One read per input group: q, k and v are the same numbers.
    groups = {stats.group_of[name]: name for name in names}
    shared = {group: stats.explained_variance_ratio(name).numpy() for group, name in groups.items()}
    rows = [shared[stats.group_of[name]] for name in names]
    targets = [stats.targets[name] for name in names]
    collected = np.array([len(row) for row in rows], dtype=np.int64)
    most = int(collected.max(initial=0))
    ratios = _stacked(rows, most)
    d_in = np.array([target.in_features for target in targets], dtype=np.int64)
    # A pass asks for at least as many as its average rank. A layer with fewer, or with as many as there were rows (one
    # less where the mean is taken out), would not have more if more had been asked for.
    few_rows = 0 < stats.provenance.n_samples <= most + 1
    asked = max(most, stats.provenance.rank)
    starved = (collected < d_in) & ((collected < asked) | few_rows)
    reached = np.concatenate([np.zeros((len(rows), 1)), np.cumsum(ratios, axis=1)], axis=1)
    reached[[stats.total_variance(name) <= 0.0 for name in names]] = 1.0
    return Spectra(list(names), targets, ratios, reached, collected, starved)


# A rule of one's own: (layer name, its spectrum) -> worth of its 1st, 2nd, ... rank, at most k numbers.
Rule = Callable[[str, Spectrum], "FloatArray"]


def uniform(ratios: FloatArray, widths: FloatArray) -> FloatArray:
    """Value the j-th rank of every layer at 1 / (j - 1/2): all layers rise at once, as evenly as the limits allow.

    The baseline: LoRA (Hu et al., arXiv 2106.09685) with one rank for all layers. A policy takes the explained-variance
    ratio of each component, falling, [n, K], 0 where a layer has fewer than K, and d_in + d_out of each layer, [n]; it
    returns the worth of each rank, [n, K].
    """
    return proportional_to(np.ones(len(ratios)), ratios.shape[1])


def eva(ratios: FloatArray, widths: FloatArray) -> FloatArray:
    """Value the j-th rank at the share of the layer's variance that its j-th component explains.

    Source: EVA (Paischer et al., arXiv 2410.07170, section 3.3); `peft.tuners.lora.eva` does the same. `cost-aware`
    takes this per parameter: ratio_j / (d_in + d_out). Under a budget in parameters that is the greedy rule for the
    knapsack problem (Dantzig 1957). Because ratios fall within a layer, its total explained variance is less than the
    best possible by at most that of one step.
    """
    return ratios


def proportional(ratios: FloatArray, widths: FloatArray) -> FloatArray:
    """Share ranks out in proportion to each layer's effective rank, 1 / sum_j(ratio_j^2).

    This is the number of equally strong directions with the same concentration of variance (the participation ratio;
    the exponential of Renyi's entropy of order 2). The entropy of order 1 of Roy and Vetterli (2007), from which the
    name comes, needs the whole spectrum, and the statistics hold its head only; in squares the tail is negligible: what
    is missed adds at most (variance not kept) x (last ratio kept) to the sum.
    """
    concentration = (ratios**2).sum(axis=1)
    effective = np.divide(1.0, concentration, out=np.zeros_like(concentration), where=concentration > 0.0)
    return proportional_to(effective, ratios.shape[1])


def proportional_to(claims: FloatArray, n_ranks: int) -> FloatArray:
    """Value the j-th rank at claim / (j - 1/2), which shares ranks out in proportion to the claims, [n].

    The divisor method of Webster and Sainte-Lague: no other whole numbers of the same sum lie nearer to proportion, in
    the sense that no move of one rank makes any two layers' ranks per claim more equal.
    """
    return claims[:, None] / (np.arange(n_ranks) + 0.5)


def gradient(gains: FloatArray, widths: FloatArray) -> FloatArray:
    """Value the j-th rank at the expected squared gradient of B that its direction brings.

    All layers' gradients are of one loss, so these are numbers of one unit, and not shares: a layer that the loss does
    not depend on gets nothing. q, k and v read the same tensor and differ here. `gradient-per-parameter` takes this per
    parameter. The gains are the explained variance of the rows weighted by the gradient, falling, [n, K].
    """
    return gains


def gora(importance: FloatArray, widths: FloatArray) -> FloatArray:
    """Share ranks out in proportion to importance / sqrt(d_in + d_out): GoRA's rule (He et al., arXiv 2502.12171).

    The importance of a layer, in the first column, is the mean of |W * G| over its entries. The paper shares out rank x
    sum(sqrt(d_in + d_out)) in proportion to it, of which a rank of a layer costs sqrt(d_in + d_out). Its limits are
    `min_rank` and `max_rank`.
    """
    return proportional_to(importance[:, 0] / np.sqrt(widths), importance.shape[1])


Policy = Callable[[FloatArray, FloatArray], FloatArray]
POLICIES: dict[str, Policy] = {"uniform": uniform, "eva": eva, "cost-aware": eva, "proportional": proportional}
GRADIENT_POLICIES: dict[str, Policy] = {"gradient": gradient, "gradient-per-parameter": gradient, "gora": gora}
PER_PARAMETER = ("cost-aware", "gradient-per-parameter")  # ranks compete by worth per parameter, others by worth


def _gradient_numbers(policy: str, stats: Statistics, spectra: Spectra) -> FloatArray:
    """Read what a policy of `GRADIENT_POLICIES` takes, [n, K]."""
    rows: list[Any] = []
    for name in spectra.names:
        found = stats.gradient(name)
        if policy == "gora" and math.isnan(found.importance):
            raise LoraInitError(
                f"policy='gora': the importance of {name!r} is unknown. It needs the model's weights, which a merge of "
                "statistics does not have. Collect from all the data in one pass, or choose another policy."
            )
        rows.append([found.importance] if policy == "gora" else found.weighted.explained_variance.numpy())
    numbers = _stacked(rows, spectra.most_collected)
    if not numbers.any():
        why = "the weights are quantised" if policy == "gora" else "the loss depends on no layer"
        raise LoraInitError(f"policy={policy!r}: all layers are worth nothing, since {why}. Choose another policy.")
    return numbers


def worth(policy: str | Rule, stats: Statistics, spectra: Spectra) -> tuple[FloatArray, FloatArray]:
    """Apply a policy by name, or somebody's own rule, whose numbers are sorted.

    Returns the worth of each rank, [n, K], and what a layer's worth is divided by, [n].
    """
    widths = spectra.widths.astype(np.float64)
    divisors = widths if policy in PER_PARAMETER else np.ones(len(widths))
    if callable(policy):
        rows = [_rule_worth(policy, name, stats[name]) for name in spectra.names]
        return _stacked(rows, spectra.most_collected), divisors
    if policy in POLICIES:
        return POLICIES[policy](spectra.ratios, widths), divisors
    if policy not in GRADIENT_POLICIES:
        known = did_you_mean(str(policy), (*POLICIES, *GRADIENT_POLICIES))
        raise LoraInitError(f"policy={policy!r} is unknown. {known} A function is one, too.")
    return GRADIENT_POLICIES[policy](_gradient_numbers(policy, stats, spectra), widths), divisors


def _rule_worth(rule: Rule, name: str, spectrum: Spectrum) -> FloatArray:
    """Apply somebody's own rule to a layer, [k], falling."""
    try:
        scores = np.asarray(rule(name, spectrum), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise LoraInitError(f"layer {name!r}: the policy failed, or returned no numbers: {error}.") from error
    if scores.shape != (spectrum.n_components,) or not np.isfinite(scores).all():
        raise LoraInitError(
            f"layer {name!r}: the policy returned scores of shape {scores.shape}, {np.isfinite(scores).sum()} of them "
            f"finite. It must return {spectrum.n_components} finite numbers, one per component."
        )
    return np.sort(scores)[::-1]
