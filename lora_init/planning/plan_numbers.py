"""The numbers that tables and pictures of a plan show: by kind of layer, against uniform ranks, over other budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_init.errors import LoraInitError
from lora_init.layers.grid import layer_grid
from lora_init.planning.plan import RankAllocation
from lora_init.planning.policies import POLICIES
from lora_init.planning.ranks import allocate_ranks
from lora_init.planning.spectra import stack_spectra
from lora_init.statistics.statistics import Statistics


@dataclass(frozen=True)
class KindTotals:
    """What the layers of one kind have together.

    Attributes:
        kind: Label, as in the heat map.
        n_layers: How many there are.
        least: Smallest rank.
        most: Largest rank.
        total_rank: Sum of the ranks.
        parameters: Trainable parameters.
        explained: Mean share of the variance explained.
    """

    kind: str
    n_layers: int
    least: int
    most: int
    total_rank: int
    parameters: int
    explained: float


def kind_totals(plan: RankAllocation) -> list[KindTotals]:
    """Sum a plan up by kind of layer, in model order."""
    grid = layer_grid(plan)
    totals = []
    for kind in grid.kinds:
        names = list(grid.of_kind(kind).values())
        ranks = [plan[name] for name in names]
        totals.append(
            KindTotals(
                kind,
                len(names),
                min(ranks),
                max(ranks),
                sum(ranks),
                sum(plan.targets[name].parameters(plan[name]) for name in names),
                sum(plan.explained[name] for name in names) / len(names),
            )
        )
    return totals


def uniform_twin(plan: RankAllocation, stats: Statistics) -> RankAllocation:
    """Give the same total rank to the same layers as evenly as can be: what the plan is to be compared with."""
    return allocate_ranks(stats, total_rank=plan.total_rank, policy="uniform", exclude=plan.excluded)


@dataclass(frozen=True)
class KindSpectra:
    """How much of their variance the layers of one kind explain by rank.

    Attributes:
        kind: Label, as in the heat map.
        blocks: Block number of each layer.
        reached: For each layer, the share that its first r components explain, r = 0 to as many as it has.
        ranks: Rank of each layer.
    """

    kind: str
    blocks: list[int]
    reached: list[list[float]]
    ranks: list[int]


def kind_spectra(plan: RankAllocation, stats: Statistics) -> list[KindSpectra]:
    """Collect the cumulative explained variance of every layer, by kind, in model order."""
    grid = layer_grid(plan)
    spectra = stack_spectra(stats, list(plan))
    rows = {
        name: row[: count + 1].tolist()
        for name, row, count in zip(spectra.names, spectra.reached, spectra.collected.tolist(), strict=True)
    }
    found = []
    for kind in grid.kinds:
        layers = grid.of_kind(kind)
        found.append(
            KindSpectra(kind, list(layers), [rows[n] for n in layers.values()], [plan[n] for n in layers.values()])
        )
    return found


@dataclass(frozen=True)
class BudgetCurve:
    """What one policy explains for how many parameters: a plan at each point, under the same limits."""

    policy: str
    parameters: list[int]
    explained: list[float]


def budget_curves(
    plan: RankAllocation, stats: Statistics, policies: Sequence[str] = tuple(POLICIES), n_points: int = 20
) -> list[BudgetCurve]:
    """Plan for budgets from an eighth of the plan's parameters to eight times as many, as far as components reach.

    Rank limits, ties and exclusions are the plan's; so is rho, relative to the average rank of each budget.
    """
    settings = {"rho": 2.0, **plan.settings}
    part = [name for name in plan if name not in set(plan.excluded)]
    spectra = stack_spectra(stats, part)
    exists = int((spectra.widths * spectra.collected).sum())
    budgets = np.geomspace(max(plan.parameters / 8, 1), min(plan.parameters * 8, exists), n_points)
    curves = []
    for policy in policies:
        plans = {}
        for budget in budgets:
            try:
                at = allocate_ranks(stats, parameters=int(budget), policy=policy, **settings)
            except LoraInitError:  # below what min_rank or the cheapest step costs: no point there
                continue
            plans[at.parameters] = at.explained_variance
        curves.append(BudgetCurve(policy, list(plans), list(plans.values())))
    return curves


def source_text(plan: RankAllocation) -> str:
    """Say what a plan was computed from."""
    made = plan.provenance
    if made is None:
        return "a plan made by hand"
    model = made.model_id or made.model_class or "a model without a name"
    rows = f"{made.n_samples:,} rows in {made.n_batches} batches" if made.n_samples else "rows that were not counted"
    return f"the inputs of each layer of {model} on {made.data or 'data not described'}: {rows}, {_method(made.center)}"


def _method(center: bool) -> str:
    return "centred (PCA)" if center else "not centred (second moment)"


def plan_text(plan: RankAllocation) -> str:
    """Say what was asked for, in the words of the command line."""
    settings = ", ".join(
        f"{key}={value:g}" if key == "rho" else f"{key}={value}" for key, value in plan.settings.items()
    )
    return f"policy {plan.policy or 'by hand'}, budget {plan.budget or 'by hand'}{', ' + settings if settings else ''}"
