"""What the runs of a comparison show: a verdict on each start, and what a reader must know beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pandas as pd

from lora_init.adapters.starts import FULL, RANDOM
from lora_init.comparison.effects import Effect, Outcome, effects, unlike_spreads
from lora_init.comparison.runs import best_rates, by_seed, run_table
from lora_init.comparison.starts import Variant
from lora_init.comparison.tasks import FEW
from lora_init.comparison.wording import rate_text, say


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
    outcome: Outcome | Literal["no statement"]
    sentence: str = ""
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
    return start not in (RANDOM, FULL) and Variant(start).steps is None


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


def _judge(
    table: pd.DataFrame, start: str, losses: pd.DataFrame, left: float, effect: Effect | None, caveats: list[str]
) -> Verdict:
    best = best_rates(table)
    lacking = [one for one in (RANDOM, start) if one not in best]
    pairs = pd.Series() if lacking else (losses.loc[start] - losses.loc[RANDOM]).dropna()
    reference = float(losses.loc[RANDOM].mean()) if RANDOM in best else None
    found = Verdict(start, "no statement", reference=reference, caveats=caveats)
    if len(pairs):
        differences = {int(seed): float(value) for seed, value in pairs.items()}
        found = replace(found, differences=differences, mean=float(pairs.iloc[0]))
    if effect:
        found = replace(
            found,
            outcome=effect.outcome,
            mean=effect.mean,
            low=effect.low,
            high=effect.high,
            showable=effect.showable,
            closed=-effect.mean / left if left > effect.showable else None,
        )
    sentence = say("verdict", it=found, rates=best, lacking=lacking[-1] if lacking else None, left=left)
    return replace(found, sentence=sentence)


def _left(table: pd.DataFrame) -> float:
    """Compute how much lower full fine-tuning ends than random, over the seeds that both have; NaN if there is none."""
    losses = by_seed(table).reindex([RANDOM, FULL])
    return float((losses.loc[RANDOM] - losses.loc[FULL]).mean())


def _caveats(table: pd.DataFrame, start: str, unlike: Mapping[str, float]) -> list[str]:
    """Say what changes the meaning of a comparison with this start."""
    said = []
    if start in unlike:
        said.append(say("scatters", start=start, times=unlike[start]))
    runs, best = table[table["start"] == start], best_rates(table)
    tried = sorted(runs[runs["status"] != "failed"]["learning_rate"].unique())
    if start in best and len(tried) == 1:
        said.append(say("one_rate", start=start, best=best[start]))
    elif start in best and best[start] in (tried[0], tried[-1]):
        said.append(say("at_the_edge", start=start, best=best[start], lowest=best[start] == tried[0]))
    sizes = table.groupby("start")["trainable_parameters"].first()
    ratio = sizes.get(start, math.nan) / sizes.get(RANDOM, math.nan)
    if start != FULL and abs(ratio - 1) > _EQUAL_PARAMETERS:
        said.append(say("other_size", start=start, parameters=sizes[start], ratio=ratio))
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
        return [say("nothing_yet")]
    said = [] if RANDOM in best_rates(table) else [say("no_reference")]
    absent = [start for start in settings.get("starts") or [] if start not in {RANDOM, *table["start"]}]
    if absent:
        said.append(say("not_run", starts=absent))
    lacking: dict[frozenset[int], list[str]] = {}
    for start, own in table[table["best"]].groupby("start", sort=False):
        seeds = frozenset(settings.get("seeds") or []) - set(own["seed"])
        if seeds and not settings.get("budget") and Variant(start).steps is None:
            lacking.setdefault(seeds, []).append(start)
    said += [say("seeds_lacking", starts=own, which=seeds) for seeds, own in lacking.items()]
    said += [say("few_examples", n=n)] if (n := settings.get("folds", {}).get("report", FEW)) < FEW else []
    said += _hardly_learned(table)
    if table["learning_rate"].nunique() > 1 and table["seed"].nunique() == 1:
        said.append(say("one_seed_chose"))
    return said + _circumstances(table) + _lost(table)


def _circumstances(table: pd.DataFrame) -> list[str]:
    """Say that not all runs are from one machine, on which alone the same run has the same numbers."""
    known = [run for run in table["circumstances"] if isinstance(run, dict)]
    facts = [{**{name: run.get(name) for name in ("processor", "threads")}, **run.get("versions", {})} for run in known]
    names = dict.fromkeys(name for run in facts for name in run)
    counts = {name: Counter(str(run.get(name)) for run in facts) for name in names}
    differing = {name: values for name, values in counts.items() if len(values) > 1}
    return [say("circumstances", differing=differing)] if differing else []


def _hardly_learned(table: pd.DataFrame) -> list[str]:
    """Count the seeds on which a start, at its best rate, learned less than half of what the best start did."""
    losses = by_seed(table)
    plain = table.groupby("seed")["plain_loss"].mean()
    losses = losses.loc[:, losses.min() < plain.reindex(losses.columns)]
    few = (plain - losses) < (plain - losses.min()) / 2
    counts = [(start, own.sum(), losses.loc[start].count()) for start, own in few.iterrows() if any(own)]
    return [say("hardly_learned", counts=counts)] if counts else []


def _lost(table: pd.DataFrame) -> list[str]:
    """Name the runs that came to nothing, and why."""
    said = []
    unstable = table[table["status"] == "unstable"]
    for (start, rate), runs in unstable.groupby(["start", "learning_rate"], sort=False):
        errors = list(dict.fromkeys(str(error or "no finite loss").rstrip(".") for error in runs["error"]))
        said.append(say("unstable", start=start, learning_rate=rate, which=list(runs["seed"]), errors=errors))
    failed = table[table["status"] == "failed"]
    for reason, runs in failed.groupby("error", sort=False):
        said.append(say("failed", n=len(runs), reason=reason.rstrip("."), starts=runs["start"].unique()))
    return said


def headroom(table: pd.DataFrame, judged: Sequence[Verdict]) -> str:
    """Say how far random goes from the plain model to full fine-tuning, and whether what is left could be shown."""
    losses, best = by_seed(table), best_rates(table)
    if RANDOM not in losses.index:
        return ""
    left = _left(table)
    return say(
        "headroom",
        plain=table[table["best"] & table["start"].eq(RANDOM)]["plain_loss"].mean(),
        exact=table["float_loss"].mean(),
        random=losses.loc[RANDOM].mean(),
        full=None if math.isnan(left) else losses.loc[FULL].mean(),
        best=best.get(FULL),
        # There is none for a single seed.
        against=effects(losses.reindex([RANDOM, FULL]), RANDOM).get(FULL),
        left=left,
        could=min((verdict.showable for verdict in judged if verdict.showable is not None), default=None),
        # What a start has won was there to win, whatever full fine-tuning gains.
        won=any(verdict.outcome == "better" for verdict in judged),
        caveats=[] if math.isnan(left) else _caveats(table, FULL, {}),
    )


def answer(table: pd.DataFrame, judged: Sequence[Verdict]) -> tuple[str, str | None, list[str]]:
    """Say which start to use and name it, None if the runs do not say yet; and list what changes the meaning."""
    doubts = _caveats(table, RANDOM, unlike_spreads(judged_losses(table)))
    better = [verdict for verdict in judged if verdict.outcome == "better"]
    could = [verdict.showable / verdict.reference for verdict in judged if verdict.showable and verdict.reference]
    winner = min(better, key=lambda verdict: verdict.mean or 0.0, default=None)
    doubts = [*winner.caveats, *doubts] if winner else doubts
    span = [min(could), max(could)] if could else []
    said = say("answer", winner=winner, could=span, rates=best_rates(table))
    start = winner.start if winner else RANDOM if could else None
    return said, start, [f"{doubt[0].upper()}{doubt[1:]}." for doubt in doubts if start]


def make_command(start: str | None, settings: Mapping[str, Any], learning_rate: float | None = None) -> str | None:
    """Write the command that makes the adapter of a start, to be trained at a rate; None where `init` does not."""
    asked = Variant(start) if start else None
    options = asked.init_options() if asked else None
    if not asked or not options or not settings.get("init"):
        return None
    of_bank = "--bank" in options  # whose adapters decide all else
    rate = "" if learning_rate is None or of_bank else f"--learning-rate {rate_text(learning_rate)} "
    batches = asked.batches or settings["statistics_batches"]
    samples = f"--samples {batches * settings['batch_size']} --max-batches {batches}"
    alpha = f"--lora-alpha {asked.alpha or settings['lora_alpha']:g}"
    return " ".join([settings["init"], samples, alpha, *options, f"{rate}--output adapter"])


def as_recommended(table: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    """Judge the starts that are there as recommended at that very rate, untuned, against random at its best one."""
    best, said = best_rates(table), []
    rates = {start: rate for start, rate in (settings.get("recommended") or {}).items() if start in best}
    untuned = table[table["counts"] & table["learning_rate"].eq(table["start"].map(rates))]
    rows, losses = untuned.pivot(index="start", columns="seed", values="loss"), judged_losses(table)
    found = effects(pd.concat([losses.drop(index=rows.index), rows]), RANDOM)
    for start in rows.index:
        known = {"start": start, "rate": rates[start], "is_best": best[start] == rates[start]}
        reference = float(losses.loc[RANDOM].mean()) if start in found else math.nan
        said.append(say("as_recommended", **known, effect=found.get(start), reference=reference))
    return said


def longer_random(table: pd.DataFrame) -> Variant:
    """Name the start that is random with twice the steps."""
    return Variant(f"{RANDOM}+{2 * _steps(table)}-steps")


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
        if longer not in losses.index or took[start] > steps:
            said.append(say("not_trained_longer", start=start, at_all=longer in losses.index))
            continue
        gained = (losses.loc[RANDOM] - losses.loc[longer]) / math.log(2)  # by e times as many steps
        if gained.mean() <= 0:
            said.append(say("more_steps_gain_nothing", start=start, took=took[start]))
            continue
        rows = losses.loc[[other.start for other in judged if other.start in losses.index]]
        later = (losses.loc[RANDOM] - gained * math.log1p(took[start] / steps)).rename(RANDOM).to_frame().T
        effect = effects(pd.concat([later, rows]), RANDOM).get(start)
        if effect is not None:
            reference, worth = float(later.loc[RANDOM].mean()), math.expm1(min(-verdict.mean / gained.mean(), 50.0))
            known = {"effect": effect, "reference": reference, "took": took[start], "worth": worth}
            said.append(say("equal_time", start=start, **known))
    return said


def facts(table: pd.DataFrame, settings: Mapping[str, Any]) -> str:
    """Say in a line what was trained, on what, and how long."""
    known = {name: settings.get(name) for name in ("model", "kind", "task", "steps", "batch_size", "rank", "data")}
    return say("facts", known=known, n_seeds=table["seed"].nunique(), n_runs=len(table))


def forgetting(table: pd.DataFrame) -> list[str]:
    """Judge what starts forget at equal task loss, over all rates and not only at each one's best, see `equal_loss`."""
    least = equal_loss(table)
    if RANDOM not in least.index:
        return []
    found, said = effects(_judged(least), RANDOM), []
    for start in filter(is_judged, table[table["counts"] & table["rise"].notna()]["start"].unique()):
        means = least.reindex([start, RANDOM]).dropna(axis=1).mean(axis=1)
        said.append(say("forgetting", start=start, effect=found.get(start), own=means[start], random=means[RANDOM]))
    return said


def equal_loss(table: pd.DataFrame) -> pd.DataFrame:
    """Arrange the rise of the loss on other text at equal task loss: a row for each start, a column for each seed.

    Of the runs of a start and a seed that end at most 0.5 % above random's best with that seed, the one counts that
    raises the loss on other text least; so for random, too. Empty where no run of random counts.
    """
    target, runs = by_seed(table), table[table["counts"] & table["rise"].notna()]
    if RANDOM not in target.index or runs.empty:
        return pd.DataFrame()
    equal = runs["loss"] <= (1 + _EQUAL_LOSS) * runs["seed"].map(target.loc[RANDOM])
    return runs[equal].groupby(["start", "seed"], sort=False)["rise"].min().unstack()


def data_needed(table: pd.DataFrame) -> list[str]:
    """Compare each start with statistics of fewer batches with the same start with most, each at its own best rate."""
    losses, said = by_seed(table), []
    varied = table[table["best"] & table["batches"].gt(0)]
    for name, runs in varied.groupby("any_batches", sort=False):
        numbers = dict(zip(runs["start"], map(int, runs["batches"]), strict=True))  # from few to many
        most = list(numbers)[-1]
        reference = float(losses.loc[most].mean())
        for start, effect in effects(losses.loc[list(numbers)], most).items():
            batches = {"fewer": numbers[start], "most": numbers[most]}
            said.append(say("data_needed", start=name, **batches, effect=effect, reference=reference))
    return said


@dataclass(frozen=True)
class Summary:
    """What a comparison found so far.

    Attributes:
        title: Task and model.
        facts: What was trained, on what, and how long.
        answer: Which start to use, in a sentence.
        caveats: What changes the meaning of that, a sentence each.
        start: Its name; None if the runs do not say yet.
        command: The command that makes its adapter; None if there is none.
        headline: The verdicts in one sentence, and how many runs ended how.
        headroom: How much of what full fine-tuning gains random gains already, in a sentence or two.
        verdicts: One for each start other than random, in order.
        as_recommended: What each start that is there as recommended is at the rate of the recommendation.
        equal_time: What is left of each better start at equal total time; see `equal_time`.
        forgetting: What each start forgets at equal task loss, a sentence each; see `forgetting`.
        data_needed: How each start ends with statistics of fewer batches, a sentence each; see `data_needed`.
        notes: What a reader must know beside them.
        table: The runs themselves, see `run_table`.
    """

    title: str
    facts: str
    answer: str
    caveats: list[str]
    start: str | None
    command: str | None
    headline: str
    headroom: str
    verdicts: list[Verdict]
    as_recommended: list[str]
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
    said, start, caveats = answer(table, judged)
    return Summary(
        title=" · ".join(filter(None, ["Starts compared", settings.get("task"), settings.get("model")])),
        facts=facts(table, settings),
        answer=said,
        caveats=caveats,
        start=start,
        command=make_command(start, settings, best_rates(table).get(start or "")),
        headline=say(
            "headline",
            outcomes=Counter(verdict.outcome for verdict in judged),
            statuses=dict(table["status"].value_counts()),
        ),
        headroom=headroom(table, judged),
        verdicts=judged,
        as_recommended=as_recommended(table, settings),
        equal_time=equal_time(table, judged),
        forgetting=forgetting(table),
        data_needed=data_needed(table),
        notes=notes(table, settings),
        table=table,
    )
