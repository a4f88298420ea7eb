"""Frozen linear layers through the faster of torch's two libraries for thin products, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.products import times_transposed


class _Frozen(torch.autograd.Function):
    """x W^T + b with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        rows = times_transposed(x.reshape(-1, x.shape[-1]), weight, bias)
        return rows.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        rows = gradients[0].reshape(-1, gradients[0].shape[-1])
        return times_transposed(rows, ctx.weight.T).view(*gradients[0].shape[:-1], -1), None, None


@contextmanager
def frozen_layers_by_onednn(model: nn.Module) -> Iterator[None]:
    """Run the frozen float32 linear layers of a model on a CPU through oneDNN while the block lasts.

    Same numbers up to rounding. A training step of a 135M model took 0.62 of its time, on a processor that Intel did
    not make; see `products`.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and not module.weight.requires_grad and "forward" not in vars(module)
        and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32
    ]  # fmt: skip
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return nn.Linear.forward(layer, x)
    output: Tensor = _Frozen.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return output
