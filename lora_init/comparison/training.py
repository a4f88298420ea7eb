"""One run: train what is trainable for a fixed number of steps, and measure on the way."""

from __future__ import annotations

import hashlib
import math
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch import nn

from lora_init.collection.losses import EVALUATION_BATCH, batch_loss, class_logits, sequence_losses
from lora_init.comparison.tasks import CLASSIFICATION, MULTIPLE_CHOICE, Item, Task, item_length
from lora_init.errors import LoraInitError, is_number
from lora_init.layers.running import evaluating, on_device_of
from lora_init.loading.reader import Encoded

_STATUS = Path("/proc/self/status")


def reset_peak() -> None:
    """Count the peak from here. On a CPU that needs Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _STATUS.exists():
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        except OSError:  # not allowed in some containers: then the process's peak is the answer
            return


def peak_bytes() -> int:
    """Read the peak since `reset_peak`: allocated on the GPU if there is one, else resident memory; 0 if unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if not _STATUS.exists():
        return 0
    match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"))
    return int(match[1]) * 1024 if match else 0


@dataclass(frozen=True)
class Score:
    """Mean loss on some examples, and metrics if they have a right answer."""

    loss: float
    metrics: dict[str, float] | None


def evaluate(model: nn.Module, task: Task, items: Sequence[Item], with_metrics: bool = False) -> Score:
    """Compute the loss of examples in evaluation mode, and metrics; for multiple choice these run every option.

    The loss is the mean over all labelled tokens, or over all examples for a classification. Metrics are accuracy,
    macro F1 and the Matthews correlation of the most probable class or option; an option's score is the log-likelihood
    of its tokens, divided by their number if the task says so.
    """
    if task.kind == CLASSIFICATION:
        return _score_classes(model, task, items)
    if task.kind != MULTIPLE_CHOICE or not with_metrics:
        return Score(_mean(sequence_losses(model, [item.tokens for item in items], task.padding)), None)
    sequences: list[Encoded] = []  # all options of all examples, so that they are scored in full batches
    for item in items:
        sequences += item.choices
    scored = iter(sequence_losses(model, sequences, task.padding))
    truth, predicted, right = [], [], []
    for item in items:
        answer = item.answer or 0
        options = list(islice(scored, len(item.choices)))  # sum of losses and number of tokens, for each
        truth.append(answer)
        predicted.append(_most_probable(options, task.normalize))
        # The loss is that of the right options, the examples as they are trained on.
        right.append(options[answer])
    return Score(_mean(right), metrics(truth, predicted))


def _most_probable(options: Sequence[tuple[float, int]], normalize: bool) -> int:
    """Return the position of the option with the lowest loss; of equal ones the first."""
    losses = []
    for loss, count in options:
        # Not normalized, a long option loses by its length: each of its tokens adds to the sum.
        losses.append(loss / count if normalize else loss)
    return losses.index(min(losses))


def _mean(sums: Sequence[tuple[float, int]]) -> float:
    return sum(loss for loss, _ in sums) / sum(count for _, count in sums)


def metrics(truth: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """Compute accuracy, macro F1 and Matthews correlation with scikit-learn."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0.0)),
        "mcc": float(matthews_corrcoef(truth, predicted)),
    }


def _score_classes(model: nn.Module, task: Task, items: Sequence[Item]) -> Score:
    items = sorted(items, key=item_length)  # so that batches have little padding
    loss, truth, predicted = 0.0, [], []
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(items), EVALUATION_BATCH):
            batch = on_device_of(model, task.batch(items[start : start + EVALUATION_BATCH]))
            logits = class_logits(model, batch)
            loss += float(nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
            truth += batch["labels"].tolist()
            predicted += logits.argmax(dim=1).tolist()
    return Score(loss / len(truth), metrics(truth, predicted))


@dataclass(frozen=True)
class Training:
    """How every run trains."""

    steps: int  # steps of each run
    batch_size: int  # examples in a batch
    warmup: float  # share of the steps in which the learning rate rises; then it falls to zero on a cosine
    evaluation_points: Sequence[int]  # steps after which the loss to report is measured, rising, from 0 to `steps`

    def __post_init__(self) -> None:
        points, steps = list(self.evaluation_points), self.steps
        if steps < 1 or points != sorted(set(points)) or points[0] != 0 or points[-1] != steps:
            raise LoraInitError(
                f"{{evaluation_points}}: expected rising steps from 0 to {steps}, the last.", evaluation_points=points
            )
        if not is_number(self.warmup) or not 0.0 <= self.warmup < 1.0:
            raise LoraInitError(
                "{warmup}: expected a share of the steps, at least 0 and less than 1.", warmup=self.warmup
            )

    def factor(self, step: int) -> float:
        """Compute the factor on the learning rate in a step: a line up, then a cosine down to zero.

        Example:
            >>> [round(Training(8, 4, 0.25, [0, 8]).factor(step), 2) for step in range(8)]
            [0.5, 1.0, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07]
        """
        warm = round(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / warm  # never zero: the first step counts
        # The scheduler asks for the factor after the last step, too: all steps may be warm-up.
        return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


REPLAYED = 0.25  # what the loss of the replayed text is weighed by beside the loss of a step's examples
# A loss this many times the plain model's, plus half a nat for tasks near zero, is no progress any more.
_FAR, _SLACK = 2.0, 0.5
# Single batches of a healthy run can be hard: their mean over this many steps counts.
_WINDOW = 5
_CLIP = 1.0


@dataclass(kw_only=True)
class TrainingResult:
    """What one training did."""

    status: str = "finished"  # `"finished"`, or `"unstable"` if the loss diverged; the run ended there
    error: str | None = None  # why it is unstable
    evaluation_points: list[int] = field(default_factory=list)  # steps after which the loss to report was measured
    report_loss: list[float] = field(default_factory=list)  # at each of those points
    selection_loss: float | None = None  # at the end; None unless the run finished
    training_loss: list[float] = field(default_factory=list)  # of each step's batch, before that step
    metrics: dict[str, float] | None = None  # at the end, or None
    data_order: str | None = None  # hash of all batches in the order they were trained on
    training_seconds: float = 0.0  # wall time of the steps


def train(
    model: nn.Module,
    task: Task,
    training: Training,
    *,
    learning_rate: float,
    seed: int,
    plain_loss: float,
    replay: Sequence[Mapping[str, torch.Tensor]] = (),
    on_step: Callable[[], None] = lambda: None,
) -> TrainingResult:
    """Train with AdamW, linear warm-up and a cosine to zero, on batches in the order that the seed decides.

    No weight decay; gradients are clipped to norm 1, as transformers' Trainer does. The random state (the base model's
    own dropout) starts from the seed, so a run depends on its arguments and the number of threads only.

    A run is unstable, and ends, when a loss or gradient is not finite, or when the loss to report or the mean of the
    last five training losses is above twice `plain_loss` plus 0.5. That limit is the same for every start, wherever it
    begins.

    Of texts to replay, one a step is trained on beside the batch, weighed by `REPLAYED`, in an order that the seed
    decides.
    """
    torch.manual_seed(seed)
    result, digest, order = TrainingResult(), hashlib.sha256(), task.order(seed, training.steps, training.batch_size)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.factor)
    texts = random.Random(seed).sample(list(replay), len(replay))
    model.train()
    _evaluate(result, model, task, 0, last=False)
    for step, items in enumerate(order, 1):
        if _diverged(result, plain_loss):
            break
        started = time.perf_counter()
        weighted: list[tuple[Mapping[str, torch.Tensor], float]] = [(task.batch(items), 1.0)]
        if texts:  # they come again when all were trained on
            weighted.append((texts[step % len(texts)], REPLAYED))
        optimizer.zero_grad(set_to_none=True)
        for batch, weight in weighted:  # one after the other: gradients add up, and memory holds one graph
            for tensor in batch.values():
                digest.update(tensor.numpy().tobytes())
            loss = batch_loss(model, send_to_device(batch, parameters[0].device))
            (weight * loss).backward()  # type: ignore[no-untyped-call]
            if weight == 1.0:  # the loss on the task, without the loss on the replayed text
                result.training_loss.append(float(loss.detach()))
        norm = float(nn.utils.clip_grad_norm_(parameters, _CLIP))
        # Before the step, which would write NaN into the weights.
        if not (math.isfinite(result.training_loss[-1]) and math.isfinite(norm)):
            result.error = f"loss {result.training_loss[-1]:.3g}, gradient {norm:.3g} in step {step}"
            break
        optimizer.step()
        schedule.step()
        result.training_seconds += time.perf_counter() - started
        on_step()
        if step in training.evaluation_points:
            _evaluate(result, model, task, step, last=step == len(order))
    if result.error or _diverged(result, plain_loss):
        result.status = "unstable"
    else:
        result.selection_loss = evaluate(model, task, task.selection).loss
    result.data_order = digest.hexdigest()[:32]
    return result


def _evaluate(result: TrainingResult, model: nn.Module, task: Task, step: int, last: bool) -> None:
    score = evaluate(model, task, task.report, with_metrics=last)
    result.evaluation_points.append(step)
    result.report_loss.append(score.loss)
    result.metrics = score.metrics


def _diverged(result: TrainingResult, plain_loss: float) -> bool:
    """Return whether the loss is far above the plain model's, and note why."""
    recent = result.training_loss[-_WINDOW:]
    mean = statistics.fmean(recent) if len(recent) == _WINDOW else 0.0
    for name, value in (("loss", result.report_loss[-1]), ("training loss", mean)):
        if not value <= _FAR * plain_loss + _SLACK:  # NaN, too
            after = len(result.training_loss)
            result.error = f"{name} {value:.3g} after step {after}, {plain_loss:.3g} for the plain model"
            return True
    return False
