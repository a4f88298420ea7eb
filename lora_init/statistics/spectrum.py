"""The frozen result of a decomposition, the comparison of two results, and the exact decomposition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_init.errors import LoraInitError


class Sizes(NamedTuple):
    """How large the input x and the output W x of a layer are, over the tokens that count."""

    input: float  # mean of the sum over j of |x_j|
    output: float  # root mean square of the entries of W x, without a bias


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Principal directions of the rows that one layer receives.

    The names are scikit-learn's, without the trailing underscore. All tensors are on the CPU and belong to this object.

    Attributes:
        components: Orthonormal rows, by falling variance, float32 [k, d_in]. The entry of largest magnitude of each
            is positive.
        explained_variance: Variance along each component, divided by n - 1, float64 [k].
        total_variance: Variance over all d_in directions, exact: not the sum of what was kept.
        mean: Mean row, float32 [d_in]. Zero where the decomposition is uncentered.
        n_samples: Number of rows seen.
    """

    components: Tensor
    explained_variance: Tensor
    total_variance: float
    mean: Tensor
    n_samples: int

    @property
    def n_components(self) -> int:
        """Number k of directions kept."""
        return self.components.shape[0]

    @property
    def noise_variance(self) -> float:
        """Mean variance along the directions that were not kept, scikit-learn's `noise_variance_`."""
        kept, width = self.components.shape
        # Both guards are for a full set of components: rounding may make the rest negative, and there are 0 others.
        return max(self.total_variance - float(self.explained_variance.sum()), 0.0) / max(width - kept, 1)

    @property
    def explained_variance_ratio(self) -> Tensor:
        """Share of the total variance along each component, float64 [k]."""
        if self.total_variance <= 0.0:  # constant rows
            return torch.zeros_like(self.explained_variance)
        return self.explained_variance / self.total_variance


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Measure the angles between the spans of the rows of `a` [p, d] and of `b` [q, d].

    Returns:
        min(p, q) angles in radians, rising, float64.

    Example:
        >>> import torch
        >>> principal_angles(torch.eye(3)[:1], torch.eye(3)[:2])
        tensor([0.], dtype=torch.float64)
    """
    from scipy.linalg import subspace_angles

    for rows in (b, a):
        if not isinstance(rows, Tensor) or rows.ndim != 2 or rows.shape[1] != b.shape[1]:
            shape = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise LoraInitError(f"principal_angles() got {shape}, expected two tensors [k, d] of one d.")
    # scipy's, since an arc cosine alone loses small angles; it returns them falling.
    angles = subspace_angles(a.double().T.numpy(force=True), b.double().T.numpy(force=True))
    return torch.from_numpy(angles[::-1].copy())


# A direction with less than this share of the largest variance is float32 rounding, not data.
NEGLIGIBLE = 1e-13
NO_ROWS = "no rows were seen, so there is no spectrum. Feed rows with partial_fit first."


@dataclass(frozen=True)
class Moments:
    """Count, mean and total scatter, exact under any split of the rows (Chan, Golub and LeVeque 1983)."""

    n_samples: int
    mean: Tensor  # [d], float64; zero if uncentered
    scatter: float  # sum of squared distances from the mean

    def plus(self, other: Moments) -> tuple[Moments, Tensor]:
        """Add another set of rows; also return the row by which the distance of the two means counts, [d]."""
        # Never as E[x^2] - E[x]^2, which cancels where the mean is large.
        n = self.n_samples + other.n_samples
        drift = other.mean - self.mean  # [d]
        row = drift * (self.n_samples * other.n_samples / n) ** 0.5
        mean = self.mean + drift * (other.n_samples / n)
        return Moments(n, mean, self.scatter + other.scatter + float(row @ row)), row


def freeze(moments: Moments, directions: Tensor, weights: Tensor) -> Spectrum:
    """Make the result: scatter becomes variance, signs are fixed, everything moves to the CPU."""
    degrees = max(moments.n_samples - 1, 1)
    # Directions from a Gram matrix are orthonormal to fewer digits where eigenvalues are small.
    rows = torch.linalg.qr(directions.double().T).Q.T
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))  # of each row, and positive in the result
    return Spectrum(
        components=(rows * largest.sign()).to("cpu", torch.float32).contiguous(),
        explained_variance=(weights / degrees).cpu(),
        total_variance=moments.scatter / degrees,
        mean=moments.mean.to("cpu", torch.float32),
        n_samples=moments.n_samples,
    )


def principal_directions(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Compute the `size` largest eigenvalues of rows^T rows, falling, [k], and their directions [k, d], all in float64.

    They come from the smaller of the two Gram matrices; fewer where the rest is rounding. Directions of the smallest
    eigenvalues are orthonormal to fewer digits: `freeze` mends that.
    """
    if len(rows) >= rows.shape[1]:
        weights, vectors = _leading(rows.T @ rows, size)  # d x d
        return weights, vectors.T
    # If rows rows^T u = w u, then rows^T u is an eigenvector of rows^T rows with the same w, of length sqrt(w).
    weights, vectors = _leading(rows @ rows.T, size)  # n x n
    return weights, (vectors / weights.sqrt()).T @ rows  # k x n, n x d -> k x d


def _leading(matrix: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the `size` largest eigenvalues, falling, and their vectors in columns; rounding is left out."""
    weights, vectors = torch.linalg.eigh(matrix)  # rising
    # Strictly greater, so that a matrix of zeros has none; clamped, since rounding may make all of them negative.
    kept = min(size, int((weights > weights[-1:].clamp_min(0.0) * NEGLIGIBLE).sum()))
    return weights.flip(0)[:kept], vectors.flip(1)[:, :kept]


def check_rows(rows: Tensor, width: int | None) -> None:
    """Refuse what is not a matrix of floats of the width seen before."""
    if rows.dim() != 2:
        raise LoraInitError(f"rows of shape {tuple(rows.shape)}, expected two dimensions [n, d].")
    if not rows.is_floating_point():
        raise LoraInitError(f"rows of type {rows.dtype}, expected floating point.")
    if width is not None and rows.shape[1] != width:
        raise LoraInitError(f"rows of width {rows.shape[1]}, expected {width} as before.")


def check_alike(one_center: bool, other_center: bool) -> None:
    """Refuse to merge centered with uncentered."""
    if other_center != one_center:
        raise LoraInitError("merge: one decomposition is centered and the other is not. Collect both the same way.")


def raise_if_not_finite(row_norms: Tensor) -> None:
    """Refuse rows with NaN or inf, which their squared norms [n] show."""
    bad = (~row_norms.isfinite()).nonzero().flatten()
    if len(bad):
        raise LoraInitError(
            f"{len(bad)} of {len(row_norms)} rows contain NaN or inf (first at row {int(bad[0])}). "
            "The model produces them; statistics were not updated."
        )


class ExactPCA:
    """Decompose the full covariance, accumulated in float64. Methods and laws are as in `IncrementalSVD`.

    It is the exact reference for the running decomposition, and is fast enough for small widths.

    Cost: 2 d^2 operations a row and d^3 for `spectrum`. Memory: d x d float64. Splitting and merging are exact up to
    float64 rounding.

    Args:
        n_components: Components to report; None for all.
        center: Subtract the mean (PCA). False gives the uncentered second moment.
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
            # Cloned: after a merge the scatter belongs to the other one.
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
        weights, vectors = _leading(self._scatter, self.n_components or len(self._scatter))
        return freeze(self._moments, vectors.T, weights)
