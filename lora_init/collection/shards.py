"""The batches that this process reads: which of them, how many so far, and their hashes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from lora_init.errors import LoraInitError

_DIGITS = 16  # of a SHA-256; enough to tell batches apart, and a header of thousands of them stays small


class Shard:
    """Read batches in order and remember the hash of each.

    Args:
        batches: Any iterable; read once.
        seconds: Wall time spent on reading is added to its entry `data`.
        hashed: Whether to hash the batches. False costs nothing and leaves `digests` empty.

    Attributes:
        digests: Hashes of the batches that were taken.
        n_taken: How many were taken.
        ended: Whether the data has ended.
    """

    def __init__(self, batches: Iterable[Any], seconds: dict[str, float], hashed: bool) -> None:
        self._stream: Iterator[Any] = iter(batches)
        self._seconds = seconds
        self._hashed = hashed
        self.digests: list[str] = []
        self.n_taken = 0
        self.ended = False

    def take(self, n: int) -> list[Any]:
        """Read the next `n` batches, fewer where the data ends."""
        start = time.perf_counter()
        try:
            taken = []
            for _ in range(n):
                try:
                    batch = next(self._stream)
                except StopIteration:
                    self.ended = True
                    break
                taken.append(batch)
                self.n_taken += 1
                if self._hashed:
                    self.digests.append(batch_digest(batch))
            return taken
        finally:
            self._seconds["data"] += time.perf_counter() - start

    def skip(self, digests: Sequence[str], origin: str) -> None:
        """Read the batches that an earlier pass has used and check that they are the same.

        Args:
            digests: Their hashes.
            origin: Where the hashes come from, for the message.

        Raises:
            LoraInitError: A batch is another one, or the data ends before.
        """
        remedy = "Pass the same data in the same order, or delete that file to begin again."
        for position, expected in enumerate(digests):
            if not self.take(1):
                raise LoraInitError(f"{origin} has used {len(digests)} batches, the data has {position}. {remedy}")
            if self.digests[-1] != expected:
                raise LoraInitError(f"batch {position} is not the one that {origin} has used in its place. {remedy}")


def length(batches: Iterable[Any]) -> int | None:
    """Count the batches without reading them; None where that cannot be known.

    Example:
        >>> length([1, 2]), length(iter([1, 2]))
        (2, None)
    """
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader has a length, but not over data that has none
        return None


def batch_digest(batch: Any) -> str:
    """Hash what a batch holds: tensors, arrays, numbers and strings, in mappings and sequences.

    Objects of other types count by the name of their type only.

    Example:
        >>> batch_digest({"x": torch.ones(2)}) == batch_digest({"x": torch.ones(2)})
        True
        >>> batch_digest({"x": torch.ones(2)}) == batch_digest({"x": torch.ones(2, 1)})
        False
    """
    digest = hashlib.sha256()
    for piece in _pieces(batch):
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()[:_DIGITS]


def _pieces(value: Any) -> Iterator[Any]:  # buffers
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield flat.view(torch.uint8).numpy().data
    elif hasattr(value, "__array_interface__"):
        yield from _pieces(torch.from_numpy(value)) if value.dtype.kind in "biuf" else (repr(value.tolist()).encode(),)
    elif isinstance(value, Mapping):
        for key in value:
            yield repr(key).encode()
            yield from _pieces(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)}".encode()
        for item in value:
            yield from _pieces(item)
    elif value is None or isinstance(value, (str, bytes, bool, int, float)):
        yield repr(value).encode()
    else:
        yield type(value).__name__.encode()
