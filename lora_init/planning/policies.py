"""Policies: what one more rank in a layer is worth. Importing this file imports neither torch nor numpy.

A policy is one function from the spectra of all layers to the worth of each rank. `allocate` then takes ranks by
falling worth until the budget is spent, so that a policy holds no rule about budgets, limits or ties. To add one, write
its function and add a `Policy` to `POLICIES`; or publish a package of your own with an entry point of the group
`lora_init.policies` that refers to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_init.errors import LoraInitError, did_you_mean
from lora_init.packages import Group, check_takes

if TYPE_CHECKING:
    from lora_init.planning.budgets import FloatArray
    from lora_init.statistics.statistics import Statistics

RHO = 1.0  # default: at most this times the average rank in one layer, so all layers have the same


@dataclass(frozen=True)
class Policy:
    """What ranks compete by.

    Attributes:
        function: Takes K numbers of each layer, [n, K], 0 where a layer has fewer, and d_in + d_out of each layer, [n];
            returns the worth of each rank, [n, K].
        reads: Returns the numbers of one layer, from statistics and its name, where they come from its gradients. None
            for the explained-variance ratio of each component, falling.
        per_parameter: Whether ranks compete by worth per parameter, and not by worth.
        if_zero: Why all numbers may be 0, where they come from gradients.
    """

    function: Callable[[FloatArray, FloatArray], FloatArray]
    reads: Callable[[Statistics, str], Sequence[float]] | None = None
    per_parameter: bool = False
    if_zero: str = "the loss depends on no layer"

    @property
    def needs_gradient(self) -> bool:
        """Whether the statistics must have gradients."""
        return self.reads is not None


def uniform(ratios: FloatArray, widths: FloatArray) -> FloatArray:
    """Value the j-th rank of every layer at 1 / (j - 1/2): all layers rise at once, as evenly as the limits allow.

    The baseline: LoRA (Hu et al., arXiv 2106.09685) with one rank for all layers.
    """
    import numpy as np

    return proportional_to(np.ones(len(ratios)), ratios.shape[1])


def eva(ratios: FloatArray, widths: FloatArray) -> FloatArray:
    """Value the j-th rank at the share of the layer's variance that its j-th component explains.

    Source: EVA (Paischer et al., arXiv 2410.07170, section 3.3); `peft.tuners.lora.eva` does the same. `cost-aware`
    takes this per parameter: ratio_j / (d_in + d_out). Under a budget in parameters that is the greedy rule for the
    knapsack problem (Dantzig 1957). Because ratios fall within a layer, its total explained variance is less than the
    best possible by at most one step's.
    """
    return ratios


def proportional(ratios: FloatArray, widths: FloatArray) -> FloatArray:
    """Share ranks out in proportion to each layer's effective rank, 1 / sum_j(ratio_j^2).

    This is the number of equally strong directions with the same concentration of variance (the participation ratio;
    the exponential of Renyi's entropy of order 2). The entropy of order 1 of Roy and Vetterli (2007), from which the
    name comes, needs the whole spectrum, and the statistics hold its head only; in squares the tail is negligible: what
    is missed adds at most (variance not kept) x (last ratio kept) to the sum.
    """
    import numpy as np

    concentration = (ratios**2).sum(axis=1)
    # A layer whose rows are constant has no direction, and claims nothing.
    effective = np.divide(1.0, concentration, out=np.zeros_like(concentration), where=concentration > 0.0)
    return proportional_to(effective, ratios.shape[1])


def proportional_to(claims: FloatArray, n_ranks: int) -> FloatArray:
    """Value the j-th rank at claim / (j - 1/2), which shares ranks out in proportion to the claims, [n].

    The divisor method of Webster and Sainte-Lague: no other whole numbers of the same sum lie nearer to proportion, in
    the sense that no move of one rank makes any two layers' ranks per claim more equal.
    """
    import numpy as np

    return claims[:, None] / (np.arange(n_ranks) + 0.5)  # layers, ranks -> layers x ranks


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
    return proportional_to(importance[:, 0] / widths**0.5, importance.shape[1])


def _gains(stats: Statistics, name: str) -> Any:
    return stats.gradient(name).weighted.explained_variance.numpy()


def _importance(stats: Statistics, name: str) -> list[float]:
    importance = stats.gradient(name).importance
    if math.isnan(importance):
        raise LoraInitError(
            f"{{policy}}: the importance of {name!r} is unknown. It needs the model's weights, which a merge of "
            "statistics does not have. Collect from all the data in one pass, or choose another policy.",
            policy="gora",
        )
    return [importance]  # in the first column, where `gora` reads it


POLICIES = {
    "uniform": Policy(uniform),
    "eva": Policy(eva),
    "cost-aware": Policy(eva, per_parameter=True),
    "proportional": Policy(proportional),
    "gradient": Policy(gradient, _gains),
    "gradient-per-parameter": Policy(gradient, _gains, per_parameter=True),
    "gora": Policy(gora, _importance, if_zero="the weights are quantized"),
}
# Entry points of installed packages.
_THEIRS = Group("lora_init.policies", "policy")


def policy_names() -> tuple[str, ...]:
    """Return the names of all policies, other packages' last. None of these is imported for it."""
    return (*POLICIES, *(name for name in _THEIRS.entries if name not in POLICIES))


def find_policy(name: str) -> Policy:
    """Look a policy up. One of a package that has the name of one of ours is warned of, and not used.

    Raises:
        LoraInitError: It is unknown, or what a package has under its name is no policy.
    """
    if isinstance(name, str) and name in POLICIES:
        _THEIRS.warn_of(name)
        return POLICIES[name]
    if name not in policy_names():
        raise LoraInitError(
            f"{{policy}} is unknown. {did_you_mean(str(name), policy_names())} A function is one, too.", policy=name
        )
    with _THEIRS.loading(name) as (entry, where):
        policy = entry.load()
        if not isinstance(policy, Policy):
            raise LoraInitError(f"{where}: {entry.value} is no lora_init.Policy.")
        check_takes(policy.function, f"{where}: its function", "numbers", "widths")
        if policy.reads is not None:
            check_takes(policy.reads, f"{where}: its reads", "statistics", "name")
    return policy
