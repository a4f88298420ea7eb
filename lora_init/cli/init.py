"""What `lora-init init` says at the end: as plain values, and on a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_init.cli.tables import facts, rank_table

if TYPE_CHECKING:
    from rich.console import Console

    from lora_init.adapters.adapter_init import AdapterInit
    from lora_init.planning.ranks import RankAllocation
    from lora_init.statistics.statistics import Statistics

_SHOWN_NOTES = 5


def summarise(
    stats: Statistics, ranks: RankAllocation, directory: Path, file: Path | None, built: AdapterInit
) -> dict[str, Any]:
    """Put what `lora-init init` did into plain values."""
    made = stats.provenance
    held_out = {leader: share for leader, share in stats.held_out.items() if finite(share) is not None}
    worst = min(held_out, key=held_out.__getitem__, default=None)
    return {
        "adapter": str(directory),
        "statistics": str(file) if file else None,
        "model": made.model_id,
        "model_class": made.model_class,
        "data": made.data,
        "rank": ranks.rank,
        "ranks": dict(ranks),
        "parameters": ranks.parameters,
        "uniform_parameters": sum(target.parameters(ranks.rank) for target in stats.targets.values()),
        "n_samples": made.n_samples,
        "n_batches": made.n_batches,
        "stop_reason": made.stop_reason,
        "n_components": max(len(stats.explained_variance(name)) for name in stats),
        "held_out": None
        if worst is None
        else {
            "median": finite(statistics.median(held_out.values())),
            "min": finite(held_out[worst]),
            "min_layer": worst,
        },
        "gamma": built.gamma,
        "loss_before": None if built.losses is None else finite(built.losses[0]),
        "loss_at_start": None if built.losses is None else finite(built.losses[1]),
        "seconds": made.seconds,
        "notes": [
            *([f"{built.start_in_words()}."] if built.corrects_base or built.changes_output else []),
            *made.notes,
            *ranks.notes,
        ],
    }


def show_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Print what `summarise` returned."""
    ranks = summary["ranks"]
    given = [rank for rank in ranks.values() if rank]
    change = summary["parameters"] / summary["uniform_parameters"] - 1
    held_out = summary["held_out"]
    rows = {
        "layers": f"{len(given)} with rank {min(given)} to {max(given)}, {len(ranks) - len(given)} without an adapter",
        "parameters": f"{summary['parameters']:,}, {change:+.1%} against rank {summary['rank']} everywhere",
        "data": summary["data"] or "not described",
        "pass": f"{summary['n_samples']:,} rows in {summary['n_batches']} batches, stopped: {summary['stop_reason']}",
        "held out": "not measured: fewer than two batches, or statistics that were merged"
        if held_out is None
        else f"{summary['n_components']} components capture {held_out['median']:.1%} of the variance of unseen rows "
        f"(median), {held_out['min']:.1%} at least ({held_out['min_layer']})",
        "time": ", ".join(f"{part} {seconds:.1f} s" for part, seconds in summary["seconds"].items()),
    }
    rows |= {"statistics": summary["statistics"]} if summary["statistics"] else {}
    rows["adapter"] = summary["adapter"]
    console.print(rank_table(ranks))
    console.print()
    console.print(facts(rows))
    for note in summary["notes"][:_SHOWN_NOTES]:
        console.print(f"note: {note}")
    if len(summary["notes"]) > _SHOWN_NOTES:
        console.print(f"and {len(summary['notes']) - _SHOWN_NOTES} more notes, all with --json")


def finite(value: float | None) -> float | None:
    """Return None for NaN, which JSON lacks."""
    return None if value is None or value != value else round(value, 6)
