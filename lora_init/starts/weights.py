"""A and B of one layer: the type that starts return, adapters hold and directories are written from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor


class LoraWeights(NamedTuple):
    """A and B of one layer, as PEFT's `lora_A` and `lora_B` hold them. A layer adds scaling * B A x to its output."""

    a: Tensor  # what reads the input, [r, d_in]; of a convolution and of experts in the shape of `Target.shapes`
    b: Tensor  # what writes the output, [d_out, r], likewise

    def to(self, *args: Any, **options: Any) -> LoraWeights:
        """Convert both, as `Tensor.to` does."""
        return LoraWeights(self.a.to(*args, **options), self.b.to(*args, **options))

    def times(self, factor: float) -> LoraWeights:
        """Multiply both, and B A by the square."""
        return LoraWeights((self.a * factor).contiguous(), (self.b * factor).contiguous())

    def of_experts(self, experts: int) -> LoraWeights:
        """Reshape PEFT's layout of fused experts to A [experts, r, d_in] and B [experts, d_out, r].

        A holds the rows of one expert after another, and B a column of each expert for one rank after another.
        """
        b = self.b.reshape(len(self.b), -1, experts).permute(2, 0, 1)
        return LoraWeights(self.a.reshape(experts, -1, self.a.shape[-1]), b)

    def fused(self) -> LoraWeights:
        """Bring A and B of each expert into PEFT's layout, the inverse of `of_experts`."""
        return LoraWeights(self.a.flatten(0, 1), self.b.permute(1, 2, 0).flatten(1))


Weights: TypeAlias = Mapping[str, LoraWeights]  # of each layer, by its name
