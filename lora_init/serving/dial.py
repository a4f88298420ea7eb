"""How strongly each layer of a trained adapter acts: measured on its task and on text that the model should keep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_init.adapters.peft_model import adapter_layers
from lora_init.collection.losses import token_losses
from lora_init.errors import LoraInitError
from lora_init.layers.masks import IGNORED, shifts_labels
from lora_init.layers.running import call_model, evaluating, on_device_of

if TYPE_CHECKING:
    from peft import PeftModel

STRONGEST = 1.5  # of one layer, in a fit
_START, _STEPS, _RATE = 0.7, 24, 0.06


@contextmanager
def strengths(model: PeftModel, values: float | Tensor | Mapping[str, float | Tensor]) -> Iterator[None]:
    """Multiply what the active adapter adds, in all layers or layer by layer, while the block runs.

    At 1 the adapter acts as trained, at 0 the model is its base, except for modules that were trained whole.

    Args:
        model: A PEFT model.
        values: One strength, or one for each layer by its name in the plain model; layers not named keep theirs.
            Tensors without dimensions may require gradients, except for experts that PEFT adapts as parameters.
    """
    layers, adapter = adapter_layers(model), model.active_adapter
    before = {name: layer.scaling[adapter] for name, layer in layers.items()}
    each = values if isinstance(values, Mapping) else dict.fromkeys(layers, values)
    try:
        for name, value in each.items():
            layers[name].scaling[adapter] = before[name] * value
        yield
    finally:
        for name, layer in layers.items():
            layer.scaling[adapter] = before[name]


def fit_strengths(
    model: PeftModel,
    task: Sequence[Any],
    keep: Sequence[Any],
    weight: float,
    start: float | Mapping[str, float] = _START,
    steps: int = _STEPS,
    rate: float = _RATE,
) -> dict[str, float]:
    """Find a strength for each layer by gradient on the loss of the task plus `weight` times that of text to keep.

    Adam with a rate that falls to 0 linearly; strengths stay between 0 and `STRONGEST`. The model is afterwards as it
    was. A step costs a forward and a backward pass without gradients of the base, and no memory beyond those of B.

    Args:
        model: A PEFT model.
        task: Batches of the task, one a step, from the first again after the last.
        keep: Batches of text to keep, likewise.
        weight: What the loss on text to keep is multiplied by.
        start: Strengths to begin at.
        steps: Number of steps.
        rate: Adam's rate in the first step.
    """
    names, outputs = zip(*_outputs(model).items(), strict=True)
    trained = [b.detach().clone() for b in outputs]
    begin = [start[name] if isinstance(start, Mapping) else start for name in names]
    values = torch.tensor(begin, requires_grad=True)
    adam = torch.optim.Adam([values], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, steps)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for b in outputs:
            b.requires_grad_(True)
        with evaluating(model):
            for step in range(steps):
                for b, whole, value in zip(outputs, trained, values.tolist(), strict=True):
                    b.data = whole * value
                gradient = torch.zeros(len(names))
                for batches, share in ((task, 1.0), (keep, weight)):
                    loss = share * _mean(*label_losses(model, batches[step % len(batches)]))
                    found = torch.autograd.grad(loss, outputs, materialize_grads=True)
                    # B is value * trained, so the derivative by the value is <dL/dB, trained>, also at 0.
                    gradient += torch.stack([(g.float() * b).sum() for g, b in zip(found, trained, strict=True)]).cpu()
                values.grad = gradient
                adam.step()
                schedule.step()
                values.data.clamp_(0.0, STRONGEST)
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for b, whole in zip(outputs, trained, strict=True):
            b.data = whole
    return dict(zip(names, values.tolist(), strict=True))


def _outputs(model: PeftModel) -> dict[str, nn.Parameter]:
    """Find B of each layer of the active adapter."""
    found = {}
    for name, layer in adapter_layers(model).items():
        embedding = getattr(layer, "lora_embedding_B", {})
        adapter = model.active_adapter
        found[name] = embedding[adapter] if adapter in embedding else layer.lora_B[adapter].weight
    return found


def _mean(losses: Tensor, labelled: Tensor) -> Tensor:
    return losses.sum() / labelled.sum()


def label_losses(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Compute the loss of each label, zero where there is none, and where there is one; both [batch, length]."""
    batch = on_device_of(model, batch)
    if shifts_labels(model):
        return token_losses(model, batch)
    labels, logits = batch["labels"], call_model(model, batch, with_labels=True).logits
    losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses, labels != IGNORED


@torch.inference_mode()
def example_losses(model: nn.Module, batches: Iterable[Any]) -> Tensor:
    """Sum the loss of each example and count its labels, in evaluation mode: float64 [examples, 2] on the CPU."""
    with evaluating(model):
        pairs = [label_losses(model, batch) for batch in batches]
        rows = [torch.stack([losses.double().sum(1), labelled.double().sum(1)], 1).cpu() for losses, labelled in pairs]
    found = torch.cat(rows)
    if not float(found[:, 1].sum()):
        raise LoraInitError("no token has a label, so there is no loss. Check labels and max_length.")
    if not math.isfinite(float(found.sum())):
        raise LoraInitError("the loss is NaN or infinite: training went wrong. Use an earlier checkpoint.")
    return found
