"""How far a long command is: a line for each part that ended, and the time that the rest may take; in a log, too."""

from __future__ import annotations

import time
from collections.abc import Callable

Say = Callable[[str], None]  # receives lines about the progress


class Progress:
    """Work of so many parts, of which some have ended."""

    def __init__(self, parts: float, say: Say) -> None:
        self._parts, self._done, self._say, self._began = parts, 0.0, say, time.monotonic()

    def ended(self, text: str, parts: float = 1.0) -> None:
        """Count parts that ended, and print the line about them."""
        self._done += parts
        # The mean over all parts so far, since single ones differ.
        each = (time.monotonic() - self._began) / self._done
        self._say(text + time_left((self._parts - self._done) * each))


def time_left(seconds: float) -> str:
    """Write the end of a line about a part that ended; empty after the last one."""
    return f"; about {duration(seconds)} left" if seconds > 0 else ""


def duration(seconds: float) -> str:
    """Write a time to about two digits.

    Example:
        >>> duration(7.4), duration(150), duration(5400)
        ('7 s', '2.5 min', '1.5 h')
    """
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.2g} {unit}"
    return f"{max(seconds, 1.0):.0f} s"
