"""From a budget, a policy and limits to a plan: what `allocate_ranks` does once its arguments are read."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_init.errors import LoraInitError
from lora_init.planning.budgets import Budget, adapter_bytes, choose_budget, costs
from lora_init.planning.limits import Ceiling, Limits, allowed_ranks, layer_limits, tie_layers, tied_ranks
from lora_init.planning.plan import RankAllocation
from lora_init.planning.policies import (
    Rule,
    Spectra,
    Steps,
    in_order,
    make_steps,
    ranks_after,
    stack_spectra,
    standard_errors,
    take_needed,
    take_until_explained,
    take_while_affordable,
    unsettled,
    worth,
)
from lora_init.statistics.statistics import Statistics

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Plan:
    """What came of it, over the n layers that take part.

    Attributes:
        ranks: Rank of each layer, [n].
        unsettled: Layers whose rank is decided by less than the sampling error: lowest and highest rank it might be.
        error_source: What the sampling error was estimated from; empty if it was not.
        notes: What a user should know, a sentence each.
    """

    ranks: IntArray
    unsettled: dict[str, tuple[int, int]]
    error_source: str
    notes: tuple[str, ...]


def make_plan(
    stats: Statistics,
    spectra: Spectra,
    budget: Budget,
    policy: str | Rule,
    rho: float,
    limits: Sequence[Limits],
    tie: Sequence[str] | Sequence[Sequence[str]],
) -> Plan:
    """Share the budget out.

    Args:
        stats: Read by a policy of one's own, and for the sampling error.
        spectra: Of the layers that take part.
        budget: What may be spent.
        policy: What ranks compete by.
        rho: At most round(rho x average rank) in one layer.
        limits: Of each layer.
        tie: Layers that get one rank.

    Raises:
        LoraInitError: As `allocate_ranks` says.
    """
    names = spectra.names
    # PEFT takes a grouped convolution only at ranks that its groups divide.
    limits = [
        replace(limit, multiple_of=math.lcm(limit.multiple_of, target.groups))
        for limit, target in zip(limits, spectra.targets, strict=True)
    ]
    per_rank, once = costs(budget, spectra.targets)
    average = budget.limit / float(per_rank.sum())  # rank that the budget buys if every layer has the same
    _check_collected(budget, average, spectra, limits, per_rank)
    by_rho = budget.unit != "variance" and policy != "uniform"
    cap = max(1, round(rho * average)) if by_rho else max(target.in_features for target in spectra.targets)
    allowed = allowed_ranks(names, limits, _ceilings(spectra, cap, f"{rho:g} x {average:.4g}"), spectra.most_collected)
    gains, weights = worth(policy, stats, spectra)
    unit_of = tie_layers(names, tie)
    steps = make_steps(tied_ranks(names, allowed, unit_of), unit_of, gains, weights, per_rank, once)
    if budget.unit == "variance":
        taken = _reach(budget, spectra, steps, unit_of)
    else:
        taken = _spend(budget, steps, steps.start[unit_of], per_rank, once)
    ranks = ranks_after(steps, taken)[unit_of]
    top = ranks_after(steps, np.ones_like(taken))[unit_of]
    notes = [*_collected_notes(budget, rho, average, cap, spectra, limits, ranks == top, policy == "uniform")]
    left = budget.limit - float((ranks * per_rank + np.where(ranks > 0, once, 0)).sum())
    if budget.unit != "variance" and (ranks == top).all() and left > 0 and not notes:
        notes.append(
            f"{left:,.0f} of {budget.limit:,.0f} {budget.unit} stay unspent: every layer has the largest rank that the "
            "limits allow."
        )
    unsure: dict[str, tuple[int, int]] = {}
    source = ""
    if policy in ("eva", "cost-aware") and budget.coverage != "every-layer":
        errors, source = standard_errors(stats, spectra)
        found = unsettled(steps, taken, errors, weights, unit_of) if source else {}
        unsure = {name: found[unit] for name, unit in zip(names, unit_of.tolist(), strict=True) if unit in found}
    if unsure:
        notes.append(
            f"The rank of {len(unsure)} of {len(names)} layers could be another within two standard errors ({source})."
        )
    return Plan(ranks, unsure, source, tuple(notes))


def _check_collected(
    budget: Budget, average: float, spectra: Spectra, limits: Sequence[Limits], per_rank: IntArray
) -> None:
    """Refuse a budget that asks for more than layers have or than was collected."""
    if budget.kind == "rank":
        for target, limit in zip(spectra.targets, limits, strict=True):
            if target.in_features < min(
                budget.limit / len(limits), math.inf if limit.max_rank is None else limit.max_rank
            ):
                raise LoraInitError(
                    f"layer {target.name!r}: {budget} is larger than its input width {target.in_features}. "
                    "Ask for less, limit its max_rank, or exclude it."
                )
    if budget.unit == "variance" or spectra.starved.all():
        return
    exists = int((per_rank * spectra.collected).sum())
    if average > spectra.most_collected or (
        budget.limit > exists and not spectra.starved.any() and budget.unit != "bytes"
    ):
        if all(count == target.in_features for count, target in zip(spectra.collected, spectra.targets, strict=True)):
            remedy = "No layer has more directions than its input is wide. Ask for less."
        else:
            remedy = f"Collect again with rank={math.ceil(average)}, or with a larger rho, or ask for less."
        raise LoraInitError(
            f"{budget} asks for an average rank of {average:.4g}, and at most {spectra.most_collected} components per "
            f"layer were collected, which cost {exists:,} {budget.unit}. {remedy}"
        )


def _ceilings(spectra: Spectra, cap: int, product: str) -> list[Ceiling]:
    ceilings = []
    for collected, target in zip(spectra.collected.tolist(), spectra.targets, strict=True):
        if cap < collected:
            ceilings.append(Ceiling(cap, f"{cap}, which is rho x average rank = {product}"))
        elif collected == target.in_features:
            ceilings.append(Ceiling(collected, f"its input width {collected}"))
        else:
            ceilings.append(Ceiling(collected, f"the {collected} components collected"))
    return ceilings


def _spend(budget: Budget, steps: Steps, standing: IntArray, per_rank: IntArray, once: IntArray) -> BoolArray:
    limit = int(budget.limit)
    fixed = int((standing * per_rank + np.where(standing > 0, once, 0)).sum())
    if budget.unit == "bytes":
        fixed += adapter_bytes({}, {}, budget.dtype) + 7  # the header is padded to a multiple of 8
    if fixed > limit and standing.any():
        raise LoraInitError(
            f"min_rank binds: the smallest ranks allowed, on {int((standing > 0).sum())} layers, cost {fixed:,} "
            f"{budget.unit}, {fixed - limit:,} more than {budget} gives. Lower min_rank, or raise the budget."
        )
    taken = take_while_affordable(steps, in_order(steps), limit - fixed)
    if taken.any() or standing.any():
        return taken
    if not len(steps.cost):
        raise LoraInitError("the limits leave every layer at rank 0. Raise max_rank.")
    raise LoraInitError(
        f"{budget} buys no rank in any layer: the cheapest step costs {int(steps.cost.min()) + fixed:,} {budget.unit}."
    )


def _reach(budget: Budget, spectra: Spectra, steps: Steps, unit_of: IntArray) -> BoolArray:
    """Take the fewest steps that explain the share of the variance asked for."""
    share = budget.limit - 1e-12  # sums of ratios are off by rounding
    most = ranks_after(steps, np.ones(len(steps.unit), dtype=np.bool_))[unit_of]
    best = spectra.reached[np.arange(len(most)), most]
    if budget.coverage == "total":
        if best.mean() < share:
            raise LoraInitError(
                f"{budget} is out of reach: all that was collected and the limits allow explains "
                f"{best.mean():.4f}, {budget.limit - best.mean():.4f} less. "
                "Collect again with a larger rank, relax the limits, or ask for less."
            )
        return take_until_explained(steps, in_order(steps), unit_of, spectra.reached, share * len(best))
    short = np.flatnonzero(best < share)
    if len(short):
        worst = short[np.argmin(best[short])]
        raise LoraInitError(
            f"{budget} is out of reach in {len(short)} of {len(most)} layers, furthest in {spectra.names[worst]!r}: "
            f"rank {most[worst]}, all that was collected and the limits allow, explains {best[worst]:.4f}, "
            f"which is {budget.limit - best[worst]:.4f} less. Collect again with a larger rank, relax the limits, "
            "or ask for less."
        )
    return take_needed(steps, unit_of, np.argmax(spectra.reached >= share, axis=1))


def _collected_notes(
    budget: Budget,
    rho: float,
    average: float,
    cap: int,
    spectra: Spectra,
    limits: Sequence[Limits],
    full: BoolArray,
    is_uniform: bool,
) -> list[str]:
    """Say where what was collected, not the policy, decided: layers that are full and could have had more.

    Raises:
        LoraInitError: More ranks were asked for in one layer than were collected for any.
    """
    reach = [min(cap, target.in_features) for target in spectra.targets]
    could = np.array([limit.highest(top) for limit, top in zip(limits, reach, strict=True)])
    wanting = full & (could > spectra.collected)
    notes = []
    hungry = np.flatnonzero(wanting & spectra.starved)
    if len(hungry):
        notes.append(
            f"{_some(spectra.names, hungry)} got all the components that were found: too few rows were seen for more."
        )
    capped = np.flatnonzero(wanting & ~spectra.starved)
    if not len(capped) or is_uniform or budget.unit == "variance":
        return notes
    text = (
        f"rho={rho:g} lets a layer have rank {cap}, and {_some(spectra.names, capped)} would compete for more than the "
        f"{spectra.most_collected} components that were collected"
    )
    if budget.unit == "ranks":
        enough = math.floor(100 * spectra.most_collected / average) / 100
        raise LoraInitError(
            f"{text}. Collect again with rank={math.ceil(average)} and rho={rho:g}, or allocate with rho={enough:g}, "
            f"or with max_rank={spectra.most_collected}."
        )
    return [*notes, f"{text}. Collect again with a larger rank or rho to let them."]


def _some(names: Sequence[str], which: IntArray) -> str:
    others = len(which) - 1
    return f"{names[which[0]]!r}" + (f" and {others} other layer{'s' * (others > 1)}" if others else "")


__all__ = ["RankAllocation", "allocate_ranks"]


def allocate_ranks(
    stats: Statistics,
    rank: int | None = None,
    rho: float = 2.0,
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
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    exclude: str | Collection[str] = (),
) -> RankAllocation:
    """Share one budget of ranks out among the layers.

    With no more than `rank` and `rho` this is EVA's rule (arXiv 2410.07170): the components of all layers compete by
    explained-variance ratio for rank x (number of layers) places, at most round(rho x rank) in one layer. Ties go to
    the earlier layer. A policy changes what they compete by, a budget changes what is counted, and limits always hold.
    The sum never exceeds the budget, and no layer could take one more step with what is left. More budget never
    explains less where all steps cost the same, or where the policy is `cost-aware` and the budget in parameters.

    Args:
        stats: From `collect`, or loaded. Only variances are read, no components, unless `policy` is a function.
        rank: Budget: average rank of the layers that take part. Without any budget: the rank that the statistics were
            collected for.
        rho: At most round(rho x average rank) in one layer, under every budget but `variance` and every policy but
            `uniform`. 1 gives all layers the same rank.
        total_rank: Budget: sum of all ranks.
        parameters: Budget: trainable parameters; a whole number, or text such as `"2.5M"`.
        fraction: Budget: share of the base model's parameters.
        megabytes: Budget: size of the saved adapter file, 10^6 bytes, header included.
        dtype: Of the saved adapter, for `megabytes`: `"float32"`, `"float16"` or `"bfloat16"`.
        variance: Budget: the fewest ranks that explain this share of the variance.
        coverage: For `variance`: `"every-layer"` must reach it; or `"total"`, the mean over the layers.
            With the first, the policy has nothing to decide.
        policy: `"uniform"`, `"eva"`, `"cost-aware"`, `"proportional"` (see `policies`), or a function from a layer's
            name and `Spectrum` to the worth of each of its ranks, [k]. From statistics with gradients also
            `"gradient"`, `"gradient-per-parameter"` and `"gora"`.
        min_rank: Smallest rank of a layer; 0 lets a layer go without an adapter.
        max_rank: Largest rank of a layer.
        multiple_of: Ranks are multiples of this, or 0.
        allowed_ranks: Ranks are among these, or 0.
        tie: Name endings of layers that get one rank within each block, such as `("q_proj", "k_proj", "v_proj")`; or
            several such tuples.
        overrides: Limits for the layers that a name, an ending or a wildcard means: `{"*.down_proj": {"max_rank": 8}}`,
            with `rank` (fixed), `min_rank`, `max_rank`, `multiple_of` and `allowed_ranks`. Later ones win.
        exclude: Names, endings or wildcards of layers that take no part: they get rank 0 and do not count in `rank`.

    Raises:
        LoraInitError: Two budgets, a budget of 0 or beyond what was collected; limits that contradict each other or the
            budget; a pattern that matches nothing; an unknown policy, or a function that returns NaN.
    """
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 1.0 <= rho < math.inf:
        raise LoraInitError(f"rho={rho!r}: a number of at least 1 is needed; 1 gives every layer the same rank.")
    names = list(stats)
    base = dict(min_rank=min_rank, max_rank=max_rank, multiple_of=multiple_of, allowed_ranks=allowed_ranks)
    limits = layer_limits(names, base, overrides, exclude)
    budget = choose_budget(
        len(limits), stats.provenance.n_parameters, stats.provenance.rank,
        rank=rank, total_rank=total_rank, parameters=parameters, fraction=fraction, megabytes=megabytes,
        variance=variance, dtype=dtype, coverage=coverage,
    )  # fmt: skip
    spectra = stack_spectra(stats, list(limits))
    plan = make_plan(stats, spectra, budget, policy, rho, list(limits.values()), tie)
    ranks = dict(zip(limits, plan.ranks.tolist(), strict=True))
    explained = dict(zip(limits, spectra.reached[np.arange(len(limits)), plan.ranks].tolist(), strict=True))
    settings = {
        **({"rho": rho} if budget.unit != "variance" and policy != "uniform" else {}),
        **{key: value for key, value in base.items() if value != getattr(Limits(), key)},
        **{key: value for key, value in [("tie", tie), ("overrides", overrides), ("exclude", exclude)] if value},
    }
    return RankAllocation(
        ranks={name: ranks.get(name, 0) for name in names},
        rank=int(budget.asked) if budget.kind == "rank" else max(1, round(sum(ranks.values()) / len(ranks))),
        targets={name: stats.targets[name] for name in names},
        explained={name: explained.get(name, 0.0) for name in names},
        policy=policy if isinstance(policy, str) else getattr(policy, "__name__", "custom"),
        budget=budget,
        settings=settings,
        provenance=stats.provenance,
        unsupported=stats.unsupported,
        excluded=tuple(name for name in names if name not in ranks),
        unsettled=plan.unsettled,
        error_source=plan.error_source,
        notes=plan.notes,
    )
