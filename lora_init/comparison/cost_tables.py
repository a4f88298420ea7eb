"""Tables beside the losses: scale and size, cost, forgetting and intruder dimensions, and every run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_init.comparison.paired import paired_difference
from lora_init.comparison.run_log import Record
from lora_init.comparison.run_measures import METRICS, RunTable, average, retained
from lora_init.comparison.runs import RANDOM, Group, Variant, final_loss, parameters, random_group
from lora_init.comparison.verdicts import final_losses
from lora_init.comparison.wording import number, rate_text, signed


def scale_table(groups: Sequence[Group]) -> RunTable:
    """Set each start beside itself with matched scale and with equal parameters; no rows if it was not run so."""
    by_variant = {group.variant: group for group in groups}
    random = random_group(groups)
    rows = []
    more = any(variant.matched_scale or variant.equal_parameters for variant in by_variant)
    for start in dict.fromkeys(variant.start for variant in by_variant):
        for equal in (False, True):
            for matched in (False, True):
                variant = Variant(start, matched, equal)
                if variant in by_variant:
                    rows.append(_scale_row(by_variant[variant], random))
    return RunTable(
        "scale",
        "Scale and size of the adapters",
        "Each start as it is, with the rows of A scaled to the random start's norm, and with as many parameters. If a "
        "difference goes away with the scale, the scale was what made it.",
        ("start", "scale of A", "parameters", "final loss", "difference to random"),
        rows if more else [],
    )


def _scale_row(group: Group, random: Group | None) -> tuple[str, ...]:
    pairs = paired_difference(final_losses(group), final_losses(random))
    return (
        group.label,
        number(average(run.get("a_scale") for run in group.best_runs.values())),
        _whole(parameters(group)),
        number(average(final_losses(group).values())),
        "–" if group.variant == RANDOM else signed(pairs.mean),
    )


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def cost_table(groups: Sequence[Group]) -> RunTable:
    """Say what each start costs: parameters, time, memory."""

    def mean(group: Group, key: str, write: Callable[[float | None], str]) -> str:
        return write(average(run.get(key) for run in group.best_runs.values()))

    def tenth(value: float | None) -> str:
        return "–" if value is None else f"{value:,.1f}"

    def megabytes(value: float | None) -> str:
        return "–" if value is None else f"{value / 1e6:,.0f}"

    rows = [
        (
            group.label,
            _whole(parameters(group)),
            mean(group, "a_scale", number),
            mean(group, "gradient_norm", number),
            mean(group, "initialisation_seconds", tenth),
            mean(group, "initialisation_passes", _whole),
            mean(group, "training_seconds", tenth),
            mean(group, "peak_memory_bytes", megabytes),
        )
        for group in groups
        if group.best is not None
    ]
    return RunTable(
        "cost",
        "Cost",
        "Means of the runs at each start's best rate. Scale of A: root mean square of the norms of its rows. First "
        "gradient: its norm in the first step. Passes: forward passes over batches of data before training.",
        ("start", "parameters", "scale of A", "first gradient", "start, s", "passes", "training, s", "peak, MB"),
        rows,
    )


def forgetting_table(groups: Sequence[Group]) -> RunTable:
    """Say what each start did to the loss on other text, and to the weights' singular vectors."""
    rows = []
    for group in groups:
        runs = group.best_runs.values()
        kept = [losses for run in runs if (losses := retained(run))]
        intruders = [run["intruders"] for run in runs if run.get("intruders")]
        if kept or intruders:
            number_of = average(i["count"] for i in intruders)
            rows.append(
                (
                    group.label,
                    number(average(before for before, _ in kept)),
                    number(average(after for _, after in kept)),
                    signed(average(after - before for before, after in kept)),
                    "–" if number_of is None else f"{number_of:,.1f} of {intruders[0]['of']:,}",
                    "–" if number_of is None else f"{average(i['energy_share'] for i in intruders):.1%}",
                )
            )
    return RunTable(
        "forgetting",
        "Forgetting, and intruder dimensions",
        "Means of the runs at each start's best rate. Retained: loss on text of another kind. Intruders: of the first "
        "ten left singular vectors of each trained weight, those with no cosine of 0.5 to one of the untrained.",
        ("start", "retained before", "retained after", "change", "intruders", "share of energy"),
        rows,
    )


def every_run(groups: Sequence[Group]) -> RunTable:
    """List every run with its numbers."""
    rows = []
    for group in groups:
        for rate, cell in group.cells.items():
            rows += [_run_row(group, rate, seed, run, cell.status(seed)) for seed, run in cell.runs.items()]
    return RunTable(
        "runs",
        "Every run",
        "Validation loss at each evaluation point, the first before training.",
        ("start", "rate", "seed", "status", "final loss", "validation loss", "metrics", "retained", "training, s"),
        rows,
    )


def _run_row(group: Group, rate: float, seed: int, run: Record, status: str) -> tuple[str, ...]:
    losses = run.get("validation_loss") or []
    metrics: Mapping[str, Any] = run.get("metrics") or {}
    return (
        group.label,
        rate_text(rate),
        str(seed),
        status,
        number(final_loss(run)) if status == "finished" else "–",
        " ".join(number(loss) for loss in losses) or "–",
        ", ".join(f"{METRICS.get(k, k)} {number(v)}" for k, v in metrics.items()) or "–",
        " to ".join(number(loss) for loss in run.get("retain_loss") or []) or "–",
        "–" if run.get("training_seconds") is None else f"{run['training_seconds']:.1f}",
    )
