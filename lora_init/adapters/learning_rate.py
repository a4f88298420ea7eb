"""The learning rate of an adapter, from one forward pass. Importing this file imports no torch.

Each of Adam's first steps moves every entry of B by about the learning rate, whatever the gradient is. In a layer with
output y = W x, scaling s and start A [r, d_in], a move of unit sign in B by eta changes y by eta s sum |(A x)_i|. A
moves as well, which adds eta^2 s c r sum |x_j| / 2, where c is fitted. The rate for 48 steps is the eta at which this
change, over the root mean square of W x, is C in the geometric mean over layers. How far A and B move grows with the
root of the number of steps, so the rate falls with it. Changes of layers add up like independent ones: where a share of
the model's linear layers has the adapter, the rate is higher by the root of one over the share. The r directions of a
layer add up only in part, so the change is divided by (r / 8)^(1/4), a fitted power. C and c were fitted on
SmolLM2-135M, see docs/learning-rates.md; muA (arXiv 2602.06204) derives how a rate scales with width and rank, without
the constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_init.errors import LoraInitError, is_number

if TYPE_CHECKING:
    from lora_init.statistics.statistics import Sizes

OPTIMIZER, WARMUP, SCHEDULE, BATCH_SIZE = "AdamW", 0.1, "cosine", 8
# Fitted at 48 steps of 8 examples on SmolLM2-135M: what the change is at the best rate, and the growth of A.
CHANGE, GROWTH = 0.0058, 2.5
RANK, OVERLAP = 8, 0.25  # at which both were fitted; directions of another number add up only in part
# A new head, which begins at random, wants a larger change.
STEPS, NEW_HEAD = 48, 4.8
WITHIN = 2.0  # the factor within which 63 of 65 best rates were
SHORTEST, LONGEST = 24, 400  # numbers of steps between which it was measured
SMALLEST = 2 / 7  # share of the linear layers at which it was measured; unfused experts can be hundreds of them
FAR = 3.0  # a rate this many times off costs more than a start gains
TRAINING = {"warmup": WARMUP, "schedule": SCHEDULE, "optimizer": OPTIMIZER}


def rate_text(rate: float) -> str:
    """Write a learning rate.

    Example:
        >>> rate_text(0.0003), rate_text(0.001)
        ('3e-4', '1e-3')
    """
    digits, exponent = f"{rate:.6e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


class Response(NamedTuple):
    """How far a step at rate eta moves a layer's output, relative to its size: eta * linear + eta^2 * quadratic."""

    linear: float  # by B
    quadratic: float  # by A and B together; 0 where A is frozen


def share_of(n_layers: int, n_linear: int) -> float:
    """Compute the share of a model's linear layers that have an adapter, as far down as was measured; 1 if unknown."""
    return min(1.0, max(SMALLEST, n_layers / n_linear)) if n_linear else 1.0


def response(size: Sizes, ax: float, rank: int, scaling: float, freeze_a: bool = False) -> Response | None:
    """Compute the response of a layer from the mean of sum |(A x)_i|; None if input or output is always zero."""
    if not (size.output > 0.0 and ax > 0.0):
        return None
    growth = 0.0 if freeze_a else GROWTH * rank * size.input / 2
    scaling *= (RANK / rank) ** OVERLAP
    return Response(scaling * ax / size.output, scaling * growth / size.output)


@dataclass(frozen=True)
class LearningRate:
    """A learning rate for AdamW, warm-up of 10 %, cosine to zero, batches of 4 to 32.

    Attributes:
        responses: For each layer, how far it moves.
        steps: Of the training.
        new_head: Whether a head is trained whole, beginning at random.
        left_out: Layers that say nothing: what they read or compute is zero throughout, or no hook sees it.
        why_steps: Where the number of steps comes from, in words; empty if it was given.
        share: Share of the linear layers that have the adapter, in the part of the model that holds it.

    Raises:
        LoraInitError: There is no layer, or steps is no number of at least 1.
    """

    responses: Mapping[str, Response]
    steps: int
    new_head: bool = False
    left_out: Sequence[str] = ()
    why_steps: str = ""
    share: float = 1.0

    def __post_init__(self) -> None:
        if not is_number(self.steps) or self.steps < 1:
            raise LoraInitError(f"steps={self.steps!r}, expected a number of training steps of at least 1.")
        if not self.responses:
            raise LoraInitError("no layer says how far it moves: inputs or outputs are zero throughout, or unknown.")

    @cached_property
    def rate(self) -> float:
        """The rate at which the geometric mean over layers of their change is what was best, to two digits."""
        best = CHANGE * (NEW_HEAD if self.new_head else 1.0)
        low, high = -40.0, 5.0  # bounds of its logarithm
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self._mean_log_change(middle) < math.log(best) else (low, middle)
        return float(f"{math.exp(low) * math.sqrt(STEPS / self.steps / self.share):.1e}")

    def _mean_log_change(self, log_rate: float) -> float:
        eta = math.exp(log_rate)
        changes = [eta * one.linear + eta * eta * one.quadratic for one in self.responses.values()]
        return sum(map(math.log, changes)) / len(changes)

    @property
    def range(self) -> tuple[float, float]:
        """A factor of two down and up, where most best rates were that the rule was judged by."""
        return float(f"{self.rate / WITHIN:.2g}"), float(f"{self.rate * WITHIN:.2g}")

    @property
    def layers(self) -> list[str]:
        """The layers, the one that moves most first."""

        def change(name: str) -> float:
            return self.responses[name].linear + self.rate * self.responses[name].quadratic

        return sorted(self.responses, key=change, reverse=True)

    @property
    def training(self) -> dict[str, Any]:
        """Learning rate, warm-up, schedule and optimizer, as a trainer is to be told."""
        return {"learning_rate": self.rate, **TRAINING}

    def stored(self) -> dict[str, Any]:
        """Lay out as plain values what `read` takes."""
        responses = {name: [float(f"{value:.4g}") for value in pair] for name, pair in self.responses.items()}
        return {
            "responses": responses, "steps": self.steps, "why_steps": self.why_steps, "new_head": self.new_head,
            "left_out": [*self.left_out], "share": self.share,
        }  # fmt: skip

    @classmethod
    def read(cls, stored: Mapping[str, Any], steps: int | None = None) -> LearningRate:
        """Make it of what `stored` returned, for another number of steps if one is given."""
        responses = {name: Response(*pair) for name, pair in stored["responses"].items()}
        changed = {} if steps is None else {"steps": steps, "why_steps": ""}
        return cls(**{**stored, "responses": responses, **changed})

    def __str__(self) -> str:
        low, high = map(rate_text, self.range)
        is_measured = SHORTEST <= self.steps <= LONGEST
        beyond = "" if is_measured else f"extrapolated: measured from {SHORTEST} to {LONGEST}"
        asides = "; ".join(filter(None, [self.why_steps, beyond]))
        steps = f"{self.steps} steps" + (f" ({asides})" if asides else "")
        return (
            f"Train with {OPTIMIZER} at {rate_text(self.rate)}, warm-up {WARMUP:.0%}, {SCHEDULE}, for {steps}. "
            f"The best rate is likely between {low} and {high}."
        )

    def far_off(self, settings: Any) -> list[str]:
        """Compare with a trainer's arguments: a line if its rate is more than three times off, or is not AdamW's."""
        optimizer = str(getattr(settings.optim, "value", settings.optim))
        if "adamw" not in optimizer:
            return [f"the learning rate was measured for AdamW, and the trainer has optim={optimizer!r}: tune it."]
        if self.rate / FAR < settings.learning_rate < self.rate * FAR:
            return []
        return [
            f"learning_rate is {rate_text(settings.learning_rate)} in the trainer's args, and the forward pass says "
            f"{rate_text(self.rate)} for {self.steps} steps. Set that, or pass initialize() learning_rate='measured'."
        ]


def training_in_words(rate: LearningRate | None, asked: float | None = None) -> str:
    """Return in a line what to train an adapter with: the rate that was asked for, or the one that the rule gives."""
    if asked is not None:
        return f"Train with {OPTIMIZER} at {rate_text(asked)}, warm-up {WARMUP:.0%}, {SCHEDULE}, as you asked for it."
    if rate is None:
        return "The learning rate is unknown: its statistics have no sizes of layers. `lora-init rate` measures it."
    return str(rate)


def one_epoch(settings: Mapping[str, Any]) -> tuple[int, str]:
    """Return how many steps an epoch takes, by what `load_batches` says of the data, and that in words."""
    rows = settings.get("rows")
    if not isinstance(rows, int) or rows < 1:
        return 100, "assumed; say how many yours has"
    return math.ceil(rows / BATCH_SIZE), f"an epoch of {rows:,} examples in batches of {BATCH_SIZE}"
