"""How far a comparison is: a bar over the steps of all runs, a line for each run that ended, and an estimate."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from tqdm.auto import tqdm

# Steps of the first run after which its time is extrapolated.
_STEPS_TO_ESTIMATE = 3


class Progress:
    """Follows a comparison. Use it as a context manager around the runs.

    Args:
        steps: Steps of each run.
        say: Receives the lines.
        show: Show the bar; by default only on a terminal.
    """

    def __init__(self, steps: int, say: Callable[[str], None], show: bool | None = None) -> None:
        self._steps = steps
        self._say = say
        self._show = sys.stderr.isatty() if show is None else show
        self._bar: tqdm[Any] | None = None
        self._done_steps, self._estimated = 0, False
        self._planned = self._left = 0
        self._title = ""

    def __enter__(self) -> Progress:
        self._bar = tqdm(unit="step", disable=not self._show, dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, title: str, planned: int, left: int) -> None:
        """Say which run begins, how many there are in all and how many are left with it."""
        self._planned, self._left, self._done_steps, self._title = planned, left, 0, title
        if self._bar is not None:
            self._bar.set_description(f"run {planned - left + 1}/{planned} {title}", refresh=False)
            self._bar.total = self._bar.n + left * self._steps
            self._bar.refresh()

    def step(self, expected_seconds: float) -> None:
        """Count a step. After the first few, the whole time is estimated and said."""
        self._done_steps += 1
        if self._bar is not None:
            self._bar.update()
        if not self._estimated and self._done_steps == min(_STEPS_TO_ESTIMATE, self._steps):
            self._estimated = True
            self._line(f"{self._left} of {self._planned} runs left, about {duration(expected_seconds * self._left)}")

    def end(self, record: Mapping[str, Any]) -> None:
        """Say how a run ended."""
        if self._bar is not None:
            self._bar.update(self._steps - self._done_steps)
        number = self._planned - self._left + 1
        losses = record["validation_loss"] or []
        how = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}" if record["status"] == "finished" else record["error"]
        self._line(
            f"run {number}/{self._planned} {self._title}: {record['status']}, {how}, {record['run_seconds']:.0f} s"
        )

    def _line(self, text: str) -> None:
        if self._show:
            tqdm.write(text, file=sys.stderr)
        else:
            self._say(text)


def duration(seconds: float) -> str:
    """Say a time as people do.

    Example:
        >>> duration(42), duration(600), duration(9000)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
