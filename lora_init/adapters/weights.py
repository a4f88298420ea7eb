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


Weights: TypeAlias = Mapping[str, LoraWeights]  # of each layer, by its name
