"""A plan on a terminal: heat map, totals, what came from which kind of layer; and several plans side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_init.cli.tables import facts, rank_table
from lora_init.planning.plan import RankAllocation
from lora_init.planning.plan_numbers import kind_totals, plan_text, source_text, uniform_twin
from lora_init.statistics.statistics import Statistics

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def show_plan(console: Console, plan: RankAllocation, stats: Statistics) -> None:
    """Print a plan, and what it costs and explains against uniform ranks of the same sum."""
    even = uniform_twin(plan, stats)
    used = [rank for rank in plan.values() if rank]
    rows = {
        "plan": plan_text(plan),
        "layers": f"{len(used)} of {len(plan)} with rank {_range(used)}, average rank {plan.rank}",
        "spent": _spent(plan),
        "parameters": f"{plan.parameters:,}, {plan.parameters / even.parameters - 1:+.1%} against uniform ranks of the "
        f"same sum, {plan.total_rank:,}",
        "adapter file": f"{plan.megabytes():.2f} MB in float32, {plan.megabytes('bfloat16'):.2f} MB in bfloat16",
        "explained": f"{plan.explained_variance:.1%} of a layer's variance on average; "
        f"{even.explained_variance:.1%} with uniform ranks",
        "from": source_text(plan),
    }
    if plan.unsettled:
        name, (low, high) = max(plan.unsettled.items(), key=lambda item: item[1][1] - item[1][0])
        rows["least sure"] = f"{name}: rank {plan[name]}, could be {low} to {high}"
    console.print(rank_table(plan))
    console.print()
    console.print(_kind_table(plan))
    console.print()
    console.print(facts(rows))
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)


def _range(ranks: Sequence[int]) -> str:
    least, most = min(ranks), max(ranks)
    return str(least) if least == most else f"{least}-{most}"


def _spent(plan: RankAllocation) -> str:
    budget = plan.budget
    if budget is None:
        return "by hand"
    if budget.unit == "variance":
        where = "of the variance of the layer with least" if budget.coverage == "every-layer" else "of the variance"
        return f"{plan.total_rank:,} ranks for {plan.spent:.2%} {where}; {budget.limit:.2%} asked for"
    return f"{plan.spent:,.0f} of {budget.limit:,.0f} {budget.unit} ({plan.spent / budget.limit:.2%})"


def _kind_table(plan: RankAllocation) -> Table:
    table = _table("layers", "count", "rank", "total rank", "parameters", "share", "explained")
    for kind in kind_totals(plan):
        table.add_row(
            kind.kind,
            str(kind.n_layers),
            _range([kind.least, kind.most]),
            f"{kind.total_rank:,}",
            f"{kind.parameters:,}",
            f"{kind.parameters / max(plan.parameters, 1):.1%}",
            f"{kind.explained:.1%}",
        )
    return table


def comparison_table(plans: Mapping[str, RankAllocation]) -> Table:
    """Set plans side by side. MB is the file's in float32; least is what is explained in the layer with least."""
    table = _table("plan", "rank", "layers", "total", "params", "MB", "explained", "least")
    for label, plan in plans.items():
        used = [rank for rank in plan.values() if rank]
        least = min((plan.explained[name] for name in plan if name not in plan.excluded), default=0.0)
        table.add_row(
            label,
            _range(used),
            str(len(used)),
            f"{plan.total_rank:,}",
            f"{plan.parameters:,}",
            f"{plan.megabytes():.2f}",
            f"{plan.explained_variance:.2%}",
            f"{least:.1%}",
        )
    return table


def _table(first: str, *others: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def comparison_values(plans: Mapping[str, RankAllocation]) -> list[dict[str, Any]]:
    """Give the content of `comparison_table` as plain values, with the ranks."""
    return [
        {
            "plan": label,
            "policy": plan.policy,
            "budget": str(plan.budget),
            "total_rank": plan.total_rank,
            "parameters": plan.parameters,
            "megabytes_float32": round(plan.megabytes(), 6),
            "explained_variance": round(plan.explained_variance, 9),
            "ranks": dict(plan),
            "notes": list(plan.notes),
        }
        for label, plan in plans.items()
    ]
