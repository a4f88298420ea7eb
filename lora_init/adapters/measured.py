"""The adapter of a start; where B is not zero, sized or checked by a loss on batches that were set aside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.quantized import QuantizationErrors, loss_or_distance, with_losses
from lora_init.adapters.starts import Start
from lora_init.adapters.step_size import find_step_size
from lora_init.collection.losses import Loss, mean_loss
from lora_init.layers.running import Forward
from lora_init.statistics.statistics import Statistics

LossOf: TypeAlias = Callable[[nn.Module], float]


def build_measured(
    model: nn.Module,
    stats: Statistics,
    start: Start,
    build: Callable[..., AdapterInit],
    aside: Sequence[Any],
    gamma: float | None = None,
    *,
    weights: str | Path | None = None,
    unchecked: bool = False,
    forward: Forward | None = None,
    loss: Loss | None = None,
    shared: Callable[[LossOf], LossOf] = lambda loss_of: loss_of,
) -> AdapterInit:
    """Build the adapter of a start, and measure what the start asks to be measured.

    A start that steps takes the size of its step by the loss, see `find_step_size`. One that corrects a quantized base
    is checked by it, see `with_losses`. All others are built, and so are these if nothing was set aside.

    Args:
        model: The plain model; as it was afterwards.
        stats: What the start is made from.
        start: What is known of it.
        build: `build_adapter` with all that it needs but `gamma`, `errors` and `model`.
        aside: Batches to measure the loss on, others than those of the statistics.
        gamma: Take this size; it is measured alone.
        weights: The float model that a quantized one was made of, see `QuantizationErrors`.
        unchecked: See `with_losses`.
        forward: As for `collect`.
        loss: As for `collect`.
        shared: Makes a loss that all processes agree on of one that each measures.

    Raises:
        LoraInitError: As `build_adapter`, `QuantizationErrors`, `find_step_size` and `with_losses` raise it.
    """
    build = partial(build, model=model)
    given: dict[str, Any] = dict(batches=aside, forward=forward, loss=loss)
    if start.by_error:
        errors = QuantizationErrors(model, stats.targets, weights)
        built = build(errors=errors)
        if not aside:
            return built
        return with_losses(model, built, errors, shared(loss_or_distance(model, errors, **given)), unchecked)
    if start.takes_step and aside:
        return find_step_size(model, lambda tried: build(gamma=tried), shared(partial(mean_loss, **given)), gamma)
    return build(gamma=gamma)
