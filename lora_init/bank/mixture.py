"""Weights over adapters that lower the loss of a few batches, without gradients (LoraHub, arXiv 2307.13269)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

import torch
from torch import nn

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.peft_model import adapter_layers, as_it_was
from lora_init.errors import require
from lora_init.serving.trained import Layer

MOST_ADAPTERS = 8
MOST_PASSES = 60


def stack(adapters: Sequence[Mapping[str, Layer]], weights: Sequence[float]) -> dict[str, Layer]:
    """Sum adapters by weights, exactly: the A one below the other, the B side by side, under a scaling of 1."""
    names = dict.fromkeys(name for adapter in adapters for name in adapter)
    sums = {}
    for name in names:
        parts = [(one[name], weight) for one, weight in zip(adapters, weights, strict=True) if name in one]
        b = torch.cat([layer.rescaled(1.0).b * weight for layer, weight in parts], dim=1)
        sums[name] = Layer(torch.cat([layer.a for layer, _ in parts]), b, 1.0)
    return sums


def find_weights(
    model: nn.Module,
    adapters: Sequence[Mapping[str, Layer]],
    build: Callable[[Mapping[str, Layer]], AdapterInit],
    loss_of: Callable[[nn.Module], float],
) -> tuple[list[float], int]:
    """Search the weights with which the sum of adapters has the lowest loss; return how often it was measured, too.

    From the best of each adapter alone and their mean on, COBYLA searches with what is left of 60 measurements. LoraHub
    begins at zero, searches with CMA-ES and adds a penalty on the weights. `build` makes an adapter of a sum.
    """
    require("scipy")
    from scipy.optimize import minimize

    n = len(adapters)
    measured: dict[tuple[float, ...], float] = {}
    with as_it_was(model):
        layers = adapter_layers(build(stack(adapters, [1.0] * n)).apply(model))
        whole = {name: next(iter(layer.lora_B.values())).weight.detach().clone() for name, layer in layers.items()}
        parts = {name: [a[name].rank if name in a else 0 for a in adapters] for name in layers}

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
    return list(min(measured.items(), key=itemgetter(1))[0]), len(measured)
