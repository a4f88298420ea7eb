"""What is recommended where nothing was asked for: the start of a task, and what to train with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_init.adapters.starts import DEFAULT, DEFAULT_FOR_CLASSES, Start

OPTIMIZER, WARMUP, SCHEDULE = "AdamW", 0.1, "cosine"
MEASURED = "measured on SmolLM2-135M and MiniLM-L6, see docs/practice.md"
_FAR = 3.0  # the random start at its usual size ends 7 to 9 % higher where its rate is a fifth of the best


def default_start(classifies: bool) -> str:
    """Return the name of the start to take where none was asked for."""
    return DEFAULT_FOR_CLASSES if classifies else DEFAULT


def rate_text(rate: float) -> str:
    """Write a learning rate.

    Example:
        >>> rate_text(0.0003), rate_text(0.001)
        ('3e-4', '1e-3')
    """
    digits, exponent = f"{rate:.6e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


@dataclass(frozen=True)
class Fit:
    """How an adapter compares with what was measured of its start."""

    start: Start
    rank: int  # on average
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    freeze_a: bool = False
    learning_rate: float | None = None  # to be trained with; None for what was measured

    @property
    def beyond(self) -> str:
        """What the adapter has that was not measured, in words; empty if nothing."""
        return "with DoRA" if self.use_dora else "with a frozen A" if self.freeze_a else ""

    @property
    def best_alpha(self) -> float:
        """The lora_alpha that was measured, at this rank."""
        return self.start.lora_alpha(self.rank, self.use_rslora)

    @property
    def is_measured(self) -> bool:
        """Whether a learning rate was measured for this start, whatever the scaling."""
        return self.start.learning_rate is not None and not self.beyond

    @property
    def recommended(self) -> dict[str, Any] | None:
        """Learning rate, warm-up, schedule and optimizer; None if none were measured for such an adapter."""
        rate = self.learning_rate
        if rate is None:
            if not self.is_measured or _is_far(self.lora_alpha, self.best_alpha):
                return None
            rate = self.start.learning_rate
        return {"learning_rate": rate, "warmup": WARMUP, "schedule": SCHEDULE, "optimizer": OPTIMIZER}

    def how_to_train(self) -> str:
        """Return in one line what to train the adapter with."""
        rate = rate_text(self.learning_rate or self.start.learning_rate or 0.0)
        if self.learning_rate is not None:
            return f"Train with {OPTIMIZER} at {rate}, warm-up {WARMUP:.0%}, {SCHEDULE}, as you asked for it."
        if self.recommended:
            tenth = rate_text((self.start.learning_rate or 0.0) / 10)  # which Gemma 3 270M wanted
            return (
                f"Train with {OPTIMIZER} at {rate}, warm-up {WARMUP:.0%}, {SCHEDULE}; {MEASURED}. On another model try "
                f"{tenth}, too."
            )
        if self.is_measured:
            why = f"{rate} was measured with lora_alpha={self.best_alpha:g}, and this is {self.lora_alpha:g}"
        else:
            why = f"none was measured {self.beyond or f'for method {self.start.name!r}'}"
        return f"Tune the learning rate with `lora-init compare`: {why}."

    def far_off(self, settings: Any) -> list[str]:
        """List settings of the adapter or of a trainer's `args` that are far from those measured, with their fix."""
        rate = self.start.learning_rate
        if rate is None or self.beyond:
            return []
        optimizer = "adamw" if settings is None else str(getattr(settings.optim, "value", settings.optim))
        if not optimizer.startswith("adamw"):
            return [f"no learning rate was measured for method {self.start.name!r} with optim={optimizer!r}."]
        changes = []
        if _is_far(self.lora_alpha, self.best_alpha):
            changes.append(f"lora_alpha is {self.lora_alpha:g}: make it {self.best_alpha:g} in the LoraConfig")
        if settings is not None and _is_far(settings.learning_rate, rate):
            given = rate_text(settings.learning_rate)
            changes.append(f"learning_rate is {given}: make it {rate_text(rate)} in the trainer's args")
        return [f"{', and '.join(changes)}. That is what was {MEASURED}."] if changes else []


def _is_far(value: float, measured: float) -> bool:
    return not measured / _FAR * 1.001 < value < measured * _FAR * 0.999  # three times is far, however it is rounded
