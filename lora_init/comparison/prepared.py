"""A model that carries an adapter and is ready to train, what that adapter is, and the way back to the plain model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_init.adapters.initializers import layer_generator, random
from lora_init.adapters.peft_model import adapter_layers
from lora_init.statistics.spectrum import Spectrum

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, eq=False)
class Prepared:
    """A start on a model, as `prepare` returns it.

    Attributes:
        peft_model: The model with the adapter. The plain model inside it is the one that was given.
        trainable_parameters: All that training changes: adapters, and heads that PEFT trains whole.
        ranks: Rank of each layer that has an adapter, or None if all layers have the rank asked for.
        a_scale: Root mean square of the norms of all rows of A.
        seconds: Time that it took, without that for statistics.
        passes: Forward passes of data that it took, without those for statistics.
        gamma: What B A was divided by, where B is not zero and the start is ours.
        release: Puts the plain model back, bit for bit; `peft_model` is of no use afterwards.
    """

    peft_model: PeftModel
    trainable_parameters: int
    ranks: dict[str, int] | None
    a_scale: float
    seconds: float
    passes: int
    gamma: float | None
    release: Callable[[], None] = field(repr=False)


def blank_spectrum(width: int) -> Spectrum:
    """Make the spectrum of a layer of which nothing is known but the width of its input."""
    return Spectrum(torch.empty(0, width), torch.empty(0, dtype=torch.float64), 0.0, torch.zeros(width), 0)


def a_weights(peft_model: PeftModel) -> dict[str, Tensor]:
    """Find A of each layer that has one, [r, d_in]; embeddings and convolutions keep theirs elsewhere or folded."""
    found = {name: layer.lora_A for name, layer in adapter_layers(peft_model).items() if len(layer.lora_A)}
    weights = {name: next(iter(adapters.values())).weight for name, adapters in found.items()}
    return {name: weight for name, weight in weights.items() if weight.dim() == 2}


def ranks_of(peft_model: PeftModel) -> dict[str, int]:
    """Read the rank of each layer that has an adapter."""
    return {name: int(next(iter(layer.r.values()))) for name, layer in adapter_layers(peft_model).items()}


def row_scale(peft_model: PeftModel) -> float:
    """Measure the root mean square of the norms of all rows of A."""
    weights = a_weights(peft_model).values()
    energy = sum(float(weight.detach().double().square().sum()) for weight in weights)
    return math.sqrt(energy / max(1, sum(len(weight) for weight in weights)))


def count_trainable(peft_model: PeftModel) -> int:
    """Count the parameters that training changes."""
    return sum(parameter.numel() for parameter in peft_model.parameters() if parameter.requires_grad)


@torch.no_grad()
def match_scale(peft_model: PeftModel, seed: int) -> None:
    """Scale A of each layer so that the root mean square of its rows' norms is that of the random start.

    The comparison that "The Primacy of Magnitude" (arXiv 2507.06558) asks for: what remains of a start's advantage
    when its updates are as large as those of plain LoRA. B is divided by the same number, which changes nothing where B
    is zero, and elsewhere keeps B A and with it the model's output.

    Args:
        peft_model: Changed in place.
        seed: That of the random start to compare with.
    """
    layers = adapter_layers(peft_model)
    for name, a in a_weights(peft_model).items():
        reference = random(blank_spectrum(a.shape[1]), len(a), layer_generator(seed, name))
        norm = float(a.double().norm())
        if norm > 0.0:
            factor = float(reference.double().norm()) / norm
            a.mul_(factor)
            next(iter(layers[name].lora_B.values())).weight.div_(factor)
