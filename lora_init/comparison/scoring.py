"""How well a model does on a task: loss, and scikit-learn's metrics."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.comparison.tasks import CLASSIFICATION, MULTIPLE_CHOICE, Item, Task, item_length
from lora_init.loading.encoding import IGNORED, Encoded, pad_batch

# Sequences of similar length in one forward pass of an evaluation: more than in training, as nothing is kept.
_EVALUATION_BATCH = 16


@dataclass(frozen=True)
class Score:
    """Loss on the validation examples, and metrics if they have a right answer."""

    loss: float
    metrics: dict[str, float] | None


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Run a language model on a batch.

    Only the logits from the first label on are computed where the model can do so; the others would be thrown away.

    Returns:
        The loss of every position, zero where there is no label, float32 [batch, k], and whether it has a label, bool
        [batch, k].
    """
    labels = batch["labels"]
    first = int((labels != IGNORED).any(dim=0).int().argmax())
    kept = labels.shape[1] - max(first - 1, 0)  # the logits before a label predict it
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    options: dict[str, Any] = {"logits_to_keep": kept} if _keeps_logits(model) else {}
    logits = model(**inputs, **options, use_cache=False).logits[:, -kept:]
    targets = labels[:, -kept:][:, 1:]
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return losses, targets != IGNORED


def training_loss(model: nn.Module, task: Task, batch: Mapping[str, Tensor]) -> Tensor:
    """Compute the mean loss of a batch: over its labelled tokens, or over its examples for a classification."""
    if task.kind == CLASSIFICATION:
        return nn.functional.cross_entropy(class_logits(model, batch), batch["labels"])
    losses, labelled = token_losses(model, batch)
    return losses.sum() / labelled.sum()


def class_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Run a classifier on a batch: float32 [batch, classes]."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits: Tensor = model(**inputs).logits
    return logits.float()


@torch.inference_mode()
def evaluate(model: nn.Module, task: Task, with_metrics: bool) -> Score:
    """Score the validation examples in evaluation mode; the model's mode is as before afterwards.

    The loss is the mean over all labelled tokens, or over all examples for a classification. Metrics are accuracy,
    macro F1 and the Matthews correlation of the most probable class or option; an option's score is the log-likelihood
    of its tokens, divided by their number if the task says so.

    Args:
        model: The model, on any device.
        task: The task.
        with_metrics: Compute metrics, too. For multiple choice that means running every option.
    """
    was_training = model.training
    model.eval()
    try:
        if task.kind == CLASSIFICATION:
            return _score_classes(model, task, with_metrics)
        if task.kind == MULTIPLE_CHOICE and with_metrics:
            return _score_choices(model, task)
        sums = list(_sequence_losses(model, [item.tokens for item in task.validation], task.padding))
        return Score(sum(loss for loss, _ in sums) / sum(count for _, count in sums), None)
    finally:
        model.train(was_training)


@torch.inference_mode()
def text_loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Compute the mean loss over all labelled tokens of some batches, in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        loss, count = 0.0, 0
        for batch in batches:
            losses, labelled = token_losses(model, _placed(batch, model))
            loss, count = loss + float(losses.double().sum()), count + int(labelled.sum())
        return loss / count
    finally:
        model.train(was_training)


def metrics(truth: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """Compute accuracy, macro F1 and Matthews correlation with scikit-learn."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0.0)),
        "mcc": float(matthews_corrcoef(truth, predicted)),
    }


def _score_classes(model: nn.Module, task: Task, with_metrics: bool) -> Score:
    loss, truth, predicted = 0.0, [], []
    for items in _by_length(task.validation):
        batch = _placed(task.batch(items), model)
        logits = class_logits(model, batch)
        loss += float(nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
        truth += batch["labels"].tolist()
        predicted += logits.argmax(dim=1).tolist()
    return Score(loss / len(truth), metrics(truth, predicted) if with_metrics else None)


def _score_choices(model: nn.Module, task: Task) -> Score:
    sequences = [choice for item in task.validation for choice in item.choices]
    scored = _sequence_losses(model, sequences, task.padding)
    truth, predicted, total, count = [], [], 0.0, 0
    for item in task.validation:
        of_item = [next(scored) for _ in item.choices]
        losses = [loss / n if task.normalize else loss for loss, n in of_item]
        right = item.answer or 0
        total, count = total + of_item[right][0], count + of_item[right][1]
        truth.append(right)
        predicted.append(losses.index(min(losses)))
    return Score(total / count, metrics(truth, predicted))


def _sequence_losses(model: nn.Module, sequences: Sequence[Encoded], padding: int) -> Iterator[tuple[float, int]]:
    """Sum the loss of each sequence, and count its labelled tokens, in the order given; run in that of their length."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]))
    found: dict[int, tuple[float, int]] = {}
    for start in range(0, len(order), _EVALUATION_BATCH):
        places = order[start : start + _EVALUATION_BATCH]
        losses, labelled = token_losses(model, _placed(pad_batch([sequences[i] for i in places], padding), model))
        pairs = zip(losses.double().sum(dim=1).tolist(), labelled.sum(dim=1).tolist(), strict=True)
        found |= dict(zip(places, pairs, strict=True))
    return (found[i] for i in range(len(sequences)))


def _by_length(items: Sequence[Item]) -> Iterator[list[Item]]:
    ordered = sorted(items, key=item_length)
    for start in range(0, len(ordered), _EVALUATION_BATCH):
        yield ordered[start : start + _EVALUATION_BATCH]


def _placed(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _keeps_logits(model: nn.Module) -> bool:
    of_peft: Any = getattr(model, "get_base_model", None)
    plain: nn.Module = model if of_peft is None else of_peft()
    return "logits_to_keep" in inspect.signature(plain.forward).parameters
