"""What a convolution's adapter reads: patches of its input as rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_init.errors import LoraInitError

# Patches that one call of a layer gives at most. Neighbours overlap: more of them cost memory and say little.
MAX_PATCHES = 4096

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Patches:
    """Cut the input of a convolution into what PEFT's `lora_A`, a convolution itself, multiplies by its weight.

    PEFT gives `lora_A` the kernel, stride and padding of the layer, all of its input channels whatever its groups,
    zeros for padding whatever its `padding_mode`, and no dilation. The rows are those of `lora_A`, not of the layer.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # zeros before and after, for each dimension

    def rows(self, x: Tensor, most: int = MAX_PATCHES) -> Tensor:
        """Cut x [batch, channels, *size] into rows [n, channels * prod(kernel)], each laid out as a row of A's weight.

        Of more than `most` patches, `most` are drawn at random over images and places: the same places in every batch
        of this shape, so that a pass can be repeated.
        """
        n_dims = len(self.kernel)
        x = x[None] if x.dim() == n_dims + 1 else x
        x = F.pad(x, [zeros for pair in reversed(self.padding) for zeros in pair])
        for i, (size, step) in enumerate(zip(self.kernel, self.stride, strict=True)):
            x = x.unfold(2 + i, size, step)  # a view: [batch, channels, *places, *kernel]
        x = x.movedim(1, 1 + n_dims)  # [batch, *places, channels, *kernel]
        places = x.shape[: 1 + n_dims]
        total = math.prod(places)
        if total <= most:
            return x.reshape(total, -1)
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:most].sort().values
        return x[torch.unravel_index(drawn.to(x.device), places)].flatten(1)


def patches_of(name: str, module: nn.Module) -> Patches | None:
    """Describe the patches of a convolution; None for any other layer. Refuse one that PEFT's adapter does not fit."""
    if not isinstance(module, CONVOLUTIONS):
        return None
    if module.padding == "same":
        padding = tuple(((size - 1) // 2, size // 2) for size in module.kernel_size)
    else:
        zeros = (0,) * len(module.kernel_size) if isinstance(module.padding, str) else module.padding
        padding = tuple((size, size) for size in zeros)
    spread = any(d > 1 and k > 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    if spread and module.padding != "same":
        raise LoraInitError(
            f"layer {name!r}: PEFT's adapter leaves out dilation={module.dilation}, so its output does not fit that of "
            "the layer. Exclude it."
        )
    return Patches(tuple(module.kernel_size), tuple(module.stride), padding)
