"""Count, mean and total scatter of rows, and the checks that every decomposition makes on its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_init.errors import LoraInitError
from lora_init.statistics.spectrum import Spectrum, fix_signs

# A direction with less than this share of the largest variance is float32 rounding, not data.
NEGLIGIBLE = 1e-13
NO_ROWS = "no rows were seen, so there is no spectrum. Feed rows with partial_fit first."


@dataclass(frozen=True)
class Moments:
    """Count, mean and total scatter, exact under any split of the rows (Chan, Golub and LeVeque 1983)."""

    n_samples: int
    mean: Tensor  # [d], float64; zero if uncentred
    scatter: float  # sum of squared distances from the mean

    def plus(self, other: Moments) -> tuple[Moments, Tensor]:
        """Add another set of rows; also return the row by which the distance of the two means counts, [d]."""
        n = self.n_samples + other.n_samples
        drift = other.mean - self.mean  # [d]
        row = drift * (self.n_samples * other.n_samples / n) ** 0.5
        mean = self.mean + drift * (other.n_samples / n)
        return Moments(n, mean, self.scatter + other.scatter + float(row @ row)), row


def freeze(moments: Moments, directions: Tensor, weights: Tensor) -> Spectrum:
    """Make the result: scatter becomes variance, signs are fixed, everything moves to the CPU."""
    degrees = max(moments.n_samples - 1, 1)
    return Spectrum(
        components=fix_signs(directions).to("cpu", torch.float32).contiguous(),
        explained_variance=(weights / degrees).cpu(),
        total_variance=moments.scatter / degrees,
        mean=moments.mean.to("cpu", torch.float32),
        n_samples=moments.n_samples,
    )


def check_rows(rows: Tensor, width: int | None) -> None:
    """Refuse what is not a matrix of floats of the width seen before."""
    if rows.dim() != 2:
        raise LoraInitError(f"rows of shape {tuple(rows.shape)}, expected two dimensions [n, d].")
    if not rows.is_floating_point():
        raise LoraInitError(f"rows of type {rows.dtype}, expected floating point.")
    if width is not None and rows.shape[1] != width:
        raise LoraInitError(f"rows of width {rows.shape[1]}, expected {width} as before.")


def check_alike(one_center: bool, other_center: bool) -> None:
    """Refuse to merge centred with uncentred."""
    if other_center != one_center:
        raise LoraInitError("merge: one decomposition is centred and the other is not. Collect both the same way.")


def raise_if_not_finite(row_norms: Tensor) -> None:
    """Refuse rows with NaN or inf, told by their squared norms [n]."""
    bad = (~row_norms.isfinite()).nonzero().flatten()
    if len(bad):
        raise LoraInitError(
            f"{len(bad)} of {len(row_norms)} rows contain NaN or inf (first at row {int(bad[0])}). "
            "The model produces them; statistics were not updated."
        )
