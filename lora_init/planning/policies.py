"""Policies: what one more rank in a layer is worth.

A policy is one function from the spectra of all layers to the worth of each rank. Ranks are then taken by falling worth
until the budget is spent (`selection`), so that a policy holds no rule about budgets, limits or ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_init.errors import LoraInitError
from lora_init.layers.targets import Target
from lora_init.statistics.spectrum import Spectrum
from lora_init.statistics.statistics import Statistics

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Spectra:
    """What n layers' components explain, at most K components each.

    Attributes:
        names: Layer names.
        targets: Their kinds and widths.
        ratios: Explained-variance ratio of each component, falling, [n, K]; 0 beyond what a layer has.
        reached: Share of the variance that the first r components explain together, [n, K + 1]: column r. 1 where
            rows are constant: there is nothing to explain.
        collected: Components that each layer has, [n].
        starved: Layers that have fewer components than were asked for, because too few rows were seen, [n].
    """

    names: list[str]
    targets: list[Target]
    ratios: NDArray[np.float64]
    reached: NDArray[np.float64]
    collected: NDArray[np.int64]
    starved: NDArray[np.bool_]

    @property
    def most_collected(self) -> int:
        """Components of the layer that has most: what the pass was asked for, if rows and widths allowed it."""
        return int(self.ratios.shape[1])

    @property
    def widths(self) -> NDArray[np.int64]:
        """Parameters that one rank of each layer costs, d_in + d_out of a linear one, [n]."""
        return np.array([target.cost for target in self.targets], dtype=np.int64)


def stack_spectra(stats: Statistics, names: Sequence[str]) -> Spectra:
    """Stack the variances of layers; components are not read."""
    # One read per input group: q, k and v are the same numbers.
    groups = {stats.group_of[name]: name for name in names}
    shared = {group: stats.explained_variance_ratio(name).numpy() for group, name in groups.items()}
    rows = [shared[stats.group_of[name]] for name in names]
    targets = [stats.targets[name] for name in names]
    collected = np.array([len(row) for row in rows], dtype=np.int64)
    most = int(collected.max(initial=0))
    ratios = np.zeros((len(rows), most))
    for padded, row in zip(ratios, rows, strict=True):
        padded[: len(row)] = row
    d_in = np.array([target.in_features for target in targets], dtype=np.int64)
    # Fewer than others have, or as many as there were rows to find them in (one less where the mean is taken out).
    few_rows = 0 < stats.provenance.n_samples <= most + 1
    starved = (collected < np.minimum(most, d_in)) | (few_rows & (collected < d_in))
    reached = np.concatenate([np.zeros((len(rows), 1)), np.cumsum(ratios, axis=1)], axis=1)
    reached[[stats.total_variance(name) <= 0.0 for name in names]] = 1.0
    return Spectra(list(names), targets, ratios, reached, collected, starved)


@dataclass(frozen=True)
class Steps:
    """All the steps that units (layers, or tied layers together) can take, from one allowed rank to the next.

    Rows are sorted by unit and rank, s of them over all u units.

    Attributes:
        start: Smallest allowed rank of each unit, [u]: where it stands before any step.
        unit: Whose step it is, [s].
        rank: Rank after it, [s].
        width: Ranks it adds to each layer of the unit, [s].
        cost: What it costs, [s], whole numbers.
        priority: Worth per rank (or per parameter), [s]; never rises within a unit.
    """

    start: IntArray
    unit: IntArray
    rank: IntArray
    width: IntArray
    cost: IntArray
    priority: FloatArray


def make_steps(
    allowed: BoolArray, unit_of: IntArray, gains: FloatArray, weights: FloatArray, per_rank: IntArray, once: IntArray
) -> Steps:
    """Lay out the steps of every unit.

    Args:
        allowed: Ranks each unit may have, [u, K + 1].
        unit_of: Unit of each layer, [n].
        gains: Worth of each rank of each layer, falling, [n, K].
        weights: What a layer's worth is divided by, [n].
        per_rank: Cost of one rank of each layer, [n].
        once: Cost of a layer that has any rank, [n].
    """
    n_units = len(allowed)

    def per_unit(values: IntArray) -> IntArray:
        return np.bincount(unit_of, weights=values, minlength=n_units).astype(np.int64)

    if n_units == len(gains):  # nothing tied: spares a copy, most of the time of a plan
        gain, weight = gains, weights
    else:
        gain = np.zeros((n_units, gains.shape[1]))
        np.add.at(gain, unit_of, gains)
        weight = np.bincount(unit_of, weights=weights, minlength=n_units).astype(np.float64)
    unit, rank = np.nonzero(allowed)  # by unit, then by rank
    first = np.r_[True, unit[1:] != unit[:-1]]
    start = rank[first]
    previous = np.r_[0, rank[:-1]][~first]
    unit, rank = unit[~first], rank[~first]
    width = rank - previous
    total = np.concatenate([np.zeros((n_units, 1)), np.cumsum(gain, axis=1)], axis=1)
    # A step of one rank takes its worth as it is: a difference of sums would blur ties by a rounding error.
    block = np.where(width == 1, gain[unit, rank - 1], total[unit, rank] - total[unit, previous])
    priority = block / (width * weight[unit])
    for i in np.flatnonzero((unit[1:] == unit[:-1]) & (priority[1:] > priority[:-1])):
        priority[i + 1] = priority[i]  # rounding again: means of equal numbers over blocks of unequal width
    cost = width * per_unit(per_rank)[unit] + np.where(previous == 0, per_unit(once)[unit], 0)
    return Steps(start, unit, rank, width, cost, priority)


def in_order(steps: Steps) -> IntArray:
    """Sort the steps by falling priority. Ties go to the earlier unit, and within a unit to the lower rank."""
    return np.argsort(-steps.priority, kind="stable")


def take_while_affordable(steps: Steps, order: IntArray, budget: int) -> BoolArray:
    """Take steps in order until the budget is spent. A unit whose next step does not fit stays where it is.

    No unit could take one more step with what is left. Where priority is gain per cost, more budget never means less
    gain, and the gain is within one step's of the best possible.

    Returns:
        Which steps are taken, [s].
    """
    taken = np.zeros(len(order), dtype=np.bool_)
    spent = np.cumsum(steps.cost[order])
    n_fit = int(np.searchsorted(spent, budget, side="right"))
    taken[order[:n_fit]] = True
    left = budget - (int(spent[n_fit - 1]) if n_fit else 0)
    rest = order[n_fit:]
    rest = rest[steps.cost[rest] <= left] if _costs_rise(steps) else rest
    if len(rest) == 0 or left < steps.cost.min():
        return taken
    stuck = np.zeros(len(steps.start), dtype=np.bool_)
    cheapest = int(steps.cost.min())
    for step, unit, cost in zip(rest.tolist(), steps.unit[rest].tolist(), steps.cost[rest].tolist(), strict=True):
        if stuck[unit]:
            continue
        if cost > left:
            stuck[unit] = True
            continue
        taken[step] = True
        left -= cost
        if left < cheapest:
            break
    return taken


def take_until_explained(
    steps: Steps, order: IntArray, unit_of: IntArray, reached: FloatArray, share: float
) -> BoolArray:
    """Take steps in order until the layers together explain a share of their variance.

    Args:
        reached: Share that the first r components of a layer explain, [n, K + 1].
        share: Sum over the layers to reach; all steps together reach it.

    Returns:
        Which steps are taken, [s].
    """
    by_unit = np.zeros((len(steps.start), reached.shape[1]))
    np.add.at(by_unit, unit_of, reached)
    gain = by_unit[steps.unit, steps.rank] - by_unit[steps.unit, steps.rank - steps.width]
    before = by_unit[np.arange(len(steps.start)), steps.start].sum()
    total = before + np.concatenate([[0.0], np.cumsum(gain[order])])
    # All steps reach it by another order of summation, so the last sum may fall short by rounding.
    n_steps = min(int(np.searchsorted(total, share)), len(order))
    taken = np.zeros(len(order), dtype=np.bool_)
    taken[order[:n_steps]] = True
    return taken


def take_needed(steps: Steps, unit_of: IntArray, needed: IntArray) -> BoolArray:
    """Take the fewest steps that bring every layer to the rank it needs, [n]. Returns which are taken, [s]."""
    of_unit = np.zeros(len(steps.start), dtype=np.int64)
    np.maximum.at(of_unit, unit_of, needed)
    return steps.rank - steps.width < of_unit[steps.unit]


def _costs_rise(steps: Steps) -> bool:
    """Tell whether no unit's later step is cheaper than an earlier one: a step too dear then ends its unit anyway."""
    same = steps.unit[1:] == steps.unit[:-1]
    return bool((steps.cost[1:] >= steps.cost[:-1])[same].all())


def ranks_after(steps: Steps, taken: BoolArray) -> IntArray:
    """Give the rank of each unit after the steps that were taken, [u]."""
    return steps.start + np.bincount(steps.unit[taken], weights=steps.width[taken], minlength=len(steps.start)).astype(
        np.int64
    )


# A rule of one's own: (layer name, its spectrum) -> worth of its 1st, 2nd, ... rank, at most k numbers.
Rule = Callable[[str, Spectrum], "FloatArray"]


def uniform(ratios: FloatArray, widths: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Value the j-th rank of every layer at 1 / (j - 1/2): all layers rise together, as evenly as the limits allow.

    The baseline: LoRA (Hu et al., arXiv 2106.09685) with one rank for all layers.

    Args:
        ratios: Explained-variance ratio of each component, by falling ratio, [n, K]; 0 where a layer has fewer than K.
        widths: d_in + d_out of each layer, [n]: what one rank of it costs in parameters.

    Returns:
        Worth of each rank, [n, K], and what it is divided by where ranks of several layers are taken together, [n].
    """
    return proportional_to(np.ones(len(ratios)), ratios.shape[1])


def eva(ratios: FloatArray, widths: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Value the j-th rank at the share of the layer's variance that its j-th component explains.

    Source: EVA (Paischer et al., arXiv 2410.07170, section 3.3); `peft.tuners.lora.eva` does the same.
    """
    return ratios, np.ones(len(ratios))


def cost_aware(ratios: FloatArray, widths: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Value the j-th rank at the share of variance it explains per parameter: ratio_j / (d_in + d_out).

    Under a budget in parameters this is the greedy rule for the knapsack problem (Dantzig 1957). Because ratios fall
    within a layer, its total explained variance is less than the best possible by at most that of one step.
    """
    return ratios, widths


def proportional(ratios: FloatArray, widths: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Share ranks out in proportion to each layer's effective rank, 1 / sum_j(ratio_j^2).

    This is the number of equally strong directions with the same concentration of variance (the participation ratio;
    the exponential of Renyi's entropy of order 2). The entropy of order 1 of Roy and Vetterli (2007), from which the
    name comes, needs the whole spectrum, and the statistics hold its head only; in squares the tail is negligible: what
    is missed adds at most (variance not kept) x (last ratio kept) to the sum.
    """
    concentration = (ratios**2).sum(axis=1)
    effective = np.divide(1.0, concentration, out=np.zeros_like(concentration), where=concentration > 0.0)
    return proportional_to(effective, ratios.shape[1])


def proportional_to(claims: FloatArray, n_ranks: int) -> tuple[FloatArray, FloatArray]:
    """Value the j-th rank at claim / (j - 1/2), which shares ranks out in proportion to the claims, [n].

    The divisor method of Webster and Sainte-Lague: no other whole numbers of the same sum lie nearer to proportion, in
    the sense that no move of one rank makes any two layers' ranks per claim more equal.
    """
    return claims[:, None] / (np.arange(n_ranks) + 0.5), np.ones(len(claims))


POLICIES: dict[str, Callable[[FloatArray, FloatArray], tuple[FloatArray, FloatArray]]] = {
    "uniform": uniform,
    "eva": eva,
    "cost-aware": cost_aware,
    "proportional": proportional,
}


def gradient(gains: FloatArray, widths: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Value the j-th rank at the expected squared gradient of B that its direction brings.

    All layers' gradients are of one loss, so these are numbers of one unit, and not shares: a layer that the loss does
    not depend on gets nothing. q, k and v read the same tensor and differ here.

    Args:
        gains: Explained variance of the rows weighted by the gradient, falling, [n, K].
        widths: d_in + d_out of each layer, [n].
    """
    return gains, np.ones(len(gains))


def gradient_per_parameter(gains: FloatArray, widths: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Value the j-th rank at the expected squared gradient that it brings per parameter, as `cost_aware` does."""
    return gains, widths


def gora(importance: FloatArray, widths: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Share ranks out in proportion to importance / sqrt(d_in + d_out): GoRA's rule (He et al., arXiv 2502.12171).

    The importance of a layer is the mean of |W * G| over its entries. The paper shares out rank x sum(sqrt(d_in +
    d_out)) in proportion to it, of which a rank of a layer costs sqrt(d_in + d_out). Its limits are `min_rank` and
    `max_rank`.

    Args:
        importance: Of each layer, in the first column, [n, K].
        widths: d_in + d_out of each layer, [n].
    """
    return proportional_to(importance[:, 0] / np.sqrt(widths), importance.shape[1])


GRADIENT_POLICIES: dict[str, Callable[[FloatArray, FloatArray], tuple[FloatArray, FloatArray]]] = {
    "gradient": gradient,
    "gradient-per-parameter": gradient_per_parameter,
    "gora": gora,
}


def _from_gradients(policy: str, stats: Statistics, spectra: Spectra) -> tuple[FloatArray, FloatArray]:
    values = np.zeros_like(spectra.ratios)
    for row, name in zip(values, spectra.names, strict=True):
        found = stats.gradient(name)
        if policy == "gora" and math.isnan(found.importance):
            raise LoraInitError(
                f"policy='gora': the importance of {name!r} is unknown. It needs the model's weights, which a merge of "
                "statistics does not have. Collect from all the data in one pass, or choose another policy."
            )
        numbers = np.array([found.importance]) if policy == "gora" else found.weighted.explained_variance.numpy()
        row[: len(numbers)] = numbers[: len(row)]
    if not values.any():
        why = "the weights are quantised" if policy == "gora" else "the loss depends on no layer"
        raise LoraInitError(f"policy={policy!r}: all layers are worth nothing, since {why}. Choose another policy.")
    return GRADIENT_POLICIES[policy](values, spectra.widths.astype(np.float64))


def worth(policy: str | Rule, stats: Statistics, spectra: Spectra) -> tuple[FloatArray, FloatArray]:
    """Apply a policy by name, or somebody's own rule.

    Of a rule's numbers for a layer only how many are among the best counts, so they are put in falling order.

    Returns:
        As the policies do.

    Raises:
        LoraInitError: Unknown policy; one that needs gradients, and there are none, or the model's weights, and the
            statistics were merged; or a rule that fails, returns NaN,
            or not one number per component.
    """
    if isinstance(policy, str):
        if policy in GRADIENT_POLICIES:
            return _from_gradients(policy, stats, spectra)
        if policy not in POLICIES:
            known = ", ".join((*POLICIES, *GRADIENT_POLICIES))
            raise LoraInitError(f"policy={policy!r} is unknown. Choose from {known}, or give a function.")
        return POLICIES[policy](spectra.ratios, spectra.widths.astype(np.float64))
    gains = np.zeros_like(spectra.ratios)
    for row, name in zip(gains, spectra.names, strict=True):
        spectrum = stats[name]
        try:
            scores = np.asarray(policy(name, spectrum), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise LoraInitError(f"layer {name!r}: the policy failed, or returned no numbers: {error}.") from error
        if scores.shape != (spectrum.n_components,):
            raise LoraInitError(
                f"layer {name!r}: the policy returned scores of shape {scores.shape}, "
                f"and ({spectrum.n_components},) is needed, one per component."
            )
        if not np.isfinite(scores).all():
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise LoraInitError(f"layer {name!r}: the policy returned {scores[bad]} for component {bad}.")
        row[: len(scores)] = np.sort(scores)[::-1]
    return gains, np.ones(len(gains))


# Two standard errors: about 95 % if errors are normal, which for shares of variance is a habit rather than a theorem.
N_ERRORS = 2.0


def standard_errors(stats: Statistics, spectra: Spectra) -> tuple[FloatArray, str]:
    """Estimate the standard error of each explained-variance ratio, [n, K], and say in words what from.

    From the spread over batches, where the statistics hold each batch's own ratios: std / sqrt(batches). This counts
    what tokens of one text have in common. Without them, from the number of rows, as if rows were independent and
    normal: ratio x sqrt(2 / rows) (Anderson 1963). Rows of one text are not independent, so that is a lower bound.

    Returns:
        Zeros and an empty text if there is nothing to go by.
    """
    errors = np.zeros_like(spectra.ratios)
    groups = [stats.group_of[name] for name in spectra.names]
    n_batches = min(len(stats.batch_ratios.get(group, ())) for group in groups)
    if n_batches > 1:
        by_group = {}
        for group in set(groups):
            shares = stats.batch_ratios[group].numpy().astype(np.float64)[:, : errors.shape[1]]  # [batches, k]
            by_group[group] = shares.std(axis=0, ddof=1) / math.sqrt(len(shares))
        for row, group in zip(errors, groups, strict=True):
            row[: len(by_group[group])] = by_group[group]
        return errors, f"from the spread over the last {n_batches} batches"
    n_rows = stats.provenance.n_samples
    if n_rows > 1:
        return spectra.ratios * math.sqrt(2.0 / n_rows), f"from {n_rows:,} rows taken as independent: a lower bound"
    return errors, ""


def unsettled(
    steps: Steps, taken: BoolArray, errors: FloatArray, weights: FloatArray, unit_of: IntArray
) -> dict[int, tuple[int, int]]:
    """Find the units whose rank could be another within the sampling error.

    The cut runs midway between the worst worth that was taken and the best that was not. A step whose worth lies within
    two standard errors of the cut could as well have gone the other way.

    Args:
        errors: Standard error of the worth of each rank, [n, K].
        weights: As in `make_steps`, [n].

    Returns:
        Unit to (lowest, highest) rank it might have; units that are settled are missing.
    """
    if taken.all() or not taken.any():
        return {}
    cut = (steps.priority[taken].min() + steps.priority[~taken].max()) / 2.0
    n_units = len(steps.start)
    squares = np.zeros((n_units, errors.shape[1] + 1))
    np.add.at(squares[:, 1:], unit_of, errors**2)
    squares = np.cumsum(squares, axis=1)
    variance = squares[steps.unit, steps.rank] - squares[steps.unit, steps.rank - steps.width]
    weight = np.bincount(unit_of, weights=weights, minlength=n_units)
    margin = N_ERRORS * np.sqrt(np.maximum(variance, 0.0)) / (steps.width * weight[steps.unit])
    low, high = steps.start.copy(), steps.start.copy()
    sure, possible = steps.priority - margin > cut, steps.priority + margin > cut
    np.maximum.at(low, steps.unit[sure & taken], steps.rank[sure & taken])
    np.maximum.at(high, steps.unit[possible | taken], steps.rank[possible | taken])
    return {int(u): (int(low[u]), int(high[u])) for u in np.flatnonzero(low < high)}
