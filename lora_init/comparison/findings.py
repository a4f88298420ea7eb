"""What the runs of a comparison show: a verdict on each start, and what a reader must know beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from lora_init.comparison.effects import Effect, effects, unlike_spreads
from lora_init.comparison.runs import RANDOM, best_rates, by_seed, run_table
from lora_init.comparison.starts import FULL, init_options, own_number, without_batches


def number(value: float | None, sign: str = "") -> str:
    """Write a loss, or with the sign "+" a difference of losses; a dash for what is not known.

    Example:
        >>> number(0.25), number(-0.25, "+"), number(None)
        ('0.2500', '−0.2500', '–')
    """
    return "–" if value is None or math.isnan(value) else f"{value:{sign}.4f}".replace("-", "−")


def rate_text(rate: float) -> str:
    """Write a learning rate.

    Example:
        >>> rate_text(0.0003), rate_text(0.001)
        ('3e-4', '1e-3')
    """
    digits, exponent = f"{rate:.6e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def percent(share: float) -> str:
    """Write a share as a difference in per cent.

    Example:
        >>> percent(-0.0123), percent(0.0005)
        ('−1.2 %', '+0.05 %')
    """
    value = 100 * share
    return f"{value:+.{1 if abs(value) >= 1 else 2}f} %".replace("-", "−")


def share(part: float) -> str:
    """Write a share.

    Example:
        >>> share(0.79), share(-0.2)
        ('79 %', '−20 %')
    """
    return f"{100 * part:.0f} %".replace("-", "−")


Outcome = Literal["better", "worse", "no difference shown", "no statement"]


@dataclass(frozen=True)
class Verdict:
    """What may be said about one start.

    Attributes:
        start: Name of the start.
        outcome: In a word or three. "better" or "worse" only if zero lies outside the interval, and "no statement"
            with fewer than two pairs.
        sentence: In full, with the caveats.
        differences: Final loss less that of random with the same seed, by seed; only seeds that both have.
        mean: The difference as `effects` estimates it; of one pair, that; None without a pair.
        low: Lower end of its interval; None with fewer than two pairs. See `Effect`.
        high: Upper end.
        showable: The smallest difference that the runs could have shown, half the width of the interval.
        reference: Mean loss of random at its best rate, which differences in per cent are relative to.
        closed: Share of the headroom that the start closes: its gain over random by that of full fine-tuning. None
            where the latter is not known, or so small that the runs could not have shown it.
        caveats: What changes the meaning: spreads, rates at the edge, numbers of parameters.
    """

    start: str
    outcome: Outcome
    sentence: str
    differences: dict[int, float] = field(default_factory=dict)
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    showable: float | None = None
    reference: float | None = None
    closed: float | None = None
    caveats: list[str] = field(default_factory=list)


def is_judged(start: str) -> bool:
    """Tell whether a start is compared with random: random itself is not, nor full, nor what trains longer."""
    return start not in (RANDOM, FULL) and own_number(start, "steps") is None


def judged_losses(table: pd.DataFrame) -> pd.DataFrame:
    """Arrange the final losses of random and of all that are compared with it: a row for each, a column for a seed."""
    return _judged(by_seed(table))


def _judged(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[[start == RANDOM or is_judged(start) for start in rows.index]]


def verdicts(table: pd.DataFrame) -> list[Verdict]:
    """Judge each start, at its own best rate, by its final loss against random's, all in one layout, see `effects`."""
    losses, left = judged_losses(table), _left(table)
    found, unlike = effects(losses, RANDOM), unlike_spreads(losses)
    starts = [start for start in table["start"].unique() if is_judged(start)]
    return [_judge(table, start, losses, left, found.get(start), _caveats(table, start, unlike)) for start in starts]


def _outcome(effect: Effect) -> Outcome:
    return "better" if effect.high < 0 else "worse" if effect.low > 0 else "no difference shown"


def _differs(effect: Effect, reference: float) -> str:
    mean, low, high = (percent(value / reference) for value in (effect.mean, effect.low, effect.high))
    return f"{_outcome(effect)}; its final loss differs by {mean} (interval {low} to {high})."


def _judge(
    table: pd.DataFrame, start: str, losses: pd.DataFrame, left: float, effect: Effect | None, caveats: list[str]
) -> Verdict:
    best = best_rates(table)
    lacking = [one for one in (RANDOM, start) if one not in best]
    pairs = pd.Series() if lacking else (losses.loc[start] - losses.loc[RANDOM]).dropna()
    reference = float(losses.loc[RANDOM].mean()) if RANDOM in best else None
    if pairs.empty or reference is None:
        why = "no seed finished both here and with random"
        if lacking:
            why = f"{lacking[-1]} has no rate with a finished run and no unstable one"
        said = f"{start}: no statement possible, since {why}."
        return Verdict(start, "no statement", said, reference=reference, caveats=caveats)
    differences = {int(seed): float(value) for seed, value in pairs.items()}
    outcome: Outcome = "no statement"
    low = high = showable = closed = None
    mean = effect.mean if effect else float(pairs.iloc[0])
    where = f"{start} at {rate_text(best[start])}, random at {rate_text(best[RANDOM])}"
    apart = f"its final loss is {percent(abs(mean) / reference)[1:]} {'lower' if mean < 0 else 'higher'} than random's"
    said = f"{start}: no statement possible with 1 run; {apart} with the same seed ({number(mean, '+')}; {where})."
    if effect:
        outcome, low, high, showable = _outcome(effect), effect.low, effect.high, effect.showable
        ends = f"{percent(low / reference)} to {percent(high / reference)}"
        said = (
            f"{start}{':' if outcome == 'no difference shown' else ' is'} {outcome}; {apart} ({number(mean, '+')}; "
            f"interval {ends}; {len(pairs)} runs of each; {where}). The runs could have shown "
            f"{percent(showable / reference)[1:]}."
        )
        if left > showable:
            closed = -mean / left
            said += f" It closes {share(closed)} of the headroom ({share(-high / left)} to {share(-low / left)})."
    sentence = said + "".join(f" But {caveat}." for caveat in caveats)
    return Verdict(start, outcome, sentence, differences, mean, low, high, showable, reference, closed, caveats)


def _left(table: pd.DataFrame) -> float:
    """Compute how much lower full fine-tuning ends than random, over the seeds that both have; NaN if there is none."""
    losses = by_seed(table).reindex([RANDOM, FULL])
    return float((losses.loc[RANDOM] - losses.loc[FULL]).mean())


def _caveats(table: pd.DataFrame, start: str, unlike: Mapping[str, float]) -> list[str]:
    """Say what changes the meaning of a comparison with this start."""
    said = []
    it, its = ("random", "random's") if start == RANDOM else ("it", "its")
    if start in unlike:
        said.append(
            f"{its} runs spread {unlike[start]:.1f} times as much as is usual here, as when one nearly diverges, so "
            "they are not pooled with others"
        )
    runs, best = table[table["start"] == start], best_rates(table)
    tried = sorted(runs[runs["status"] != "failed"]["learning_rate"].unique())
    if start in best and len(tried) == 1:
        said.append(f"{it} was run at {rate_text(best[start])} only, so it is not known to be tuned")
    elif start in best and best[start] in (tried[0], tried[-1]):
        side = ("lowest", "lower") if best[start] == tried[0] else ("highest", "higher")
        said.append(f"{its} best rate, {rate_text(best[start])}, is the {side[0]} tried, so a {side[1]} may be better")
    sizes = table.groupby("start")["trainable_parameters"].first()
    ratio = sizes.get(start, math.nan) / sizes.get(RANDOM, math.nan)
    if start != FULL and abs(ratio - 1) > _EQUAL_PARAMETERS:
        more = "fewer" if ratio < 1 else "more"
        said.append(f"{it} trains {sizes[start]:,.0f} parameters, {percent(abs(ratio - 1))[1:]} {more} than random")
    return said


def steps_of_start(table: pd.DataFrame) -> pd.Series:
    """Compute how many training steps of its own each start takes as long as, with its statistics and its search."""
    best = table[table["best"]]
    steps = best["evaluation_points"].map(lambda points: points[-1])
    return (best["initialisation_seconds"] * steps / best["training_seconds"]).groupby(best["start"]).mean()


_EQUAL_PARAMETERS = 0.01  # a share: whole ranks can't always meet a number
_EQUAL_LOSS = 0.005  # a share, too


def notes(table: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    """Say what a reader must know beside the verdicts in whole sentences, the most serious first."""
    if table.empty:
        return ["No run has ended yet, so there is nothing to compare."]
    said = []
    if RANDOM not in best_rates(table):
        said.append(
            "Every start is compared with random, and random has no learning rate with a finished run and no unstable "
            "one. Add random to --starts, or lower rates."
        )
    absent = [start for start in settings.get("starts") or [] if start not in {RANDOM, *table["start"]}]
    if absent:
        said.append(f"Not run yet: {', '.join(absent)}.")
    lacking: dict[str, list[str]] = {}
    for start, own in table[table["best"]].groupby("start", sort=False):
        seeds = set(settings.get("seeds") or []) - set(own["seed"])
        if seeds and not settings.get("budget") and own_number(start, "steps") is None:
            lacking.setdefault(_seeds(seeds), []).append(start)
    said += [f"{', '.join(own)}: no finished run with {seeds} at the best rate." for seeds, own in lacking.items()]
    said += _hardly_learned(table)
    if table["learning_rate"].nunique() > 1 and table["seed"].nunique() == 1:
        said.append("Rates were chosen on a single seed, so another may well be better.")
    return said + _circumstances(table) + _lost(table)


def _circumstances(table: pd.DataFrame) -> list[str]:
    """Say that not all runs are from one machine, on which alone the same run has the same numbers."""
    known = [run for run in table["circumstances"] if isinstance(run, dict)]
    facts = [{**{name: run.get(name) for name in ("processor", "threads")}, **run.get("versions", {})} for run in known]
    said = []
    for name in dict.fromkeys(name for run in facts for name in run):
        counts = Counter(str(run.get(name)) for run in facts)
        if len(counts) > 1:
            said.append(f"{name} ({', '.join(f'{value}: {n} runs' for value, n in counts.items())})")
    return [f"Runs differ in {'; '.join(said)}, so equal ones may differ by rounding."] if said else []


def _hardly_learned(table: pd.DataFrame) -> list[str]:
    """Count the seeds on which a start, at its best rate, learned less than half of what the best start did."""
    losses = by_seed(table)
    plain = table.groupby("seed")["plain_loss"].mean()
    losses = losses.loc[:, losses.min() < plain.reindex(losses.columns)]
    few = (plain - losses) < (plain - losses.min()) / 2
    counts = [
        f"{start} on {own.sum()} of {losses.loc[start].count()} seeds" for start, own in few.iterrows() if any(own)
    ]
    return (
        [f"Learned less than half of what the best start with the same seed did: {', '.join(counts)}."]
        if counts
        else []
    )


def _seeds(seeds: Iterable[int]) -> str:
    own = sorted(set(seeds))
    if len(own) > 2 and own[-1] - own[0] == len(own) - 1:
        return f"seeds {own[0]} to {own[-1]}"
    return f"seed{'s' * (len(own) > 1)} {', '.join(map(str, own))}"


def _lost(table: pd.DataFrame) -> list[str]:
    """Name the runs that came to nothing, and why."""
    said = []
    unstable = table[table["status"] == "unstable"]
    for (start, rate), runs in unstable.groupby(["start", "learning_rate"], sort=False):
        why = "; ".join(dict.fromkeys(str(error or "no finite loss").rstrip(".") for error in runs["error"]))
        where = f"{rate_text(rate)} ({_seeds(runs['seed'])}: {why})"
        said.append(f"{start} is unstable at {where}, so this rate is not averaged.")
    failed = table[table["status"] == "failed"]
    for reason, runs in failed.groupby("error", sort=False):
        n = f"{len(runs)} run{'s' * (len(runs) > 1)}"
        said.append(f"{n} failed ({reason.rstrip('.')}): {', '.join(runs['start'].unique())}.")
    return said


def headroom(table: pd.DataFrame, judged: Sequence[Verdict]) -> str:
    """Say how far random goes from the plain model to full fine-tuning, and whether what is left could be shown."""
    losses, best = by_seed(table), best_rates(table)
    if RANDOM not in losses.index:
        return ""
    runs = table[table["best"] & table["start"].eq(RANDOM)]
    plain, random = runs["plain_loss"].mean(), losses.loc[RANDOM].mean()
    begin = f"The plain model has a loss of {number(plain)}, and random ends at {number(random)}."
    left = _left(table)
    if math.isnan(left):
        return f"{begin} How much is left to win, full fine-tuning would say (--full)."
    but = "".join(f" But {caveat}." for caveat in _caveats(table, FULL, {}))
    said = f"{begin} Full fine-tuning ends at {number(losses.loc[FULL].mean())}, at {rate_text(best[FULL])}"
    for effect in effects(losses.loc[[RANDOM, FULL]], RANDOM).values():  # there is none for a single seed
        mean, low, high = (percent(end / random) for end in (effect.mean, effect.low, effect.high))
        said += f": {mean} against random ({low} to {high})"
    said += f".{but}"
    # What a start has won was there to win, whatever full fine-tuning gains.
    nothing = "" if any(verdict.outcome == "better" for verdict in judged) else ": nothing to win here"
    if left <= 0.0:
        return f"{said} That is no lower than random{nothing}."
    gone = (plain - random) / (plain - random + left)
    said += f" So random goes {share(gone)} of the way, and {percent(left / random)[1:]} is left."
    could = [verdict.showable for verdict in judged if verdict.showable is not None]
    if not could:
        return said
    enough = f"{nothing} that they could show" if nothing and left <= min(could) else ""
    return f"{said} The runs could have shown {percent(min(could) / random)[1:]} at best{enough}."


def answer(table: pd.DataFrame, judged: Sequence[Verdict]) -> tuple[str, str | None]:
    """Say which start to use, with all that changes the meaning, and name it; None if the runs do not say yet."""
    best, doubts = best_rates(table), _caveats(table, RANDOM, unlike_spreads(judged_losses(table)))
    better = [verdict for verdict in judged if verdict.outcome == "better"]
    could = [verdict.showable / verdict.reference for verdict in judged if verdict.showable and verdict.reference]
    if better:
        winner = min(better, key=lambda verdict: verdict.mean or 0.0)
        start, gain = winner.start, percent(-(winner.mean or 0.0) / (winner.reference or math.nan))[1:]
        said = f"Use {start}: its final loss is {gain} lower than random's ({number(winner.mean, '+')})."
        doubts = [*winner.caveats, *doubts]
    elif could:
        start = RANDOM
        span = " to ".join(dict.fromkeys(percent(end)[1:] for end in (min(could), max(could))))
        said = f"No start is shown to be better than random. The runs could have shown differences of {span}."
    else:
        return "The runs do not say yet which start to use.", None
    rates = f"Its learning rate is {rate_text(best[start])}; random's is" if better else "Random's learning rate is"
    but = f" But {'; and '.join(doubts)}." if doubts else ""
    return f"{said} {rates} {rate_text(best[RANDOM])}.{but}", start


def make_command(start: str | None, settings: Mapping[str, Any]) -> str | None:
    """Write the command that makes the adapter of a start; None where `init` does not make it."""
    options = init_options(start) if start else None
    if start is None or not options or not settings.get("init"):
        return None
    batches = own_number(start, "batches") or settings["statistics_batches"]
    samples = f"--samples {batches * settings['batch_size']} --max-batches {batches}"
    alpha = f"--lora-alpha {own_number(start, 'alpha') or settings['lora_alpha']:g}"
    return " ".join([settings["init"], samples, alpha, *options, "--output adapter"])


def longer_random(table: pd.DataFrame) -> str:
    """Name the start that is random with twice the steps."""
    return f"{RANDOM}+{2 * _steps(table)}-steps"


def _steps(table: pd.DataFrame) -> int:
    """Read the steps of all from a run of random that finished."""
    return int(table[table["best"] & table["start"].eq(RANDOM)]["evaluation_points"].iloc[0][-1])


def equal_time(table: pd.DataFrame, judged: Sequence[Verdict]) -> list[str]:
    """Judge the better starts at equal total time: random trains for the time of statistics, start and search, too.

    Its loss after more steps is read, seed by seed, between that after the steps of all and that after twice as many,
    on a line over the logarithm of the number of steps. Where more steps are no gain, it would not train on.
    """
    losses, took, said = by_seed(table), steps_of_start(table), []
    for verdict in judged:
        if verdict.outcome != "better" or verdict.mean is None:
            continue
        start, longer, steps = verdict.start, longer_random(table), _steps(table)
        begin = f"At equal total time, {start}"
        if longer not in losses.index or took[start] > steps:
            why = "was not trained longer" if longer not in losses.index else "could train more than twice as long"
            said.append(f"{begin}: no statement possible, since random {why}.")
            continue
        gained = (losses.loc[RANDOM] - losses.loc[longer]) / math.log(2)  # by e times as many steps
        if gained.mean() <= 0:
            why = "since random gains nothing by more of them at its rate"
            said.append(f"{begin}: as at equal steps, {why}. Its start takes as long as {took[start]:.1f} steps.")
            continue
        rows = losses.loc[[other.start for other in judged if other.start in losses.index]]
        later = (losses.loc[RANDOM] - gained * math.log1p(took[start] / steps)).rename(RANDOM).to_frame().T
        effect = effects(pd.concat([later, rows]), RANDOM).get(start)
        if effect is None:
            continue
        reference, worth = float(later.loc[RANDOM].mean()), math.expm1(min(-verdict.mean / gained.mean(), 50.0))
        lead = f"{share(worth)} further steps" if 0 < worth <= 1 else "more than twice the steps"
        said.append(
            f"{begin}: {_differs(effect, reference)} Its start takes as long as {took[start]:.1f} steps, "
            f"and its lead is worth {lead} of random: it pays from "
            f"{took[start] / (worth if 0 < worth <= 1 else 1):.0f} steps on, if that share is the same there."
        )
    return said


def facts(table: pd.DataFrame, settings: Mapping[str, Any]) -> str:
    """Say in a line what was trained, on what, and how long."""
    known = {name: settings.get(name) for name in ("model", "kind", "task", "steps", "batch_size", "rank", "data")}
    return (
        f"{known['model']}, rank {known['rank']}, on {known['task']} ({known['kind']}): {known['steps']} steps of "
        f"{known['batch_size']} examples, {table['seed'].nunique()} seeds, {len(table)} runs. {known['data']}."
    )


def forgetting(table: pd.DataFrame) -> list[str]:
    """Judge what starts forget at equal task loss, over all rates and not only at each one's best.

    Of the runs of a start and a seed that end at most 0.5 % above random's best with that seed, the one counts that
    raises the loss on other text least; so for random, too.
    """
    target, runs = by_seed(table), table[table["counts"] & table["rise"].notna()]
    if RANDOM not in target.index or runs.empty:
        return []
    equal = runs["loss"] <= (1 + _EQUAL_LOSS) * runs["seed"].map(target.loc[RANDOM])
    least = _judged(runs[equal].groupby(["start", "seed"], sort=False)["rise"].min().unstack())
    found, said = effects(least, RANDOM), []
    for start in runs["start"].unique():
        if is_judged(start) and start in found:
            effect, shared = found[start], least.loc[[start, RANDOM]].dropna(axis=1).mean(axis=1)
            how = "less than" if effect.high < 0 else "more than" if effect.low > 0 else "not shown to differ from"
            said.append(
                f"Forgetting at equal task loss, {start}: {how} random. The loss on other text rises by "
                f"{number(shared[start], '+')}, with random by {number(shared[RANDOM], '+')} (difference "
                f"{number(effect.mean, '+')}, interval {number(effect.low, '+')} to {number(effect.high, '+')})."
            )
        elif is_judged(start):
            said.append(f"Forgetting at equal task loss, {start}: it reaches random's loss with too few seeds to tell.")
    return said


def data_needed(table: pd.DataFrame) -> list[str]:
    """Compare each start with statistics of fewer batches with the same start with most, each at its own best rate."""
    losses, said = by_seed(table), []
    numbers = {start: n for start in losses.index if (n := own_number(start, "batches"))}
    for name in dict.fromkeys(map(without_batches, numbers)):
        own = [start for start in numbers if without_batches(start) == name]  # from few to many
        most, reference = own[-1], float(losses.loc[own[-1]].mean())
        for start, effect in effects(losses.loc[own], most).items():
            fewer = f"{name} with {numbers[start]} batches in place of {numbers[most]}"
            said.append(f"{fewer}: {_differs(effect, reference)}")
    return said


@dataclass(frozen=True)
class Summary:
    """What a comparison found so far.

    Attributes:
        title: Task and model.
        facts: What was trained, on what, and how long.
        answer: Which start to use, in a sentence or two.
        start: Its name; None if the runs do not say yet.
        command: The command that makes its adapter; None if there is none.
        headline: The verdicts in one sentence, and how many runs ended how.
        headroom: How much of what full fine-tuning gains random gains already, in a sentence or two.
        verdicts: One for each start other than random, in order.
        equal_time: What is left of each better start at equal total time; see `equal_time`.
        forgetting: What each start forgets at equal task loss, a sentence each; see `forgetting`.
        data_needed: How each start ends with statistics of fewer batches, a sentence each; see `data_needed`.
        notes: What a reader must know beside them.
        table: The runs themselves, see `run_table`.
    """

    title: str
    facts: str
    answer: str
    start: str | None
    command: str | None
    headline: str
    headroom: str
    verdicts: list[Verdict]
    equal_time: list[str]
    forgetting: list[str]
    data_needed: list[str]
    notes: list[str]
    table: pd.DataFrame


def summarise(records: Iterable[dict[str, Any]], settings: Mapping[str, Any]) -> Summary:
    """Say what the runs show, whether they are all there or only some.

    Args:
        records: Content of the files of the runs.
        settings: Content of `settings.json`.
    """
    table = run_table(records, settings.get("starts") or [])
    judged = verdicts(table)
    ended = ", ".join(f"{n} {status}" for status, n in table["status"].value_counts().items())
    headline = f"Runs: {ended or 'none yet'}."
    if judged:
        parts = ", ".join(f"{n} {outcome}" for outcome, n in Counter(verdict.outcome for verdict in judged).items())
        headline = f"{len(judged)} compared with random: {parts}. {headline}"
    said, start = answer(table, judged)
    return Summary(
        title=" · ".join(filter(None, ["Starts compared", settings.get("task"), settings.get("model")])),
        facts=facts(table, settings),
        answer=said,
        start=start,
        command=make_command(start, settings),
        headline=headline,
        headroom=headroom(table, judged),
        verdicts=judged,
        equal_time=equal_time(table, judged),
        forgetting=forgetting(table),
        data_needed=data_needed(table),
        notes=notes(table, settings),
        table=table,
    )
