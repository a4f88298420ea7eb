"""What is run next: all that is planned or, under a budget, what can still decide; and until when."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from lora_init.comparison.effects import CONFIDENCE, effects
from lora_init.comparison.findings import judged_losses, longer_random, verdicts
from lora_init.comparison.runs import Record, Run, RunPlan, best_rates, run_table
from lora_init.comparison.variants import REFERENCE, Variant
from lora_init.comparison.wording import percent
from lora_init.errors import LoraInitError, is_number
from lora_init.starts.starts import RANDOM

# Numbers of seeds after which a budget asks what still decides. The last is where it ends at the latest.
STAGES = (3, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True)
class RunBudget:
    """How much may be spent on a comparison; without any limit, what is planned is run."""

    seconds: float | None = None  # no run begins that would probably not end in it, and after it the best adapter
    precision: float | None = None  # half the width of an interval that is enough, as a share of random's loss
    began: float = field(default_factory=time.monotonic, repr=False)

    def __post_init__(self) -> None:
        for name, value, most in (("time", self.seconds, math.inf), ("precision", self.precision, 1.0)):
            if value is not None and not (is_number(value) and 0.0 < value < most):
                below = f" and below {most:g}, such as 0.01" if most < math.inf else ", in seconds"
                raise LoraInitError(f"{{{name}}}: expected a number above zero{below}.", **{name: value})

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return self.seconds is not None or self.precision is not None

    def settings(self) -> dict[str, Any]:
        """Return it in plain values."""
        limits = {"time": self.seconds, "precision": self.precision}
        return {"budget": limits} if self.limited else {}

    @property
    def spent(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    def fits(self, seconds: float) -> bool:
        """Return whether what takes so long would end in time."""
        return self.seconds is None or self.spent + seconds <= self.seconds

    def due(
        self, plan: RunPlan, starts: Sequence[Variant], records: Mapping[Run, Record]
    ) -> tuple[list[Run], list[str]]:
        """List the runs to do as far as is known, those that ended among them, and why the others are left out.

        Under a limit seeds are added in stages, see `STAGES`. After each the starts that `stops` names get no more, and
        all ends when none is left. What it lists depends on the runs alone, in whatever order they ended.
        """
        planned = plan.runs(starts, records)
        said: list[str] = []
        going, seeds = list(starts), list(plan.seeds)
        if self.limited:
            for n in STAGES:
                now = _runs_of_stage(planned, records, going, seeds[:n])
                if any(run not in records for run in now):
                    return now, said
                going, why = self._judge(going, [record for run, record in records.items() if run.seed in seeds[:n]])
                said.append(f"After {n} seeds: {why}.")
                if going in ([], [REFERENCE]) or n >= len(seeds):
                    break
            planned = [run for run in planned if run in records]
        if all(run in records for run in planned):
            planned = [*planned, *longer_runs(records)]
        return planned, said

    def _judge(self, going: Sequence[Variant], records: Iterable[Record]) -> tuple[list[Variant], str]:
        """Return which starts get more seeds, random among them, and in words why each does or does not."""
        over, left = stops(judged_losses(run_table(records)), self.precision)
        reasons = {**over, **left}
        why = [reasons[str(start)] for start in going if str(start) in reasons]
        still_going = [start for start in going if start == REFERENCE or str(start) in left]
        return still_going, "; ".join(why) or "nothing to compare"


def _runs_of_stage(
    planned: Iterable[Run], records: Mapping[Run, Record], going: Sequence[Variant], seeds: Sequence[int]
) -> list[Run]:
    """List the planned runs with these seeds of the starts that continue, and all runs that ended."""
    return [run for run in planned if run in records or (run.start in going and run.seed in seeds)]


def stops(losses: pd.DataFrame, precision: float | None) -> tuple[dict[str, str], dict[str, str]]:
    """Find which starts get no more seeds, and which get more: start to reason, of either kind.

    A start cannot win any more if its interval lies above zero, or above another start's interval. Since that is asked
    after each of the `STAGES`, the 5 % of errors are divided among them; the intervals of one stage hold for all starts
    together, see `effects`. A start is also left alone when it is known precisely enough. A start that is better goes
    on until it is, so that nothing is called better because somebody looked often.
    """
    careful = effects(losses, RANDOM, 1 - (1 - CONFIDENCE) / len(STAGES))
    usual = effects(losses, RANDOM)
    best = min(careful, key=lambda start: careful[start].high, default=RANDOM)
    rival, bound = (best, careful[best].high) if careful and careful[best].high < 0.0 else (RANDOM, 0.0)
    over, left = {}, {}
    for start, effect in careful.items():
        known = usual[start].detectable / float(losses.loc[RANDOM].mean())
        if effect.low > bound:
            over[start] = f"{start} gets no more, as it cannot win any more against {rival}"
        elif precision is not None and known <= precision:
            over[start] = f"{start} gets no more, as its difference to random is known within {percent(known)}"
        else:
            wanted = "" if precision is None else f" ({percent(precision)} is wanted)"
            left[start] = f"{start} gets more, its difference to random is known within {percent(known)}{wanted}"
    return over, left


def longer_runs(records: Mapping[Run, Record]) -> list[Run]:
    """List the runs of random with more steps, if a start is better: what that is worth in time, they tell."""
    table = run_table(records.values())
    better = [verdict for verdict in verdicts(table) if verdict.outcome == "better"]
    seeds = dict.fromkeys(seed for verdict in better for seed in verdict.differences)
    return [Run(longer_random(table, better), seed, best_rates(table)[RANDOM]) for seed in seeds]
