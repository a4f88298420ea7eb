"""Obvious versions of what the package computes, in numpy: short enough to be checked by reading."""

import numpy as np


def pca(rows, n_components, center=True):
    """Components [k, d], variances [k] and total variance of rows [n, d], by a full SVD in float64."""
    rows = np.asarray(rows, dtype=np.float64)
    centred = rows - rows.mean(0) if center else rows
    _, singular_values, components = np.linalg.svd(centred, full_matrices=False)
    variances = singular_values**2 / max(len(rows) - 1, 1)
    return components[:n_components], variances[:n_components], variances.sum()


def captured(rows, components, center=True):
    """Sum of squares of rows [n, d] along components [r, d]."""
    rows = np.asarray(rows, dtype=np.float64)
    centred = rows - rows.mean(0) if center else rows
    return float(((centred @ np.asarray(components, dtype=np.float64).T) ** 2).sum())


def planted(n, singular_values, width, mean=0.0, seed=0):
    """Rows [n, width] whose centred singular values are exactly the given ones, and their directions [k, width]."""
    random = np.random.default_rng(seed)
    k = len(singular_values)
    left = random.standard_normal((n, k))
    left = np.linalg.qr(left - left.mean(0))[0]
    right = np.linalg.qr(random.standard_normal((width, k)))[0].T
    return left @ (np.asarray(singular_values)[:, None] * right) + mean, right
