"""The file from which an interrupted pass goes on."""

from __future__ import annotations

import glob
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_init.collection.state import Collected
from lora_init.errors import LoraInitError
from lora_init.statistics.incremental_svd import IncrementalSVD
from lora_init.statistics.tensorfile import TensorFile, write_tensors

FORMAT = "lora_init.checkpoint"
FORMAT_VERSION = 2


class Checkpoint:
    """Write the state of a pass to a file now and then, and read it back.

    The file has everything that the rest of the pass depends on: all decompositions, what the stopping rule remembers,
    the grouping of the layers, and the hashes of the batches used. It is written in one piece; a crash leaves the file
    before or the file after.

    Args:
        path: The file.
        every: Seconds between two writings.
        resume: Go on from the file if it is there.
        asked: What has to be the same to go on, in words: setting to value.
    """

    def __init__(self, path: str | Path, every: float, resume: bool, asked: Mapping[str, Any]) -> None:
        self.path = Path(path).expanduser()
        self._every = every
        self._asked = dict(asked)
        self._resume = resume
        self._written = time.monotonic()

    def read(self, found: Collected, make: Callable[[str], IncrementalSVD], of: int = 1) -> list[list[str]]:
        """Bring `found` to where the file is.

        Args:
            found: Is changed; stays as it is if there is no file.
            make: Makes an empty decomposition for a group.
            of: The number of processes.

        Returns:
            Hashes of the batches that each process has used; empty lists if there is no file.

        Raises:
            LoraInitError: The file cannot be read, belongs to a pass with other data, model or settings, or is there
                although it was not said to go on from it.
        """
        unused: list[list[str]] = [[] for _ in range(of)]
        if not self.path.exists():
            return unused
        file = TensorFile(self.path, FORMAT, FORMAT_VERSION)
        try:
            begun, digests = file.header["asked"], file.header["batches"]
            if file.header["n_batches"] == 0:
                return unused  # there is nothing in it to lose or to go on from
            if not self._resume:
                raise LoraInitError(
                    f"{self.path} exists, from a pass that was interrupted after {file.header['n_batches']} batches. "
                    "Pass resume=True to go on from it, or delete it."
                )
            self._check(begun, len(digests), of)
            names = file.header["digests"]
            found.unpack(file.header, {name: file.tensor(name) for name in names}, make)
        except LoraInitError:  # a ValueError, too
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise file.changed(f"its header ({error})") from error
        return [list(used) for used in digests]

    def _check(self, begun: Mapping[str, Any], n_processes: int, of: int) -> None:
        remedy = "Name another file, or delete this one to begin again."
        for setting, ours in self._asked.items():
            theirs = begun.get(setting)
            if theirs != ours:
                raise LoraInitError(
                    f"{self.path} was begun with {setting} {_shown(theirs)}, this pass has {_shown(ours)}. {remedy}"
                )
        if n_processes != of:
            raise LoraInitError(
                f"{self.path} was begun by {n_processes} process{'es' * (n_processes > 1)}, this pass has {of}. "
                "Start as many as before, or delete the file to begin again."
            )

    def write(self, found: Collected, digests: Sequence[Sequence[str]]) -> None:
        """Write the state between two batches.

        Raises:
            LoraInitError: The file cannot be written.
        """
        header, tensors = found.pack()
        write_tensors(self.path, FORMAT, FORMAT_VERSION, {**header, "asked": self._asked, "batches": digests}, tensors)
        self._written = time.monotonic()

    def begin(self, found: Collected, digests: Sequence[Sequence[str]]) -> None:
        """Write the file before the first batch, so that a place that cannot be written is known before the work.

        Raises:
            LoraInitError: The file cannot be written.
        """
        # What processes that were killed while they wrote have left.
        for left in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.tmp"):
            with suppress(OSError):
                left.unlink()
        self.write(found, digests)

    def write_if_due(self, found: Collected, digests: Sequence[Sequence[str]]) -> None:
        """Write the file if its time has come. A failure is a warning: the pass itself has lost nothing."""
        if time.monotonic() - self._written < self._every:
            return
        try:
            self.write(found, digests)
        except LoraInitError as error:
            self._written = time.monotonic()
            warnings.warn(f"{error} The pass goes on without a new checkpoint.", stacklevel=2)


def _shown(value: Any) -> str:
    text = str(value)
    return repr(text if len(text) <= 80 else text[:77] + "...") if isinstance(value, str) else text
