"""From statistics and a budget to a plan: `allocate_ranks`, and how it takes one rank after the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from lora_init.errors import LoraInitError, check_number, check_switches, warn
from lora_init.layers.grid import some
from lora_init.planning.budgets import BoolArray, Budget, FloatArray, IntArray, choose_budget, costs
from lora_init.planning.limits import Limits, allowed_by_unit, layer_limits, tie_layers
from lora_init.planning.plan import RankAllocation
from lora_init.planning.policies import RHO
from lora_init.planning.spectra import Rule, Spectra, stack_spectra, worth
from lora_init.statistics.statistics import SPARE, Statistics

__all__ = ["RankAllocation", "allocate_ranks"]


def allocate_ranks(
    stats: Statistics,
    rank: int | None = None,
    rho: float | None = None,
    *,
    total_rank: int | str | None = None,
    parameters: int | str | None = None,
    fraction: float | None = None,
    megabytes: float | None = None,
    dtype: str = "float32",
    variance: float | None = None,
    coverage: str = "every-layer",
    policy: str | Rule = "eva",
    min_rank: int = 0,
    max_rank: int | None = None,
    multiple_of: int = 1,
    allowed_ranks: Collection[int] | None = None,
    tie: Sequence[str] | Sequence[Sequence[str]] = (),
    uniform_per_kind: bool = False,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    exclude: str | Collection[str] = (),
) -> RankAllocation:
    """Share one budget of ranks out among the layers.

    With `rank` and a `rho` above 1 this is EVA's rule (arXiv 2410.07170): the components of all layers compete by
    explained-variance ratio for rank x (number of layers) places, at most round(rho x rank) in one layer. Ties go to
    the earlier layer. A policy changes what they compete by, a budget changes what is counted, and limits always hold.
    The sum never exceeds the budget, and no layer could take one more step with what is left. More budget never
    explains less where all steps cost the same, or where the policy is `cost-aware` and the budget in parameters.

    A layer whose data has fewer directions than its share gets as many ranks as there are, whatever `min_rank` says,
    and a warning says so.

    Args:
        stats: From `collect`, or loaded.
        rank: Budget: average rank of the layers that take part. Without any budget: the rank that the statistics were
            collected for.
        rho: At most round(rho x average rank) in one layer, under every budget but `variance` and every policy but
            `uniform`. Default: 1, as of `initialize`, which gives all layers the same rank; 2 with a policy other than
            `eva`, which would decide nothing.
        total_rank: Budget: sum of all ranks.
        parameters: Budget: trainable parameters; a whole number, or text such as `"2.5M"`.
        fraction: Budget: share of the base model's parameters.
        megabytes: Budget: size of the saved adapter, parameters times the bytes of `dtype`, in 10^6 bytes.
        dtype: Of the saved adapter, for `megabytes`: `"float32"`, `"float16"` or `"bfloat16"`.
        variance: Budget: the fewest ranks that explain this share of the variance.
        coverage: For `variance`: `"every-layer"` must reach it; or `"total"`, the mean over the layers.
            With the first, the policy has nothing to decide. With the second, ranks are taken in the order of the
            policy; where limits or ties make steps of unequal width, the sum may exceed the least possible.
        policy: A name of `policies.POLICIES`, such as `"eva"`, `"cost-aware"` or `"gradient"`; or a function from a
            layer's name and `Spectrum` to the worth of each of its ranks, [k].
        min_rank: Smallest rank of a layer; 0 lets a layer go without an adapter.
        max_rank: Largest rank of a layer.
        multiple_of: Ranks are multiples of this, or 0.
        allowed_ranks: Ranks are among these, or 0.
        tie: Name endings of layers that get one rank within each block, such as `("q_proj", "k_proj", "v_proj")`; or
            several such tuples.
        uniform_per_kind: Give all layers of a kind, which differ in their block only, one rank.
        overrides: Limits for the layers that a name, an ending or a wildcard means: `{"*.down_proj": {"max_rank": 8}}`,
            with `rank` (fixed), `min_rank`, `max_rank`, `multiple_of` and `allowed_ranks`. Later ones win.
        exclude: Names, endings or wildcards of layers that take no part: they get rank 0 and do not count in `rank`.

    Raises:
        LoraInitError: Two budgets, a budget of 0 or beyond what was collected; limits that contradict each other or the
            budget; a pattern that matches nothing; an unknown policy, or a function that returns NaN.
    """
    _check_statistics(stats)
    rho = _read_rho(rho, policy)
    base = dict(min_rank=min_rank, max_rank=max_rank, multiple_of=multiple_of, allowed_ranks=allowed_ranks)
    limits = layer_limits(stats.targets, base, overrides, exclude)
    budgets = dict(
        rank=rank, total_rank=total_rank, parameters=parameters, fraction=fraction, megabytes=megabytes,
        variance=variance,
    )  # fmt: skip
    check_switches(uniform_per_kind=uniform_per_kind)
    for name, value, default, other in (
        ("dtype", dtype, "float32", "megabytes"), ("coverage", coverage, "every-layer", "variance")
    ):  # fmt: skip
        if budgets[other] is None and value != default:
            raise LoraInitError(f"{{{name}}} is for the budget {other}. Leave it out.", **{name: value})
    made = stats.provenance
    budget = choose_budget(budgets, len(limits), made.rank, made.n_parameters, dtype, coverage)
    spectra = stack_spectra(stats, list(limits))
    # A share of the variance may need any rank in a layer, and uniform ranks stay at their average by themselves.
    uses_rho = budget.unit != "variance" and policy != "uniform"
    task = _task(spectra, limits, budget, rho if uses_rho else None)
    unit_of = tie_layers(list(limits), tie, uniform_per_kind)
    _check_directions(spectra, made.n_samples)
    allowed = allowed_by_unit(task.limits, task.tops, spectra.most_collected, unit_of)
    steps = make_steps(allowed, unit_of, *worth(policy, stats, spectra), task.per_rank)
    if not len(steps.unit) and not steps.start.any():
        raise LoraInitError(
            "the limits leave every layer at rank 0. Raise {max_rank}, or lower {multiple_of}.",
            max_rank=...,
            multiple_of=...,
        )
    taken = _reach(task, steps) if budget.unit == "variance" else _spend(task, steps)
    ranks = steps.ranks_after(taken)
    settings: dict[str, Any] = {}
    if uses_rho:
        settings["rho"] = rho
    shaping = dict(tie=tie, uniform_per_kind=uniform_per_kind, overrides=overrides, exclude=exclude)
    # `r` is what `lora_alpha` is relative to, and each layer's alpha follows from it: any number of at least 1 will do.
    average = int(budget.asked) if budget.kind == "rank" else max(1, round(float(ranks.mean())))
    # In the order of the model, layers that take no part too.
    rank_of, share_of = dict.fromkeys(stats, 0), dict.fromkeys(stats, 0.0)
    rank_of |= zip(limits, ranks.tolist(), strict=True)
    share_of |= zip(limits, spectra.reached_at(ranks).tolist(), strict=True)
    excluded = tuple(name for name in stats if name not in limits)
    return RankAllocation(
        ranks=rank_of,
        rank=average,
        targets={name: stats.targets[name] for name in stats},
        explained=share_of,
        policy=policy if isinstance(policy, str) else getattr(policy, "__name__", "custom"),
        budget=budget,
        settings=settings | _other_than_default(base) | _without_empty(shaping),
        provenance=made,
        unsupported=stats.unsupported,
        excluded=excluded,
        notes=(*_notes(task, steps, ranks), *_uncounted(budget, stats.unsupported)),
    )


def _check_statistics(stats: Any) -> None:
    if not (isinstance(stats, Statistics) and len(stats)):
        kind = type(stats).__name__
        raise LoraInitError(f"Statistics of layers are needed, from collect or Statistics.load(path), not {kind}.")


def _read_rho(rho: float | None, policy: Any) -> float:
    """Return how far a rank may be above the average: by default 1, and 2 with a policy that decides nothing at 1."""
    if rho is None:
        return RHO if policy == "eva" else SPARE
    check_number("rho", rho, 1, hint=" 1 gives all layers one rank.")
    return rho


def _check_directions(spectra: Spectra, n_samples: int) -> None:
    if not spectra.collected.any():
        seen = f" ({n_samples:,} in all)" if n_samples else ""
        raise LoraInitError(f"no layer has a direction to start from: its rows{seen} do not differ. Use more data.")


def _other_than_default(limits: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in limits.items() if value != getattr(Limits(), name)}


# An empty tie or no override is a default, and says nothing about the plan.
def _without_empty(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value}


class _Task(NamedTuple):
    """What is to be shared out among n layers, and what bounds the rank of each."""

    budget: Budget
    spectra: Spectra
    limits: Mapping[str, Limits]
    per_rank: IntArray  # cost of one rank of each layer, [n]
    average: float  # rank that the budget buys if every layer has the same
    rho: float | None  # times the average, the largest rank of a layer; None where nothing but its width limits it
    needs: FloatArray  # rank below which too little data in a layer is worth a warning, [n]
    could: IntArray  # largest rank of each layer if more were collected, [n]
    tops: IntArray  # largest rank of each layer but for its limits, with what was collected, [n]


def _task(spectra: Spectra, limits: Mapping[str, Limits], budget: Budget, rho: float | None) -> _Task:
    """Put together what bounds each layer: its width, rho, what was collected, and its limits."""
    per_rank = costs(budget, spectra.widths)
    average = budget.limit / float(per_rank.sum())
    caps = np.array([target.in_features for target in spectra.targets], dtype=np.int64)
    if rho is not None:
        # At least 1, since a small budget in parameters may buy less than one rank on average; capped first, since a
        # huge rho times the average overflows an integer.
        caps = np.minimum(caps, max(1, round(min(rho * average, float(caps.max())))))
    needs = np.zeros(len(limits))
    could = np.zeros(len(limits), dtype=np.int64)
    for i, limit in enumerate(limits.values()):
        needs[i] = max(average, limit.min_rank)
        could[i] = limit.highest(int(caps[i]))
    tops = np.minimum(caps, spectra.collected)
    relaxed = dict(limits)
    for i in np.flatnonzero(spectra.starved).tolist():
        # Data without enough directions outrules min_rank: the layer gets those that there are.
        name = spectra.names[i]
        most = limits[name].highest(tops[i])
        if most < limits[name].min_rank <= could[i]:
            relaxed[name] = replace(limits[name], min_rank=most)
    return _Task(budget, spectra, relaxed, per_rank, average, rho, needs, could, tops)


def _spend(task: _Task, steps: Steps) -> BoolArray:
    """Mark the steps that the budget buys, [s]."""
    budget, standing = task.budget, steps.start[steps.unit_of]  # units -> layers
    limit, fixed, unit = int(budget.limit), int((standing * task.per_rank).sum()), budget.unit
    if fixed > limit:
        raise LoraInitError(
            f"min_rank binds: the smallest ranks allowed, on {int((standing > 0).sum())} layers, cost {fixed:,} "
            f"{unit}, {fixed - limit:,} more than {budget.text} gives. Lower min_rank, or raise the budget.",
            **budget.option,
        )
    taken = take_while_affordable(steps, limit - fixed)
    if not taken.any() and not standing.any():
        cheapest = int(steps.cost.min())
        raise LoraInitError(
            f"{budget.text} buys no rank in any layer: the cheapest step costs {cheapest:,} {unit}.", **budget.option
        )
    return taken


def _reach(task: _Task, steps: Steps) -> BoolArray:
    """Mark the steps that reach the share of the variance asked for, [s]."""
    budget, spectra = task.budget, task.spectra
    share = budget.limit - 1e-12  # sums of ratios are off by rounding
    # Whether it can be reached at all, before any step is taken.
    best = spectra.reached_at(steps.top)
    if (best.mean() if budget.coverage == "total" else best.min()) < share:
        short, worst = best < share, int(best.argmin())
        raise LoraInitError(
            f"{budget.text} is out of reach: all that was collected and the limits allow explains {best.mean():.4f} on "
            f"average, and too little in {short.sum()} of {len(best)} layers, least in {spectra.names[worst]!r}: "
            f"{best[worst]:.4f}. Collect again with a larger rank, relax the limits, or ask for less.",
            **budget.option,
        )
    if budget.coverage == "total":
        by_unit = np.zeros((len(steps.start), spectra.reached.shape[1]))
        np.add.at(by_unit, steps.unit_of, spectra.reached)  # layers x ranks -> units x ranks
        return take_until_explained(steps, by_unit, share * len(best))
    # The first rank that reaches the share, of the tied layer that needs most. The policy has nothing to decide.
    needed = np.zeros(len(steps.start), dtype=np.int64)
    np.maximum.at(needed, steps.unit_of, np.argmax(spectra.reached >= share, axis=1))
    # A step is taken if the rank before it is too low.
    return steps.rank - steps.width < needed[steps.unit]


def _notes(task: _Task, steps: Steps, ranks: IntArray) -> tuple[str, ...]:
    """Report where what was collected, not the policy, decided: layers at their top that could have had more.

    Too little data in a layer is a warning; too few components for a budget in ranks, or to spend it, an error.
    """
    budget, spectra = task.budget, task.spectra
    if budget.unit == "variance":
        return ()
    left = budget.limit - float((ranks * task.per_rank).sum())
    at_top = ranks == steps.top
    # Budget is left over, and no layer can take a further step at any price.
    is_stuck = left > 0 and bool(at_top.all())
    wanting = at_top & (task.could > spectra.collected)  # by what was collected alone
    short = wanting & spectra.starved & (spectra.collected < task.needs)
    if short.any():
        text = f"{_some(spectra.names, short)} got as many ranks as the data has directions. Use more data."
        warn(text)
    capped = wanting & ~spectra.starved  # their data may have more directions than were collected
    if capped.any() and (task.rho is not None or is_stuck):
        error = _too_few_collected(task, capped)
        if is_stuck or budget.unit == "ranks":
            raise error
        return (str(error),)
    if is_stuck and not short.any():
        text = f"{left:,.0f} of {budget.limit:,.0f} {budget.unit} stay unspent"
        return (f"{text}: every layer has the largest rank that the limits and rho allow.",)
    return ()


def _too_few_collected(task: _Task, capped: BoolArray) -> LoraInitError:
    """Make the error about layers that would take more ranks than there are components; it says what to collect."""
    budget, spectra = task.budget, task.spectra
    rank, most = min(math.ceil(task.average), int(task.could.max())), spectra.most_collected
    and_rho = " and {rho}" if task.rho else ""
    return LoraInitError(
        f"{budget.text} lets a layer have rank {task.could[capped].max()}, and {_some(spectra.names, capped)} "
        f"would take more than the {most} components that were collected. Collect again with "
        f"rank {rank}{and_rho}, or ask for less, or allocate with {{max_rank}}.",
        **{"rho": task.rho, "max_rank": most} | budget.option,
    )


def _uncounted(budget: Budget, unsupported: Mapping[str, str]) -> list[str]:
    """Report layers that no data can start: they come on top of a budget, since their widths are not known."""
    if not unsupported or budget.unit not in ("parameters", "bytes"):
        return []
    return [f"{budget} does not count {', '.join(unsupported)}: PEFT adds an adapter of the average rank there."]


def _some(names: Sequence[str], which: BoolArray) -> str:
    return some([repr(names[int(i)]) for i in np.flatnonzero(which)])


# Ranks are shared out greedily: lay out every step that a unit could take, sort the steps by what they bring, and take
# them in that order. Components fall, so a step brings no more than the one before it in the same unit. Therefore the
# order never asks for a later step of a unit before an earlier one, and where all steps cost the same, no allocation of
# the same sum is better. Where costs differ, steps are sorted by worth per cost: the greedy rule of Dantzig (1957) for
# the knapsack problem, see `policies.eva`.
@dataclass(frozen=True)
class Steps:
    """All the steps that units (layers, or layers that are tied) can take, from one allowed rank to the next.

    Rows are sorted by unit and rank, s of them over all u units of n layers.
    """

    unit_of: IntArray  # unit of each layer, [n]
    start: IntArray  # smallest allowed rank of each unit, [u]: where it stands before any step
    unit: IntArray  # whose step it is, [s]
    rank: IntArray  # rank after it, [s]
    width: IntArray  # ranks it adds to each layer of the unit, [s]
    cost: IntArray  # what it costs, [s], whole numbers
    priority: FloatArray  # worth per rank (or per parameter), [s]; never rises within a unit

    def in_order(self) -> IntArray:
        """Sort the steps by falling priority. Ties go to the earlier unit, and within a unit to the lower rank."""
        return np.argsort(-self.priority, kind="stable")  # negated, since a reversed order would reverse ties, too

    def ranks_after(self, taken: BoolArray) -> IntArray:
        """Return the rank of each layer after the steps that were taken, [n]."""
        widths = np.bincount(self.unit[taken], weights=self.width[taken], minlength=len(self.start))
        return (self.start + widths.astype(np.int64))[self.unit_of]

    @property
    def top(self) -> IntArray:
        """Rank of each layer after all steps, [n]."""
        return self.ranks_after(np.ones(len(self.unit), dtype=np.bool_))


def make_steps(
    allowed: BoolArray, unit_of: IntArray, gains: FloatArray, weights: FloatArray, per_rank: IntArray
) -> Steps:
    """Lay out the steps of every unit.

    `allowed` marks the ranks of each unit, [u, K + 1]; `gains` is the worth of each layer's ranks, falling, [n, K];
    `weights` what a layer's worth is divided by, and `per_rank` the cost of one rank, [n].
    """
    n_units = len(allowed)
    gain = np.zeros((n_units, gains.shape[1]))
    np.add.at(gain, unit_of, gains)  # layers x ranks -> units x ranks: a step of a unit is one of all its layers
    weight = np.bincount(unit_of, weights=weights, minlength=n_units)
    unit_cost = np.bincount(unit_of, weights=per_rank, minlength=n_units).astype(np.int64)
    unit, rank = np.nonzero(allowed)  # by unit, then by rank
    # The first allowed rank of a unit is where it stands; each further one is a step from the rank before it.
    first = np.r_[True, unit[1:] != unit[:-1]]
    start = rank[first]
    previous = np.r_[0, rank[:-1]][~first]
    unit, rank = unit[~first], rank[~first]
    width = rank - previous
    total = np.concatenate([np.zeros((n_units, 1)), np.cumsum(gain, axis=1)], axis=1)
    # A step of one rank, or of ranks of one worth, takes that worth as it is: a difference of sums would blur ties by a
    # rounding error.
    first_gain, last_gain = gain[unit, previous], gain[unit, rank - 1]
    mean = (total[unit, rank] - total[unit, previous]) / (width * weight[unit])
    priority = np.where(first_gain == last_gain, last_gain / weight[unit], mean)
    # Rounding again: means of nearly equal numbers over blocks of unequal width may rise, and a step would then come
    # before its turn.
    ends = np.searchsorted(unit, np.arange(n_units + 1))
    for begin, end in itertools.pairwise(ends.tolist()):
        priority[begin:end] = np.minimum.accumulate(priority[begin:end])
    return Steps(unit_of, start, unit, rank, width, width * unit_cost[unit], priority)


def take_while_affordable(steps: Steps, budget: int) -> BoolArray:
    """Take steps in order until the budget is spent, [s]. A unit whose next step does not fit stays where it is.

    No unit could take one more step with what is left. Where priority is gain per cost, more budget never means less
    gain, and the gain is within one step's of the best possible.
    """
    taken = np.zeros(len(steps.unit), dtype=np.bool_)
    stuck: set[int] = set()
    for step in steps.in_order().tolist():
        unit, cost = int(steps.unit[step]), int(steps.cost[step])
        if cost > budget:
            stuck.add(unit)  # for good: a later step that would fit starts from the rank after this one
        elif unit not in stuck:
            taken[step] = True
            budget -= cost
    return taken


def take_until_explained(steps: Steps, explained: FloatArray, share: float) -> BoolArray:
    """Take steps in order until the units explain a share of their variance, summed over all layers, [s].

    `explained` is the sum of what the first r components of a unit's layers explain, [u, K + 1].
    """
    gain = explained[steps.unit, steps.rank] - explained[steps.unit, steps.rank - steps.width]
    missing = share - explained[np.arange(len(steps.start)), steps.start].sum()
    order, taken = steps.in_order(), np.zeros(len(gain), dtype=np.bool_)
    if missing > 0:
        # All steps reach the share by another order of summation, so the last sum may fall short by rounding.
        taken[order[: int(np.searchsorted(np.cumsum(gain[order]), missing)) + 1]] = True
    return taken
