"""What a reader must know beside the verdicts: what is missing, unstable or failed, and what chance can do."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lora_init.comparison.runs import (
    RANDOM,
    Group,
    Record,
    best_of_all,
    final_loss,
    mean_at,
    parameters,
    random_group,
    table_seeds,
)


def number(value: float | None) -> str:
    """Write a loss or a difference of losses, small ones with two digits; a dash for what is not known.

    Example:
        >>> number(0.25), number(0.00012), number(None)
        ('0.2500', '0.00012', '–')
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if not value or abs(value) >= 0.001:
        return f"{value:.4f}"
    return f"{value:.{1 - math.floor(math.log10(abs(value)))}f}"


def signed(value: float | None) -> str:
    """Write a difference.

    Example:
        >>> signed(-0.25), signed(0.0), signed(None)
        ('−0.2500', '0.0000', '–')
    """
    return number(value) if not value else f"{'−' if value < 0 else '+'}{number(abs(value))}"


def rate_text(rate: float) -> str:
    """Write a learning rate.

    Example:
        >>> rate_text(0.0003), rate_text(0.001)
        ('3e-4', '1e-3')
    """
    digits, exponent = f"{rate:.6e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def count(n: int, noun: str) -> str:
    """Write a count with its noun.

    Example:
        >>> count(1, "run"), count(2, "run")
        ('1 run', '2 runs')
    """
    return f"{n} {noun}{'' if n == 1 else 's'}"


def join(words: Sequence[str]) -> str:
    """Join words as a sentence does.

    Example:
        >>> join(["a", "b", "c"])
        'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def seed_list(seeds: Collection[int]) -> str:
    """Write seeds with their noun.

    Example:
        >>> seed_list([0, 1])
        'seeds 0 and 1'
    """
    return f"seed{'' if len(seeds) == 1 else 's'} {join([str(seed) for seed in sorted(seeds)])}"


Outcome = Literal["better", "worse", "no difference shown", "no statement"]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedDifference:
    """What the pairs say.

    Attributes:
        differences: Value less the reference's, by seed; only seeds that both have.
        mean: Mean of them; None without a pair.
        low: Lower end of the interval of the mean; None with fewer than two pairs.
        high: Upper end.
        outcome: For losses, where less is better: "better" or "worse" only if zero lies outside the interval, and
            "no statement" with fewer than two pairs.
    """

    differences: dict[int, float]
    mean: float | None
    low: float | None
    high: float | None
    outcome: Outcome

    @property
    def n(self) -> int:
        """How many pairs there are."""
        return len(self.differences)


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> PairedDifference:
    """Compare two starts on the seeds that both have.

    The interval is that of the paired t-test, at 95 %. It takes the differences as normally distributed; a bootstrap
    would not, but of three seeds it can draw only ten different samples, and its intervals are then too narrow.

    Args:
        values: Result by seed.
        reference: Result of the start to compare with, by seed.

    Example:
        >>> paired_difference({0: 0.9, 1: 0.8, 2: 0.9}, {0: 1.0, 1: 1.0, 2: 1.1}).outcome
        'better'
        >>> paired_difference({0: 0.5}, {0: 1.0}).outcome
        'no statement'
    """
    differences = {seed: values[seed] - reference[seed] for seed in sorted(values) if seed in reference}
    n = len(differences)
    if not n:
        return PairedDifference({}, None, None, None, "no statement")
    mean = math.fsum(differences.values()) / n
    if n == 1:
        return PairedDifference(differences, mean, None, None, "no statement")
    from scipy.stats import t

    variance = math.fsum((difference - mean) ** 2 for difference in differences.values()) / (n - 1)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * math.sqrt(variance / n)
    low, high = mean - half, mean + half
    outcome: Outcome = "no difference shown"
    if low > 0 or high < 0:
        outcome = "better" if mean < 0 else "worse"
    return PairedDifference(differences, mean, low, high, outcome)


@dataclass(frozen=True)
class Verdict:
    """What may be said about one start.

    Attributes:
        label: The start, with how it was run.
        outcome: In a word or three.
        sentence: In full.
        pairs: The numbers behind it.
    """

    label: str
    outcome: Outcome
    sentence: str
    pairs: PairedDifference


def final_losses(group: Group | None) -> dict[int, float]:
    """Give the final validation losses at a variant's best rate, by seed."""
    return {seed: final_loss(run) for seed, run in group.best_runs.items()} if group else {}


def verdicts(groups: Sequence[Group]) -> list[Verdict]:
    """Judge each start, at its own best rate, by its final validation loss against random's with the same seeds."""
    random = random_group(groups)
    found = []
    for group in groups:
        if group.variant != RANDOM:
            pairs = paired_difference(final_losses(group), final_losses(random))
            found.append(Verdict(group.label, pairs.outcome, _sentence(group, random, pairs), pairs))
    return found


def _sentence(group: Group, random: Group | None, pairs: PairedDifference) -> str:
    name = group.label
    if group.best is None:
        return f"{name}: no statement possible, since no learning rate has a finished run and no unstable one."
    if random is None or random.best is None:
        return f"{name}: no statement possible, since random has no rate to compare with."
    if pairs.mean is None:
        return f"{name}: no statement possible, since no seed finished both here and with random."
    where = f"{name} at {rate_text(group.best)}, random at {rate_text(random.best)}"
    apart = f"{number(abs(pairs.mean))} {'lower' if pairs.mean < 0 else 'higher'} than random's"
    if pairs.low is None or pairs.high is None:
        return (
            f"{name}: no statement possible with 1 run. Its final validation loss is {apart} with the same seed "
            f"({where}); how much of that is chance, only more seeds can tell."
        )
    interval = f"95 % interval {signed(pairs.low)} to {signed(pairs.high)}; {where}"
    if pairs.outcome == "no difference shown":
        return (
            f"{name}: no difference shown with {pairs.n} runs. Its final validation loss is {apart} on average, and "
            f"zero is inside the interval ({interval})."
        )
    return (
        f"{name} is {pairs.outcome} than random: its final validation loss is {apart} on average, with {pairs.n} runs "
        f"of each ({interval})."
    )


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
