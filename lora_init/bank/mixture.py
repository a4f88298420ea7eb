"""Weights over adapters that lower the loss of a few batches, without gradients (LoraHub, arXiv 2307.13269)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

import torch
from torch import Tensor, nn

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.peft_model import adapter_layers, remember
from lora_init.errors import require

MOST_ADAPTERS = 8
MOST_PASSES = 60

Pairs = Mapping[str, tuple[Tensor, Tensor]]  # layer -> A [r, d_in], B [d_out, r], whose product is the update


def stack(adapters: Sequence[Pairs], weights: Sequence[float]) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum adapters by weights, exactly: the A one below the other, the B side by side."""
    names = dict.fromkeys(name for adapter in adapters for name in adapter)
    sums = {}
    for name in names:
        parts = [(*adapter[name], weight) for adapter, weight in zip(adapters, weights, strict=True) if name in adapter]
        sums[name] = torch.cat([a for a, _, _ in parts]), torch.cat([b * weight for _, b, weight in parts], dim=1)
    return sums


def find_weights(
    model: nn.Module,
    adapters: Sequence[Pairs],
    build: Callable[[Pairs], AdapterInit],
    loss_of: Callable[[nn.Module], float],
) -> tuple[list[float], int]:
    """Search the weights with which the sum of adapters has the lowest loss.

    The loss is measured for each adapter alone and for their mean. From the best of these on,
    COBYLA of scipy searches with what is left of 60 measurements. LoraHub begins at zero, searches with CMA-ES and adds
    a penalty on the weights; the step-size search that follows has its place here.

    `build` puts a sum into an adapter that adds it whole. Returns the weights, and how often the loss was measured.
    """
    require("scipy")
    from scipy.optimize import minimize

    n = len(adapters)
    measured: dict[tuple[float, ...], float] = {}
    restore = remember(model)
    try:
        layers = adapter_layers(build(stack(adapters, [1.0] * n)).apply(model))
        whole = {name: next(iter(layer.lora_B.values())).weight.detach().clone() for name, layer in layers.items()}
        parts = {name: [a[name][0].shape[0] if name in a else 0 for a in adapters] for name in layers}

        @torch.no_grad()
        def measure(weights: Sequence[float]) -> float:
            key = tuple(map(float, weights))
            if key not in measured:
                for name, layer in layers.items():
                    column = torch.tensor(key).repeat_interleave(torch.tensor(parts[name])).to(whole[name])
                    next(iter(layer.lora_B.values())).weight.copy_(whole[name] * column)
                loss = loss_of(model)
                measured[key] = loss if math.isfinite(loss) else 1e9
            return measured[key]

        first = [[float(i == j) for j in range(n)] for i in range(n)] + [[1.0 / n] * n]
        options = {"maxiter": MOST_PASSES - len(first), "rhobeg": 0.25}
        minimize(measure, min(first, key=measure), method="COBYLA", options=options)
    finally:
        restore()
    return list(min(measured.items(), key=itemgetter(1))[0]), len(measured)
