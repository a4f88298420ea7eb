"""How far starts differ from the reference: one layout of starts and seeds, bounds that hold for all at once."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

# With this probability the effects of all starts lie inside their intervals together.
CONFIDENCE = 0.95
# Starts with the same seed, from which it can be told whose loss scatters.
_ENOUGH = 4


Outcome = Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True)
class Effect:
    """The difference of a start to the reference. All intervals are right together with 95 %."""

    mean: float  # of the start, less the reference's mean, as the layout has them
    low: float  # ends of the interval
    high: float

    @property
    def detectable(self) -> float:
        """The detectable difference: half the width of the interval."""
        return (self.high - self.low) / 2

    @property
    def outcome(self) -> Outcome:
        """Better or worse only if zero lies outside the interval, of something that is to be low."""
        return "better" if self.high < 0 else "worse" if self.low > 0 else "no difference shown"

    def over(self, reference: float) -> Effect:
        """Return it as a share of a reference."""
        return Effect(self.mean / reference, self.low / reference, self.high / reference)


def unlike_spreads(losses: pd.DataFrame) -> dict[str, float]:
    """Find starts whose losses scatter more over the seeds than the others': how many times the usual deviation.

    The layout of `effects` is fitted, so that neither what a start does with all seeds counts, nor what a seed does to
    all starts. A start's spread is the variance over the seeds of what the fit leaves, less the median of the others
    with the same seed, so that what one of the others did does not count. It is unlike if its ratio to the median
    spread of the others is above the F quantile of 99 %. Seeds with fewer than four starts have no part: of so few,
    nobody can tell which one scattered.
    """
    from scipy.stats import chi2, f

    losses = losses.loc[:, losses.count() >= _ENOUGH]
    if losses.empty:
        return {}
    values, design = _layout(losses)
    residuals = losses.to_numpy(copy=True)
    residuals[~np.isnan(residuals)] -= design @ np.linalg.pinv(design) @ values
    left = pd.DataFrame(residuals, losses.index, losses.columns)
    distances = [left.loc[start] - left.drop(index=start).median() for start in left.index]
    spreads, counts = np.array([own.var() for own in distances]), losses.count(axis=1).to_numpy()
    unlike = {}
    for i in np.flatnonzero(counts > 1):
        n, rest = int(counts[i]), np.delete(spreads, i)
        usual = np.nanmedian(rest) / (chi2.median(n - 1) / (n - 1))  # by the median of the variance of n numbers
        limit = f.ppf(0.99, n - 1, int((~np.isnan(rest)).sum()) * (n - 1))
        if usual > 0.0 and spreads[i] / usual > limit:
            unlike[str(losses.index[i])] = math.sqrt(spreads[i] / usual)
    return unlike


def effects(losses: pd.DataFrame, reference: str, confidence: float = CONFIDENCE) -> dict[str, Effect]:
    """Compare each start with the reference in a two-way layout of starts and seeds.

    The model is loss = start + seed + noise, fitted by least squares, so seeds that some starts lack are no harm. The
    noise is estimated from all starts together, and Dunnett's correction makes the intervals hold for all comparisons
    at once. A start whose spread is unlike (`unlike_spreads`) is compared by its own pairs alone, with Bonferroni's
    correction, and has no part in the noise of the others; if the reference is unlike, all are. Few seeds do not always
    show that a spread is unlike: where one of six starts scatters four times as much, an interval missed in 8.9 % of
    1,500 comparisons of five seeds that `benchmarks.power` draws, in 5.7 % with eight, and in 5.6 % with five seeds and
    equal noise.

    `losses` has a row for each start and a column for each seed, NaN where there is no run. A start that shares fewer
    than two seeds with the reference has no effect. All intervals are right together with `confidence`.
    """
    from scipy.stats import sem, t

    if reference not in losses.index:
        return {}
    pairs = {start: (losses.loc[start] - losses.loc[reference]).dropna() for start in losses.index}
    compared = [start for start, own in pairs.items() if start != reference and len(own) > 1]
    unlike = unlike_spreads(losses)
    alone = [start for start in compared if start in unlike or reference in unlike]
    pooled = [start for start in compared if start not in alone]
    by_start = {}
    for start in alone:
        own = pairs[start]
        half = float(t.ppf(1 - (1 - confidence) / (2 * len(compared)), len(own) - 1) * sem(own))
        by_start[start] = Effect(float(own.mean()), float(own.mean()) - half, float(own.mean()) + half)
    if pooled:
        share = len(pooled) / len(compared)  # of the errors allowed
        pooled.sort(key=lambda start: len(pairs[start]))  # so that critical values are found again
        by_start |= _dunnett(losses.loc[[reference, *pooled]], 1 - (1 - confidence) * share)
    return {start: by_start[start] for start in compared}


def detectable(n_starts: int, n_seeds: int) -> float | None:
    """Compute what difference to the reference can be shown, in standard deviations of a run; None with one seed.

    It is the mean of `Effect.detectable` if all runs are there and all starts scatter alike.

    Example:
        >>> [f"{detectable(2, n):.1f}" for n in (2, 3, 5)]
        ['5.4', '2.7', '1.7']
    """
    if n_starts < 1 or n_seeds < 2:
        return None
    correlation = np.full((n_starts, n_starts), 0.5) + 0.5 * np.eye(n_starts)
    factor = _critical(correlation.tobytes(), n_starts * (n_seeds - 1), round(CONFIDENCE, 6))
    return factor * math.sqrt(2 / n_seeds)


def _layout(losses: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses of all runs, row by row, and the model's design: a row for each run.

    Its columns are one for each seed, then one for each start but the first.
    """
    values = losses.to_numpy()
    rows, columns = np.nonzero(~np.isnan(values))
    starts, seeds = (np.eye(length) for length in values.shape)
    return values[rows, columns], np.hstack([seeds[columns], starts[rows][:, 1:]])


def _dunnett(losses: pd.DataFrame, confidence: float) -> dict[str, Effect]:
    """Compare all rows with the first."""
    values, design = _layout(losses)
    inverse = np.linalg.pinv(design.T @ design)
    fitted = inverse @ design.T @ values
    freedom = len(design) - int(np.linalg.matrix_rank(design))
    noise = float(np.square(values - design @ fitted).sum()) / freedom
    n = losses.shape[1]
    covariance = inverse[n:, n:]
    errors = np.sqrt(np.diag(covariance))
    correlation = (covariance / np.outer(errors, errors)).round(6)
    halves = _critical(correlation.tobytes(), freedom, round(confidence, 6)) * math.sqrt(noise) * errors
    halves = np.maximum(halves, 1e-9 * np.abs(values).max())  # what the fit rounds
    return {
        str(start): Effect(float(mean), float(mean - half), float(mean + half))
        for start, mean, half in zip(losses.index[1:], fitted[n:], halves, strict=True)
    }


@functools.cache
def _critical(correlation: bytes, freedom: int, confidence: float) -> float:
    """Find what no |t| of all comparisons exceeds with this probability: Dunnett's critical value."""
    from scipy.optimize import brentq
    from scipy.stats import multivariate_t, t

    flat = np.frombuffer(correlation)
    shape = flat.reshape(math.isqrt(len(flat)), -1)

    def excess(factor: float) -> float:
        ends = np.full(len(shape), factor)
        # With so many points the factor is right to a few thousandths.
        inside = multivariate_t.cdf(ends, shape=shape, df=freedom, lower_limit=-ends, maxpts=40_000, random_state=0)
        return float(inside) - confidence

    # Between the quantile of a single comparison and Bonferroni's, but for what the integral is off by.
    least, most = t.ppf([(1 + confidence) / 2, 1 - (1 - confidence) / (2 * len(shape))], freedom)
    return float(brentq(excess, 0.98 * least, 1.02 * most, xtol=1e-3))
