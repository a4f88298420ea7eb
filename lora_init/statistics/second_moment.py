"""The second moment of what a layer reads, in the form that a statistics file has it, and its powers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_init.statistics.spectrum import Spectrum


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """S = E x x^T of the rows that a layer reads, as U diag(u) U^T + s I: few directions known, and an isotropic rest.

    Its powers have the same eigenvectors, so that rows are multiplied by them at a cost of k x d each, and no d x d
    matrix is made.
    """

    directions: Tensor  # U^T, orthonormal rows, float64 [k, d]
    excess: Tensor  # u, how much more than s each direction has, float64 [k]
    floor: float  # s

    @classmethod
    def of(cls, spectrum: Spectrum, damping: float = 0.0) -> SecondMoment:
        """Compute S = V diag(v - s) V^T + m m^T + s I; a share `damping` of the mean eigenvalue is added to all."""
        mean, rest = spectrum.mean.double(), spectrum.noise_variance
        # E x x^T is the covariance and the outer product of the mean, which is one more direction: as rows, whose
        # scatter is what S has above s. Of an uncentered spectrum the mean is 0 and adds nothing.
        leading = (spectrum.explained_variance - rest).clamp_min(0.0).sqrt()[:, None] * spectrum.components.double()
        _, scale, directions = torch.linalg.svd(torch.cat([leading, mean[None]]), full_matrices=False)
        # The trace of S over its width is the mean eigenvalue.
        floor = rest + damping * (spectrum.total_variance + float(mean @ mean)) / len(mean)
        return cls(directions, scale.square(), floor)

    def times(self, rows: Tensor, power: float) -> Tensor:
        """Multiply rows [n, d], of the type of the directions, by a power of S."""
        # s^p everywhere, and along the known directions what (u + s)^p is more: rows n x d, never d x d.
        change = (self.excess + self.floor) ** power - self.floor**power
        product: Tensor = rows * self.floor**power + (rows @ self.directions.T * change) @ self.directions
        return product

    def to(self, like: Tensor) -> SecondMoment:
        """Return the same on the device and in the type of a tensor."""
        return SecondMoment(self.directions.to(like), self.excess.to(like), self.floor)
