"""What the runs of a comparison show: a verdict on each start, and what a reader must know beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from lora_init.comparison.effects import Effect, Outcome, effects, unlike_spreads
from lora_init.comparison.runs import APART, best_rates, by_seed, run_table
from lora_init.comparison.tasks import FEW
from lora_init.comparison.variants import Variant
from lora_init.comparison.wording import rate_text, say
from lora_init.starts.starts import FULL, RANDOM


@dataclass(frozen=True)
class Verdict:
    """What may be said about one start; differences are of final losses, less random's."""

    start: str
    outcome: Outcome | Literal["no statement"]  # better or worse if zero lies outside the interval
    sentence: str = ""  # in full, with the caveats
    differences: dict[int, float] = field(default_factory=dict)  # by seed, of seeds that both have
    mean: float | None = None  # as `effects` estimates it; of one pair, that
    low: float | None = None  # ends of its interval; None with fewer than two pairs
    high: float | None = None
    detectable: float | None = None  # the detectable difference, half the width of the interval
    reference: float | None = None  # mean loss of random at its best rate, which per cents are of
    closed: float | None = (
        None  # gain over the gain of full fine-tuning; None if the runs could not have shown the latter
    )
    caveats: list[str] = field(default_factory=list)  # what changes the meaning


def is_judged(start: str) -> bool:
    """Return whether a start is compared with random: random itself is not, nor full, nor what trains longer."""
    return start not in (RANDOM, FULL) and Variant.parse(start).steps is None


def judged_losses(table: pd.DataFrame) -> pd.DataFrame:
    """Arrange the final losses of random and of all that are compared with it: a row for each, a column for a seed."""
    return _judged(by_seed(table))


def _judged(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[[start == RANDOM or is_judged(start) for start in rows.index]]


def verdicts(table: pd.DataFrame) -> list[Verdict]:
    """Judge each start, at its own best rate, by its final loss against random's, all in one layout, see `effects`."""
    losses, left = judged_losses(table), _left(table)
    differences, unlike = effects(losses, RANDOM), unlike_spreads(losses)
    starts = [start for start in table["start"].unique() if is_judged(start)]
    caveats = {start: _caveats(table, start, unlike) for start in starts}
    return [_judge(table, start, losses, left, differences.get(start), caveats[start]) for start in starts]


def _judge(
    table: pd.DataFrame, start: str, losses: pd.DataFrame, left: float, effect: Effect | None, caveats: list[str]
) -> Verdict:
    best = best_rates(table)
    lacking = [one for one in (RANDOM, start) if one not in best]
    pairs = pd.Series() if lacking else (losses.loc[start] - losses.loc[RANDOM]).dropna()
    reference = float(losses.loc[RANDOM].mean()) if RANDOM in best else None
    verdict = Verdict(start, "no statement", reference=reference, caveats=caveats)
    if len(pairs):
        differences = {int(seed): float(value) for seed, value in pairs.items()}
        verdict = replace(verdict, differences=differences, mean=float(pairs.iloc[0]))
    if effect:
        verdict = replace(
            verdict,
            outcome=effect.outcome,
            mean=effect.mean,
            low=effect.low,
            high=effect.high,
            detectable=effect.detectable,
            closed=-effect.mean / left if left > effect.detectable else None,
        )
    sentence = say("verdict", it=verdict, rates=best, lacking=lacking[-1] if lacking else None, left=left)
    return replace(verdict, sentence=sentence)


def _left(table: pd.DataFrame) -> float:
    """Compute how much lower full fine-tuning ends than random, over the seeds that both have; NaN if there is none."""
    losses = by_seed(table).reindex([RANDOM, FULL])
    return float((losses.loc[RANDOM] - losses.loc[FULL]).mean())


def _edge(table: pd.DataFrame, start: str) -> Literal["lowest", "highest"] | None:
    """Return at which end of the rates tried a start's best one is."""
    runs, best = table[table["start"] == start], best_rates(table).get(start)
    tried = sorted(runs[runs["status"] != "failed"]["learning_rate"].unique())
    if len(tried) < 2 or best not in (tried[0], tried[-1]):
        return None
    return "lowest" if best == tried[0] else "highest"


def _caveats(table: pd.DataFrame, start: str, unlike: Mapping[str, float]) -> list[str]:
    """List what changes the meaning of a comparison with this start."""
    said = []
    if start in unlike:
        said.append(say("scatters", start=start, times=unlike[start]))
    runs, best = table[table["start"] == start], best_rates(table)
    if edge := _edge(table, start):
        said.append(say("at_the_edge", start=start, best=best[start], edge=edge))
    elif start in best and runs[runs["status"] != "failed"]["learning_rate"].nunique() == 1:
        said.append(say("one_rate", start=start, best=best[start]))
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
    """List what a reader must know beside the verdicts, the most serious first."""
    if table.empty:
        return [say("nothing_yet")]
    said = [] if RANDOM in best_rates(table) else [say("no_reference")]
    absent = [start for start in settings.get("starts") or [] if start not in {RANDOM, *table["start"]}]
    if absent:
        said.append(say("not_run", starts=absent))
    said += _seeds_lacking(table, settings)
    said += [say("few_examples", n=n)] if (n := settings.get("folds", {}).get("report", FEW)) < FEW else []
    said += [say("small", steps=settings["steps"], tuned=size["tuned"])] if (size := settings.get("size")) else []
    said += _hardly_learned(table)
    if table["learning_rate"].nunique() > 1 and table["seed"].nunique() == 1:
        said.append(say("one_seed_chose"))
    return said + _circumstances(table) + _lost(table)


def _seeds_lacking(table: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    """List the starts that were not run on all seeds at their best rate, where no limit decided that."""
    if settings.get("budget"):
        return []
    lacking: dict[frozenset[int], list[str]] = {}
    for start, own in table[table["best"]].groupby("start", sort=False):
        seeds = frozenset(settings.get("seeds") or []) - set(own["seed"])
        if seeds and (start in (RANDOM, FULL) or is_judged(start)):
            lacking.setdefault(seeds, []).append(start)
    return [say("seeds_lacking", starts=own, which=seeds) for seeds, own in lacking.items()]


def _circumstances(table: pd.DataFrame) -> list[str]:
    """Report that not all runs are from one machine, on which alone the same run has the same numbers."""
    known = [run for run in table["circumstances"] if isinstance(run, dict)]
    facts = [{**{name: run.get(name) for name in ("processor", "threads")}, **run.get("versions", {})} for run in known]
    differing = _differing(facts)
    if "processor" in differing and table["node"].notna().any():
        pairs = zip(table["circumstances"], table["node"].fillna("the first machine"), strict=True)
        differing["processor"] = Counter(f"{run['processor']} on {node}" for run, node in pairs if run in known)
    return [say("circumstances", differing=differing)] if differing else []


def _differing(facts: Sequence[Mapping[str, Any]]) -> dict[str, Counter[str]]:
    """Count the values of each fact that is not the same in all runs."""
    names = dict.fromkeys(name for run in facts for name in run)
    counts = {name: Counter(str(run.get(name)) for run in facts) for name in names}
    return {name: values for name, values in counts.items() if len(values) > 1}


def _hardly_learned(table: pd.DataFrame) -> list[str]:
    """Count the seeds on which a start, at its best rate, learned less than half of what the best start did."""
    losses = by_seed(table)
    plain = table.groupby("seed")["plain_loss"].mean()
    losses = losses.loc[:, losses.min() < plain.reindex(losses.columns)]
    few = (plain - losses) < (plain - losses.min()) / 2
    counts = [(start, own.sum(), losses.loc[start].count()) for start, own in few.iterrows() if any(own)]
    return [say("hardly_learned", counts=counts)] if counts else []


def _lost(table: pd.DataFrame) -> list[str]:
    """List the runs that came to nothing, and why."""
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
    """Report how far random goes from the plain model to full fine-tuning, and whether what is left could be shown."""
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
        could=min((verdict.detectable for verdict in judged if verdict.detectable is not None), default=None),
        # What a start has won was there to win, whatever full fine-tuning gains.
        won=any(verdict.outcome == "better" for verdict in judged),
        caveats=[] if math.isnan(left) else _caveats(table, FULL, {}),
    )


def answer(
    table: pd.DataFrame, judged: Sequence[Verdict], timed: Mapping[str, EqualTime], settings: Mapping[str, Any]
) -> tuple[str, str | None, list[str]]:
    """Return which start to use in a sentence, its name if there is advice, and what changes the meaning.

    There is none where a best rate is at the edge of those tried. A start that `random` beats when it trains for the
    same time is not advised.
    """
    winner, lasting = _winner(judged, timed)
    could = [verdict.detectable / verdict.reference for verdict in judged if verdict.detectable and verdict.reference]
    start = winner.start if winner and lasting else RANDOM if could else None
    edges = {one: edge for one in dict.fromkeys([start, RANDOM]) if one and could and (edge := _edge(table, one))}
    rates, left = best_rates(table), forgotten(table)
    known: dict[str, Any] = {"winner": winner, "lasting": lasting, "edges": edges, "rates": rates}
    known |= {"could": [min(could), max(could)] if could else [], "forgotten": left.get(start or "", left.get(RANDOM))}
    said = say("answer", **known, extend=_next_extend(table, edges, settings))
    doubts = _doubts(table, winner, timed) if start else []
    return said, None if edges else start, doubts


def _doubts(table: pd.DataFrame, winner: Verdict | None, timed: Mapping[str, EqualTime]) -> list[str]:
    """List, as sentences, what changes the meaning of the advice: about random, and about the start that won."""
    doubts = _caveats(table, RANDOM, unlike_spreads(judged_losses(table)))
    if winner:
        late = timed[winner.start]
        doubts = [*winner.caveats, *doubts, *([late.sentence] if late.outcome != "better" else [])]
    return [f"{doubt[0].upper()}{doubt[1:].rstrip('.')}." for doubt in doubts]


def _winner(judged: Sequence[Verdict], timed: Mapping[str, EqualTime]) -> tuple[Verdict | None, bool]:
    """Choose the best of the better starts, if possible of those that random does not beat in the same time.

    Return it, None if no start is better, and whether it is one of those.
    """
    better = sorted((verdict for verdict in judged if verdict.outcome == "better"), key=lambda one: one.mean or 0.0)
    lasting = [verdict for verdict in better if timed[verdict.start].outcome != "worse"]
    return next(iter([*lasting, *better]), None), bool(lasting)


def _next_extend(table: pd.DataFrame, edges: Mapping[str, str], settings: Mapping[str, Any]) -> int | None:
    """Return the `--extend` that goes on from the edge; None if the same command does, as after an interruption."""
    given, extend = settings.get("learning_rates") or [], settings.get("extend", 0)
    for start, edge in edges.items():
        tried, scale = table[table["start"] == start]["learning_rate"].unique(), 0.1 if start == FULL else 1.0
        own = (settings.get("recommended") or {}).get(start)
        ends = [rate * scale for rate in given] or ([own / APART, own * APART] if own else [0.0])
        added = sum(rate < 0.999 * min(ends) for rate in tried) if edge == "lowest" else sum(tried > 1.001 * max(ends))
        if added >= extend:
            return int(extend) + 2
    return None


def make_command(start: str | None, settings: Mapping[str, Any], learning_rate: float | None = None) -> str | None:
    """Write the command that makes the adapter of a start, to be trained at a rate; None where `init` does not."""
    variant = Variant.parse(start) if start else None
    options = variant.init_options() if variant else None
    if not variant or not options or not settings.get("init"):
        return None
    of_bank = "--bank" in options  # whose adapters decide all else
    rate = "" if learning_rate is None or of_bank else f"--learning-rate {rate_text(learning_rate)} "
    batches = variant.batches or settings["statistics_batches"]
    samples = f"--samples {batches * settings['batch_size']} --max-batches {batches}"
    alpha = f"--lora-alpha {variant.alpha or settings['lora_alpha']:g}"
    return " ".join([settings["init"], samples, alpha, *options, f"{rate}--output adapter"])


def as_recommended(table: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    """Judge the starts that are there as recommended at that very rate, untuned, against random at its best one."""
    best, said = best_rates(table), []
    known = (settings.get("recommended") or {}).items()
    rates = {start: rate for start, rate in known if start in best and start != RANDOM}
    untuned = table[table["counts"] & table["learning_rate"].eq(table["start"].map(rates))]
    rows, losses = untuned.pivot(index="start", columns="seed", values="loss"), judged_losses(table)
    differences = effects(pd.concat([losses.drop(index=rows.index), rows]), RANDOM)
    for start in rows.index:
        known = {"start": start, "rate": rates[start], "is_best": best[start] == rates[start]}
        reference = float(losses.loc[RANDOM].mean()) if start in differences else math.nan
        said.append(say("as_recommended", **known, effect=differences.get(start), reference=reference))
    return said


_MOST_TIMES = 8  # as many steps is as long as random trains to be compared at equal time


def longer_random(table: pd.DataFrame, judged: Iterable[Verdict]) -> Variant:
    """Return the start that is random trained for at least the time of each better start: 2, 4 or 8 times the steps."""
    steps, took = _steps(table), steps_of_start(table)
    most = max((float(took[verdict.start]) for verdict in judged if verdict.outcome == "better"), default=0.0)
    times = 2 ** math.ceil(math.log2(max(2.0, 1 + most / steps)))
    return Variant(RANDOM, steps=min(times, _MOST_TIMES) * steps)


def _steps(table: pd.DataFrame) -> int:
    """Read the steps of all from a run of random that finished."""
    return int(table[table["best"] & table["start"].eq(RANDOM)]["evaluation_points"].iloc[0][-1])


class EqualTime(NamedTuple):
    """What is left of a better start where random trains for the time of its statistics, start and search, too."""

    outcome: Outcome | Literal["no statement"]
    sentence: str


def equal_time(table: pd.DataFrame, judged: Sequence[Verdict]) -> dict[str, EqualTime]:
    """Judge the better starts at equal total time.

    The loss of random after more steps is read, seed by seed, between those after the steps of all and after the steps
    of a longer run, on a line over the logarithm of their number. Where more steps are no gain, it would not train on.
    If the longer run is not as long as the start takes, but ends lower all the same, random is better.
    """
    losses = by_seed(table)
    trained = {name: Variant.parse(name) for name in losses.index}
    longer = {n: name for name, one in trained.items() if (n := one.steps) and one == Variant(RANDOM, steps=n)}
    rows = losses.loc[[verdict.start for verdict in judged if verdict.start in losses.index]]
    return {
        verdict.start: _at_equal_time(table, verdict, longer, rows) for verdict in judged if verdict.outcome == "better"
    }


def _at_equal_time(table: pd.DataFrame, verdict: Verdict, longer: Mapping[int, str], rows: pd.DataFrame) -> EqualTime:
    """Judge a better start at equal total time; `longer` names the runs of random with more steps by their number."""
    start, steps, losses = verdict.start, _steps(table), by_seed(table)
    took = float(steps_of_start(table)[start])
    n = min((n for n in longer if n >= steps + took), default=max(longer, default=0))
    if n <= steps:
        return EqualTime("no statement", say("not_trained_longer", start=start, n=0, wanted=0))
    gained = (losses.loc[RANDOM] - losses.loc[longer[n]]) / math.log(n / steps)  # by e times as many steps
    if gained.mean() <= 0:
        return EqualTime(verdict.outcome, say("more_steps_gain_nothing", start=start, took=took))
    later = (losses.loc[RANDOM] - gained * math.log(min(n, steps + took) / steps)).rename(RANDOM).to_frame().T
    effect = effects(pd.concat([later, rows]), RANDOM).get(start)
    if effect is None or (n < steps + took and effect.outcome != "worse"):
        return EqualTime("no statement", say("not_trained_longer", start=start, n=n, wanted=round(steps + took)))
    worth = math.expm1(min(-(verdict.mean or 0.0) / gained.mean(), 50.0))
    known = {"took": took, "worth": worth, "most": n / steps - 1, "n": n if n < steps + took else None}
    reference = float(later.loc[RANDOM].mean())
    return EqualTime(effect.outcome, say("equal_time", start=start, effect=effect, reference=reference, **known))


def facts(table: pd.DataFrame, settings: Mapping[str, Any]) -> str:
    """Describe in a line what was trained, on what, and how long."""
    known = {name: settings.get(name) for name in ("model", "kind", "task", "steps", "batch_size", "rank", "data")}
    return say("facts", known=known, n_seeds=table["seed"].nunique(), n_runs=len(table))


class Forgotten(NamedTuple):
    """How much a start raises the loss on other text at the task loss of random at its best rate."""

    rise: float
    random: float
    effect: Effect | None  # None with too few seeds that reach that loss


def forgotten(table: pd.DataFrame) -> dict[str, Forgotten]:
    """Judge what random and the starts compared with it forget, see `equal_loss`."""
    least = equal_loss(table)
    if RANDOM not in least.index:
        return {}
    differences = effects(_judged(least), RANDOM)
    judged = {}
    for start in table[table["counts"] & table["rise"].notna()]["start"].unique():
        if start == RANDOM or is_judged(start):
            means = least.reindex(list(dict.fromkeys([start, RANDOM]))).dropna(axis=1).mean(axis=1)
            judged[start] = Forgotten(means[start], means[RANDOM], differences.get(start))
    return judged


def equal_loss(table: pd.DataFrame, above: float = _EQUAL_LOSS) -> pd.DataFrame:
    """Arrange the least rise of the loss on other text at equal task loss: a row for each start, a column for a seed.

    Of the runs of a start and a seed that end at most `above`, a share, over random's best with that seed, the one
    counts that raises the loss on other text least; so for random, too. Runs that were evaluated at several strengths
    of their adapter count at any strength, between two of them on a line. Empty where no run of random counts.
    """
    target, runs = by_seed(table), table[table["counts"] & table["rise"].notna()]
    if RANDOM not in target.index or runs.empty:
        return pd.DataFrame()
    limits = (1 + above) * runs["seed"].map(target.loc[RANDOM])
    least = [_least_rise(run, limit) for (_, run), limit in zip(runs.iterrows(), limits, strict=True)]
    lowest = runs.assign(least=least).dropna(subset="least")
    return lowest.groupby(["start", "seed"], sort=False)["least"].min().unstack()


def _least_rise(run: pd.Series, limit: float) -> float:
    """Return the least rise of the loss on other text at which a run's task loss is within a limit; NaN if none is."""
    if not isinstance(run["dial"], list):
        return float(run["rise"]) if run["loss"] <= limit else math.nan
    strengths, losses, retained = np.array(run["dial"]).T
    between = np.linspace(strengths[0], strengths[-1], 301)
    within = np.interp(between, strengths, losses) <= limit
    rises = np.interp(between, strengths, retained)[within] - run["retained_before"]
    return float(rises.min()) if len(rises) else math.nan


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
    """What a comparison found so far."""

    title: str  # task and model
    facts: str  # what was trained, on what, and how long
    answer: str  # which start to use
    caveats: list[str]  # what changes the meaning of that, a sentence each
    start: str | None  # its name; None if the runs do not say yet
    command: str | None  # makes its adapter; None if no command does
    headline: str  # the verdicts in one sentence, and how many runs ended how
    headroom: str  # how much of what full fine-tuning gains random gains already
    verdicts: list[Verdict]  # one for each start other than random, in order
    as_recommended: list[str]  # what each recommended start is at the rate of the recommendation
    equal_time: list[str]  # what is left of each better start at equal total time
    forgetting: list[str]  # what each start forgets at equal task loss
    data_needed: list[str]  # how each start ends with statistics of fewer batches
    notes: list[str]  # what a reader must know beside them
    alphas: dict[str, float]  # lora_alpha of each start
    table: pd.DataFrame  # the runs, see `run_table`


def summarise(records: Iterable[dict[str, Any]], settings: Mapping[str, Any]) -> Summary:
    """Collect what the runs show, whether they are all there or only some; `settings` is what `settings.json` says."""
    table = run_table(records, settings.get("starts") or [])
    judged = verdicts(table)
    timed = equal_time(table, judged)
    said, start, caveats = answer(table, judged, timed, settings)
    starts = [one for one in table["start"].unique() if one != FULL]
    outcomes, statuses = Counter(verdict.outcome for verdict in judged), dict(table["status"].value_counts())
    dialled = any(isinstance(dial, list) for dial in table["dial"])
    return Summary(
        title=" · ".join(filter(None, ["Starts compared", settings.get("task"), settings.get("model")])),
        facts=facts(table, settings),
        answer=said,
        caveats=caveats,
        start=start,
        command=make_command(start, settings, best_rates(table).get(start or "")),
        headline=say("headline", outcomes=outcomes, statuses=statuses),
        headroom=headroom(table, judged),
        verdicts=judged,
        as_recommended=as_recommended(table, settings),
        equal_time=[found.sentence for found in timed.values()],
        forgetting=[
            say("forgetting", start=name, it=found, dialled=dialled)
            for name, found in forgotten(table).items()
            if name != RANDOM
        ],
        data_needed=data_needed(table),
        notes=notes(table, settings),
        alphas={name: Variant.parse(name).alpha or settings.get("lora_alpha", math.nan) for name in starts},
        table=table,
    )
