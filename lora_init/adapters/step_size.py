"""How far a start should step whose B is not zero: as far as lowers the loss most, on batches set aside."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from torch import nn

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.peft_model import adapter_layers, check_plain, remember
from lora_init.errors import LoraInitError
from lora_init.layers.wrappers import unwrapped

# Where the search begins, and how far from there it may go down and up: by factors of 4, then by one of 2.
FIRST = 1024.0
_FARTHEST = (2.0**-10, 2.0**14)
# Batches that are set aside to measure the loss on.
N_ASIDE = 4


class NoStepError(LoraInitError):
    """No size of a step lowers the loss."""


def find_step_size(
    model: nn.Module,
    build: Callable[[float], AdapterInit],
    loss_of: Callable[[nn.Module], float],
    gamma: float | None = None,
    first: float = FIRST,
) -> AdapterInit:
    """Search the gamma with which a start lowers the loss most, by factors of 4 and then of 2.

    B A is divided by gamma, so a larger one is a smaller step. The search begins at 1024, or at `first`, and goes on in
    the direction in which the loss falls. That takes about eight measurements.

    Args:
        model: The plain model; as it was afterwards, whatever `loss_of` does to it.
        build: Makes the adapter with a given gamma.
        loss_of: Measures the loss of the model as it is then, such as `mean_loss` of some batches. They should be
            others than those of the statistics, on which the step is better than on new data.
        gamma: Measure this one alone.
        first: Where the search begins; it goes on down to 2^-10 and up to 2^14 times this.

    Returns:
        The adapter with that gamma, and `losses` with what was measured.

    Raises:
        LoraInitError: The loss is not finite, or no gamma within those bounds gives one below that of the plain model.

    Example:
        >>> from functools import partial
        >>> build = partial(build_adapter, stats, 8, "lora-one")  # doctest: +SKIP
        >>> init = find_step_size(model, lambda gamma: build(gamma=gamma), loss_of)  # doctest: +SKIP
    """
    check_plain(model, "find_step_size()")
    model = unwrapped(model)
    restore = remember(model)
    try:
        before = loss_of(model)
        init = build(gamma or first)
        layers = adapter_layers(init.apply(model)).values()

        @functools.cache
        def measure(candidate: float) -> float:
            for layer in layers:  # the product B A is proportional to 1 / gamma
                layer.scaling = dict.fromkeys(layer.scaling, init.scaling * (gamma or first) / candidate)
            loss = loss_of(model)
            return loss if math.isfinite(loss) else math.inf

        best = gamma or _lowest(measure, first)
        loss = measure(best)
    finally:
        restore()
    if not (math.isfinite(before) and math.isfinite(loss)) or not (gamma or loss < before):
        raise NoStepError(
            f"method {init.method!r}: the loss is {before:.4g} for the plain model and {loss:.4g} after the step with "
            f"gamma={best:g}, the best that was found. Take a start with B = 0, or pass another gamma=."
        )
    return replace(build(best), losses=(before, loss))


def _lowest(measure: Callable[[float], float], first: float) -> float:
    best = first
    for factor in (4.0, 0.25):
        while _FARTHEST[0] <= best * factor / first <= _FARTHEST[1] and measure(best * factor) < measure(best):
            best *= factor
    return min((best, best * 2.0, best / 2.0), key=measure)


def set_aside(batches: Iterable[Any]) -> tuple[list[Any], Iterable[Any]]:
    """Take the first four batches for the search, and give the iterable of the others, for the statistics.

    If there are no others, all serve for both, with a warning.
    """
    stream = iter(batches)
    aside = list(islice(stream, N_ASIDE))
    rest = list(islice(stream, 1))
    if aside and not rest:
        warnings.warn(
            f"there are only {len(aside)} batches, so the size of the step is chosen by the loss on those that the "
            f"statistics are from, and comes out too large. With more than {N_ASIDE}, {N_ASIDE} are set aside for it.",
            stacklevel=3,
        )
    return aside, chain(rest, stream) if rest else aside
