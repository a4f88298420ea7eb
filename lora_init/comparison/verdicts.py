"""What a comparison shows, a sentence for each start: better than random, worse, or no difference shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_init.comparison.paired import Outcome, PairedDifference, paired_difference
from lora_init.comparison.runs import RANDOM, Group, final_loss, random_group
from lora_init.comparison.wording import number, rate_text, signed


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
