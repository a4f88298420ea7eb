"""What the loss says about one layer: the frozen result of the backward passes, and its place in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_init.statistics.mean_gradient import MeanGradient
from lora_init.statistics.spectrum import Spectrum

_TENSORS = ("left", "singular_values", "right", "output_moment")


@dataclass(frozen=True, eq=False)
class GradientSpectrum:
    """Directions of one layer that the loss depends on.

    g is the gradient of the summed loss with respect to the layer's output at one token, x what the layer reads there.
    All tensors are on the CPU.

    Attributes:
        weighted: Principal directions of the rows |g| x, uncentred. `explained_variance` is the expected squared
            gradient of B, for one token, along each of them; the first r maximise its sum over all A of r orthonormal
            rows. `total_variance` is E |g|^2 |x|^2. Layers are comparable: all are gradients of one loss.
        left: Left singular vectors of the mean gradient G of the weight, orthonormal rows, float32 [k, d_out].
        singular_values: Its singular values, falling, float64 [k].
        right: Its right singular vectors, float32 [k, d_in].
        output_moment: E g^2 at each output, float64 [d_out]; its sum is E |g|^2.
        importance: Mean of |W * G| over all entries, GoRA's measure; G from its triplets. NaN where W is not known:
            after a merge, and in the file of a pass that has not ended.
        n_samples: Number of tokens that G and `output_moment` are of: all of the pass, while `weighted` may have seen
            enough before its end.
    """

    weighted: Spectrum
    left: Tensor
    singular_values: Tensor
    right: Tensor
    output_moment: Tensor
    importance: float
    n_samples: int

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Write it as plain values and tensors."""
        weighted = self.weighted
        numbers = {
            "total_variance": weighted.total_variance,
            "n_samples": weighted.n_samples,
            "importance": None if math.isnan(self.importance) else self.importance,
            "n_tokens": self.n_samples,
        }
        tensors = {"components": weighted.components, "explained_variance": weighted.explained_variance}
        return numbers, tensors | {name: getattr(self, name) for name in _TENSORS}

    @classmethod
    def unpack(cls, numbers: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> GradientSpectrum:
        """Read what `pack` wrote.

        Args:
            numbers: The plain values.
            tensor: Gives a tensor by its name.
        """
        components, along = tensor("components"), tensor("explained_variance")
        n_samples, total = int(numbers["n_samples"]), float(numbers["total_variance"])
        return cls(
            weighted=Spectrum(components, along, total, torch.zeros(components.shape[1]), n_samples),
            importance=math.nan if numbers["importance"] is None else float(numbers["importance"]),
            # Files from before this number was kept have divided by the other one.
            n_samples=int(numbers.get("n_tokens", n_samples)),
            **{name: tensor(name) for name in _TENSORS},
        )

    def with_importance(self, weight: Tensor) -> GradientSpectrum:
        """Compute the importance from the weight of the layer, [d_out, d_in]."""
        scaled = (self.singular_values[:, None] * self.right.double()).to(weight.device, torch.float32)  # [k, d_in]
        total = 0.0
        for start in range(0, len(weight), 256):  # in slices of rows, so that G is never there as a whole
            rows = weight[start : start + 256].float()
            total += float(
                (rows * (self.left[:, start : start + 256].to(scaled).T @ scaled)).abs().sum(dtype=torch.float64)
            )
        return replace(self, importance=total / max(weight.numel(), 1))


def freeze_gradient(mean: MeanGradient, weighted: Spectrum, n_labels: int) -> GradientSpectrum:
    """Make the result of a layer; its importance is not known yet.

    Args:
        mean: Sum of the gradients of the summed loss over all batches.
        weighted: Decomposition of the weighted rows.
        n_labels: Labels of all batches: divided by them the sum is the gradient of the mean loss.
    """
    left, values, right = mean.triplets(mean.n_components)
    moment = mean.squares / max(mean.n_samples, 1)
    return GradientSpectrum(weighted, left, values / max(n_labels, 1), right, moment, math.nan, mean.n_samples)
