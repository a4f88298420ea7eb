"""Two starts compared seed by seed: the mean difference, its interval, and what may be said."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["better", "worse", "no difference shown", "no statement"]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedDifference:
    """What the pairs say.

    Attributes:
        differences: Value less the reference's, by seed; only seeds that both have.
        mean: Mean of them; None without a pair.
        low: Lower end of the interval of the mean; None with fewer than two pairs.
        high: Upper end.
        outcome: For losses, where less is better: "better" or "worse" only if zero lies outside the interval, and
            "no statement" with fewer than two pairs.
    """

    differences: dict[int, float]
    mean: float | None
    low: float | None
    high: float | None
    outcome: Outcome

    @property
    def n(self) -> int:
        """How many pairs there are."""
        return len(self.differences)


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> PairedDifference:
    """Compare two starts on the seeds that both have.

    The interval is that of the paired t-test, at 95 %. It takes the differences as normally distributed; a bootstrap
    would not, but of three seeds it can draw only ten different samples, and its intervals are then too narrow.

    Args:
        values: Result by seed.
        reference: Result of the start to compare with, by seed.

    Example:
        >>> paired_difference({0: 0.9, 1: 0.8, 2: 0.9}, {0: 1.0, 1: 1.0, 2: 1.1}).outcome
        'better'
        >>> paired_difference({0: 0.5}, {0: 1.0}).outcome
        'no statement'
    """
    differences = {seed: values[seed] - reference[seed] for seed in sorted(values) if seed in reference}
    n = len(differences)
    if not n:
        return PairedDifference({}, None, None, None, "no statement")
    mean = math.fsum(differences.values()) / n
    if n == 1:
        return PairedDifference(differences, mean, None, None, "no statement")
    from scipy.stats import t

    variance = math.fsum((difference - mean) ** 2 for difference in differences.values()) / (n - 1)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * math.sqrt(variance / n)
    low, high = mean - half, mean + half
    outcome: Outcome = "no difference shown"
    if low > 0 or high < 0:
        outcome = "better" if mean < 0 else "worse"
    return PairedDifference(differences, mean, low, high, outcome)
