"""What other packages bring by entry points: starts and policies. None is imported before it is used.

Importing this file imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from typing import Any

from lora_init.errors import LoraInitError, first_line, warn


@dataclass(frozen=True)
class Group:
    """A group of entry points."""

    name: str  # such as "lora_init.starts"
    kind: str  # what one is called in messages

    @cached_property
    def entries(self) -> dict[str, list[EntryPoint]]:
        """What is installed, by name."""
        entries: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=self.name):
            entries.setdefault(entry.name, []).append(entry)
        return entries

    @contextmanager
    def loading(self, name: str) -> Iterator[tuple[EntryPoint, str]]:
        """Yield the entry point of a name, and how messages call it; what fails in the block becomes one line.

        Raises:
            LoraInitError: Several packages have it, or the block failed.
        """
        # Which one is loaded would depend on the order of installation, so none is.
        entry, *others = self.entries[name]
        where = f"{self.kind} {name!r} of {package_of(entry)}"
        if others:
            raise LoraInitError(f"{where} is also in {', '.join(map(package_of, others))}. Uninstall all but one.")
        try:
            yield entry, where
        except (LoraInitError, KeyboardInterrupt):
            raise
        except BaseException as error:  # a module may call sys.exit
            raise LoraInitError(f"{where} cannot be imported: {type(error).__name__}: {first_line(error)}") from error

    def warn_of(self, name: str) -> None:
        """Warn about entry points of a name that lora_init has itself: they are not used."""
        for entry in self.entries.get(name, ()):
            # Ours win, so that what a name means does not depend on which packages are installed.
            warn(f"{self.kind} {name!r} of {package_of(entry)} is not used: this name is lora_init's own.")


def package_of(entry: EntryPoint) -> str:
    """Return name and version of the package that an entry point is in."""
    if entry.dist is None:
        return "an unknown package"
    return f"{entry.dist.name} {entry.dist.version}"


def check_takes(function: Any, where: str, *arguments: str) -> None:
    """Check that somebody's function can be called with these arguments, by position; name them if it cannot."""
    if not callable(function):
        raise LoraInitError(f"{where} is {function!r}, expected a function of ({', '.join(arguments)}).")
    try:
        taken = signature(function)
    except (TypeError, ValueError):  # some that are written in C do not say
        return
    try:
        taken.bind(*arguments)  # as a call would, without one: names stand for the values
    except TypeError as error:
        raise LoraInitError(f"{where} takes {taken}, and is called with ({', '.join(arguments)}).") from error
