"""How long a training is: steps, examples in a step, how often it sees each. Importing this file imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lora_init.errors import LoraInitError, check_number, is_number

BATCH_SIZE = 8  # examples in a step, where nothing is said
_ASSUMED = 100  # steps, where nothing is known
_MOST_EPOCHS = 10_000


@dataclass(frozen=True)
class TrainingLength:
    """How long a training is.

    Attributes:
        steps: Steps of the optimizer.
        batch_size: Examples in a step, of all processes and of all batches that are accumulated.
        rows: Number of different examples; None if it is unknown, as of a stream: then none repeats.
        why: Where the number of steps comes from, in words; empty if it was given.
        seen: How often an example of a step is seen in all, in the mean, where steps and rows do not tell it; else 0.

    Raises:
        LoraInitError: One of these is no number of at least 1, or a step has more examples than there are.
    """

    steps: int
    batch_size: int = BATCH_SIZE
    rows: int | None = None
    why: str = ""
    seen: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, float) and value.is_integer():  # as 1e3 is in a file of settings
                object.__setattr__(self, name, int(value))
        check_number("steps", self.steps, 1, whole=True)
        check_number("train_batch_size", self.batch_size, 1, whole=True)
        # The default is not refused for few rows: nobody asked for it.
        if self.rows is not None and self.batch_size > max(self.rows, BATCH_SIZE):
            raise LoraInitError(
                f"{{train_batch_size}}, and there are {self.rows} examples. Take fewer, or more data.",
                train_batch_size=self.batch_size,
            )

    @classmethod
    def plan(
        cls, rows: int | None, steps: int | None = None, epochs: float | None = None, batch_size: int = BATCH_SIZE
    ) -> TrainingLength:
        """Complete what is known: steps from epochs and rows; without either one epoch, or 100 steps of a stream.

        Example:
            >>> print(TrainingLength.plan(1000, epochs=3))
            375 steps of 8 (3 epochs of 1,000 examples in batches of 8)

        Raises:
            LoraInitError: Steps and epochs contradict, or there are epochs of a stream.
        """
        if epochs is not None and (not is_number(epochs) or not 0 < epochs <= _MOST_EPOCHS):
            raise LoraInitError(f"{{epochs}}, expected a number above 0, {_MOST_EPOCHS:,} at most.", epochs=epochs)
        if rows is None and steps is None and epochs is not None:
            raise LoraInitError(
                "{epochs}: the number of examples is unknown, as of a stream. Say {steps}, or both.",
                epochs=epochs, steps=...,
            )  # fmt: skip
        if rows is None:
            return cls._of_stream(steps, epochs, batch_size)
        # It checks the numbers, also where the steps are still to be computed.
        length = cls(_ASSUMED if steps is None else steps, batch_size, rows)
        if steps is not None and epochs is None:
            return length
        times = 1.0 if epochs is None else epochs
        expected = max(1, math.ceil(times * length.steps_an_epoch))
        if steps is None:
            number = f"{times:g} epochs"
            if times == 1.0:
                number = "an epoch"
            return cls(expected, batch_size, rows, f"{number} of {rows:,} examples in batches of {batch_size}")
        return length._held_against(times, expected)

    def _held_against(self, epochs: float, expected: int) -> TrainingLength:
        """Refuse steps that so many epochs do not have, and count how often each example is seen in them."""
        # They agree within a step for each epoch, whose last batch a trainer may drop.
        if abs(self.steps - expected) > max(1.0, epochs):
            raise LoraInitError(
                f"{{steps}} and {{epochs}} contradict: {epochs:g} epochs of {self.rows:,} examples in batches of "
                f"{self.batch_size} are {expected} steps. Leave one of them out.",
                steps=self.steps, epochs=epochs,
            )  # fmt: skip
        if self.rows and self.steps < expected:  # each epoch drops what fills no batch, so that all of them are full
            return replace(self, seen=self.steps * self.batch_size / self.rows)
        return self

    @classmethod
    def _of_stream(cls, steps: int | None, epochs: float | None, batch_size: int) -> TrainingLength:
        """Plan for data of which only the user knows how many examples they have: by steps and epochs, if both are."""
        if steps is None:
            return cls(_ASSUMED, batch_size, why="assumed; say how many yours has")
        length = cls(steps, batch_size)
        if epochs is None or epochs <= 1.0:
            return length  # no example repeats, so how many there are does not matter
        return replace(length, rows=max(1, round(steps * batch_size / epochs)))

    def changed(self, steps: int | None, epochs: float | None, batch_size: int | None) -> TrainingLength:
        """Return a training of another length on the same examples; other batches alone go as often through them."""
        if steps is None and epochs is None:
            if batch_size is None:
                return self
            if self.rows:
                epochs = self.steps / self.steps_an_epoch
            else:
                steps = self.steps
        other = TrainingLength.plan(self.rows, steps, epochs, batch_size or self.batch_size)
        # Twice as many examples are drawn, and each is seen twice as often.
        times = other.steps * other.batch_size / (self.steps * self.batch_size)
        return replace(other, seen=self.seen * times or other.seen)

    @property
    def steps_an_epoch(self) -> int:
        """Steps of an epoch, of which the last has the examples that are left; all steps if their number is unknown."""
        if not self.rows:
            return self.steps
        return math.ceil(self.rows / self.batch_size)

    @property
    def epochs(self) -> float:
        """How often an example is seen; 1 where none repeats, or their number is unknown."""
        return max(1.0, self.seen or self.steps / self.steps_an_epoch)

    def __str__(self) -> str:
        """Write it as a part of a sentence.

        Example:
            >>> print(TrainingLength(480, rows=900))
            480 steps of 8 (4.2 epochs of 900 examples)
        """
        text = f"{self.steps} steps of {self.batch_size}"
        if self.steps == 1:
            text = f"1 step of {self.batch_size}"
        if self.why:
            return f"{text} ({self.why})"
        if self.epochs < 1.05:  # written as 1.0
            return text
        if self.seen:
            return f"{text} (each drawn {self.epochs:.1f} times)"
        return f"{text} ({self.epochs:.1f} epochs of {self.rows:,} examples)"
