"""What verdicts are worth: comparisons with known effects, judged as a report does: `python -m benchmarks.power`.

Every comparison has `random` and six starts on the same seeds. A seed moves all losses alike (standard deviation 3),
each run is noise of standard deviation 1 on top, and effects are in units of that noise. Counted are the comparisons in
which any start that makes no difference is called better (they should be at most 5 %), and how often a start that is
better is called so. Beside it: the paired t interval of each start alone, at 95 % each, as reports had it before.

The second table is about a comparison under a limit (`--time`, `--precision`), where starts stop early: how often one
that is as good as the best is stopped, how often one that makes no difference is called better at the end, and how many
runs it takes. The last is what no analysis of three seeds can exceed: the power if the noise were known exactly.

Writes `results/power/power.json`, `power.md` and `limited.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm, sem, t

from benchmarks.settings import table
from lora_init.comparison.budget import STAGES, stops
from lora_init.comparison.effects import effects

STARTS = ("random", "a", "b", "c", "d", "e", "f")
OUTPUT = Path(__file__).parent / "results" / "power"


def alone(losses: pd.DataFrame) -> set[str]:
    """Name the starts that the paired t interval of each alone calls better."""
    differences = losses.drop(index="random") - losses.loc["random"]
    half = t.ppf(0.975, losses.shape[1] - 1) * sem(differences, axis=1)
    return set(differences.index[differences.mean(axis=1) + half < 0])


def together(losses: pd.DataFrame) -> set[str]:
    """Name the starts that a report calls better."""
    return {start for start, effect in effects(losses, "random").items() if effect.high < 0}


def draw(rng: np.random.Generator, n_seeds: int, scenario: str) -> pd.DataFrame:
    """Draw the losses of a comparison in which no start makes a difference."""
    noise = rng.normal(size=(len(STARTS), n_seeds))
    if scenario == "heavy tails":
        noise = rng.standard_t(4, size=noise.shape) / np.sqrt(2.0)  # of variance 1
    elif scenario == "one start spreads four times as much":
        noise[-1] *= 4.0
    elif scenario == "one run of random nearly diverged":
        noise[0, 0] += 10.0
    losses = noise + rng.normal(0.0, 3.0, n_seeds)
    return pd.DataFrame(losses, STARTS, range(n_seeds))


SCENARIOS = (
    "equal noise", "heavy tails", "one start spreads four times as much", "one run of random nearly diverged"
)  # fmt: skip


def share(judge: Callable[[pd.DataFrame], set[str]], drawn: list[pd.DataFrame], effect: float = 0.0) -> float:
    """Count comparisons with a false "better"; or, where `a` is better by an effect, those in which it is called so."""
    if not effect:
        return float(np.mean([bool(judge(losses)) for losses in drawn]))
    shift = pd.Series({"a": -effect}).reindex(STARTS, fill_value=0.0)
    return float(np.mean(["a" in judge(losses.add(shift, axis="index")) for losses in drawn]))


def spend(losses: pd.DataFrame, precision: float | None) -> tuple[pd.DataFrame, set[str]]:
    """Take the runs that a limited comparison does, and name the starts that were stopped as they cannot win."""
    going, stopped = list(STARTS), set()
    taken = pd.Series(0, STARTS)
    for n in [stage for stage in STAGES if stage <= losses.shape[1]]:
        taken[going] = n
        there = losses.where(np.arange(losses.shape[1]) < taken.to_numpy()[:, None])
        over, left = stops(there, precision)
        stopped |= {start for start in going if "cannot win" in over.get(start, "")}
        going = [start for start in going if start == "random" or start in left]
        if going == ["random"]:
            break
    return there, stopped


def limited(
    rng: np.random.Generator, n: int, scenario: str, effects_of: dict[str, float], precision: float | None
) -> list[str]:
    """Simulate limited comparisons of at most 12 seeds, in losses of 100: a precision of 0.01 is the noise itself."""
    shift = pd.Series(effects_of, dtype=float).reindex(STARTS, fill_value=0.0)
    best = {start for start in STARTS if shift[start] == shift.min()}
    wrong, dropped, right, runs = 0, 0, 0, 0
    for _ in range(n):
        taken, stopped = spend(draw(rng, 12, scenario).add(shift + 100.0, axis="index"), precision)
        called = together(taken)
        wrong += any(shift[start] >= 0.0 for start in called)
        dropped += bool(stopped & best)
        right += "a" in called
        runs += int(taken.notna().to_numpy().sum())
    shares = [f"{count / n:.1%}" for count in (dropped, wrong, right)]
    return [*shares, f"{runs / n / (12 * len(STARTS)):.0%}"]


def bound(effect: float, sides: int) -> float:
    """Compute the power with three seeds and six starts if the noise were known, for one- or two-sided verdicts."""
    rng = np.random.default_rng(0)
    null = (rng.normal(size=(200_000, len(STARTS) - 1)) + rng.normal(size=(200_000, 1))) / np.sqrt(2.0)
    most = (np.abs(null) if sides == 2 else null).max(axis=1)
    return float(norm.cdf(effect / np.sqrt(2 / 3) - np.quantile(most, 0.95)))


LIMITED: tuple[tuple[str, str, dict[str, float]], ...] = (
    ("no start differs", "equal noise", {}),
    ("no start differs, heavy tails", "heavy tails", {}),
    ("a is better by 2", "equal noise", {"a": -2.0}),
    ("a is better by 2, three are worse by 3", "equal noise", {"a": -2.0, "b": 3.0, "c": 3.0, "d": 3.0}),
)


def main() -> None:
    """Simulate, and write the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=2000)
    parser.add_argument("--limited", type=int, default=400, help="Comparisons under a limit.")
    asked = parser.parse_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    if asked.comparisons:
        verdicts(asked.comparisons)
    if asked.limited:
        limits(asked.limited)


def verdicts(comparisons: int) -> None:
    """Count verdicts on comparisons without a limit."""
    rng = np.random.default_rng(0)
    rows = []
    for scenario in SCENARIOS:
        for n_seeds in (3, 5, 8):
            drawn = [draw(rng, n_seeds, scenario) for _ in range(comparisons)]
            false = [share(judge, drawn) for judge in (together, alone)]
            rows.append({"losses": scenario, "seeds": n_seeds, "effect": 0.0, "report": false[0], "alone": false[1]})
            if scenario == "equal noise":
                for effect in (2.0, 3.0, 4.0, 5.0):
                    power = [share(judge, drawn, effect) for judge in (together, alone)]
                    rows.append(
                        {"losses": scenario, "seeds": n_seeds, "effect": effect, "report": power[0], "alone": power[1]}
                    )
    content = {"comparisons": comparisons, "starts": len(STARTS) - 1, "shares": rows}
    (OUTPUT / "power.json").write_text(json.dumps(content, indent=1) + "\n")
    cells = [
        [row["losses"], row["seeds"], row["effect"] or "none", f"{row['report']:.1%}", f"{row['alone']:.1%}"]
        for row in rows
    ]
    text = table(["losses", "seeds", "effect", "called better by a report", "by each t interval alone"], cells)
    (OUTPUT / "power.md").write_text(text + "\n")
    print(text)


def limits(comparisons: int) -> None:
    """Count what a limit does, and compute what no analysis can exceed."""
    rng = np.random.default_rng(0)
    held = [
        [what, f"{precision:.0%}" if precision else "none", *limited(rng, comparisons, scenario, shift, precision)]
        for what, scenario, shift in LIMITED
        for precision in (None, 0.01)
    ]
    header = ["under a limit", "precision", "best stopped", "falsely better", "a called better", "runs of all"]
    bounds = [[effect, f"{bound(effect, 2):.1%}", f"{bound(effect, 1):.1%}"] for effect in (2.0, 3.0, 4.0)]
    text = f"{table(header, held)}\n\n{table(['effect, three seeds', 'noise known, two-sided', 'one-sided'], bounds)}"
    (OUTPUT / "limited.md").write_text(f"{comparisons} comparisons of each kind.\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
