"""What `lora-init init` says at the end: as plain values, and on a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_init.cli.console import say
from lora_init.cli.tables import facts, rank_table
from lora_init.collection.collect import Interrupted, fingerprint
from lora_init.collection.processes import Team
from lora_init.errors import LoraInitError
from lora_init.layers.targets import find_targets
from lora_init.loading.models import LoadedModel
from lora_init.statistics.statistics import Statistics

if TYPE_CHECKING:
    from rich.console import Console

    from lora_init.adapters.adapter_init import AdapterInit
    from lora_init.planning.allocate import RankAllocation
    from lora_init.statistics.statistics import Statistics


def obtain(
    file: Path | None, loaded: LoadedModel, settings: dict[str, Any], collect_now: Callable[[Path | None], Statistics]
) -> Statistics:
    """Take the statistics from the file if there is one that fits, else collect them and write the file."""
    if file is None:
        return collect_now(None)
    file = file.expanduser()
    with Team() as team:
        there = team.meet(file.exists())
    if len(set(there)) > 1:
        raise LoraInitError(
            f"--statistics {file}: rank {there.index(True)} sees this file, rank {there.index(False)} does not. "
            "Name a file in a place that all processes share."
        )
    if there[0]:
        return _reuse(file, loaded, settings)
    if not file.parent.is_dir():
        raise LoraInitError(f"--statistics {file}: the directory {file.parent} doesn't exist. Create it first.")
    partial = file.with_name(f"{file.name}.partial")
    first = team.rank == 0
    if partial.exists():
        say(f"{partial}: going on with the pass that was interrupted")
    try:
        stats = collect_now(partial)
    except Interrupted as stop:
        if stop.statistics is not None and first:
            stop.statistics.save(file)
            say(f"{file}: kept the statistics of {stop.statistics.provenance.n_batches} batches")
            partial.unlink(missing_ok=True)
        raise
    if first:
        stats.save(file)
        partial.unlink(missing_ok=True)
    return stats


def _reuse(file: Path, loaded: LoadedModel, settings: dict[str, Any]) -> Statistics:
    """Load statistics, and refuse them if they were made for another model or with other settings."""
    stats = Statistics.load(file)
    made = stats.provenance
    remedy = "Name another file, or delete this one to collect again."
    if made.fingerprint != fingerprint(loaded.model):
        origin = f"{made.model_class} {made.model_id}".strip()
        raise LoraInitError(f"{file} was made from another model ({origin}). {remedy}")
    found = find_targets(
        loaded.model, settings["target_modules"], settings["exclude_modules"], settings["task_type"],
        settings["target_parameters"],
    )  # fmt: skip
    wanted, there = {*found.layers, *found.unsupported}, {*stats, *stats.unsupported}
    if wanted != there:
        raise LoraInitError(
            f"{file} is not about the layers that --target-modules and --target-parameters select: "
            f"{len(wanted - there)} are missing, {len(there - wanted)} too many. {remedy}"
        )
    for option, name in (("--center", "center"), ("--token-mask", "token_mask"), ("--task-type", "task_type")):
        if getattr(made, name) != settings[name]:
            raise LoraInitError(
                f"{file} was made with {option} {getattr(made, name)}, and {settings[name]} is asked for. {remedy}"
            )
    if settings.get("gradients") and not made.gradients:
        raise LoraInitError(f"{file} was made without --gradients, and this needs them. {remedy}")
    say(f"{file}: used as it is ({made.data or 'data not described'}; {made.n_batches} batches, {made.stop_reason})")
    return stats


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
