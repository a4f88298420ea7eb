"""One run: train what is trainable for a fixed number of steps, and measure on the way."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_init.comparison.scoring import Score, evaluate, training_loss
from lora_init.comparison.tasks import Item, Task

# A loss this many times that of the start, plus half a nat for starts near zero, is no progress any more.
_FAR, _SLACK = 2.0, 0.5
# Single batches of a healthy run can be hard: their mean over this many steps counts.
_WINDOW = 5
_CLIP = 1.0


@dataclass
class TrainingRun:
    """What one run did.

    Attributes:
        status: `"finished"`, or `"unstable"` if the loss diverged; the run ended there.
        reason: Why it is unstable.
        evaluation_points: Steps after which the validation loss was measured.
        validation_loss: At each of those points.
        training_loss: Of each step's batch, before that step.
        metrics: At the end, or None.
        gradient_norm: Norm of the gradient of all trainable parameters in the first step, before clipping.
        data_order: Hash of all batches in the order they were trained on.
        seconds: Wall time of the steps.
        evaluation_seconds: Wall time of the first evaluation.
    """

    status: str = "finished"
    reason: str | None = None
    evaluation_points: list[int] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    training_loss: list[float] = field(default_factory=list)
    metrics: dict[str, float] | None = None
    gradient_norm: float | None = None
    data_order: str = ""
    seconds: float = 0.0
    evaluation_seconds: float = 0.0


def train(
    model: nn.Module,
    task: Task,
    order: Sequence[Sequence[Item]],
    *,
    learning_rate: float,
    warmup: float,
    evaluation_points: Sequence[int],
    seed: int,
    on_step: Callable[[TrainingRun], None] = lambda run: None,
) -> TrainingRun:
    """Train with AdamW, linear warm-up and a cosine to zero, in the given order of batches.

    No weight decay; gradients are clipped to norm 1, as transformers' Trainer does. The random state (the base model's
    own dropout) starts from the seed, so a run depends on its arguments and the number of threads only.

    A run is unstable, and ends, when a loss or gradient is not finite, or when the validation loss or the mean of the
    last five training losses is above twice the validation loss at step 0 plus 0.5.

    Args:
        model: Trained in place.
        task: Says what the loss is and has the validation examples.
        order: Batches, one a step.
        learning_rate: At the end of the warm-up.
        warmup: Share of the steps.
        evaluation_points: Steps after which to evaluate, rising, the first 0 and the last the number of batches.
        seed: Seed of the random state.
        on_step: Called after each step with what the run has done so far.
    """
    torch.manual_seed(seed)
    run, digest = TrainingRun(), hashlib.sha256()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    device = parameters[0].device
    model.train()
    started = time.perf_counter()
    _evaluate(run, model, task, 0, last=False)
    run.evaluation_seconds = time.perf_counter() - started
    limit = _FAR * run.validation_loss[0] + _SLACK
    for step, items in enumerate(order):
        if _unstable(run, limit):
            break
        started = time.perf_counter()
        batch = task.batch(items)
        for tensor in batch.values():
            digest.update(tensor.numpy().tobytes())
        factor = schedule(step, len(order), warmup)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        norm = _step(model, task, {name: tensor.to(device) for name, tensor in batch.items()}, optimizer, run)
        run.gradient_norm = norm if run.gradient_norm is None else run.gradient_norm
        run.seconds += time.perf_counter() - started
        on_step(run)
        if step + 1 in evaluation_points and run.reason is None:
            _evaluate(run, model, task, step + 1, last=step + 1 == len(order))
    run.status = "unstable" if _unstable(run, limit) else "finished"
    run.data_order = digest.hexdigest()[:32]
    return run


def schedule(step: int, steps: int, warmup: float) -> float:
    """Compute the factor on the learning rate in a step: a line up, then a cosine down to zero.

    Example:
        >>> [round(schedule(step, 8, 0.25), 2) for step in range(8)]
        [0.5, 1.0, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07]
    """
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / (steps - warm)))


def _step(
    model: nn.Module, task: Task, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, run: TrainingRun
) -> float:
    """Take one step, unless its loss or gradient is not finite, and return the norm of the gradient."""
    optimizer.zero_grad(set_to_none=True)
    loss = training_loss(model, task, batch)
    run.training_loss.append(float(loss.detach()))
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, _CLIP))
    if math.isfinite(run.training_loss[-1]) and math.isfinite(norm):
        optimizer.step()
    else:
        run.reason = f"loss {run.training_loss[-1]:.3g}, gradient {norm:.3g} in step {len(run.training_loss)}"
    return norm


def _evaluate(run: TrainingRun, model: nn.Module, task: Task, step: int, last: bool) -> None:
    score: Score = evaluate(model, task, with_metrics=last)
    run.evaluation_points.append(step)
    run.validation_loss.append(score.loss)
    run.metrics = score.metrics


def _unstable(run: TrainingRun, limit: float) -> bool:
    if run.reason is None:
        recent = run.training_loss[-_WINDOW:]
        mean = statistics.fmean(recent) if len(recent) == _WINDOW else 0.0
        for name, value in (("validation loss", run.validation_loss[-1]), ("training loss", mean)):
            if not value <= limit:  # NaN, too
                run.reason = (
                    f"{name} {value:.3g} after step {len(run.training_loss)}, {run.validation_loss[0]:.3g} at 0"
                )
    return run.reason is not None
