"""What the runs of a comparison show: a verdict on each start, and what a reader must know beside it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from lora_init.comparison.runs import RANDOM, best_rates, by_seed, run_table
from lora_init.comparison.starts import MATCHED_SCALE, split_start


def number(value: float | None) -> str:
    """Write a loss or a difference of losses, small ones with two digits; a dash for what is not known.

    Example:
        >>> number(0.25), number(0.00012), number(None)
        ('0.2500', '0.00012', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    if not value or abs(value) >= 0.001:
        return f"{value:.4f}"
    return f"{value:.{1 - math.floor(math.log10(abs(value)))}f}"


def signed(value: float | None) -> str:
    """Write a difference.

    Example:
        >>> signed(-0.25), signed(0.0), signed(None)
        ('−0.2500', '0.0000', '–')
    """
    return number(value) if not value or math.isnan(value) else f"{'−' if value < 0 else '+'}{number(abs(value))}"


def rate_text(rate: float) -> str:
    """Write a learning rate.

    Example:
        >>> rate_text(0.0003), rate_text(0.001)
        ('3e-4', '1e-3')
    """
    digits, exponent = f"{rate:.6e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


Outcome = Literal["better", "worse", "no difference shown", "no statement"]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Verdict:
    """What may be said about one start.

    Attributes:
        start: Name of the start.
        outcome: In a word or three. "better" or "worse" only if zero lies outside the interval, and "no statement"
            with fewer than two pairs.
        sentence: In full.
        differences: Final loss less that of random with the same seed, by seed; only seeds that both have.
        mean: Mean of them; None without a pair.
        low: Lower end of the 95 % interval of the mean; None with fewer than two pairs.
        high: Upper end.
    """

    start: str
    outcome: Outcome
    sentence: str
    differences: dict[int, float]
    mean: float | None
    low: float | None
    high: float | None


def interval(differences: Collection[float]) -> tuple[float, float] | None:
    """Compute the 95 % interval of the paired t-test; None with fewer than two differences.

    It takes the differences as normally distributed; a bootstrap would not, but of three seeds it can draw only ten
    different samples, and its intervals are then too narrow.

    Example:
        >>> [round(end, 3) for end in interval([-0.1, -0.2, -0.2])]
        [-0.31, -0.023]
    """
    from scipy.stats import sem, t

    if len(differences) < 2:
        return None
    values = list(differences)
    mean = math.fsum(values) / len(values)
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * sem(values))
    return mean - half, mean + half


def paired(table: pd.DataFrame, start: str, column: str = "loss") -> dict[int, float]:
    """Give by how much a start differs from random, each at its best rate, by seed; only seeds that both have."""
    values = by_seed(table, column)
    if not {start, RANDOM} <= set(values.index):
        return {}
    return {int(seed): float(value) for seed, value in (values.loc[start] - values.loc[RANDOM]).dropna().items()}


def verdicts(table: pd.DataFrame) -> list[Verdict]:
    """Judge each start, at its own best rate, by its final loss against random's with the same seeds."""
    best = best_rates(table)
    return [_judge(start, best, paired(table, start)) for start in table["start"].unique() if start != RANDOM]


def _judge(start: str, best: Mapping[str, float], differences: dict[int, float]) -> Verdict:
    low, high = interval(differences.values()) or (None, None)
    mean = math.fsum(differences.values()) / len(differences) if differences else None
    outcome: Outcome = "no statement"
    if low is not None and high is not None:
        outcome = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
    if mean is None:
        why = "no seed finished both here and with random"
        for one in (RANDOM, start):
            why = why if one in best else f"{one} has no rate with a finished run and no unstable one"
        sentence = f"{start}: no statement possible, since {why}."
        return Verdict(start, outcome, sentence, differences, mean, low, high)
    where = f"{start} at {rate_text(best[start])}, random at {rate_text(best[RANDOM])}"
    apart = f"its final loss is {number(abs(mean))} {'lower' if mean < 0 else 'higher'} than random's"
    about = f"{apart} on average, with {len(differences)} runs of each (95 % interval {signed(low)} to {signed(high)}; "
    if outcome == "no statement":
        said = f"no statement possible with 1 run; {apart} with the same seed ({where}). Only more seeds can tell"
        sentence = f"{start}: {said} how much of that is chance."
    elif outcome == "no difference shown":
        sentence = f"{start}: {outcome}; {about}{where})."
    else:
        sentence = f"{start} is {outcome}; {about}{where})."
    return Verdict(start, outcome, sentence, differences, mean, low, high)


_EQUAL_PARAMETERS = 0.01  # a share: whole ranks can't always meet a number


def notes(table: pd.DataFrame, judged: Sequence[Verdict], settings: Mapping[str, Any]) -> list[str]:
    """Say what a reader must know beside the verdicts in whole sentences, the most serious first."""
    if table.empty:
        return ["No run has ended yet, so there is nothing to compare."]
    return [*_missing(table, settings), *_lost(table), *_sweeps(table), *_sizes(table), *_chance(table, judged)]


def start_names(settings: Mapping[str, Any]) -> list[str]:
    """Name the starts that the settings ask for; a user's own is a name with where it is."""
    return [start if isinstance(start, str) else str(start[0]) for start in settings.get("starts") or []]


def _seeds(seeds: Iterable[int]) -> str:
    return f"seed{'s' * (len(set(seeds)) > 1)} {', '.join(map(str, sorted(seeds)))}"


def _missing(table: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    said = []
    if RANDOM not in best_rates(table):
        said.append(
            "Every start is compared with random, and random has no learning rate with a finished run and no unstable "
            "one. Add random to --starts, or lower rates."
        )
    absent = [start for start in start_names(settings) if start not in {RANDOM, *table["start"]}]
    if absent:
        said.append(f"Not run yet: {', '.join(absent)}.")
    for start, own in table[table["best"]].groupby("start", sort=False):
        seeds = set(settings.get("seeds") or []) - set(own["seed"])
        if seeds:
            said.append(f"{start}: no finished run with {_seeds(seeds)} at its best rate.")
    return said


def _lost(table: pd.DataFrame) -> list[str]:
    """Name the runs that came to nothing, and why."""
    said = []
    unstable = table[table["status"] == "unstable"]
    for (start, rate), runs in unstable.groupby(["start", "learning_rate"], sort=False):
        why = "; ".join(dict.fromkeys(str(error or "no finite loss").rstrip(".") for error in runs["error"]))
        where = f"{rate_text(rate)} ({_seeds(runs['seed'])}: {why})"
        said.append(f"{start} is unstable at {where}, so this rate is not averaged.")
    failed = table[table["status"] == "failed"]
    for reason, runs in failed.groupby(failed["error"].fillna("no reason given"), sort=False):
        names = ", ".join(runs["start"].unique())
        said.append(f"{len(runs)} runs failed ({reason.rstrip('.')}): {names}.")
    return said


def _sweeps(table: pd.DataFrame) -> list[str]:
    """Say where a better rate may lie outside those that were tried."""
    sides: dict[str, list[str]] = {"one": [], "lowest": [], "highest": []}
    tried = table[table["status"] != "failed"].groupby("start")["learning_rate"].unique()
    for start, best in best_rates(table).items():
        rates = sorted(tried[start])
        if len(rates) == 1:
            sides["one"].append(start)
        elif best in (rates[0], rates[-1]):
            sides["lowest" if best == rates[0] else "highest"].append(start)
    said = {
        "one": "Run at one learning rate only, so not known to be tuned",
        "lowest": "The best rate is the lowest that was tried, so a lower one may be better",
        "highest": "The best rate is the highest that was tried, so a higher one may be better",
    }
    found = [f"{said[side]}: {'; '.join(starts)}." for side, starts in sides.items() if starts]
    if table["learning_rate"].nunique() > 1 and table["seed"].nunique() == 1:
        found.append("Rates were chosen on a single seed, so another may well be better.")
    return found


def _sizes(table: pd.DataFrame) -> list[str]:
    sizes = table.groupby("start", sort=False)["trainable_parameters"].first()
    theirs = sizes.get(RANDOM, math.nan)
    said = []
    for start, ours in sizes.items():
        if MATCHED_SCALE not in split_start(str(start))[1] and abs(ours / theirs - 1) > _EQUAL_PARAMETERS:
            apart = f"{abs(ours / theirs - 1):.1%} {'fewer' if ours < theirs else 'more'} than random"
            said.append(f"{start} trains {ours:,.0f} parameters, {apart}.")
    return said


def _chance(table: pd.DataFrame, judged: Sequence[Verdict]) -> list[str]:
    said = []
    compared = sum(verdict.low is not None for verdict in judged)
    if compared > 1:
        said.append(
            f"{compared} comparisons were made. With intervals of 95 %, one in twenty starts that make no difference "
            "would be called better or worse by chance."
        )
    return said


@dataclass(frozen=True)
class Summary:
    """What a comparison found so far.

    Attributes:
        title: Task and model.
        headline: The verdicts in one sentence, and how many runs ended how.
        verdicts: One for each start other than random, in order.
        notes: What a reader must know beside them.
        table: The runs themselves, see `run_table`.
    """

    title: str
    headline: str
    verdicts: list[Verdict]
    notes: list[str]
    table: pd.DataFrame


def summarise(records: Iterable[dict[str, Any]], settings: Mapping[str, Any]) -> Summary:
    """Say what the runs show, whether they are all there or only some.

    Args:
        records: Content of the files of the runs.
        settings: Content of `settings.json`.
    """
    table = run_table(records, start_names(settings))
    judged = verdicts(table)
    ended = ", ".join(f"{n} {status}" for status, n in table["status"].value_counts().items())
    headline = f"Runs: {ended or 'none yet'}."
    if judged:
        outcomes = pd.Series([verdict.outcome for verdict in judged], dtype=object).value_counts(sort=False)
        parts = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items())
        headline = f"{len(judged)} compared with random: {parts}. {headline}"
    title = " · ".join(filter(None, ["Starts compared", settings.get("task"), settings.get("model")]))
    return Summary(title, headline, judged, notes(table, judged, settings), table)
