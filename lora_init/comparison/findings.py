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
from lora_init.comparison.runs import APART, best_rates, by_seed, predicted_rate, run_table
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
    # gain over the gain of full fine-tuning; None if the runs could not have shown the latter
    closed: float | None = None
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
    judged = []
    for start in table["start"].unique():
        if is_judged(start):
            caveats = _caveats(table, start, unlike)
            judged.append(_judge(table, start, losses, left, differences.get(start), caveats))
    return judged


def _judge(
    table: pd.DataFrame, start: str, losses: pd.DataFrame, left: float, effect: Effect | None, caveats: list[str]
) -> Verdict:
    best = best_rates(table)
    verdict = Verdict(start, "no statement", caveats=caveats)
    if RANDOM in best:
        verdict = replace(verdict, reference=float(losses.loc[RANDOM].mean()))
    lacking = None
    for name in (RANDOM, start):  # where both lack a rate, the start is named
        if name not in best:
            lacking = name
    if lacking is None:
        pairs = (losses.loc[start] - losses.loc[RANDOM]).dropna()
        if len(pairs):
            differences = {int(seed): float(value) for seed, value in pairs.items()}
            # Of a single pair this is all that is known; of more, the effect takes its place.
            verdict = replace(verdict, differences=differences, mean=float(pairs.iloc[0]))
    if effect:
        # Without full fine-tuning `left` is NaN, which is not above anything.
        closed = -effect.mean / left if left > effect.detectable else None
        verdict = replace(
            verdict,
            outcome=effect.outcome,
            mean=effect.mean,
            low=effect.low,
            high=effect.high,
            detectable=effect.detectable,
            closed=closed,
        )
    return replace(verdict, sentence=say("verdict", it=verdict, rates=best, lacking=lacking, left=left))


def _left(table: pd.DataFrame) -> float:
    """Compute how much lower full fine-tuning ends than random, over the seeds that both have; NaN if there is none."""
    losses = by_seed(table).reindex([RANDOM, FULL])
    return float((losses.loc[RANDOM] - losses.loc[FULL]).mean())


def _edge(table: pd.DataFrame, start: str) -> Literal["lowest", "highest"] | None:
    """Return at which end of the rates tried a start's best one is; None if it is at neither."""
    best, tried = best_rates(table).get(start), _rates_tried(table, start)
    if len(tried) < 2:  # a single rate has a caveat of its own
        return None
    if best == tried[0]:
        return "lowest"
    if best == tried[-1]:
        return "highest"
    return None


def _rates_tried(table: pd.DataFrame, start: str) -> list[float]:
    """List the rates of a start in rising order: those that diverged, too, as that tells something of a rate."""
    runs = table[table["start"] == start]
    return sorted(runs[runs["status"] != "failed"]["learning_rate"].unique())


def _caveats(table: pd.DataFrame, start: str, unlike: Mapping[str, float]) -> list[str]:
    """List what changes the meaning of a comparison with this start."""
    caveats = []
    if start in unlike:
        caveats.append(say("scatters", start=start, times=unlike[start]))
    best = best_rates(table)
    if edge := _edge(table, start):
        caveats.append(say("at_the_edge", start=start, best=best[start], edge=edge))
    elif start in best and len(_rates_tried(table, start)) == 1:
        caveats.append(say("one_rate", start=start, best=best[start]))
    sizes = table.groupby("start")["trainable_parameters"].first()
    ratio = sizes.get(start, math.nan) / sizes.get(RANDOM, math.nan)  # NaN, of which no caveat comes, if one is unknown
    if start != FULL and abs(ratio - 1) > _EQUAL_PARAMETERS:
        caveats.append(say("other_size", start=start, parameters=sizes[start], ratio=ratio))
    return caveats


def steps_of_start(table: pd.DataFrame) -> pd.Series:
    """Compute the time of each start, with its statistics and its search, in training steps of that start."""
    best = table[table["best"]]
    steps = best["evaluation_points"].map(lambda points: points[-1])
    # Run by run, so that start and training were timed on the same machine.
    return (best["initialisation_seconds"] * steps / best["training_seconds"]).groupby(best["start"]).mean()


_EQUAL_PARAMETERS = 0.01  # a share: whole ranks can't always meet a number
_EQUAL_LOSS = 0.005  # a share, too


def notes(table: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    """List what a reader must know beside the verdicts, the most serious first."""
    if table.empty:
        return [say("nothing_yet")]
    sentences = []
    if RANDOM not in best_rates(table):
        sentences.append(say("no_reference"))
    run = {RANDOM, *table["start"]}  # of random the sentence before tells
    absent = [start for start in settings.get("starts") or [] if start not in run]
    if absent:
        sentences.append(say("not_run", starts=absent))
    sentences += _seeds_lacking(table, settings)
    n_reported = settings.get("folds", {}).get("report", FEW)  # settings of older directories have no `folds`
    if n_reported < FEW:
        sentences.append(say("few_examples", n=n_reported))
    if size := settings.get("size"):  # where a limit of time made it smaller
        sentences.append(say("small", steps=settings["steps"], tuned=size["tuned"]))
    sentences += _hardly_learned(table)
    if table["learning_rate"].nunique() > 1 and table["seed"].nunique() == 1:
        sentences.append(say("one_seed_chose"))
    return sentences + _circumstances(table) + _lost(table)


def _seeds_lacking(table: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    """List the starts that were not run on all seeds at their best rate, where no limit decided that."""
    if settings.get("budget"):
        return []
    starts_by_lack: dict[frozenset[int], list[str]] = {}  # starts that lack the same seeds share a sentence
    for start, own in table[table["best"]].groupby("start", sort=False):
        seeds = frozenset(settings.get("seeds") or []) - set(own["seed"])
        # Random that trains longer has only the seeds that a better start has.
        if seeds and (start in (RANDOM, FULL) or is_judged(start)):
            starts_by_lack.setdefault(seeds, []).append(start)
    return [say("seeds_lacking", starts=starts, which=seeds) for seeds, starts in starts_by_lack.items()]


def _circumstances(table: pd.DataFrame) -> list[str]:
    """Report that not all runs are from one machine, on which alone the same run has the same numbers."""
    described = [run for run in table["circumstances"] if isinstance(run, dict)]  # older records lack them
    facts = []
    for run in described:
        machine = {"processor": run.get("processor"), "threads": run.get("threads")}
        facts.append(machine | run.get("versions", {}))
    differing = _differing(facts)
    if not differing:
        return []
    if "processor" in differing and table["node"].notna().any():
        # Where nodes have names, a reader wants to know which one has which processor.
        differing["processor"] = Counter()
        for run, node in zip(table["circumstances"], table["node"].fillna("the first machine"), strict=True):
            if isinstance(run, dict):
                differing["processor"][f"{run['processor']} on {node}"] += 1
    return [say("circumstances", differing=differing)]


def _differing(facts: Sequence[Mapping[str, Any]]) -> dict[str, Counter[str]]:
    """Count the values of each fact that is not the same in all runs."""
    names: dict[str, None] = {}  # each once, in order
    for run in facts:
        names |= dict.fromkeys(run)
    differing = {}
    for name in names:
        values = Counter(str(run.get(name)) for run in facts)  # a version that a run lacks is a value, too: None
        if len(values) > 1:
            differing[name] = values
    return differing


def _hardly_learned(table: pd.DataFrame) -> list[str]:
    """Count the seeds on which a start, at its best rate, learned less than half of what the best start did."""
    losses = by_seed(table)
    plain = table.groupby("seed")["plain_loss"].mean()
    # On a seed where no start improved on the plain model, half of the best is nothing to go by.
    losses = losses.loc[:, losses.min() < plain.reindex(losses.columns)]
    few = (plain - losses) < (plain - losses.min()) / 2
    counts = []  # of each start: seeds on which it hardly learned, and seeds that it has
    for start, own in few.iterrows():
        if any(own):
            counts.append((start, own.sum(), losses.loc[start].count()))
    return [say("hardly_learned", counts=counts)] if counts else []


def _lost(table: pd.DataFrame) -> list[str]:
    """List the runs that came to nothing, and why."""
    sentences = []
    unstable = table[table["status"] == "unstable"]
    for (start, rate), runs in unstable.groupby(["start", "learning_rate"], sort=False):
        errors: dict[str, None] = {}  # each once, in order
        for error in runs["error"].fillna(""):  # a record has null, the table None or NaN
            errors[str(error or "no finite loss").rstrip(".")] = None  # the sentence has a full stop of its own
        seeds = list(runs["seed"])
        sentences.append(say("unstable", start=start, learning_rate=rate, which=seeds, errors=list(errors)))
    failed = table[table["status"] == "failed"]
    for reason, runs in failed.groupby("error", sort=False):
        sentences.append(say("failed", n=len(runs), reason=reason.rstrip("."), starts=runs["start"].unique()))
    return sentences


def headroom(table: pd.DataFrame, judged: Sequence[Verdict]) -> str:
    """Report how far random goes from the plain model to full fine-tuning, and whether the rest could be detected."""
    losses, best = by_seed(table), best_rates(table)
    if RANDOM not in losses.index:
        return ""
    left, full = _left(table), None
    caveats: list[str] = []
    if not math.isnan(left):
        full, caveats = losses.loc[FULL].mean(), _caveats(table, FULL, {})
    return say(
        "headroom",
        plain=table[table["best"] & table["start"].eq(RANDOM)]["plain_loss"].mean(),
        exact=table["float_loss"].mean(),
        random=losses.loc[RANDOM].mean(),
        full=full,
        best=best.get(FULL),
        # There is none for a single seed.
        against=effects(losses.reindex([RANDOM, FULL]), RANDOM).get(FULL),
        left=left,
        could=min((verdict.detectable for verdict in judged if verdict.detectable is not None), default=None),
        # What a start has won was there to win, whatever full fine-tuning gains.
        won=any(verdict.outcome == "better" for verdict in judged),
        caveats=caveats,
    )


def answer(
    table: pd.DataFrame, judged: Sequence[Verdict], timed: Mapping[str, EqualTime], settings: Mapping[str, Any]
) -> tuple[str, str | None, list[str]]:
    """Return which start to use in a sentence, its name if there is advice, and what changes the meaning.

    There is no advice where a best rate is at the edge of those tried. A start that `random` beats when it trains for
    the same time is not advised.
    """
    winner, lasting = _winner(judged, timed)
    detectable = []  # of each verdict, as a share of random's loss
    for verdict in judged:
        if verdict.detectable and verdict.reference:
            detectable.append(verdict.detectable / verdict.reference)
    start = None
    if winner and lasting:
        start = winner.start
    elif detectable:  # runs that could have shown a difference, and did not, speak for random
        start = RANDOM
    edges = {}
    if detectable:
        for name in (start, RANDOM):
            if name and (edge := _edge(table, name)):
                edges[name] = edge
    by_start = forgotten(table)
    sentence = say(
        "answer",
        winner=winner,
        lasting=lasting,
        edges=edges,
        rates=best_rates(table),
        could=[min(detectable), max(detectable)] if detectable else [],
        forgotten=by_start.get(start or RANDOM),
        extend=_next_extend(table, edges, settings),
    )
    if start is None:
        return sentence, None, []
    doubts = _doubts(table, winner, timed)
    # At an edge the best rate is not known yet, and with it the best start.
    return sentence, None if edges else start, doubts


def _doubts(table: pd.DataFrame, winner: Verdict | None, timed: Mapping[str, EqualTime]) -> list[str]:
    """List, as sentences, what changes the meaning of the advice: about random, and about the start that won."""
    doubts = _caveats(table, RANDOM, unlike_spreads(judged_losses(table)))
    if winner:
        doubts = [*winner.caveats, *doubts]
        at_equal_time = timed[winner.start]
        if at_equal_time.outcome != "better":
            doubts.append(at_equal_time.sentence)
    # Caveats are parts of sentences elsewhere: they begin small, and have no full stop.
    return [f"{doubt[0].upper()}{doubt[1:].rstrip('.')}." for doubt in doubts]


def _winner(judged: Sequence[Verdict], timed: Mapping[str, EqualTime]) -> tuple[Verdict | None, bool]:
    """Choose the best of the better starts, if possible of those that random does not beat in the same time.

    Return the start, None if none is better, and whether it lasts: whether random does not beat it in the same time.
    """
    better = [verdict for verdict in judged if verdict.outcome == "better"]
    better.sort(key=lambda verdict: verdict.mean or 0.0)
    lasting = [verdict for verdict in better if timed[verdict.start].outcome != "worse"]
    return next(iter([*lasting, *better]), None), bool(lasting)


def _next_extend(table: pd.DataFrame, edges: Mapping[str, str], settings: Mapping[str, Any]) -> int | None:
    """Return the `--extend` that goes on from the edge; None if the same command does, as after an interruption."""
    extend = settings.get("extend", 0)
    for start, edge in edges.items():
        tried, (lowest, highest) = table[table["start"] == start]["learning_rate"], _first_ends(start, settings)
        # Rates are rounded to two digits when they are planned, by up to 5 %, and those added are a factor of 3 away.
        added = {"lowest": tried < lowest / 1.5, "highest": tried > highest * 1.5}[edge]
        if tried[added].nunique() >= extend:
            return int(extend) + 2
    return None


def _first_ends(start: str, settings: Mapping[str, Any]) -> tuple[float, float]:
    """Return the lowest and the highest rate that a start was tried at before any were added, as `RunPlan` has them."""
    if given := settings.get("learning_rates"):
        scale = 0.1 if start == FULL else 1.0
        return min(given) * scale, max(given) * scale
    predicted = predicted_rate(Variant.parse(start), settings.get("recommended") or {})
    if predicted is None:
        return 0.0, 0.0
    return predicted / APART, predicted * APART


def make_command(start: str | None, settings: Mapping[str, Any], learning_rate: float | None = None) -> str | None:
    """Write the command that makes the adapter of a start, to be trained at a rate; None where `init` does not."""
    if not start:
        return None
    variant = Variant.parse(start)
    options = variant.init_options()
    if not options or not settings.get("init"):
        return None
    batches = variant.batches or settings["statistics_batches"]
    samples = f"--samples {batches * settings['batch_size']} --max-batches {batches}"
    alpha = f"--lora-alpha {variant.alpha or settings['lora_alpha']:g}"
    words = [settings["init"], samples, alpha, *options]
    if learning_rate is not None and "--bank" not in options:  # whose adapters decide all else
        words.append(f"--learning-rate {rate_text(learning_rate)}")
    return " ".join([*words, "--output adapter"])


def as_recommended(table: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    """Judge each start with a predicted rate at that very rate, untuned, against random at its best one."""
    best, sentences = best_rates(table), []
    rates = {}
    for start, rate in (settings.get("recommended") or {}).items():
        if start in best and start != RANDOM:
            rates[start] = rate
    untuned = table[table["counts"] & table["learning_rate"].eq(table["start"].map(rates))]
    rows, losses = untuned.pivot(index="start", columns="seed", values="loss"), judged_losses(table)
    # The untuned runs take the place of the tuned ones of the same start; random and all others stay in the layout.
    differences = effects(pd.concat([losses.drop(index=rows.index), rows]), RANDOM)
    for start in rows.index:
        facts_of_start = {"start": start, "rate": rates[start], "is_best": best[start] == rates[start]}
        reference = float(losses.loc[RANDOM].mean()) if start in differences else math.nan
        sentences.append(say("as_recommended", **facts_of_start, effect=differences.get(start), reference=reference))
    return sentences


_MOST_TIMES = 8  # random trains for at most this many times the steps, to be compared at equal time


def longer_random(table: pd.DataFrame, judged: Iterable[Verdict]) -> Variant:
    """Return the start that is random trained for at least the time of each better start: 2, 4 or 8 times the steps."""
    steps, steps_taken = _steps(table), steps_of_start(table)
    longest = 0.0  # of the better starts, in steps
    for verdict in judged:
        if verdict.outcome == "better":
            longest = max(longest, float(steps_taken[verdict.start]))
    times = 2 ** math.ceil(math.log2(max(2.0, 1 + longest / steps)))
    return Variant(RANDOM, steps=min(times, _MOST_TIMES) * steps)


def _steps(table: pd.DataFrame) -> int:
    """Read from a run of random that finished how many steps all runs train for."""
    return int(table[table["best"] & table["start"].eq(RANDOM)]["evaluation_points"].iloc[0][-1])


class EqualTime(NamedTuple):
    """What is left of a better start where random trains for the time of its statistics, start and search, too."""

    outcome: Outcome | Literal["no statement"]
    sentence: str


def equal_time(table: pd.DataFrame, judged: Sequence[Verdict]) -> dict[str, EqualTime]:
    """Judge the better starts at equal total time.

    A start that takes time before its first step is compared with random that trains for that time, too. The loss of
    random after so many steps is interpolated, seed by seed, between its ordinary run and a longer run, on a line over
    the logarithm of the steps. Where more steps gain nothing, random would not train on. If the longer run is shorter
    than the start takes, but ends lower all the same, random is better.
    """
    losses = by_seed(table)
    longer: dict[int, str] = {}
    for name in losses.index:
        n_steps = Variant.parse(name).steps
        # Plain random alone: a run of it with another lora_alpha would be another start.
        if n_steps and Variant.parse(name) == Variant(RANDOM, steps=n_steps):
            longer[n_steps] = name
    # All starts stay in the layout: they tell how far runs scatter.
    rows = losses.loc[[verdict.start for verdict in judged if verdict.start in losses.index]]
    by_start = {}
    for verdict in judged:
        if verdict.outcome == "better":
            by_start[verdict.start] = _at_equal_time(table, verdict, longer, rows)
    return by_start


def _at_equal_time(table: pd.DataFrame, verdict: Verdict, longer: Mapping[int, str], rows: pd.DataFrame) -> EqualTime:
    """Judge a better start at equal total time; `longer` names the runs of random with more steps by their number."""
    start, steps, losses = verdict.start, _steps(table), by_seed(table)
    took = float(steps_of_start(table)[start])
    wanted = steps + took
    # The shortest run that is long enough is nearest to the steps wanted; else the longest that there is.
    n = min((n for n in longer if n >= wanted), default=max(longer, default=0))
    if n <= steps:
        return EqualTime("no statement", say("not_trained_longer", start=start, n=0, wanted=0))
    gained = (losses.loc[RANDOM] - losses.loc[longer[n]]) / math.log(n / steps)  # by e times as many steps
    if gained.mean() <= 0:
        return EqualTime(verdict.outcome, say("more_steps_gain_nothing", start=start, took=took))
    later = (losses.loc[RANDOM] - gained * math.log(min(n, wanted) / steps)).rename(RANDOM).to_frame().T
    effect = effects(pd.concat([later, rows]), RANDOM).get(start)
    too_short = n < wanted
    if effect is None or (too_short and effect.outcome != "worse"):
        return EqualTime("no statement", say("not_trained_longer", start=start, n=n, wanted=round(wanted)))
    # The lead at equal steps, in steps of random: on the same line, with an exponent that cannot overflow.
    worth = math.expm1(min(-(verdict.mean or 0.0) / gained.mean(), 50.0))
    sentence = say(
        "equal_time",
        start=start,
        effect=effect,
        reference=float(later.loc[RANDOM].mean()),
        took=took,
        worth=worth,
        most=n / steps - 1,
        n=n if too_short else None,
    )
    return EqualTime(effect.outcome, sentence)


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
    by_start = {}
    for start in table[table["counts"] & table["rise"].notna()]["start"].unique():
        if start == RANDOM or is_judged(start):
            # Means over the seeds that both have. A start that never reaches the loss has no row: `reindex` puts NaN.
            pair = list(dict.fromkeys([start, RANDOM]))
            means = least.reindex(pair).dropna(axis=1).mean(axis=1)
            by_start[start] = Forgotten(means[start], means[RANDOM], differences.get(start))
    return by_start


def equal_loss(table: pd.DataFrame, above: float = _EQUAL_LOSS) -> pd.DataFrame:
    """Arrange the least rise of the loss on other text at equal task loss: a row for each start, a column for a seed.

    The task loss that a run must reach is random's at its best rate with the same seed, or up to a share `above`
    higher. Of the runs of a start with a seed that reach it, the one counts that raises the loss on other text least.
    The same holds for random itself. Runs that were evaluated at several strengths of their adapter count at any
    strength; between two of them losses are interpolated. The table is empty where no run of random counts.
    """
    target, runs = by_seed(table), table[table["counts"] & table["rise"].notna()]
    if RANDOM not in target.index or runs.empty:
        return pd.DataFrame()
    limits = (1 + above) * runs["seed"].map(target.loc[RANDOM])  # NaN, which nothing is below, if random lacks the seed
    least = [_least_rise(run, limit) for (_, run), limit in zip(runs.iterrows(), limits, strict=True)]
    reached = runs.assign(least=least).dropna(subset="least")
    return reached.groupby(["start", "seed"], sort=False)["least"].min().unstack()


def _least_rise(run: pd.Series, limit: float) -> float:
    """Return the least rise of the loss on other text at which a run's task loss is within a limit; NaN if none is."""
    if isinstance(run["dial"], list):
        strengths, losses, retained = np.array(run["dial"]).T  # strengths x 3 -> three rows
        between = np.linspace(strengths[0], strengths[-1], 301)
        within = np.interp(between, strengths, losses) <= limit
        rises = np.interp(between, strengths, retained)[within] - run["retained_before"]
        if len(rises):
            return float(rises.min())
    elif run["loss"] <= limit:
        return float(run["rise"])
    return math.nan


def data_needed(table: pd.DataFrame) -> list[str]:
    """Compare each start with statistics of fewer batches with the same start with most, each at its own best rate."""
    losses, sentences = by_seed(table), []
    varied = table[table["best"] & table["batches"].gt(0)]
    for name, runs in varied.groupby("any_batches", sort=False):
        numbers = dict(zip(runs["start"], map(int, runs["batches"]), strict=True))  # from few to many, as the table is
        most = list(numbers)[-1]
        reference = float(losses.loc[most].mean())
        for start, effect in effects(losses.loc[list(numbers)], most).items():
            batches = {"fewer": numbers[start], "most": numbers[most]}
            sentences.append(say("data_needed", start=name, **batches, effect=effect, reference=reference))
    return sentences


@dataclass(frozen=True)
class Summary:
    """What a comparison found so far."""

    title: str  # task and model
    facts: str  # what was trained, on what, and how long
    answer: str  # which start to use
    caveats: list[str]  # what changes the meaning of the answer, a sentence each
    start: str | None  # name of the start to use; None if the runs do not say yet
    command: str | None  # makes the adapter of that start; None if no command does
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
    advice, start, caveats = answer(table, judged, timed, settings)
    outcomes, statuses = Counter(verdict.outcome for verdict in judged), dict(table["status"].value_counts())
    alphas = {}
    for name in table["start"].unique():
        if name != FULL:  # it has no adapter
            alphas[name] = Variant.parse(name).alpha or settings.get("lora_alpha", math.nan)
    return Summary(
        title=" · ".join(filter(None, ["Starts compared", settings.get("task"), settings.get("model")])),
        facts=facts(table, settings),
        answer=advice,
        caveats=caveats,
        start=start,
        command=make_command(start, settings, best_rates(table).get(start or "")),
        headline=say("headline", outcomes=outcomes, statuses=statuses),
        headroom=headroom(table, judged),
        verdicts=judged,
        as_recommended=as_recommended(table, settings),
        equal_time=[at_equal_time.sentence for at_equal_time in timed.values()],
        forgetting=_forgetting(table),
        data_needed=data_needed(table),
        notes=notes(table, settings),
        alphas=alphas,
        table=table,
    )


def _forgetting(table: pd.DataFrame) -> list[str]:
    """Write what each start forgets at equal task loss, in sentences that compare it with random."""
    dialled = any(isinstance(dial, list) for dial in table["dial"])
    by_start = forgotten(table)
    by_start.pop(RANDOM, None)
    return [say("forgetting", start=start, it=lost, dialled=dialled) for start, lost in by_start.items()]
