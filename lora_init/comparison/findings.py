"""What the runs of a comparison show: a verdict on each start, and what a reader must know beside it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from lora_init.comparison.runs import RANDOM, Results


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


def seed_list(seeds: Iterable[int]) -> str:
    """Write seeds with their noun.

    Example:
        >>> seed_list([1, 0])
        'seeds 0, 1'
    """
    return f"seed{'s' * (len(set(seeds)) > 1)} {', '.join(map(str, sorted(seeds)))}"


Outcome = Literal["better", "worse", "no difference shown", "no statement"]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Verdict:
    """What may be said about one start.

    Attributes:
        label: The start, with how it was run.
        outcome: In a word or three. "better" or "worse" only if zero lies outside the interval, and "no statement"
            with fewer than two pairs.
        sentence: In full.
        differences: Final loss less that of random with the same seed, by seed; only seeds that both have.
        mean: Mean of them; None without a pair.
        low: Lower end of the 95 % interval of the mean; None with fewer than two pairs.
        high: Upper end.
    """

    label: str
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


def paired(results: Results, label: str, column: str = "loss") -> dict[int, float]:
    """Give by how much a start differs from random, each at its best rate, by seed; only seeds that both have."""
    by_seed = results.by_seed(column)
    if label not in by_seed.index or RANDOM.label not in by_seed.index:
        return {}
    difference = (by_seed.loc[label] - by_seed.loc[RANDOM.label]).dropna()
    return {int(seed): float(value) for seed, value in difference.items()}


def verdicts(results: Results) -> list[Verdict]:
    """Judge each start, at its own best rate, by its final validation loss against random's with the same seeds."""
    return [_judge(results, label) for label in results.variants if label != RANDOM.label]


def _judge(results: Results, label: str) -> Verdict:
    differences = paired(results, label)
    mean = math.fsum(differences.values()) / len(differences) if differences else None
    low, high = interval(differences.values()) or (None, None)
    outcome: Outcome = "no statement"
    if low is not None and high is not None:
        outcome = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
    return Verdict(label, outcome, _sentence(results, label, outcome, mean, low, high), differences, mean, low, high)


def _sentence(
    results: Results, label: str, outcome: Outcome, mean: float | None, low: float | None, high: float | None
) -> str:
    best = results.best
    if label not in best:
        return f"{label}: no statement possible, since no learning rate has a finished run and no unstable one."
    if RANDOM.label not in best:
        return f"{label}: no statement possible, since random has no rate to compare with."
    if mean is None:
        return f"{label}: no statement possible, since no seed finished both here and with random."
    where = f"{label} at {rate_text(best[label])}, random at {rate_text(best[RANDOM.label])}"
    apart = f"its final validation loss is {number(abs(mean))} {'lower' if mean < 0 else 'higher'} than random's"
    if outcome == "no statement":
        return (
            f"{label}: no statement possible with 1 run; {apart} with the same seed ({where}). How much of that is "
            "chance, only more seeds can tell."
        )
    n = len(paired(results, label))
    about = f"{apart} on average, with {n} runs of each (95 % interval {signed(low)} to {signed(high)}; {where})."
    return f"{label}: no difference shown; {about}" if outcome.startswith("no") else f"{label} is {outcome}; {about}"


# The rates that people use without a sweep.
UNTUNED = (1e-4, 3e-4)
# Parameter counts that differ by less than this share count as equal: whole ranks can't always meet a number.
_EQUAL_PARAMETERS = 0.01
_NAMED = 6


def notes(results: Results, judged: Sequence[Verdict], settings: Mapping[str, Any]) -> list[str]:
    """Say what a reader must know beside the verdicts in whole sentences, the most serious first."""
    if results.frame.empty:
        return ["No run has ended yet, so there is nothing to compare."]
    return [
        *_missing(results, settings),
        *_unstable(results),
        *_failed(results),
        *_sweeps(results),
        *_sizes(results),
        *_untuned(results),
        *_chance(results, judged),
    ]


def start_names(settings: Mapping[str, Any]) -> list[str]:
    """Name the starts that the settings ask for; a user's own is a name with where it is."""
    return [start if isinstance(start, str) else str(start[0]) for start in settings.get("starts") or []]


def _missing(results: Results, settings: Mapping[str, Any]) -> list[str]:
    said = []
    if RANDOM.label not in results.best:
        said.append(
            "Every start is compared with random, and random has no learning rate with a finished run and no unstable "
            "one. Add random to --starts, or lower rates."
        )
    ran = {variant.start for variant in results.variants.values()}
    absent = [start for start in start_names(settings) if start not in ran and start != RANDOM.start]
    if absent:
        said.append(f"Not run yet: {', '.join(absent)}.")
    for label, own in results.at_best.groupby("label", sort=False):
        seeds = set(settings.get("seeds") or []) - set(own["seed"])
        if seeds:
            said.append(f"{label}: no finished run with {seed_list(seeds)} at its best rate.")
    return said


def _unstable(results: Results) -> list[str]:
    unstable = results.frame[results.frame["status"] == "unstable"]
    said = []
    for (label, rate), runs in unstable.groupby(["label", "learning_rate"], sort=False):
        own = results.frame[(results.frame["label"] == label) & (results.frame["learning_rate"] < rate)]
        lower = own["learning_rate"].max()
        ends = own[own["learning_rate"] == lower]["loss"]
        next_lower = "No lower rate was tried." if own.empty else f"The next lower rate, {rate_text(lower)}, "
        if not own.empty:
            known = ends.notna().any()
            next_lower += f"ends at {number(ends.mean())}." if known else "has no finished run."
        said.append(
            f"{label} is unstable at {rate_text(rate)} ({seed_list(runs['seed'])}: {_why(runs)}), so this rate is not "
            f"averaged. {next_lower}"
        )
    return said


def _why(runs: pd.DataFrame) -> str:
    """Give the reasons of runs that came to nothing, each once."""
    said = [" ".join(str(error or "no finite loss").split()).rstrip(".") for error in runs["error"]]
    return "; ".join(dict.fromkeys(said))


def _failed(results: Results) -> list[str]:
    failed = results.frame[results.frame["status"] == "failed"]
    said = []
    for reason, runs in failed.groupby(failed["error"].fillna("no reason given"), sort=False):
        names = [f"{r.label} at {rate_text(r.learning_rate)} with seed {r.seed}" for r in runs.itertuples()]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        said.append(f"{len(names)} failed ({reason.rstrip('.')}): {'; '.join(names[:_NAMED])}{more}.")
    return said


def _sweeps(results: Results) -> list[str]:
    """Say where a better rate may lie outside those that were tried."""
    sides: dict[str, list[str]] = {"one": [], "lowest": [], "highest": []}
    tried = results.frame[results.frame["status"] != "failed"].groupby("label")["learning_rate"].unique()
    for label, best in results.best.items():
        rates = sorted(tried[label])
        if len(rates) == 1:
            sides["one"].append(label)
        elif best in (rates[0], rates[-1]):
            sides["lowest" if best == rates[0] else "highest"].append(label)
    said = [f"Run at one learning rate only, so not known to be tuned: {'; '.join(sides['one'])}."] * bool(sides["one"])
    for side, where in (("lowest", "lower"), ("highest", "higher")):
        if sides[side]:
            names = "; ".join(sides[side])
            said.append(f"The best rate is the {side} that was tried, so a {where} one may be better: {names}.")
    return said


def _sizes(results: Results) -> list[str]:
    sizes = results.frame.groupby("label", sort=False)["trainable_parameters"].first()
    theirs = sizes.get(RANDOM.label, math.nan)
    said = []
    for label, ours in sizes.items():
        variant = results.variants[label]
        if variant.matched_scale or not abs(ours / theirs - 1) > _EQUAL_PARAMETERS:
            continue
        twin = any(v.equal_parameters and v.start == variant.start for v in results.variants.values())
        also = f"it was {'also' if twin else 'not'} run with equal parameters"
        if variant.equal_parameters:
            also = "whole ranks come no closer"
        apart = f"{abs(ours / theirs - 1):.1%} {'fewer' if ours < theirs else 'more'} than random"
        said.append(f"{label} trains {ours:,.0f} parameters, {apart}; {also}.")
    return said


def _untuned(results: Results) -> list[str]:
    """Say what is lost without a sweep."""
    if RANDOM.label not in results.best:
        return []
    lost = results.means.unstack() - results.means.min()
    seeds = f" ({seed_list(results.shared_seeds)})" if results.shared_seeds else ""
    said = []
    for rate in UNTUNED:
        at = lost[rate].dropna() if rate in lost else pd.Series(dtype=float)
        if len(at) > 1 and RANDOM.label in at:
            least = at.idxmin()
            closest = f"closest is {least}, {number(at[least])} above"
            closest = "no start ends closer" if least == RANDOM.label else closest
            said.append(
                f"Untuned, at {rate_text(rate)}, random ends {number(at[RANDOM.label])} above the best of all starts "
                f"and rates; {closest}{seeds}."
            )
    if not set(UNTUNED) & set(results.rates):
        rates = " and ".join(map(rate_text, UNTUNED))
        said.append(f"What is lost without a sweep is not known: {rates}, which people use untuned, were not tried.")
    return said


def _chance(results: Results, judged: Sequence[Verdict]) -> list[str]:
    said = []
    compared = sum(verdict.low is not None for verdict in judged)
    if compared > 1:
        said.append(
            f"{compared} comparisons were made. With intervals of 95 %, one in twenty starts that make no difference "
            "would be called better or worse by chance."
        )
    if results.frame.groupby("label")["learning_rate"].nunique().gt(1).any():
        said.append(
            "Each start's learning rate was picked on the validation loss that is reported here, for all starts alike, "
            "so these losses are a little lower than new data would give."
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
        results: The runs themselves.
    """

    title: str
    headline: str
    verdicts: list[Verdict]
    notes: list[str]
    results: Results


def summarise(records: Iterable[dict[str, Any]], settings: Mapping[str, Any]) -> Summary:
    """Say what the runs show, whether they are all there or only some.

    Args:
        records: Content of the files of the runs.
        settings: Content of `settings.json`.
    """
    results = Results.of(records, start_names(settings))
    title = " · ".join(filter(None, ["Starts compared", settings.get("task"), settings.get("model")]))
    judged = verdicts(results)
    return Summary(title, _headline(judged, results), judged, notes(results, judged, settings), results)


def _headline(judged: Sequence[Verdict], results: Results) -> str:
    outcomes = pd.Series([verdict.outcome for verdict in judged], dtype=object).value_counts(sort=False)
    ended = results.frame["status"].value_counts()
    how = ", ".join(f"{n} {status}" for status, n in ended.items())
    runs = f"Runs: {how or 'none yet'}."
    parts = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items())
    return f"{len(judged)} compared with random: {parts}. {runs}" if judged else runs
