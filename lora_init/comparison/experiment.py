"""Which runs a comparison consists of, given those that have ended. A plan made of plain values; nothing runs here."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_init.adapters.gradient_starts import GRADIENT_METHODS
from lora_init.comparison.peft_starts import PEFT_STARTS
from lora_init.comparison.run_log import Record
from lora_init.comparison.runs import Variant, best_rate
from lora_init.errors import LoraInitError

# Starts whose ranks move between layers and with them the number of parameters; eva-frozen-a also trains no A.
_MOVES_RANKS = ("eva", "eva-uncentred", "eva-frozen-a", "gradient-ranks")
# Starts whose A has the size of the random one already, or another on purpose, or is part of a change to the base
# weights or of a step whose size is A's and B's together: nothing to match.
_UNMATCHED = (
    "random",
    "random-scaled",
    "natural-gradient-scaled",
    "eva-ranks",
    "gradient-ranks",
    *PEFT_STARTS,
    *(name for name, method in GRADIENT_METHODS.items() if method.gamma),
)


@dataclass(frozen=True)
class Run:
    """One training. `learning_rate` is None while it depends on runs that have not ended."""

    variant: Variant
    seed: int
    learning_rate: float | None

    def key(self, task: str) -> tuple[Any, ...]:
        """Return what `run_log.run_key` makes of its record."""
        v = self.variant
        return task, v.start, v.matched_scale, v.equal_parameters, self.seed, self.learning_rate

    @property
    def title(self) -> str:
        """Describe the run in a few words."""
        rate = "best rate" if self.learning_rate is None else f"{self.learning_rate:g}"
        return f"{self.variant.label}, {rate}, seed {self.seed}"


def variants(starts: Iterable[str], match_scale: bool, ranks_cost_the_same: bool) -> list[Variant]:
    """List each start, and beside it what makes it comparable.

    Args:
        starts: Names of starts.
        match_scale: Also run starts with A scaled to the size of the random one, where that differs.
        ranks_cost_the_same: Whether a rank costs as many parameters in one layer as in another; if not, starts that
            move ranks, or train no A, are also run at the parameter count of the random start.
    """
    plain = [Variant(start) for start in starts]
    moving = [v for v in plain if v.start in _MOVES_RANKS]
    differing = [v for v in moving if v.start == "eva-frozen-a" or not ranks_cost_the_same]
    equal = [replace(v, equal_parameters=True) for v in differing]
    matched = [replace(v, matched_scale=True) for v in plain if match_scale and v.start not in _UNMATCHED]
    return [*plain, *equal, *matched]


def plan_runs(
    task: str,
    variants: Sequence[Variant],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    sweep: str,
    records: Mapping[tuple[Any, ...], Record],
) -> list[Run]:
    """List all runs in the order to do them in, those that have ended among them.

    `"full"` is every variant at every rate with every seed. `"halving"` is every rate on the first seed, and on the
    others the best of them alone. Should that one be unstable on another seed, the next best takes its place; a variant
    that has no stable rate has no other seeds.

    Args:
        task: Name of the task.
        variants: From `variants`.
        learning_rates: At least one.
        seeds: At least one.
        sweep: `"halving"` or `"full"`.
        records: Runs that have ended, by key.
    """
    first = [Run(variant, seeds[0], rate) for rate in learning_rates for variant in variants]
    if sweep == "full":
        return first + [Run(v, seed, rate) for seed in seeds[1:] for rate in learning_rates for v in variants]
    others: dict[Variant, list[Run]] = {}
    for variant in variants:
        swept = [records.get(run.key(task)) for run in first if run.variant == variant]
        done = [
            record
            for seed in seeds
            for rate in learning_rates
            if (record := records.get(Run(variant, seed, rate).key(task))) is not None
        ]
        best = None if None in swept else best_rate(done)
        if None in swept or best is not None:
            others[variant] = [Run(variant, seed, best) for seed in seeds[1:]]
    # Seed by seed, so that what is there when it is stopped can be paired.
    return first + [runs[i] for i in range(len(seeds) - 1) for runs in others.values()]


def check_fair(records: Iterable[Mapping[str, Any]], own: Container[str] = ()) -> None:
    """Make sure that runs that are compared were given the same: data in the same order, and parameters.

    Args:
        records: Runs that have ended.
        own: Starts of the user's own, which have the size that they have.

    Raises:
        LoraInitError: Runs of one seed saw other data, or starts of one size have other numbers of parameters.
    """
    order: dict[int, tuple[str, str]] = {}
    parameters: dict[str, tuple[int, str]] = {}
    for record in records:
        if record["status"] != "finished":
            continue
        name = f"{record['start']} at {record['learning_rate']:g}"
        seen = order.setdefault(record["seed"], (record["data_order"], name))
        if seen[0] != record["data_order"]:
            raise LoraInitError(
                f"seed {record['seed']}: {name} saw other data than {seen[1]}. The data or the library changed between "
                "runs; start again in another directory."
            )
        size = "frozen" if record["start"] == "eva-frozen-a" else "equal"
        if record["ranks"] is None and record["start"] not in own:
            trained = record["trainable_parameters"]
            count, other = parameters.setdefault(size, (trained, name))
            if count != trained:
                raise LoraInitError(
                    f"{name} trains {trained:,} parameters and {other} {count:,}, with the same ranks. "
                    "They cannot be compared."
                )


def check_plan(
    learning_rates: Sequence[float], seeds: Sequence[int], steps: int, points: Sequence[int], warmup: float, sweep: str
) -> None:
    """Check what a plan is made from.

    Raises:
        LoraInitError: A rate that is not positive, no seed, points that do not rise, or shares outside 0 to 1.
    """
    wrong = [rate for rate in learning_rates if not 0.0 < rate < float("inf")]
    if wrong or not learning_rates:
        raise LoraInitError(
            f"learning_rates: {wrong[0] if wrong else 'none'}; expected positive numbers, such as 1e-4."
        )
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds) or len(set(learning_rates)) < len(learning_rates):
        raise LoraInitError(
            f"seeds={list(seeds)}, learning_rates={list(learning_rates)}: expected different ones, seeds >= 0."
        )
    if steps < 1 or list(points) != sorted(set(points)) or points[0] != 0 or points[-1] != steps:
        raise LoraInitError(f"evaluation points {list(points)}: expected rising steps from 0 to {steps}.")
    if not 0.0 <= warmup < 1.0:
        raise LoraInitError(f"warmup={warmup}: expected a share of the steps, at least 0 and less than 1.")
    if sweep not in ("halving", "full"):
        raise LoraInitError(f"sweep={sweep!r} is unknown. Choose halving or full.")
