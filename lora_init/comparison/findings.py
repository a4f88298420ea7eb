"""What a reader must know beside the verdicts: what is missing, unstable or failed, and what chance can do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_init.comparison.run_log import Record
from lora_init.comparison.runs import Group, best_of_all, mean_at, parameters, random_group, table_seeds
from lora_init.comparison.verdicts import verdicts
from lora_init.comparison.wording import count, join, number, rate_text, seed_list

# The rates that people use without a sweep.
UNTUNED = (1e-4, 3e-4)
# Parameter counts that differ by less than this share count as equal: whole ranks can't always meet a number.
_EQUAL_PARAMETERS = 0.01
_NAMED = 6


def notes(groups: Sequence[Group], settings: Mapping[str, Any]) -> list[str]:
    """Say it in whole sentences, the most serious first."""
    return [
        *_missing(groups, settings),
        *_unstable(groups),
        *_failed(groups),
        *_sweeps(groups),
        *_sizes(groups),
        *_untuned(groups),
        *_chance(groups),
    ]


def start_names(settings: Mapping[str, Any]) -> list[str]:
    """Name the starts that the settings ask for; a user's own is a name with where it is."""
    return [start if isinstance(start, str) else str(start[0]) for start in settings.get("starts") or []]


def _missing(groups: Sequence[Group], settings: Mapping[str, Any]) -> list[str]:
    if not groups:
        return ["No run has ended yet, so there is nothing to compare."]
    said = []
    if random_group(groups) is None:
        said.append(
            "Every start is compared with random, and random has no learning rate with a finished run and no unstable "
            "one. Add random to --starts, or lower rates."
        )
    ran = {group.variant.start for group in groups}
    absent = [start for start in start_names(settings) if start not in ran and start != "random"]
    if absent:
        said.append(f"Not run yet: {join(absent)}.")
    for group in groups:
        seeds = set(settings.get("seeds") or []) - set(group.best_runs)
        if group.best is not None and seeds:
            said.append(
                f"{group.label}: no finished run with {seed_list(seeds)} at its best rate, {rate_text(group.best)}."
            )
    return said


def _unstable(groups: Sequence[Group]) -> list[str]:
    return [
        f"{group.label} is unstable at {rate_text(rate)} ({seed_list(cell.unstable)}: {_why(cell.unstable.values())}), "
        "so this rate is not averaged. "
        f"{_next_lower(group, rate)}"
        for group in groups
        for rate, cell in group.cells.items()
        if cell.unstable
    ]


def _why(runs: Iterable[Record]) -> str:
    """Give the reasons of runs that came to nothing, each once."""
    said = [" ".join(str(run.get("error") or "no finite loss").split()).rstrip(".") for run in runs]
    return "; ".join(dict.fromkeys(said))


def _next_lower(group: Group, rate: float) -> str:
    lower = max((other for other in group.cells if other < rate), default=None)
    if lower is None:
        return "No lower rate was tried."
    cell = group.cells[lower]
    if cell.unstable:
        return f"The next lower rate, {rate_text(lower)}, is unstable too."
    if not cell.finished:
        return f"The next lower rate, {rate_text(lower)}, has no finished run."
    return (
        f"The next lower rate, {rate_text(lower)}, ends at {number(cell.mean())} ({count(len(cell.finished), 'run')})."
    )


def _failed(groups: Sequence[Group]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for group in groups:
        for rate, cell in group.cells.items():
            for seed, run in cell.failed.items():
                by_reason.setdefault(_why([run]), []).append(f"{group.label} at {rate_text(rate)} with seed {seed}")
    return [
        f"{count(len(runs), 'run')} failed ({reason}): {_first(runs, ' and {} more')}."
        for reason, runs in by_reason.items()
    ]


def _first(words: Sequence[str], more: str) -> str:
    return "; ".join(words[:_NAMED]) + (more.format(len(words) - _NAMED) if len(words) > _NAMED else "")


def _sweeps(groups: Sequence[Group]) -> list[str]:
    """Say where a better rate may lie outside those that were tried."""
    sides: dict[str, list[str]] = {"one": [], "lowest": [], "highest": []}
    for group in groups:
        tried = [rate for rate, cell in group.cells.items() if cell.counts or cell.unstable]
        if group.best is not None and len(tried) == 1:
            sides["one"].append(group.label)
        elif group.best is not None and group.best in (tried[0], tried[-1]):
            sides["lowest" if group.best == tried[0] else "highest"].append(group.label)
    said = [
        f"The best rate is the {side} that was tried, so a {'lower' if side == 'lowest' else 'higher'} one may be "
        f"better: {'; '.join(sides[side])}."
        for side in ("lowest", "highest")
        if sides[side]
    ]
    if sides["one"]:
        said.insert(0, f"Run at one learning rate only, so not known to be tuned: {'; '.join(sides['one'])}.")
    return said


def _sizes(groups: Sequence[Group]) -> list[str]:
    random = random_group(groups)
    theirs = parameters(random) if random else None
    said = []
    for group in groups:
        ours = parameters(group)
        if group.variant.matched_scale or not ours or not theirs or abs(ours / theirs - 1) <= _EQUAL_PARAMETERS:
            continue
        twin = any(g.variant.equal_parameters and g.variant.start == group.variant.start for g in groups)
        also = f"it was {'also' if twin else 'not'} run with equal parameters"
        if group.variant.equal_parameters:
            also = "whole ranks come no closer"
        said.append(
            f"{group.label} trains {ours:,} parameters, {abs(ours / theirs - 1):.1%} "
            f"{'fewer' if ours < theirs else 'more'} than random; {also}."
        )
    return said


def _untuned(groups: Sequence[Group]) -> list[str]:
    """Say what is lost without a sweep."""
    random, seeds = random_group(groups), table_seeds(groups)
    best = best_of_all(groups, seeds)
    said = []
    if random and not any(rate in group.cells for group in groups for rate in UNTUNED):
        said.append(
            f"What is lost without a sweep is not known: {join([rate_text(rate) for rate in UNTUNED])}, which people "
            "use untuned, were not tried."
        )
    for rate in UNTUNED:
        lost = {g.label: loss - best for g in groups if (loss := mean_at(g, rate, seeds)) is not None}
        if random and len(lost) > 1 and random.label in lost:
            least = min(lost, key=lambda label: lost[label])
            others = (
                "no start ends closer" if least == random.label else f"closest is {least}, {number(lost[least])} above"
            )
            said.append(
                f"Untuned, at {rate_text(rate)}, random ends {number(lost[random.label])} above the best of all starts "
                f"and rates; {others}{f' ({seed_list(seeds)})' if seeds else ''}."
            )
    return said


def _chance(groups: Sequence[Group]) -> list[str]:
    said = []
    judged = sum(verdict.pairs.low is not None for verdict in verdicts(groups))
    if judged > 1:
        said.append(
            f"{judged} comparisons were made. With intervals of 95 %, one in twenty starts that make no difference "
            "would be called better or worse by chance."
        )
    if any(len(group.cells) > 1 for group in groups):
        said.append(
            "Each start's learning rate was picked on the validation loss that is reported here, for all starts alike, "
            "so these losses are a little lower than new data would give."
        )
    return said
