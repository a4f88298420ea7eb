"""The summary of the adapter that `lora-init init` wrote, as plain values and in words."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from lora_init.cli.console import print_next, running
from lora_init.cli.tables import correction_facts, facts, finite, quantization_name
from lora_init.errors import LoraInitError

if TYPE_CHECKING:
    from rich.console import Console

    from lora_init.adapters.adapter_init import AdapterInit
    from lora_init.bank.start import BankStart
    from lora_init.cli.source import Names
    from lora_init.planning.plan import RankAllocation
    from lora_init.statistics.statistics import Statistics


def _how_to_load(model: str, directory: Path, built: AdapterInit) -> str:
    # One line of PEFT does not do there: the base is changed first, or A is frozen afterwards.
    if built.corrects_base or built.freeze_a:
        return f"as {directory / 'README.md'} shows"
    classes, base = built.provenance.settings.get("classes"), "base_model"
    if classes:  # the head must have as many outputs, in this order
        labels = dict(enumerate(map(str, classes)))
        base = f"AutoModelForSequenceClassification.from_pretrained({model!r}, id2label={labels})"
    return f"PeftModel.from_pretrained({base}, {str(directory)!r}, is_trainable=True)"


def _next(directory: Path) -> str:
    """Write what one does next with an adapter that `init` wrote."""
    from lora_init.adapters.directory import AdapterDirectory
    from lora_init.keep.dial import check_dialable

    # The dial's own check decides, so that no command is offered which would be refused after the training.
    try:
        check_dialable(AdapterDirectory(directory).config, (), "")
    except LoraInitError:
        return f"train it as {directory / 'README.md'} shows; then lora-init inspect TRAINED"
    return "train it; then lora-init dial TRAINED HELD-OUT-DATA -o kept"


def summary_of(
    names: Names, stats: Statistics, ranks: RankAllocation, directory: Path, built: AdapterInit
) -> dict[str, Any]:
    """Put what `lora-init init` did into plain values."""
    from lora_init.adapters.card import correction_of, start_in_words
    from lora_init.adapters.directory import WEIGHTS_FILE, AdapterDirectory
    from lora_init.serving.support import serving_note

    made, file = stats.provenance, names.file
    before, after = built.losses or (None, None)
    special = []  # what one must know of this adapter before it is trained
    if built.corrects_base or built.changes_output or built.freeze_a:
        special.append(f"{start_in_words(built)}.")
    if made.quantisation:
        special.append(f"the base was quantized ({quantization_name(made.quantisation)}): train and serve on the same.")
    base_change = built.method if built.corrects_base else ""
    # The directory is read back, so that what is printed is about what was written.
    written, size = AdapterDirectory(directory), (directory / WEIGHTS_FILE).stat().st_size / 10**6
    return {
        "adapter": str(directory),
        "statistics": str(file) if file else None,
        "model": made.model_id,
        "model_class": made.model_class,
        "data": made.data,
        "classes": made.settings.get("classes", []),
        "rank": ranks.rank,
        "ranks": dict(ranks),
        "method": built.method,
        "lora_alpha": built.lora_alpha,
        "scaling": built.scaling,
        "parameters": built.n_parameters(),
        "megabytes": size,
        "megabytes_at_one_rank": _at_one_rank(built) * size,
        "uniform_parameters": sum(
            target.parameters(ranks.rank, built.freeze_a, built.use_dora) for target in stats.targets.values()
        ),
        "n_samples": made.n_samples,
        "n_batches": made.n_batches,
        "stop_reason": made.stop_reason,
        "n_components": max(len(stats.explained_variance(name)) for name in stats),
        "held_out": _held_out(stats),
        "gamma": built.gamma,
        "loss_before": finite(before),
        "loss_at_start": finite(after),
        "correction": correction_of(built) if built.errors else None,
        "quantisation": made.quantisation,
        "seconds": made.seconds,
        "serving": serving_note(ranks, written.config, written.shapes, base_change),
        "load": _how_to_load(names.model, directory, built),
        "recommended": built.recommended,
        "train": built.how_to_train,
        "next": _next(directory),
        "notes": [*special, *made.notes, *ranks.notes, *_notes(built, ranks)],
    }


def _held_out(stats: Statistics) -> dict[str, Any] | None:
    """Summarize the shares of held-out variance that layers keep; None if none was measured."""
    # NaN where it was not measured.
    shares = {name: share for name, share in stats.held_out.items() if math.isfinite(share)}
    if not shares:
        return None
    worst = min(shares, key=shares.__getitem__)
    return {"median": finite(median(shares.values())), "min": finite(shares[worst]), "min_layer": worst}


def summary_of_bank(started: BankStart, directory: Path) -> dict[str, Any]:
    """Put what a start from a bank is into plain values."""
    init = started.init
    before, after = init.losses or (None, None)
    return {
        "adapter": str(directory),
        "method": init.method, "ranks": init.ranks, "parameters": init.n_parameters(),
        "neighbours": [asdict(neighbour) | {"said": neighbour.in_words()} for neighbour in started.neighbours],
        "weights": dict(started.weights), "passes": started.passes, "gamma": init.gamma,
        "loss_before": finite(before), "loss_at_start": finite(after), "next": _next(directory),
    }  # fmt: skip


def show_bank_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Print what `summary_of_bank` returned."""
    # With a sign, since a mixture may take an adapter away.
    weights = ", ".join(f"{weight:+.2f} {name}" for name, weight in summary["weights"].items())
    loss = "not measured: no labelled examples"
    if summary["loss_before"] is not None:
        loss = "{loss_before:.4f} -> {loss_at_start:.4f} before any training".format(**summary)
    rows = {
        "nearest": "\n".join(neighbour["said"] for neighbour in summary["neighbours"][:3]),  # the JSON has all
        "weights": weights or "none: generated from the prompts",
        "size": f"{1.0 / summary['gamma']:g} x the update",
        "loss": loss,
        "parameters": f"{summary['parameters']:,}",
        "adapter": summary["adapter"],
    }
    console.print(facts(rows))
    print_next(console, summary["next"])


def _notes(built: AdapterInit, ranks: RankAllocation) -> list[str]:
    notes = []
    # These depend on the options of the adapter; notes of the statistics and the plan depend on what was measured.
    if built.start.needs_gradient:  # of 256 examples, a third held out, labels made a held-out loss 20 % lower
        notes.append("it has seen the labels of these examples: judge what you train from it by others.")
    if built.use_dora and ranks.budget is not None and ranks.budget.unit in ("parameters", "bytes"):
        notes.append(f"{ranks.budget} does not count DoRA's magnitudes.")
    if built.dtype != "float32":
        notes.append(f"PEFT trains and saves float32; `lora-init export --dtype {built.dtype}` keeps {ranks.budget}.")
    return notes


def _at_one_rank(built: AdapterInit) -> float:
    """Compute how many times as large the adapter is with its largest rank in every layer, as `export` makes it."""
    # One rank for all is the largest: a lower one would take directions from layers that were given more.
    largest = max(built.ranks.values())
    costs = {name: target.parameters(1) for name, target in built.targets.items()}  # of one rank: d_in + d_out
    as_built = 0
    for name, rank in built.ranks.items():
        as_built += rank * costs[name]
    return largest * sum(costs.values()) / as_built


def show_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Print what `summary_of` returned: start and size, how to train, who takes it, how to load it, where more is."""
    ranks, directory = summary["ranks"], summary["adapter"]
    used = [rank for rank in ranks.values() if rank]
    least, most = min(used), max(used)
    size, at_one = summary["megabytes"], summary["megabytes_at_one_rank"]
    spread, serving = str(most), f"{size:.1f} MB. {summary['serving']}"
    if least < most:  # engines that take one rank only need an export
        spread = f"{least} to {most} (average {fmean(used):.3g})"
        serving += f" `export` makes {at_one:.1f} MB of it at one rank, {size:.1f} MB with --keep-ranks."
    lines = [
        f"{directory}: {summary['method']}, rank {spread} in "
        f"{len(used)} of {len(ranks)} layers, lora_alpha {summary['lora_alpha']:g} (scaling {summary['scaling']:g}), "
        f"{summary['parameters']:,} parameters.",
        summary["train"],
    ]
    if summary["correction"]:
        lines += [f"{name}: {text}" for name, text in correction_facts(summary["correction"]).items()]
    lines += [serving, f"Load it: {summary['load']}"]
    # Some notes were printed as warnings while the command ran; nobody reads them twice.
    lines += [f"note: {note}" for note in summary["notes"] if note not in running.warned]
    lines.append(f"Ranks, data and what they capture: lora-init inspect {shlex.quote(str(directory))}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    print_next(console, summary["next"])
