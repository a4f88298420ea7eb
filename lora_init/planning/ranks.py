"""How many ranks each layer gets: from statistics and a budget to a plan, in an instant and without the model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lora_init.errors import LoraInitError
from lora_init.planning.allocate import make_plan
from lora_init.planning.budgets import choose_budget
from lora_init.planning.limits import Limits, layer_limits
from lora_init.planning.plan import RankAllocation
from lora_init.planning.policies import Rule
from lora_init.planning.spectra import stack_spectra
from lora_init.statistics.statistics import Statistics

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
