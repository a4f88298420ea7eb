"""`--statistics FILE` of the command line: used if the file is there and fits, else written.

While the pass goes on, FILE.partial holds its state: killed, it goes on from there when the command is given again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_init.cli.console import say
from lora_init.collection.collect import Interrupted, fingerprint
from lora_init.collection.team import Team
from lora_init.errors import LoraInitError
from lora_init.layers.targets import find_targets
from lora_init.loading.models import LoadedModel
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
