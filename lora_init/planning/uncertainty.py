"""Which ranks of a plan are decided by less than the sampling error of the statistics."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lora_init.planning.selection import Steps
from lora_init.planning.spectra import Spectra
from lora_init.statistics.statistics import Statistics

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

# Two standard errors: about 95 % if errors are normal, which for shares of variance is a habit rather than a theorem.
N_ERRORS = 2.0


def standard_errors(stats: Statistics, spectra: Spectra) -> tuple[FloatArray, str]:
    """Estimate the standard error of each explained-variance ratio, [n, K], and say in words what from.

    From the spread over batches, where the statistics hold each batch's own ratios: std / sqrt(batches). This counts
    what tokens of one text have in common. Without them, from the number of rows, as if rows were independent and
    normal: ratio x sqrt(2 / rows) (Anderson 1963). Rows of one text are not independent, so that is a lower bound.

    Returns:
        Zeros and an empty text if there is nothing to go by.
    """
    errors = np.zeros_like(spectra.ratios)
    groups = [stats.group_of[name] for name in spectra.names]
    n_batches = min(len(stats.batch_ratios.get(group, ())) for group in groups)
    if n_batches > 1:
        by_group = {}
        for group in set(groups):
            shares = stats.batch_ratios[group].numpy().astype(np.float64)[:, : errors.shape[1]]  # [batches, k]
            by_group[group] = shares.std(axis=0, ddof=1) / math.sqrt(len(shares))
        for row, group in zip(errors, groups, strict=True):
            row[: len(by_group[group])] = by_group[group]
        return errors, f"from the spread over the last {n_batches} batches"
    n_rows = stats.provenance.n_samples
    if n_rows > 1:
        return spectra.ratios * math.sqrt(2.0 / n_rows), f"from {n_rows:,} rows taken as independent: a lower bound"
    return errors, ""


def unsettled(
    steps: Steps, taken: BoolArray, errors: FloatArray, weights: FloatArray, unit_of: IntArray
) -> dict[int, tuple[int, int]]:
    """Find the units whose rank could be another within the sampling error.

    The cut runs midway between the worst worth that was taken and the best that was not. A step whose worth lies within
    two standard errors of the cut could as well have gone the other way.

    Args:
        errors: Standard error of the worth of each rank, [n, K].
        weights: As in `make_steps`, [n].

    Returns:
        Unit to (lowest, highest) rank it might have; units that are settled are missing.
    """
    if taken.all() or not taken.any():
        return {}
    cut = (steps.priority[taken].min() + steps.priority[~taken].max()) / 2.0
    n_units = len(steps.start)
    squares = np.zeros((n_units, errors.shape[1] + 1))
    np.add.at(squares[:, 1:], unit_of, errors**2)
    squares = np.cumsum(squares, axis=1)
    variance = squares[steps.unit, steps.rank] - squares[steps.unit, steps.rank - steps.width]
    weight = np.bincount(unit_of, weights=weights, minlength=n_units)
    margin = N_ERRORS * np.sqrt(np.maximum(variance, 0.0)) / (steps.width * weight[steps.unit])
    low, high = steps.start.copy(), steps.start.copy()
    sure, possible = steps.priority - margin > cut, steps.priority + margin > cut
    np.maximum.at(low, steps.unit[sure & taken], steps.rank[sure & taken])
    np.maximum.at(high, steps.unit[possible | taken], steps.rank[possible | taken])
    return {int(u): (int(low[u]), int(high[u])) for u in np.flatnonzero(low < high)}
