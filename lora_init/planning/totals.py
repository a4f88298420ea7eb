"""What a plan comes to: by kind of layer, and beside uniform ranks of the same sum."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from lora_init.layers.grid import layer_grid
from lora_init.planning.allocate import allocate_ranks
from lora_init.planning.plan import RankAllocation
from lora_init.statistics.statistics import Statistics

if TYPE_CHECKING:
    import pandas as pd


def kind_totals(plan: RankAllocation) -> pd.DataFrame:
    """Sum a plan up by kind of layer, in model order: layers, least, most, total_rank, parameters, explained."""
    table, kinds = plan.to_pandas(), layer_grid(plan).by_kind
    kind_of = {name: kind for kind, layers in kinds.items() for name in layers.values()}
    totals = table.groupby([kind_of[name] for name in table.index]).agg(
        layers=("rank", "size"),
        least=("rank", "min"),
        most=("rank", "max"),
        total_rank=("rank", "sum"),
        parameters=("parameters", "sum"),
        explained=("explained_variance", "mean"),
    )
    return totals.loc[list(kinds)]


def totals_against_uniform(plan: RankAllocation, stats: Statistics) -> list[tuple[str, ...]]:
    """Set what a plan costs and explains beside uniform ranks of the same sum: rows of name, plan, uniform ranks."""
    with warnings.catch_warnings():  # where the data has too few directions was said when the plan was made
        warnings.simplefilter("ignore")
        both = plan, allocate_ranks(stats, total_rank=plan.total_rank, policy="uniform", exclude=plan.excluded)
    used = [[rank for rank in one.values() if rank] for one in both]
    rows = {
        "layers with an adapter": [f"{len(ranks)} of {len(plan)}" for ranks in used],
        "rank": [f"{min(ranks)} to {max(ranks)}" for ranks in used],
        "total rank": [f"{one.total_rank:,}" for one in both],
        "parameters": [f"{one.parameters:,}" for one in both],
        "MB in float32": [f"{one.megabytes():.2f}" for one in both],
        "MB in bfloat16": [f"{one.megabytes('bfloat16'):.2f}" for one in both],
        "variance explained, mean": [f"{one.explained_variance:.1%}" for one in both],
    }
    return [(name, *cells) for name, cells in rows.items()]
