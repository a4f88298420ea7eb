"""The exact decomposition: the oracle for the running one, and right for small widths."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_init.errors import LoraInitError
from lora_init.statistics.spectrum import (
    NEGLIGIBLE,
    NO_ROWS,
    Moments,
    Spectrum,
    check_alike,
    check_rows,
    freeze,
    raise_if_not_finite,
)


class ExactPCA:
    """Decompose the full covariance, accumulated in float64. Methods and laws are those of `IncrementalSVD`.

    Cost: 2 d^2 operations a row and d^3 for `spectrum`. Memory: d x d float64. Splitting and merging are exact up to
    float64 rounding.

    Args:
        n_components: Components to report; None for all.
        center: Subtract the mean (PCA). False gives the uncentred second moment.
    """

    def __init__(self, n_components: int | None = None, center: bool = True) -> None:
        self.n_components = n_components
        self.center = center
        self._moments: Moments | None = None
        self._scatter: Tensor | None = None  # [d, d], float64

    @property
    def n_samples(self) -> int:
        """Rows taken in so far."""
        return self._moments.n_samples if self._moments else 0

    def partial_fit(self, rows: Tensor) -> ExactPCA:
        """Take in rows [n, d] of any float type, n from 0 on.

        Raises:
            LoraInitError: Rows of another width than before, or with NaN or inf; nothing was updated.
        """
        check_rows(rows, self._moments.mean.shape[0] if self._moments else None)
        if rows.shape[0] == 0:
            return self
        rows = rows.double()
        raise_if_not_finite(rows.square().sum(1))
        mean = rows.mean(0) if self.center else torch.zeros_like(rows[0])
        rows = rows - mean
        scatter = rows.T @ rows
        self._add(Moments(rows.shape[0], mean, float(scatter.trace())), scatter)
        return self

    def merge(self, other: ExactPCA) -> ExactPCA:
        """Take in what another one has seen, as if its rows had come here. `other` is not changed.

        Raises:
            LoraInitError: Other width or other `center`.
        """
        check_alike(self.center, other.center)
        if other._moments is not None and other._scatter is not None:
            check_rows(other._scatter, self._moments.mean.shape[0] if self._moments else None)
            self._add(other._moments, other._scatter)
        return self

    def _add(self, moments: Moments, scatter: Tensor) -> None:
        if self._moments is None or self._scatter is None:
            self._moments, self._scatter = moments, scatter.clone()
        else:
            self._moments, drift = self._moments.plus(moments)
            self._scatter = self._scatter + scatter + torch.outer(drift, drift)

    def spectrum(self) -> Spectrum:
        """Freeze the present result.

        Raises:
            LoraInitError: No rows so far.
        """
        if self._moments is None or self._scatter is None:
            raise LoraInitError(NO_ROWS)
        weights, vectors = torch.linalg.eigh(self._scatter)
        weights, vectors = weights.flip(0), vectors.flip(1)
        kept = int((weights > weights[:1].clamp_min(0.0) * NEGLIGIBLE).sum())
        kept = min(kept, self.n_components or kept)
        return freeze(self._moments, vectors[:, :kept].T, weights[:kept])
