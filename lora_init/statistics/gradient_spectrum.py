"""What the loss says about one layer: the frozen result of the backward passes, and its place in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_init.statistics.mean_gradient import MeanGradient
from lora_init.statistics.spectrum import Spectrum


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
        importance: Mean of |W * G| over all entries, GoRA's measure; G from its triplets. NaN after a merge, which
            does not know W.
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
        return numbers, {
            "components": weighted.components,
            "explained_variance": weighted.explained_variance,
            "left": self.left,
            "singular_values": self.singular_values,
            "right": self.right,
            "output_moment": self.output_moment,
        }

    @classmethod
    def unpack(cls, numbers: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> GradientSpectrum:
        """Read what `pack` wrote.

        Args:
            numbers: The plain values.
            tensor: Gives a tensor by its name.
        """
        components = tensor("components")
        weighted = Spectrum(
            components, tensor("explained_variance"), float(numbers["total_variance"]),
            torch.zeros(components.shape[1]), int(numbers["n_samples"]),
        )  # fmt: skip
        left, values, right = (tensor(name) for name in ("left", "singular_values", "right"))
        # Files from before this number was kept have divided by the other one.
        n_samples = int(numbers.get("n_tokens", weighted.n_samples))
        importance = math.nan if numbers["importance"] is None else float(numbers["importance"])
        return cls(weighted, left, values, right, tensor("output_moment"), importance, n_samples)


def freeze_gradient(mean: MeanGradient, weighted: Spectrum, n_labels: int, weight: Tensor | None) -> GradientSpectrum:
    """Make the result of a layer.

    Args:
        mean: Sum of the gradients of the summed loss over all batches.
        weighted: Decomposition of the weighted rows.
        n_labels: Labels of all batches: divided by them the sum is the gradient of the mean loss.
        weight: Of the layer, [d_out, d_in]; None if it is not known.
    """
    left, values, right = mean.triplets(mean.n_components)
    values = values / max(n_labels, 1)
    measure = 0.0 if weight is None else importance(weight.detach(), left, values, right)
    moment = mean.squares / max(mean.n_samples, 1)
    return GradientSpectrum(weighted, left, values, right, moment, measure, mean.n_samples)


def importance(weight: Tensor, left: Tensor, values: Tensor, right: Tensor) -> float:
    """Average |W * G| in slices of rows, so that G is never there as a whole."""
    scaled = (values[:, None] * right.double()).to(weight.device, torch.float32)  # [k, d_in]
    total = 0.0
    for start in range(0, len(weight), 256):
        rows = weight[start : start + 256].float()
        total += float((rows * (left[:, start : start + 256].to(scaled).T @ scaled)).abs().sum(dtype=torch.float64))
    return total / max(weight.numel(), 1)
