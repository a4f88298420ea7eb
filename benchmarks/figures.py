"""Figures in the pages, recomputed from committed runs: `python -m benchmarks.evidence` writes those that changed.

Behind a figure stands a comment that says what it is, and that no reader sees:

    It ends 10.8 % (9.1 to 12.5) lower<!-- figure: below("confirm-minilm-specialties", NATURAL), below_between(...) -->.

It holds as many of the numbers before it, on its line and after the comment before, as its expressions have values; the
numbers keep their decimals, and their sign if they have one. An expression is Python with the functions below. `study`
is a directory in `results/`, `rate` the start's best one unless given; shares are in per cent of the loss of `random`.
`tests/test_evidence.py` fails where a figure is not what the runs say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import long_runs, public_sweeps, rates, size_of_a, starts, trade_off
from benchmarks.size_of_a import Run
from lora_init.comparison.effects import Effect, effects
from lora_init.comparison.findings import equal_loss, judged_losses, verdicts
from lora_init.comparison.runs import SETTINGS_FILE, best_rates, by_seed, read_runs, run_table
from lora_init.comparison.wording import rate_text
from lora_init.files import read_json
from lora_init.starts.starts import RANDOM

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md", "docs/dial.md", "docs/learning-rates.md", "docs/results.md", "docs/serving.md", "docs/which-start.md",
    "benchmarks/README.md", "benchmarks/STUDIES.md",
)  # fmt: skip
# What the pages recommend, by the names that runs have.
STEP, NATURAL, EVA = "natural-gradient-step", "natural-gradient+80-alpha", "eva+32-alpha"
OPENBOOKQA, SIQA, HELLASWAG = "headroom-openbookqa", "headroom-siqa", "headroom-hellaswag"
MEDICAL, KINDS = "headroom-minilm-medical-subjects", "headroom-minilm-siqa-kinds"
SPECIALTIES = "headroom-minilm-specialties"
CONFIRM_MEDICAL, CONFIRM_KINDS = "confirm-minilm-medical-subjects", "confirm-minilm-siqa-kinds"
CONFIRM_SPECIALTIES = "confirm-minilm-specialties"
# On examples that nothing was chosen by.
FRESH_OPENBOOKQA, FRESH_SIQA, FRESH_HELLASWAG = "fresh-openbookqa", "fresh-siqa", "fresh-hellaswag"
FRESH_SIQA_HALF = "fresh-bfloat16-siqa"  # `natural-gradient`, and `random` at four rates
FRESH_MEDICAL, FRESH_KINDS = "fresh-minilm-medical-subjects", "fresh-minilm-siqa-kinds"
FRESH_SPECIALTIES = "fresh-minilm-specialties"
GEMMA = "gemma-openbookqa"
# Two seeds chose 3e-3; on all eight both losses are lower at 2e-3.
TUNED = {(SPECIALTIES, RANDOM): 2e-3}

_MARK = re.compile(r"[ ]?<!-- figure: (.+?) -->")
_NUMBER = re.compile(r"(?<![\w.])[+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e-?\d+)?(?!\w)")


# What a page can say


def plain(study: str) -> float:
    """Return the loss of the model without an adapter."""
    return float(by_seed(_runs(study), "plain_loss").loc[RANDOM].mean())


def loss(study: str, *names: str, rate: float | None = None) -> Any:
    """Return the mean final loss."""
    return _each(names, lambda start: float(_chosen(study, start, rate)["loss"].mean()))


def rise(study: str, *names: str, rate: float | None = None) -> Any:
    """Return how much the loss on other text has risen."""
    return _each(names, lambda start: float(_chosen(study, start, rate)["rise"].mean()))


def rise_at_equal_loss(study: str, start: str) -> tuple[float, float]:
    """Return the same of random and a start, of runs that end no higher than random at its best rate."""
    pairs = equal_loss(_runs(study)).loc[[RANDOM, start]].dropna(axis=1)
    return float(pairs.loc[RANDOM].mean()), float(pairs.loc[start].mean())


def seeds(study: str, *names: str, rate: float | None = None) -> Any:
    """Count the seeds."""
    return _each(names, lambda start: len(_chosen(study, start, rate)))


def best_rate(study: str, *names: str) -> Any:
    """Return the learning rate that a start is compared at."""
    return _each(names, lambda start: _best_rates(study)[start])


def above(study: str, *names: str, of: str = RANDOM) -> Any:
    """Return how far a start ends above another one, each at its best rate."""
    return _each(names, lambda start: 100 * _effect(study, start, of).mean)


def above_at(study: str, rate: float, *names: str) -> Any:
    """Return how far a start ends at a rate above random at its best one, over the seeds that both have."""
    return _each(names, lambda start: float(_points(study).loc[(start, rate), "above"]))


def ends(start: str, *studies: str) -> tuple[Any, ...]:
    """Return `above` in each study, and `rise` where it was measured."""
    return tuple(
        (above(study, start), *([] if math.isnan(rise(study, start)) else [rise(study, start)])) for study in studies
    )


def above_between(study: str, start: str, of: str = RANDOM) -> tuple[float, float]:
    """Return the interval of `above`."""
    effect = _effect(study, start, of)
    return 100 * effect.low, 100 * effect.high


def below(study: str, *names: str, of: str = RANDOM) -> Any:
    """Return how far a start ends below another one."""
    return _each(names, lambda start: -100 * _effect(study, start, of).mean)


def below_between(study: str, start: str, of: str = RANDOM) -> tuple[float, float]:
    """Return the interval of `below`."""
    low, high = above_between(study, start, of)
    return -high, -low


def detectable(study: str, *names: str, of: str = RANDOM) -> Any:
    """Return the smallest difference to another start that the runs could have shown."""
    return _each(names, lambda start: 100 * _effect(study, start, of).detectable)


def cost(name: str, setting: str = "smollm2") -> float:
    """Return what a pass costs, from `benchmarks.statistics`, such as `"step / body"`."""
    return float(read_json(starts.RESULTS / "statistics" / f"{setting}.json")["cost"][name])


def verdicts_of_fourteen_starts(outcome: str | None = None) -> int:
    """Count the comparisons of `benchmarks.starts`: all, or those with an outcome."""
    return sum(outcome in (None, verdict.outcome) for verdict in _fourteen_starts())


@cache
def _fourteen_starts() -> list[Any]:
    return [verdict for runs in starts.read_tasks().values() for verdict in verdicts(runs)]


HOT = "random 3e-3"  # the arm that others are compared with
RISES = ("seen", "unseen")  # of the loss on text to keep, and on news
TEXTS = ("passages", "news", "chats")
LOSE = "lose "  # what `lora_init.dial` chooses with so many per cent


def dialed(arm: str, strength: str, task: str, seed: int = 0) -> tuple[float, ...]:
    """Return loss and rises of an adapter of `benchmarks.dial`."""
    runs = _dialed().set_index(["arm", "strength", "task", "seed"])[["loss", *RISES]]
    return tuple(map(float, runs.loc[arm, strength, task, seed]))


def dial_row(arm: str, strength: str, task: str | None = None) -> tuple[float, ...]:
    """Return how an arm at a strength stands to random at 3e-3 as trained: seeds at least, task, and rises, in %."""
    found = dial_pairs(arm, strength, task).groupby("task")
    means = found[["loss", *RISES, *(f"{part} of" for part in RISES)]].mean().mean()
    rises = [100 * float(means[part] / means[f"{part} of"]) for part in RISES]
    return float(found.size().min()), float(means["loss"]), *rises


def dial_between(arm: str, strength: str) -> tuple[float, float]:
    """Return the interval of the task in `dial_row`, by t over seeds within tasks."""
    return _within_tasks(dial_pairs(arm, strength)["loss"])


def detectable_dial(arm: str) -> float:
    """Return half of that interval, of an arm as trained."""
    low, high = dial_between(arm, "1")
    return (high - low) / 2


def judged_row(strength: str, task: str | None = None, file: str = "judged") -> tuple[float, ...]:
    """Return how a strength of `benchmarks.dial_judged` stands to full strength: task, passages, news, chats, in %."""
    found = _judged_pairs(strength, task, file).groupby("task").mean().mean()
    return float(found["loss"]), *(100 * float(found[part] / found[f"{part} of"]) for part in TEXTS if part in found)


def judged_between(strength: str) -> tuple[float, float]:
    """Return the interval of the task in `judged_row`, by t over seeds within tasks."""
    return _within_tasks(_judged_pairs(strength)["loss"])


def dial_seconds() -> tuple[float, float]:
    """Return the processor time of `lora_init.dial` over that of training, the least and the most."""
    ratios = [line["seconds"] / line["training_seconds"] for line in _judged_lines() if "seconds" in line]
    return min(ratios), max(ratios)


def divergence_within() -> tuple[float, float]:
    """Return the least and the most rank correlation of divergence and rise, of a kind of text, on one task."""
    found = [_correlations(own) for _, own in _dial_judged().drop("0").groupby("task")]
    return min(map(min, found)), max(map(max, found))


def divergence_across() -> tuple[float, float]:
    """Return the same of all tasks at once."""
    found = _correlations(_dial_judged().drop("0"))
    return min(found), max(found)


def _correlations(runs: pd.DataFrame) -> list[float]:
    return [float(runs["divergence"].corr(runs[kind], "spearman")) for kind in TEXTS]


def _within_tasks(values: pd.Series) -> tuple[float, float]:
    """Compute the 95 % interval of the mean over tasks, from how far seeds of a task are apart."""
    from scipy.stats import t

    found = values.groupby("task")
    counts, mean = found.count(), float(found.mean().mean())
    freedom = int((counts - 1).sum())
    noise = float((counts - 1).mul(found.var().fillna(0.0)).sum()) / freedom
    half = float(t.ppf(0.975, freedom)) * float(noise * (1 / counts).sum()) ** 0.5 / len(counts)
    return mean - half, mean + half


def _judged_pairs(strength: str, task: str | None = None, file: str = "judged") -> pd.DataFrame:
    """Put the readings at a strength beside those at full strength, of the same task and seed."""
    runs = _dial_judged(file)
    pairs = _beside(runs.loc[strength], runs.loc["1"])
    return pairs if task is None else pairs.loc[[task]]


def _beside(runs: pd.DataFrame, full: pd.DataFrame) -> pd.DataFrame:
    """Put runs beside those at full strength; their loss becomes how far it is above, in %."""
    pairs = runs.join(full.add_suffix(" of"), how="inner")
    return pairs.assign(loss=100 * (pairs["loss"] / pairs["loss of"] - 1))


def _judged_lines(file: str = "judged") -> list[dict[str, Any]]:
    text = (starts.RESULTS / "dial" / f"{file}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@cache
def _dial_judged(file: str = "judged") -> pd.DataFrame:
    """Tabulate loss on the task and rises on other text by strength, task and seed."""
    lines = _judged_lines(file)
    labels = {(line["task"], part): sum(n) for line in lines for part, n in line.get("labels", {}).items()}
    rows = [
        {name: line[name] for name in ("strength", "task", "seed")}
        | {part: sum(sums) / labels[line["task"], part] for part, sums in line["sums"].items() if part != "task"}
        | {"loss": sum(line["sums"]["task"]) / labels[line["task"], "task"]}
        | {"divergence": line.get("divergence", [float("nan")])[0]}
        for line in lines
    ]
    table = pd.DataFrame(rows).set_index(["strength", "task", "seed"]).sort_index()
    base = table.loc["0"].assign(loss=0.0, divergence=0.0)
    return table - base.reindex(table.index.droplevel(0)).to_numpy()


def dial_time(arm: str) -> tuple[float, float]:
    """Return the training time of an arm over that of random at 3e-3, the least and the most of the tasks."""
    seconds = _dialed().set_index(["arm", "strength", "seed", "task"]).sort_index()["seconds"]
    ratio = seconds.loc[arm, "1", 0] / seconds.loc[HOT, "1", 0]
    return float(ratio.min()), float(ratio.max())


def retrieval(start: str, rate: float = 0.0) -> tuple[float, ...]:
    """Return of runs in `benchmarks.embeddings` the seeds, and the mean nDCG@10 on the task and on the other set."""
    own = _retrieval(start, rate)
    return float(len(own)), float(own["report"].mean()), float(own["other"].mean())


def retrieval_gain(start: str, rate: float, of: str, of_rate: float) -> tuple[float, ...]:
    """Return the mean difference in nDCG@10 of the task between two, and its 95 % interval by t over shared seeds."""
    from scipy.stats import t

    gained = (_retrieval(start, rate)["report"] - _retrieval(of, of_rate)["report"]).dropna()
    half = float(t.ppf(0.975, len(gained) - 1) * gained.sem())
    return float(gained.mean()), float(gained.mean()) - half, float(gained.mean()) + half


def _retrieval(start: str, rate: float) -> pd.DataFrame:
    table = pd.read_json(starts.RESULTS / "embeddings" / "runs.jsonl", lines=True)
    return table[table["start"].eq(start) & table["rate"].sub(rate).abs().lt(1e-9)].set_index("seed")


def merged(dtype: str) -> tuple[float, ...]:
    """Return of merges in `benchmarks.merging` the noise in sizes of the change, and the effect lost in %."""
    table = pd.read_json(starts.RESULTS / "merging" / "rows.jsonl", lines=True)
    own = table[table["type"].eq(dtype)]
    lost = 100 * own["merged"] / own["base"]
    return float(own["noise"].min()), float(own["noise"].max()), float(lost.min()), float(lost.max())


def cut(way: str) -> tuple[float, ...]:
    """Return what the cut of `benchmarks.compression` adds to the loss: mean, least and most, in %."""
    found = _cut()
    change = 100 * (found[way] / found["full"] - 1)
    return float(change.mean()), float(change.min()), float(change.max())


def cut_by_data() -> tuple[float, ...]:
    """Return in how many adapters, of how many, the cut by data has the lower loss, and the mean difference in %."""
    found = _cut()
    gained = 100 * (found["data"] / found["weights"] - 1)
    return float((gained < 0).sum()), float(len(gained)), float(gained.mean())


@cache
def _cut() -> pd.DataFrame:
    """Tabulate the loss on the task by adapter and way."""
    table = pd.read_json(starts.RESULTS / "compression" / "runs.jsonl", lines=True)
    table["loss"] = table["sums"].map(sum) / table["labels"].map(sum)
    return table.pivot(index=["task", "arm", "seed"], columns="way", values="loss").dropna()


def dial_pairs(arm: str, strength: str, task: str | None = None) -> pd.DataFrame:
    """Put an arm beside random at 3e-3 as trained, of the same task and seed."""
    if strength.startswith(LOSE):
        pairs = _by_rule(arm, float(strength.removeprefix(LOSE)) / 100)
    else:
        runs = _dialed().set_index(["arm", "strength", "task", "seed"])
        pairs = _beside(runs.loc[(arm, strength)], runs.loc[(HOT, "1")])
    return pairs if task is None else pairs.loc[[task]]


# As `lora_init.dial` prefers them: strengths of the layers, most weight on the text to keep first, then one for all.
_ORDER = ("own 0.3 1", "own 0.3 to 1", "own 0.3", "0.7 to own 0.3", "0.6", "0.8", "1")


@cache
def _by_rule(arm: str, lose: float) -> pd.DataFrame:
    """Let one half of the reported examples choose as `lora_init.dial` does and judge by the other, for 100 halves."""
    runs, rng, rows = _dialed().set_index(["task", "seed", "strength"]).sort_index(), np.random.default_rng(0), {}
    counts = {task: np.array(parts["task"]) for task, parts in read_json(starts.RESULTS / "dial/counts.json").items()}
    for task, seed in runs[runs["arm"].eq(arm)].index.droplevel("strength").unique():
        own = runs[runs["arm"].eq(arm)].loc[(task, seed)]
        sums = {one: np.array(own.loc[one, "sums"]["task"]) for one in _ORDER if one in own.index}
        picks = []
        for _ in range(100):
            halves = np.array_split(rng.permutation(len(counts[task])), 2)
            by, judged = ({one: sums[one][i].sum() / counts[task][i].sum() for one in sums} for i in halves)
            limit = (1 + lose) * min(by[one] for one in sums if " " not in one)
            ends = by["own 0.3"] > limit  # then no further weight is tried
            tried = (one for one in sums if not ends or one in ("0.7 to own 0.3", "0.6", "0.8", "1"))
            pick = next(one for one in tried if by[one] <= limit)
            picks.append(
                {"loss": 100 * (judged[pick] / judged["1"] - 1)} | {part: own.loc[pick, part] for part in RISES}
            )
        full = {f"{part} of": runs[runs["arm"].eq(HOT)].loc[(task, seed, "1"), part] for part in RISES}
        rows[task, seed] = pd.DataFrame(picks).mean().to_dict() | full
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["task", "seed"])


@cache
def _dialed() -> pd.DataFrame:
    directory = starts.RESULTS / "dial"
    counts = read_json(directory / "counts.json")
    table = pd.DataFrame(map(json.loads, (directory / "runs.jsonl").read_text(encoding="utf-8").splitlines()))
    for part, name in (("task", "loss"), ("seen", "seen"), ("unseen", "unseen")):
        labels = table["task"].map(lambda task, part=part: sum(counts[task][part]))
        table[name] = table["sums"].map(lambda sums, part=part: sum(sums[part])) / labels
    base = table[table["strength"].eq("0")].set_index("task")
    for name in RISES:
        table[name] -= table["task"].map(base[name])
    return table[["arm", "strength", "task", "seed", "seconds", "loss", *RISES, "sums"]]


def swept(start: str, encoder: bool = False) -> tuple[float, float]:
    """Return the lowest and the highest best rate that was interpolated for a start."""
    found = rates.best_rates()
    own = found[found["start"].eq(start) & found["encoder"].eq(encoder)]["rate"]
    return float(f"{own.min():.1e}"), float(f"{own.max():.1e}")


def lost(study: str, *rates_of_random: float) -> Any:
    """Return how far random ends at some rates above its best one."""
    return tuple(above_at(study, rate, RANDOM) for rate in rates_of_random)


def best_run(study: str, start: str) -> tuple[float, float]:
    """Return the lowest mean loss of a start at any of its rates, and that rate."""
    runs = _runs(study)
    means = runs[runs["start"].eq(start) & runs["status"].eq("finished")].groupby("learning_rate")["loss"].mean()
    return float(means.min()), float(means.idxmin())


def rule(of_all: bool = True) -> tuple[float, float, float]:
    """Return the shares of pairs for which the rule is within a factor of 2 and of 1.5, and the rms factor."""
    return rates.judged(rates.errors(of_all=of_all))


LANGUAGE = ("openbookqa", "piqa")
# The tasks of each model in `benchmarks.size_of_a`, and the start that is recommended there.
SIZED = {"smollm2": LANGUAGE, "gemma": LANGUAGE, "minilm": ("minilm-specialties", "minilm-medical-subjects")}
OURS = {"smollm2": "eva", "gemma": "eva", "minilm": "natural-gradient"}


def sized(model: str, start: str, size: str = "1", **changed: Any) -> tuple[float, ...]:
    """Return how far runs of `benchmarks.size_of_a` end above the recommended start, in %, on each of their tasks."""
    return tuple(round(_above(run, OURS[model]), 1) + 0.0 for run in _sized(model, start, size, **changed))


def best_of_three(model: str, start: str, size: str = "1") -> tuple[float, ...]:
    """Return the same of the best of three rates, a factor of three apart."""
    each = zip(*(sized(model, start, size, x=x) for x in (1 / 3, 1.0, 3.0)), strict=True)
    return tuple(map(min, each))


def sized_rise(model: str, start: str, **changed: Any) -> tuple[float, ...]:
    """Return how much the loss on passages rises in training, on each of the two tasks."""
    return tuple(round(_sized_mean(run, "rise"), 2) + 0.0 for run in _sized(model, start, **changed))


def against(other: str, model: str, start: str, **changed: Any) -> tuple[float, float]:
    """Return how far a start ends above another one, both at the rate of the rule, in %, and what was detectable.

    The mean is over two tasks and the seeds that both have.
    """
    runs = [replace(run, seed=seed) for run in _sized(model, start, **changed) for seed in range(3)]
    values = pd.Series([_above(run, other) for run in runs], index=pd.Index([run.task for run in runs], name="task"))
    low, high = _within_tasks(values.dropna())
    return (low + high) / 2, (high - low) / 2


def limit(model: str = "smollm2", task: str = "openbookqa", **changes: Any) -> float:
    """Return how far the run nearest to the rule's rate ends above the best of its sweep, with something changed."""
    found = size_of_a.pairs()
    return float(found[found["run"].eq(Run(model, task, "random", **changes))]["above"].iloc[0])


def part_of_layers(model: str) -> tuple[float, ...]:
    """Return the same for attention, MLP, and q_proj and v_proj alone."""
    return tuple(limit(model, layers=layers) for layers in ("attention", "mlp", "q_proj,v_proj"))


def _sized(model: str, start: str, size: str = "1", **changed: Any) -> list[Run]:
    of_model = size_of_a.OF_CLASSES if model == "minilm" else {}
    return [Run(model, task, start, size, **of_model | changed) for task in SIZED[model]]


def _above(run: Run, other: str) -> float:
    reference = Run(run.model, run.task, other, steps=run.steps, seed=run.seed)
    return 100.0 * (_sized_mean(run, "loss") / _sized_mean(reference, "loss") - 1.0)


def _sized_mean(run: Run, value: str) -> float:
    """Compute the mean over all times that a run was made; the first ones did not read the rise."""
    found = [row[value] for row in _sized_runs() if value in row and run.is_in(row)]
    return float(np.mean([one[-1] if value == "loss" else one for one in found])) if found else float("nan")


@cache
def _sized_runs() -> list[dict[str, Any]]:
    file = ROOT / "benchmarks" / "results" / "size_of_a" / "runs.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def rule_pairs(of_all: bool = True) -> int:
    """Count the pairs of task and start that the rule is judged by."""
    return len(rates.errors(of_all=of_all))


def told(start: str) -> tuple[float, ...]:
    """Return how many times the best rate the rule gives in sweeps of a start: the mean, the least and the most."""
    of_start = rates.pairs()["start"].str.replace("+equal-parameters", "").eq(start)
    off = rates.errors()[of_start]
    return tuple(map(math.exp, (off.mean(), off.min(), off.max())))


def rank_power() -> tuple[float, float, float]:
    """Return with what power of the rank best rates of public sweeps rise: median, mean, standard error of the mean."""
    return public_sweeps.rank_power()


def rank_models() -> int:
    """Count the models of those sweeps."""
    return len(public_sweeps.rank_powers())


@cache
def _long(model: str, task: str, steps: int, **more: Any) -> tuple[dict[float, float], float]:
    """Return the losses of a sweep of `benchmarks.long_runs` by rate, and the rate that the rule prints."""
    sweep = long_runs.Sweep(model, task, steps, **more)
    return long_runs.losses_of(sweep), long_runs.told(sweep)


def long_over(model: str, task: str = "boolq", steps: int = 480, **more: Any) -> float:
    """Return how many times the best rate of a long sweep the rule's is."""
    losses, rule = _long(model, task, steps, **more)
    return rule / (long_runs.best_rate(losses) or math.nan)


def long_above(model: str, task: str = "boolq", steps: int = 480, at: float | None = None, **more: Any) -> float:
    """Return how far above the best run of a long sweep the rule's rate ends, or another: in %, between runs."""
    losses, rule = _long(model, task, steps, **more)
    return round(100 * long_runs.above_best(losses, at or rule), 1) + 0.0


def long_prodigy(model: str, task: str = "boolq") -> float:
    """Return how far above the best run of a long sweep of 480 steps Prodigy ends, in %."""
    (found,) = long_runs.losses_of(long_runs.Sweep(model, task, 480, optimizer="prodigy")).values()
    return round(100 * (found / min(_long(model, task, 480)[0].values()) - 1), 1)


def _long_sweeps() -> list[tuple[float, float]]:
    """List the rule's rate over the best, and its loss above the best run, of sweeps of rank 8 that end at zero."""
    usual = dict(batch=8, rank=8, layers="all-linear", start="random")
    sweeps = [one for one in long_runs.SWEEPS if usual.items() <= asdict(one).items() and one.schedule != "constant"]
    known = [asdict(one) for one in sweeps if long_runs.best_rate(long_runs.losses_of(one))]
    return [(long_over(**sweep), long_above(**sweep)) for sweep in known]


def long_sweeps() -> int:
    """Count the long sweeps of batches of 8 whose best rate lies inside."""
    return len(_long_sweeps())


def long_larger() -> tuple[float, float, float]:
    """Return the least and the largest rate over the best with steps of 32, and how far above the best it ends."""
    sweeps = [asdict(one) for one in long_runs.SWEEPS if one.batch == 32]
    known = [one for one in sweeps if long_runs.best_rate(long_runs.losses_of(long_runs.Sweep(**one)))]
    over, above = zip(*((long_over(**one), long_above(**one)) for one in known), strict=True)
    return min(over), max(over), max(above)


def long_judged() -> tuple[float, float, float, float]:
    """Return for those the least and the most of the rule over the best rate, the rms factor, the most loss above."""
    over, above = zip(*_long_sweeps(), strict=True)
    return min(over), max(over), math.exp(math.sqrt(np.mean(np.log(over) ** 2))), max(above)


def experts_over() -> tuple[float, ...]:
    """Return how many times the best rate of each sweep on SmolLM2 with its MLPs cut into experts the rule's is."""
    lines = (Path(__file__).parent / "results/experts/sweep.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [one for one in map(json.loads, lines) if one["status"] == "finished"]
    rule = {one["task"]: one["rule"] for one in runs}
    losses = {task: {one["rate"]: one["loss"][-1] for one in runs if one["task"] == task} for task in rule}
    return tuple(rule[task] / (long_runs.best_rate(losses[task]) or math.nan) for task in rule)


def cited(*numbers: float) -> tuple[float, ...]:
    """Take numbers as they stand: somebody else's, with the source beside them."""
    return numbers


_VOCABULARY = {
    name: value
    for name, value in list(globals().items())
    if not name.startswith("_") and (name.isupper() or getattr(value, "__module__", "") == __name__)
}


def _each(names: Sequence[str], value: Callable[[str], float]) -> Any:
    """Compute a value for each name; for a single one as it is, so that it can be calculated with."""
    return value(names[0]) if len(names) == 1 else tuple(map(value, names))


@cache
def _runs(study: str) -> pd.DataFrame:
    directory = starts.RESULTS / study
    table = run_table(read_runs(directory), read_json(directory / SETTINGS_FILE)["starts"])
    for (_, start), rate in ((key, rate) for key, rate in TUNED.items() if key[0] == study):
        own = table["start"].eq(start)
        table.loc[own, "best"] = table["counts"] & table["learning_rate"].eq(rate)
    return table


@cache
def _best_rates(study: str) -> Any:
    return best_rates(_runs(study))


@cache
def _points(study: str) -> pd.DataFrame:
    return trade_off.points(_runs(study))


def _chosen(study: str, start: str, rate: float | None) -> pd.DataFrame:
    runs = _runs(study)
    rate = _best_rates(study)[start] if rate is None else rate
    chosen = runs[runs["start"].eq(start) & runs["learning_rate"].eq(rate) & runs["status"].eq("finished")]
    if chosen.empty:
        raise KeyError(f"{study} has no finished run of {start} at {rate_text(rate)}")
    return chosen


@cache
def _effect(study: str, start: str, of: str) -> Effect:
    """Compare as a report does: with random in the layout of all starts, with others and full fine-tuning in pairs."""
    found = _judged(study).get(start) if of == RANDOM else None
    losses = by_seed(_runs(study))
    found = found or effects(losses.loc[[of, start]], of)[start]
    return found.over(float(losses.loc[of].mean()))


@cache
def _judged(study: str) -> dict[str, Effect]:
    return effects(judged_losses(_runs(study)), RANDOM)


# Where they stand


@dataclass(frozen=True)
class Figure:
    """A number in a page that a comment holds: where it is, how it reads, and what it should be."""

    line: int
    start: int
    text: str
    expression: str
    value: float

    @property
    def right(self) -> str:
        """Write the value in the form of the text."""
        if "e" in self.text:
            return rate_text(self.value)
        decimals = len(self.text.partition(".")[2])
        form = f"{'+' * (self.text[0] in '+−')}{',' * (',' in self.text)}.{decimals}f"
        return format(self.value, form).replace("-", "−")

    @property
    def is_stale(self) -> bool:
        return self.text != self.right


def figures(text: str) -> Iterator[Figure]:
    """Find the figures of a page, in order.

    Raises:
        ValueError: An expression cannot be computed, or has more values than there are numbers before it.
    """
    offset = 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        after = 0
        for mark in _MARK.finditer(line):
            try:
                values = _flat(eval(mark[1], dict(_VOCABULARY)))  # our own pages, as their Python blocks
            except Exception as error:
                raise ValueError(f"line {number}: {mark[1]}: {error!r}") from error
            found = list(_NUMBER.finditer(line, after, mark.start()))
            if len(found) < len(values):
                raise ValueError(f"line {number}: {mark[1]}: {len(values)} values, and {len(found)} numbers before it")
            for one, value in zip(found[-len(values) :], values, strict=True):
                yield Figure(number, offset + one.start(), one[0], mark[1], value)
            after = mark.end()
        offset += len(line)


def _flat(value: Any) -> list[float]:
    return [one for part in value for one in _flat(part)] if isinstance(value, tuple) else [value]


def corrected(text: str) -> str:
    """Write all figures of a page as they should be."""
    for figure in reversed(list(figures(text))):
        text = text[: figure.start] + figure.right + text[figure.start + len(figure.text) :]
    return text
