"""The frozen result of a decomposition, and how to compare two of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Principal directions of the rows that one layer receives.

    The names are scikit-learn's, without the trailing underscore. All tensors are on the CPU and belong to this object.

    Attributes:
        components: Orthonormal rows, by falling variance, float32 [k, d_in]. The entry of largest magnitude of each
            is positive.
        explained_variance: Variance along each component, divided by n - 1, float64 [k].
        total_variance: Variance over all d_in directions, exact: not the sum of what was kept.
        mean: Mean row, float32 [d_in]. Zero where the decomposition is uncentred.
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
        return max(self.total_variance - float(self.explained_variance.sum()), 0.0) / max(width - kept, 1)

    @property
    def explained_variance_ratio(self) -> Tensor:
        """Share of the total variance along each component, float64 [k]."""
        if self.total_variance <= 0.0:
            return torch.zeros_like(self.explained_variance)
        return self.explained_variance / self.total_variance


def fix_signs(components: Tensor) -> Tensor:
    """Flip each row so that its entry of largest magnitude is positive: the one sign rule of the package.

    Args:
        components: [..., k, d].

    Example:
        >>> import torch
        >>> fix_signs(torch.tensor([[0.6, -0.8]]))
        tensor([[-0.6000,  0.8000]])
    """
    index = components.abs().argmax(dim=-1, keepdim=True)
    return components * torch.where(components.gather(-1, index) < 0, -1.0, 1.0).to(components.dtype)


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Measure the angles between the spans of the rows of `a` [p, d] and of `b` [q, d].

    Small angles come from sines and large ones from cosines (Knyazev and Argentati 2002): an arc cosine alone has no
    digits left below 1e-8.

    Returns:
        min(p, q) angles in radians, rising, float64.

    Example:
        >>> import torch
        >>> principal_angles(torch.eye(3)[:1], torch.eye(3)[:2])
        tensor([0.], dtype=torch.float64)
    """
    q_a, q_b = (torch.linalg.qr(rows.double().T).Q for rows in (a, b))  # [d, p], [d, q]
    if q_a.shape[1] < q_b.shape[1]:
        q_a, q_b = q_b, q_a
    cosines = torch.linalg.svdvals(q_a.T @ q_b).clamp(max=1.0)  # falling
    sines = torch.linalg.svdvals(q_b - q_a @ (q_a.T @ q_b)).flip(0).clamp(max=1.0)  # rising
    return torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))
