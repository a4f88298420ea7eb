"""The one rule by which ranks are taken: best worth first, while the budget lasts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


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
