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
                wanted = ", in seconds"
                if most < math.inf:
                    wanted = f" and below {most:g}, such as 0.01"
                raise LoraInitError(f"{{{name}}}: expected a number above zero{wanted}.", **{name: value})

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return self.seconds is not None or self.precision is not None

    def settings(self) -> dict[str, Any]:
        """Return the limits in plain values; nothing if there is none."""
        if not self.limited:  # notes on a comparison tell by this key whether a limit decided on its seeds
            return {}
        return {"budget": {"time": self.seconds, "precision": self.precision}}

    @property
    def spent(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    def fits(self, seconds: float) -> bool:
        """Return whether something that takes this many seconds would end in time."""
        return self.seconds is None or self.spent + seconds <= self.seconds

    def due(
        self, plan: RunPlan, starts: Sequence[Variant], records: Mapping[Run, Record]
    ) -> tuple[list[Run], list[str]]:
        """List the runs to do as far as they are known, and why the others are left out.

        Runs that ended are among those listed. Under a limit, seeds are added in stages, see `STAGES`. After each stage
        the starts that `stops` names get no more seeds; all ends when no start is left. The list depends on the runs
        alone, in whatever order they ended.
        """
        planned = plan.runs(starts, records)
        reasons: list[str] = []
        if self.limited:
            going, seeds = list(starts), list(plan.seeds)
            # All stages are gone through again at each call. So the decisions of a resumed comparison are those of one
            # that was never interrupted, and nothing about them has to be kept.
            for n in STAGES:
                stage = _runs_of_stage(planned, records, going, seeds[:n])
                if not _all_ended(stage, records):
                    return stage, reasons
                # Runs of later seeds, which another plan may have left, have no say in this stage.
                of_stage = [record for run, record in records.items() if run.seed in seeds[:n]]
                going, why = self._judge(going, of_stage)
                reasons.append(f"After {min(n, len(seeds))} seeds: {why}.")
                if going in ([], [REFERENCE]) or n >= len(seeds):  # random alone has nothing to be compared with
                    break
            planned = [run for run in planned if run in records]
        # Only now is it known which starts are better, and so what the longer runs have to be as long as.
        if _all_ended(planned, records):
            planned = [*planned, *longer_runs(records)]
        return planned, reasons

    def _judge(self, going: Sequence[Variant], records: Iterable[Record]) -> tuple[list[Variant], str]:
        """Return which starts get more seeds, random among them, and in words why each does or does not."""
        over, left = stops(judged_losses(run_table(records)), self.precision)
        reasons = {**over, **left}
        why, still_going = [], []
        for start in going:
            name = str(start)
            if name in reasons:
                why.append(reasons[name])
            if start == REFERENCE or name in left:
                still_going.append(start)
        return still_going, "; ".join(why) or "nothing to compare"


def _all_ended(runs: Iterable[Run], records: Mapping[Run, Record]) -> bool:
    return all(run in records for run in runs)


def _runs_of_stage(
    planned: Iterable[Run], records: Mapping[Run, Record], going: Sequence[Variant], seeds: Sequence[int]
) -> list[Run]:
    """List the planned runs with these seeds of the starts that continue, and all runs that ended."""
    return [run for run in planned if run in records or (run.start in going and run.seed in seeds)]


def stops(losses: pd.DataFrame, precision: float | None) -> tuple[dict[str, str], dict[str, str]]:
    """Find which starts get no more seeds, and which get more: two mappings of start to reason.

    A start cannot win any more if its interval lies above zero, or above another start's interval. Since that is asked
    after each of the `STAGES`, the 5 % of errors are divided among them (Bonferroni's correction for looking often);
    the intervals of one stage hold for all starts together, see `effects`. A start also gets no more seeds when its
    difference is known precisely enough. A start that is better goes on until then, so that nothing is called better
    because somebody looked often.
    """
    careful = effects(losses, RANDOM, 1 - (1 - CONFIDENCE) / len(STAGES))
    usual = effects(losses, RANDOM)  # by which the report judges
    # The interval to stay below: random's, which is zero, or that of a start which is surely better than random.
    rival, bound = RANDOM, 0.0
    for start, effect in careful.items():
        if effect.high < bound:
            rival, bound = start, effect.high
    over, left = {}, {}
    for start, effect in careful.items():
        known = usual[start].detectable / float(losses.loc[RANDOM].mean())
        # The rival itself never stops here: its low end lies below its high one.
        if effect.low > bound:
            over[start] = f"{start} gets no more, as it cannot win any more against {rival}"
        elif precision is not None and known <= precision:
            over[start] = f"{start} gets no more, as its difference to random is known within {percent(known)}"
        else:
            reason = f"{start} gets more, its difference to random is known within {percent(known)}"
            if precision is not None:
                reason += f" ({percent(precision)} is wanted)"
            left[start] = reason
    return over, left


def longer_runs(records: Mapping[Run, Record]) -> list[Run]:
    """List the runs of random with more steps, if a start is better: they tell what its lead is worth in time."""
    table = run_table(records.values())
    better = [verdict for verdict in verdicts(table) if verdict.outcome == "better"]
    if not better:  # then random need not even have a run that finished
        return []
    seeds: dict[int, None] = {}  # each once, in order
    for verdict in better:
        seeds |= dict.fromkeys(verdict.differences)
    longer, rate = longer_random(table, better), best_rates(table)[RANDOM]
    return [Run(longer, seed, rate) for seed in seeds]
