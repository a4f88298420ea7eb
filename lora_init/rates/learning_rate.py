"""The learning rate of an adapter, from one forward pass. Importing this file imports no torch.

Each of Adam's first steps moves every entry of B by about the learning rate, whatever the gradient is. In a layer with
output y = W x, scaling s and start A [r, d_in], a move of unit sign in B by eta changes y by eta s sum |(A x)_i|. A
moves as well, which adds eta^2 s c r sum |x_j| / 2, where c is fitted. The rate for 48 steps is the eta at which this
change, over the root mean square of W x, is C in the geometric mean over layers. Longer runs want a lower rate: a
little lower on examples that are all new, and much lower where the same examples come again; larger steps a little
higher one, see `factor`. Changes of
layers add up like independent ones: where a share of the model's linear layers has the adapter, the rate is higher by
the root of one over the share. The r directions of a layer add up only in part, so the change is divided by
(r / 8)^(1/4), a fitted power. C and c were fitted on SmolLM2-135M, see docs/learning-rates.md; muA (arXiv 2602.06204)
derives how a rate scales with width and rank, without the constant.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_init.errors import LoraInitError, warn
from lora_init.layers.grid import layers_in
from lora_init.rates.training_length import BATCH_SIZE, TrainingLength

if TYPE_CHECKING:
    from lora_init.statistics.spectrum import Sizes

OPTIMIZER, WARMUP, SCHEDULE = "AdamW", 0.1, "cosine"
SCHEDULES = (SCHEDULE, "linear")  # that rates were measured with, as transformers calls them
# Fitted at 48 steps of 8 examples on SmolLM2-135M: what the change is at the best rate, and the growth of A.
CHANGE, GROWTH = 0.0058, 2.5
RANK, OVERLAP = 8, 0.25  # at which both were fitted; directions of another number add up only in part
# A new head, which begins at random, wants a larger change.
STEPS, NEW_HEAD = 48, 4.8
# How the rate falls with the steps, by a power: on new examples, and for each further epoch; and how it rises with the
# examples in a step. See `factor`.
FALL, REPEATED, FALL_NEW_HEAD, RISE = 1 / 6, 1.2, 0.5, 1 / 3
# What is known of the logarithm of the best rate: its standard deviation around the rule where the rule was measured
# (65 sweeps), and how that grows for each factor of e in steps, epochs and batch size away from there: how far single
# sweeps put the powers from FALL, REPEATED and RISE.
SPREAD, SPREAD_STEPS, SPREAD_EPOCHS, SPREAD_BATCH = 0.35, 0.1, 0.25, 0.25
MEASURED_AT, MEASURED_AT_NEW_HEAD = (48, 1.0), (200, 3.0)  # steps and epochs of most of those sweeps
UNKNOWN = 4.0  # a range that reaches farther than by this factor says that the rate is not known
SHORTEST, LONGEST, LARGEST = 24, 1600, 128  # steps between which it was measured, and examples in a step
SMALLEST = 2 / 7  # share of the linear layers at which it was measured; unfused experts can be hundreds of them
FAR = 3.0  # a rate this many times off costs more than a start gains, where the best one is known that well
TRAINING = {"warmup": WARMUP, "schedule": SCHEDULE, "optimizer": OPTIMIZER}


def rate_text(rate: float) -> str:
    """Write a learning rate.

    Example:
        >>> rate_text(0.0003), rate_text(0.001)
        ('3e-4', '1e-3')
    """
    digits, exponent = f"{rate:.6e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def is_adamw(optimizer: str) -> bool:
    """Check, by the name of its setting or class, whether an optimizer is one that rates were measured for."""
    kinds = "(_?(torch|hf|apex|fused|xla|npu|anyprecision|bnb|4bit|8bit|32bit|fp8))*"  # which compute the same
    # The whole name: Adamax, for one, begins like it and is another.
    return re.fullmatch(f"(paged_?|anyprecision|fused)?adamw?{kinds}", optimizer.lower()) is not None


def check_measured(optimizer: str, is_plain_loss: bool, trainer: str, model: Any) -> None:
    """Refuse to set a rate where none was measured; warn of a model that reads no text, by its own loss."""
    if not is_adamw(optimizer):
        what = f"the optimizer {optimizer}"
    elif not is_plain_loss:
        what = f"the loss of {trainer}"
    else:
        if not reads_text(model):
            name = type(model).__name__
            warn(f"learning_rate='measured': rates were measured on models of text, and {name} reads none: tune it.")
        return
    raise LoraInitError(f"learning_rate='measured': no rate was measured for {what}. Leave it out, and tune it.")


def reads_text(model: Any) -> bool:
    """Return whether a model takes tokens, as those do that rates were measured for."""
    return "input_ids" in inspect.signature(type(model).forward).parameters


class Response(NamedTuple):
    """How far a step at rate eta moves a layer's output, relative to its size: eta * linear + eta^2 * quadratic."""

    linear: float  # by B
    quadratic: float  # by A and B together; 0 where A is frozen


def factor(length: TrainingLength, new_head: bool = False) -> float:
    """Compute the rate of a training of this length over that of 48 steps of 8, in which no example comes again.

    Where all examples were new, the rate of this law was 0.6 to 0.9 times the best at 48 steps and 0.7 to 0.9 times at
    480, on two families and two tasks, and 0.8 times at 1,600 (one sweep). Of 1,000 examples it is 0.9 and 1.1 times
    the best after three epochs, and 1.3 times after ten (one sweep), where a rate divided by the epochs themselves is
    2.1 times the best and ends 5 % above. At 48 steps of 32 it is 0.8 to 0.9 times the best, of 128 1.1 times (one
    sweep); without the power of the batch 0.4 to 0.6. Rates of a new head were measured from 100 to 400 steps of 8,
    about three epochs: they fell with the root of the steps.

    Example:
        >>> round(factor(TrainingLength(480)), 2), round(factor(TrainingLength(480, rows=900)), 2)
        (0.68, 0.12)
    """
    if new_head:
        # Its sweeps had steps of 8 and about three epochs: neither batch nor epochs were varied.
        return math.pow(STEPS / length.steps, FALL_NEW_HEAD)
    larger = math.pow(length.batch_size / BATCH_SIZE, RISE)
    return larger * math.pow(STEPS / length.steps, FALL) / math.pow(length.epochs, REPEATED)


def share_of(n_layers: int, n_linear: int) -> float:
    """Compute the share of a model's linear layers that have an adapter, as far down as was measured; 1 if unknown."""
    if not n_linear:
        return 1.0
    return min(1.0, max(SMALLEST, n_layers / n_linear))


def response(size: Sizes, ax: float, rank: int, scaling: float, freeze_a: bool = False) -> Response | None:
    """Compute the response of a layer from the mean of sum |(A x)_i|; None if input, output or scaling is zero."""
    # `> 0` also leaves out NaN, of sizes that are not known.
    if not (size.output > 0.0 and ax > 0.0 and scaling):
        return None
    # What A adds, without eta^2 s; `input` is the mean of sum |x_j|. See the law at the top of this file.
    growth = 0.0
    if not freeze_a:
        growth = GROWTH * rank * size.input / 2
    # A negative alpha moves a layer as far as a positive one.
    scaling = abs(scaling) * (RANK / rank) ** OVERLAP
    return Response(scaling * ax / size.output, scaling * growth / size.output)


@dataclass(frozen=True)
class LearningRate:
    """A learning rate for AdamW, warm-up of 10 %, cosine to zero.

    Attributes:
        responses: For each layer, how far it moves.
        length: Of the training: steps, examples in a step, and how many there are.
        new_head: Whether a head is trained whole, beginning at random.
        left_out: Layers that say nothing: what they read or compute is zero throughout, or no hook sees it.
        share: Share of the linear layers that have the adapter, in the part of the model that holds it.

    Raises:
        LoraInitError: There is no layer.
    """

    responses: Mapping[str, Response]
    length: TrainingLength
    new_head: bool = False
    left_out: Sequence[str] = ()
    share: float = 1.0

    def __post_init__(self) -> None:
        if not self.responses:
            raise LoraInitError("no layer says how far it moves: inputs or outputs are zero throughout, or unknown.")

    @cached_property
    def rate(self) -> float:
        """The rate at which the geometric mean over layers of their change is what was best, to two digits."""
        log_best = math.log(CHANGE * (NEW_HEAD if self.new_head else 1.0))
        # By bisection: the mean of logarithms of quadratic functions has no closed inverse, but it rises with the rate,
        # as no response is negative. 50 halvings leave far less than the two digits that are returned.
        low, high = -40.0, 5.0  # bounds of its logarithm
        for _ in range(50):
            middle = (low + high) / 2
            if self._mean_log_change(middle) < log_best:
                low = middle
            else:
                high = middle
        return float(f"{math.exp(low) * factor(self.length, self.new_head) / math.sqrt(self.share):.1e}")

    @property
    def steps(self) -> int:
        """Steps of the training."""
        return self.length.steps

    def _mean_log_change(self, log_rate: float) -> float:
        """Return the logarithm of the geometric mean over layers of their change at a rate."""
        eta = math.exp(log_rate)
        logs, n_layers = [], 0
        for name, of_layer in self.responses.items():
            change = eta * of_layer.linear + eta * eta * of_layer.quadratic
            n = layers_in(name)  # fused experts hold gate and up projection in one, and count as two
            logs.append(n * math.log(change))
            n_layers += n
        return sum(logs) / n_layers

    def of_steps(self, steps: int) -> LearningRate:
        """Return the rate for another number of steps on the same data."""
        return replace(self, length=self.length.changed(steps, None, None))

    @property
    def within(self) -> float:
        """The factor within which the best rate is with a probability of 95 %, by the spread around the rule."""
        steps, epochs = MEASURED_AT_NEW_HEAD if self.new_head else MEASURED_AT
        # The deviations are taken as independent, so that their squares add up; two in sum hold 95 %.
        away = math.hypot(
            SPREAD,
            SPREAD_STEPS * math.log(self.length.steps / steps),
            SPREAD_EPOCHS * math.log(self.length.epochs / epochs),
            SPREAD_BATCH * math.log(self.length.batch_size / BATCH_SIZE),
        )
        return math.exp(2.0 * away)

    @property
    def range(self) -> tuple[float, float]:
        """From where to where the best rate likely is: a factor of `within` down and up."""
        return self._around(self.within)

    def _around(self, apart: float) -> tuple[float, float]:
        return float(f"{self.rate / apart:.2g}"), float(f"{self.rate * apart:.2g}")

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
        responses = {}
        for name, pair in self.responses.items():
            responses[name] = [float(f"{value:.4g}") for value in pair]
        return {
            "responses": responses, **asdict(self.length), "new_head": self.new_head, "left_out": [*self.left_out],
            "share": self.share,
        }  # fmt: skip

    @classmethod
    def read(
        cls, stored: Mapping[str, Any], steps: int | None = None, epochs: float | None = None,
        train_batch_size: int | None = None,
    ) -> LearningRate:  # fmt: skip
        """Make it of what `stored` returned, for a training of another length if one is given."""
        responses = {name: Response(*pair) for name, pair in stored["responses"].items()}
        batch_size, rows = stored.get("batch_size", BATCH_SIZE), stored.get("rows")  # older records have neither
        # So may all that has a default: it is left to that.
        length = TrainingLength(stored["steps"], batch_size, rows, stored.get("why", ""), stored.get("seen", 0.0))
        others = {name: stored[name] for name in ("new_head", "left_out", "share") if name in stored}
        return cls(responses, length.changed(steps, epochs, train_batch_size), **others)

    def __str__(self) -> str:
        low, high = map(rate_text, self.range)
        what = f"{OPTIMIZER} at {rate_text(self.rate)}, warm-up {WARMUP:.0%}, {SCHEDULE}, for {self.length}"
        if self.within <= UNKNOWN:
            return f"Train with {what}. The best rate is likely between {low} and {high}{self._extrapolated}."
        # No rate of the range is farther from the nearer of these two than by the root of `within`.
        lower, higher = map(rate_text, self._around(math.sqrt(self.within)))
        return (
            f"Train with {what}. The best rate is not known for such a training, and likely between {low} and {high}: "
            f"try {lower} and {higher}{self._extrapolated}."
        )

    @property
    def _extrapolated(self) -> str:
        """What was measured, if this training lies outside of it, in words."""
        measured = []
        if not SHORTEST <= self.steps <= LONGEST:
            measured.append(f"{SHORTEST} to {LONGEST} steps")
        if self.length.batch_size > LARGEST:
            measured.append(f"steps of at most {LARGEST} examples")
        if not measured:
            return ""
        return f" (extrapolated: measured were {' and '.join(measured)})"

    def far_off(self, learning_rate: float | None, optimizer: str, schedule: str) -> list[str]:
        """Compare with what a trainer has: a line where nothing was measured, and for a rate beyond three times."""
        if not is_adamw(optimizer):
            return [f"the learning rate was measured for AdamW, and not for the optimizer {optimizer}: tune it."]
        lines = []
        if schedule not in SCHEDULES:
            known = " and ".join(SCHEDULES)
            lines.append(f"the learning rate was measured with the schedule {known}, and not with {schedule}: tune it.")
        # A rate that is not known better than that cannot be called wrong.
        far = max(FAR, self.within)
        if learning_rate is not None and not self.rate / far < learning_rate < self.rate * far:
            lines.append(
                f"learning_rate is {rate_text(learning_rate)} in the trainer, and the forward pass "
                f"says {rate_text(self.rate)} for {self.length}. Set that, or pass initialize() "
                "learning_rate='measured'."
            )
        return lines


def made_by_torch(scheduler: Any) -> Any:
    """Return the scheduler itself, which accelerate's holds."""
    return getattr(scheduler, "scheduler", scheduler)


def shares_of(scheduler: Any) -> Sequence[Any]:
    """Return the functions of a `LambdaLR`, from a step to the share of the rate that it began with; none of others."""
    from torch.optim.lr_scheduler import MultiplicativeLR  # whose functions give factors from one step to the next

    functions: Sequence[Any] = getattr(scheduler, "lr_lambdas", ())
    return () if isinstance(scheduler, MultiplicativeLR) else functions


def schedule_of(settings: Any, scheduler: Any = None, steps: int = 0) -> str:
    """Name the schedule of a trainer's arguments, with its own settings; another that was made by what it does.

    A warm-up of more than half of the steps is named, too.
    """
    # By its value: transformers has an enumeration, and a tool may have put a text there.
    name = str(getattr(settings.lr_scheduler_type, "value", settings.lr_scheduler_type))
    given, warmup = settings.lr_scheduler_kwargs or {}, settings.get_warmup_steps(steps)
    own_settings = [f"{key}={value}" for key, value in given.items()]
    if scheduler is None and warmup > max(1, steps / 2):
        own_settings.append(f"a warm-up of {warmup} of {steps} steps")
    if own_settings:
        return f"{name} ({', '.join(own_settings)})"
    made = made_by_torch(scheduler)
    if made is None or name not in SCHEDULES:
        return name
    # A trainer's own method may have made another one than its arguments name.
    return next((curve for curve in SCHEDULES if _is_curve(made, curve, steps)), type(made).__name__)


def _is_curve(scheduler: Any, name: str, steps: int) -> bool:
    """Check whether factors of a `LambdaLR` fall along a curve from their highest, which is 1, to 0 after `steps`."""
    functions = shares_of(scheduler)
    for function in functions:
        factors = [function(step) for step in range(steps + 1)]
        highest = factors.index(max(factors))  # the end of the warm-up
        if highest > max(1, steps / 2):
            return False
        for step in range(highest, steps + 1):
            share = (step - highest) / max(1, steps - highest)
            expected = 1 - share
            if name == SCHEDULE:
                expected = (1 + math.cos(math.pi * share)) / 2
            if not abs(factors[step] - expected) <= 0.01:  # nor where it is NaN
                return False
    return steps > 0 and bool(functions)


def training_in_words(rate: LearningRate | None, asked: float | None = None) -> str:
    """Return in a line what to train an adapter with: the rate that was asked for, or the one that the rule gives."""
    if asked is not None:
        return f"Train with {OPTIMIZER} at {rate_text(asked)}, warm-up {WARMUP:.0%}, {SCHEDULE}, as you asked for it."
    if rate is None:
        return "The learning rate is unknown: its statistics have no sizes of layers. `lora-init rate` measures it."
    return str(rate)
