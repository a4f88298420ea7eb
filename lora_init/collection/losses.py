"""The loss of a model: of a batch, as the model itself or a training computes it, and of many, in evaluation mode."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.errors import LoraInitError
from lora_init.layers.masks import IGNORED, NothingCountsError, check_attention_mask, shifts_labels
from lora_init.layers.running import (
    Forward,
    call_model,
    check_batches,
    evaluating,
    naming_strange_tokens,
    on_device_of,
)
from lora_init.layers.wrappers import without_adapter
from lora_init.loading.batches import pad_batch
from lora_init.loading.reader import Encoded

# (output of the forward pass, batch) -> the loss to differentiate, a mean over the labels of the batch
Loss = Callable[[Any, Any], Tensor]
# Sequences of similar length in one forward pass of an evaluation: more than in training, as nothing is kept.
EVALUATION_BATCH = 16


def count_labels(model: nn.Module, batch: Any) -> int:
    """Count what the loss of a batch is a mean over: its labels, else its examples.

    A causal language model predicts the label of a token from those before it, so the first of each row has no part.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        return _count_examples(batch)
    if labels.dim() == 2 and shifts_labels(model):  # labels of classes, [batch], are never shifted
        labels = labels[:, 1:]
    count = int((labels != IGNORED).sum())
    if count == 0:
        raise NothingCountsError("no token of the batch has a label, so there is no loss. Check labels and max_length.")
    return count


def _count_examples(batch: Any) -> int:
    """Count the rows of the first tensor of a batch; 1 if it has none."""
    values: Iterable[Any] = [batch]
    if isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, (list, tuple)):
        values = batch
    for value in values:
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    return 1


def own_loss(output: Any) -> Any:
    """Take the loss that a model of transformers returns; None if there is none."""
    if isinstance(output, Mapping):
        return output.get("loss")
    return getattr(output, "loss", None)


@torch.no_grad()
def mean_loss(
    model: nn.Module, batches: Iterable[Any], forward: Forward | None = None, loss: Loss | None = None
) -> float:
    """Compute the mean of the losses of some batches, in evaluation mode.

    The mode of every submodule is restored afterwards.

    Args:
        model: Any model that `collect(..., gradients=True)` takes.
        batches: As `collect` takes them.
        forward: As for `collect`.
        loss: As for `collect`.

    Raises:
        LoraInitError: There is no batch, or none with a label.
    """
    if not isinstance(model, nn.Module):
        raise LoraInitError(f"mean_loss() takes a model in this place and got {type(model).__name__}.")
    check_batches(batches, "mean_loss()")
    losses = []
    with evaluating(model):
        for number, batch in enumerate(batches):
            moved = on_device_of(model, batch)
            # A batch of which nothing counts has no loss.
            with suppress(NothingCountsError), naming_strange_tokens(f"batch {number}"):
                count_labels(model, moved)
                if isinstance(moved, Mapping):
                    check_attention_mask(moved)
                output = forward(model, moved) if forward else call_model(model, moved, with_labels=True)
                value = loss(output, moved) if loss else own_loss(output)
                if value is None:
                    raise LoraInitError("a batch has no labels, so its loss is unknown. Give it labels, or pass loss=.")
                losses.append(float(value))
    if not losses:
        raise LoraInitError("there is no batch with a label to measure the loss on. Pass at least one.")
    return statistics.fmean(losses)


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss of every position of a batch, zero without a label, float32 [batch, k], and whether it has one.

    Only the logits from the first label on are computed where the model can do so; the others would be thrown away.
    """
    labels = batch["labels"]  # batch x length
    # The first column with a label; argmax returns the first of the largest. Without labels it is column 0.
    first = int((labels != IGNORED).any(dim=0).int().argmax())
    kept = labels.shape[1] - max(first - 1, 0)  # the logits before a label predict it
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    plain: Any = without_adapter(model)
    if "logits_to_keep" in inspect.signature(plain.forward).parameters:
        # As positions, not as their number: a number makes a slice, which is not contiguous, and to multiply that with
        # a frozen lm_head torch on a CPU copies the lm_head for each sequence.
        inputs["logits_to_keep"] = torch.arange(labels.shape[1] - kept, labels.shape[1], device=labels.device)
    # A model without that argument returns all of them. batch x kept x vocabulary
    logits = model(**inputs, use_cache=False).logits[:, -kept:]
    targets = labels[:, -kept:][:, 1:]  # batch x (kept - 1): a position predicts the next label
    labelled = targets != IGNORED
    losses = torch.zeros(targets.shape, device=targets.device)
    # Of the labelled alone: each is a row as wide as the vocabulary. The last logits predict nothing.
    rows = logits[nn.functional.pad(labelled, (0, 1))].float()  # -> labelled tokens x vocabulary
    losses[labelled] = nn.functional.cross_entropy(rows, targets[labelled], reduction="none")
    return losses, labelled


def class_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Run a classifier on a batch: float32 [batch, classes]."""
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.float()


def batch_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Compute the mean loss of a batch: over its labelled tokens, or over its examples where labels are classes."""
    if batch["labels"].dim() == 1:
        return nn.functional.cross_entropy(class_logits(model, batch), batch["labels"])
    # Of all labels of the batch, not the mean of each example's: long answers count for more, as in training.
    losses, labelled = token_losses(model, batch)
    return losses.sum() / labelled.sum()


@torch.inference_mode()
def text_loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Compute the mean loss over all labelled tokens of some batches, in evaluation mode."""
    loss, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            losses, labelled = token_losses(model, on_device_of(model, batch))
            loss += float(losses.double().sum())
            count += int(labelled.sum())
    return loss / count


@torch.inference_mode()
def sequence_losses(model: nn.Module, sequences: Sequence[Encoded], padding: int) -> list[tuple[float, int]]:
    """Sum the loss of each sequence, and count its labelled tokens, in the order given; run in the order of length."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]))
    pairs: list[tuple[float, int]] = [(0.0, 0)] * len(sequences)
    with evaluating(model):
        for start in range(0, len(order), EVALUATION_BATCH):
            places = order[start : start + EVALUATION_BATCH]
            batch = on_device_of(model, pad_batch([sequences[i] for i in places], padding))
            losses, labelled = token_losses(model, batch)  # each batch x k
            sums, counts = losses.double().sum(dim=1).tolist(), labelled.sum(dim=1).tolist()
            for place, loss, count in zip(places, sums, counts, strict=True):
                pairs[place] = loss, count
    return pairs
