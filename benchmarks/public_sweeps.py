"""What sweeps that others published say of our rule: `python -m benchmarks.public_sweeps`.

`results/public_sweeps/tinker_sft.csv` has the losses of thinking-machines-lab/tinker-cookbook,
`tinker_cookbook/recipes/chat_sl/results/sft_sweep.md` at commit 9dfcc3a2: 35 models of 1B to 550B, tulu3, 780 steps of
128 examples, lora_alpha 32, one to four ranks each. The rule's constant cannot be held against them, since it needs a
pass over each model; how its rate rises with the rank at a fixed lora_alpha can: with `OVERLAP`, the power 1/4, where B
moves an output most, and with half of it where A and B together do.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np
import pandas as pd

from benchmarks.settings import best_rate, table

FILE = Path(__file__).parent / "results" / "public_sweeps" / "tinker_sft.csv"


@cache
def rank_powers() -> pd.Series[float]:
    """Return for each model the power of the rank with which its best rate rises, of those with two ranks or more."""
    found = {}
    for model, own in pd.read_csv(FILE).groupby("model"):
        means = own.groupby(["rank", "learning_rate"])["test_nll"].mean()  # some were run twice
        by_rank = {rank: best_rate(one.droplevel("rank").to_dict()) for rank, one in means.groupby("rank")}
        known = {rank: rate for rank, rate in by_rank.items() if rate is not None}
        if len(known) >= 2:
            found[str(model)] = float(np.polyfit(np.log([*known]), np.log([*known.values()]), 1)[0])
    return pd.Series(found)


def rank_power() -> tuple[float, float, float]:
    """Return median, mean and standard error of the mean of those powers."""
    powers = rank_powers()
    return median(powers), fmean(powers), stdev(powers) / math.sqrt(len(powers))


def main() -> None:
    """Print the powers."""
    powers = rank_powers().sort_values()
    print(table(["model", "power of the rank"], [[name, f"{power:.2f}"] for name, power in powers.items()]))
    print("median {:.2f}, mean {:.2f}, standard error {:.2f}".format(*rank_power()))
    print("the rule: from 0.12 where A moves most to 0.25 where B does")


if __name__ == "__main__":
    main()
