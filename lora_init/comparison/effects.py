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
# Starts with the same seed that are needed to tell whose loss scatters.
_ENOUGH = 4


Outcome = Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True)
class Effect:
    """The difference of a start to the reference. All intervals are right together with 95 %."""

    mean: float  # the start's mean less the reference's, as the layout estimates them
    low: float  # ends of the interval
    high: float

    @property
    def detectable(self) -> float:
        """The detectable difference: half the width of the interval."""
        return (self.high - self.low) / 2

    @property
    def outcome(self) -> Outcome:
        """Better or worse only if zero lies outside the interval; lower is better."""
        if self.high < 0:
            return "better"
        if self.low > 0:
            return "worse"
        return "no difference shown"

    def over(self, reference: float) -> Effect:
        """Return the effect as a share of a reference."""
        return Effect(self.mean / reference, self.low / reference, self.high / reference)


def unlike_spreads(losses: pd.DataFrame) -> dict[str, float]:
    """Find starts whose losses scatter more over the seeds than the others': start to how many times as much.

    The layout of `effects` is fitted first, so that neither the level of a start counts nor the level of a seed. From
    each residual the median of the other starts' residuals with the same seed is subtracted, so that an outlier of
    another start does not count. A start's spread is the variance of these distances over the seeds. The spread is
    unlike if its ratio to the median spread of the others is above the F quantile of 99 %. Seeds with fewer than four
    starts are left out: of so few, nobody can tell which one scattered.

    The values returned are ratios of standard deviations.
    """
    from scipy.stats import chi2, f

    losses = losses.loc[:, losses.count() >= _ENOUGH]
    if losses.empty:
        return {}
    values, design = _layout(losses)
    residuals = losses.to_numpy(copy=True)  # starts x seeds
    # The mask runs row by row, as `_layout` lists the runs. The pseudoinverse serves for a design of lower rank, too:
    # with gaps, seeds and starts need not all be connected.
    residuals[~np.isnan(residuals)] -= design @ np.linalg.pinv(design) @ values
    left = pd.DataFrame(residuals, losses.index, losses.columns)
    spreads = np.empty(len(left))  # NaN for a start with fewer than two seeds
    for row, start in enumerate(left.index):
        spreads[row] = (left.loc[start] - left.drop(index=start).median()).var()
    counts = losses.count(axis=1).to_numpy()
    unlike = {}
    for i in np.flatnonzero(counts > 1):
        n, others = int(counts[i]), np.delete(spreads, i)
        # The others' median, not their mean: another start that scatters would raise the mean, and hide this one. The
        # variance of n normal numbers has a median below its expectation, by this factor of the chi-squared law.
        usual = np.nanmedian(others) / (chi2.median(n - 1) / (n - 1))
        limit = f.ppf(0.99, n - 1, int((~np.isnan(others)).sum()) * (n - 1))
        if usual > 0.0 and spreads[i] / usual > limit:  # zero where all runs of the others are alike
            unlike[str(losses.index[i])] = math.sqrt(spreads[i] / usual)
    return unlike


def effects(losses: pd.DataFrame, reference: str, confidence: float = CONFIDENCE) -> dict[str, Effect]:
    """Compare each start with the reference in a two-way layout of starts and seeds.

    The model is loss = start + seed + noise, fitted by least squares, so some starts may lack some seeds. The noise is
    estimated from all starts together, and Dunnett's correction makes the intervals hold for all comparisons at once. A
    start whose spread is unlike (`unlike_spreads`) is compared by its own pairs alone, with Bonferroni's correction,
    and does not count in the noise of the others; if the reference is unlike, all starts are compared in that way. Few
    seeds do not always show that a spread is unlike: where one of six starts scatters four times as much, an interval
    missed in 8.9 % of 1,500 comparisons of five seeds that `benchmarks.power` draws, in 5.7 % with eight, and in 5.6 %
    with five seeds and equal noise.

    `losses` has a row for each start and a column for each seed, NaN where there is no run. A start that shares fewer
    than two seeds with the reference has no effect. All intervals are right together with `confidence`.
    """
    from scipy.stats import sem, t

    if reference not in losses.index:
        return {}
    pairs = {start: (losses.loc[start] - losses.loc[reference]).dropna() for start in losses.index}
    compared = [start for start, own in pairs.items() if start != reference and len(own) > 1]
    unlike = unlike_spreads(losses)
    by_start, pooled = {}, []
    for start in compared:
        if start not in unlike and reference not in unlike:
            pooled.append(start)
            continue
        own = pairs[start]
        # Bonferroni: an equal share of the errors for each of the comparisons, one half of it at either end.
        half = float(t.ppf(1 - (1 - confidence) / (2 * len(compared)), len(own) - 1) * sem(own))
        by_start[start] = Effect(float(own.mean()), float(own.mean()) - half, float(own.mean()) + half)
    if pooled:
        share = len(pooled) / len(compared)  # of the errors allowed: what the starts compared alone leave
        # The order makes no difference to the intervals. This one makes equal matrices of correlation equal in bytes,
        # so that `_critical` finds its values again.
        pooled.sort(key=lambda start: len(pairs[start]))
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
    # Differences to one reference share its noise: with equal numbers of seeds any two correlate by a half.
    correlation = np.full((n_starts, n_starts), 0.5) + 0.5 * np.eye(n_starts)
    factor = _critical(correlation.tobytes(), n_starts * (n_seeds - 1), round(CONFIDENCE, 6))
    return factor * math.sqrt(2 / n_seeds)  # the difference of two means over the seeds has twice the variance of one


def _layout(losses: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses of all runs, row by row, and the model's design: a row for each run.

    The design has a column for each seed, then one for each start but the first: the seeds already hold the level of
    the first start, so a coefficient of another start is its difference to the first.
    """
    values = losses.to_numpy()  # starts x seeds
    n_starts, n_seeds = values.shape
    rows, columns = np.nonzero(~np.isnan(values))
    # Rows of a unit matrix as indicators: runs x seeds, and runs x (starts - 1).
    of_seeds, of_starts = np.eye(n_seeds)[columns], np.eye(n_starts)[rows][:, 1:]
    return values[rows, columns], np.hstack([of_seeds, of_starts])


def _dunnett(losses: pd.DataFrame, confidence: float) -> dict[str, Effect]:
    """Compare all rows with the first: many-to-one comparisons after Dunnett, of a layout that may have gaps.

    The estimates of several starts against one reference have a joint t distribution, whose correlations follow from
    the design alone. Its two-sided quantile is the factor on each standard error; Bonferroni's, which knows nothing of
    the correlations, would be larger.
    """
    values, design = _layout(losses)
    inverse = np.linalg.pinv(design.T @ design)  # (seeds + starts - 1) squared
    fitted = inverse @ design.T @ values
    freedom = len(design) - int(np.linalg.matrix_rank(design))
    noise = float(np.square(values - design @ fitted).sum()) / freedom
    n = losses.shape[1]  # the seeds come first
    covariance = inverse[n:, n:]  # of the starts' coefficients, in units of the noise
    errors = np.sqrt(np.diag(covariance))
    # Rounded, so that matrices that differ by rounding alone are one key of the cache.
    correlation = (covariance / np.outer(errors, errors)).round(6)
    halves = _critical(correlation.tobytes(), freedom, round(confidence, 6)) * math.sqrt(noise) * errors
    halves = np.maximum(halves, 1e-9 * np.abs(values).max())  # what the fit rounds
    by_start = {}
    for start, mean, half in zip(losses.index[1:], fitted[n:], halves, strict=True):
        by_start[str(start)] = Effect(float(mean), float(mean - half), float(mean + half))
    return by_start


@functools.cache
def _critical(correlation: bytes, freedom: int, confidence: float) -> float:
    """Find the bound that no |t| of all comparisons exceeds with this probability: Dunnett's critical value.

    The bound has no closed form: the integral of the multivariate t distribution over a cube is solved for the half
    edge of that cube. One call takes long, so results are kept; `correlation` comes as bytes, which can be a key.
    """
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
