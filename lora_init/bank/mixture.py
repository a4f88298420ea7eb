"""Weights over adapters that lower the loss of a few batches, without gradients (LoraHub, arXiv 2307.13269).

There are at most eight weights, and a loss is cheap to measure while its gradient needs the memory of training. So the
weights are searched by a method without derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

import torch
from torch import Tensor, nn

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.peft_model import adapter_layers, as_it_was
from lora_init.errors import require
from lora_init.serving.trained import Layer

MOST_ADAPTERS = 8  # the nearest
MOST_PASSES = 60  # measurements of the loss


def stack(adapters: Sequence[Mapping[str, Layer]], weights: Sequence[float]) -> dict[str, Layer]:
    """Sum adapters by weights, exactly: the A one below the other, the B side by side, under a scaling of 1."""
    # Sums of A and of B would not do: (B1 + B2)(A1 + A2) has the mixed products B1 A2 and B2 A1, too. Side by side
    # [B1 B2] times A1 above A2 is B1 A1 + B2 A2, at the sum of the ranks.
    parts_a: dict[str, list[Tensor]] = {}
    parts_b: dict[str, list[Tensor]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, layer in adapter.items():
            parts_a.setdefault(name, []).append(layer.a)
            parts_b.setdefault(name, []).append(layer.rescaled(1.0).b * weight)
    return {name: Layer(torch.cat(a), torch.cat(parts_b[name], dim=1), 1.0) for name, a in parts_a.items()}


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
        # The sum goes on the model once, with weights of 1. A weight then multiplies the columns of B of its adapter.
        layers = adapter_layers(build(stack(adapters, [1.0] * n)).apply(model))
        weights_b = {name: next(iter(layer.lora_B.values())).weight for name, layer in layers.items()}
        unweighted = {name: weight.detach().clone() for name, weight in weights_b.items()}
        n_columns = {}  # of each adapter in a layer's B
        for name in layers:
            n_columns[name] = torch.tensor([adapter[name].rank if name in adapter else 0 for adapter in adapters])

        @torch.no_grad()
        def measure(weights: Sequence[float]) -> float:
            key = tuple(map(float, weights))
            if key not in measured:
                for name, weight in weights_b.items():
                    columns = torch.tensor(key).repeat_interleave(n_columns[name]).to(unweighted[name])
                    weight.copy_(unweighted[name] * columns)
                loss = loss_of(model)
                # COBYLA fits a linear model to the losses, which infinity would spoil.
                measured[key] = loss if math.isfinite(loss) else 1e9
            return measured[key]

        alone, mean = torch.eye(n).tolist(), [1.0 / n] * n
        first = [*alone, mean]
        options = {"maxiter": MOST_PASSES - len(first), "rhobeg": 0.25}
        minimize(measure, min(first, key=measure), method="COBYLA", options=options)
    # The best that was measured: COBYLA's last point need not be that.
    return list(min(measured.items(), key=itemgetter(1))[0]), len(measured)
