"""Several processes make one pass together: whose batches are whose, when all stop, and one result for all.

Everything goes through the collectives of `torch.distributed`. A process that raises says so itself, and what has
launched the processes ends the others; one that is killed or hangs ends the others after the timeout of the process
group.
"""

from __future__ import annotations

import hashlib
import io
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from lora_init.errors import LoraInitError, first_line


class Mergeable(Protocol):
    """What processes can find together."""

    def merge(self, other: Any) -> None:
        """Take in what another process has found."""


Found = TypeVar("Found", bound=Mergeable)


class Processes:
    """All processes of the default process group of `torch.distributed`, or this one alone where there is none.

    A context manager. Inside it all processes call the same methods in the same order. Tensors travel on the CPU, by
    gloo: by the default group if that is its backend, else by a group of its own.

    Since the others rely on each, Ctrl-C (and any signal that Python treats so) is only noted, and raised when the
    context ends. `alone` takes no notice of a process group.
    """

    def __init__(self, alone: bool = False) -> None:
        grouped = not alone and torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if grouped else 0
        self.size = torch.distributed.get_world_size() if grouped else 1
        self.interrupted = False
        self._group: Any = None
        self._raises = False
        self._signals: list[int] = []

    def __enter__(self) -> Processes:
        if self.size > 1 and torch.distributed.get_backend() != "gloo":
            with self._named_errors():
                self._group = torch.distributed.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGINT, signal.SIGTERM)
            self._signals = [one for one in signals if signal.getsignal(one) is signal.default_int_handler]
            for one in self._signals:
                signal.signal(one, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for one in self._signals:
            signal.signal(one, signal.default_int_handler)
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)
            self._group = None
        if self.interrupted and kind is None:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: Any) -> None:
        self.interrupted = True
        if self._raises:
            raise KeyboardInterrupt

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let Ctrl-C end the block at once: nobody waits for what it does."""
        self._raises = True
        try:
            if self.interrupted:
                raise KeyboardInterrupt
            yield
        finally:
            self._raises = False

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise LoraInitError(
                f"rank {self.rank} waited for {self.size - 1} other process{'es' * (self.size > 2)}, of which one has "
                f"ended or did not answer: {first_line(error)} What the others printed says why."
            ) from error

    def sum(self, *numbers: int) -> list[int]:
        """Add numbers up over all processes."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor([int(number) for number in numbers])  # booleans would be combined by "or"
        with self._named_errors():
            torch.distributed.all_reduce(total, group=self._group)
        return [int(number) for number in total]

    def gather(self, value: Any) -> list[Any]:
        """Give all processes the values of all, by rank."""
        values = [value] * self.size
        if self.size > 1:
            with self._named_errors():
                torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def check_alike(self, asked: Mapping[str, Any]) -> None:
        """Refuse, in all processes, to go on if they were given different things; say what differs and where."""
        everywhere = self.gather(dict(asked))
        for rank, theirs in enumerate(everywhere):
            for setting, first in everywhere[0].items():
                if theirs.get(setting) != first:
                    raise LoraInitError(
                        f"rank {rank} has {setting} {theirs.get(setting)!r}, rank 0 has {first!r}. "
                        "Give all processes the same model and arguments."
                    )

    def merge(self, found: Found) -> Found:
        """Give all processes what all have found: that of two neighbours, then of two such pairs, and so on.

        What this process has found is not changed.
        """
        if self.size == 1:
            return found
        whole, step = from_bytes(to_bytes(found)), 1
        with self._named_errors():
            while step < self.size and self.rank % step == 0:
                if self.rank % (2 * step):
                    torch.distributed.send_object_list([to_bytes(whole)], self.rank - step, group=self._group)
                elif self.rank + step < self.size:
                    received: list[Any] = [None]
                    torch.distributed.recv_object_list(received, self.rank + step, group=self._group)
                    whole.merge(from_bytes(received[0]))
                step *= 2
        content = to_bytes(whole) if self.rank == 0 else None
        shared: Found = from_bytes(self.share(content))
        return shared  # rank 0 reads the bytes, too: all do the same

    def share(self, value: Any, source: int = 0) -> Any:
        """Give all processes what the process of rank `source` has; no tensors but those on the CPU."""
        values = [value]
        if self.size > 1:
            with self._named_errors():
                torch.distributed.broadcast_object_list(values, source, group=self._group)
        return values[0]


def to_bytes(found: Mergeable) -> bytes:
    """Write what a pass has found as bytes, for `from_bytes`."""
    buffer = io.BytesIO()
    torch.save(found, buffer)
    return buffer.getvalue()


def from_bytes(content: bytes) -> Any:
    """Read what `to_bytes` wrote, here or in another process: onto the CPU, since a GPU may be another's."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)


class Part(Iterator[Any]):
    """Items start, start + step, ... of an iterator. Unlike `islice`, it goes on after an item that cannot be read.

    Attributes:
        error: Why the item before could not be read, this process's or not; None if it could. If that is the last, it
            may have been the end of the iterator, as of a generator, and nobody knows what else it had.
    """

    def __init__(self, items: Iterator[Any], start: int, step: int) -> None:
        self.error: Exception | None = None
        self._items, self._before, self._step = items, start, step

    def __next__(self) -> Any:
        before, self._before = self._before, self._step - 1
        for i in range(before + 1):
            try:
                item, self.error = next(self._items), None
            except StopIteration:
                raise
            except Exception as error:
                self.error = error
                if i == before:
                    raise
        return item


class Shard(NamedTuple):
    """The batches of one process."""

    batches: Part  # those that are still to be read
    spare: Any  # one to run a sharded model on when there is none left; None if no process has a batch
    first: str  # hash of the first one of rank 0, empty if there is none: another one means other data
    common: bool  # all processes have the same loader and each reads its part of it
    start: int = 0  # where in the data the first batch of this process is
    step: int = 1  # and how far from each of its batches to the next

    def position(self, n: int) -> int:
        """Say where in the data batch `n` of this process is, both from 0."""
        return self.start + n * self.step


def own_batches(processes: Processes, batches: Iterable[Any], used: Sequence[int], in_step: bool) -> Shard:
    """Open the batches that are this process's, past those that an earlier pass has used.

    A loader that gives each process its own is read as it is. One that gives all of them the same, which the hash of
    the first batch tells, is read as one data set: the process of rank r takes batches r, r + size, and so on. `used`
    has a number for each process of the earlier pass, or one for all of a loader that they had in common. Processes
    that run a sharded model together (`in_step`) get a spare batch.
    """
    if type(batches).__name__ == "DataLoaderDispatcher" and processes.size > 1:
        raise LoraInitError(
            "the loader reads in one process and sends batches to the others (accelerate's dispatch_batches), which "
            "works only as long as all want as many. Prepare it with dispatch_batches=False."
        )
    stream = iter(batches)
    with processes.interruptible():
        first = list(islice(stream, 1))
    digests = processes.gather([digest_of(batch) for batch in first])
    spare = _spare(processes, first, digests) if in_step else None
    stream = chain(first, stream)
    same = [rank for rank, found in enumerate(digests) if found and digests.count(found) > 1]
    common = len(same) == processes.size
    if common:
        start, step = sum(used) + processes.rank, processes.size
    else:
        if same and processes.rank == 0:
            warnings.warn(
                f"ranks {', '.join(map(str, same))} got the same first batch; what they read alike counts as often. "
                "Give each rank data of its own, or all of them the same loader.",
                stacklevel=2,
            )
        if used and len(used) != processes.size:
            raise LoraInitError(
                f"the pass to go on with was made by {len(used)} processes, each with data of its own, and this one by "
                f"{processes.size}. Start as many as before."
            )
        start, step = used[processes.rank] if used else 0, 1
    return Shard(Part(stream, start, step), spare, "".join(digests[0]), common, start, step)


def _spare(processes: Processes, first: list[Any], digests: list[list[str]]) -> Any:
    """Give a batch to run a sharded model on: the first one, or that of another process to one that has none."""
    having = [rank for rank, found in enumerate(digests) if found]
    if having and len(having) < processes.size:
        lent = processes.share(send_to_device(first, "cpu"), having[0])
        first = first or lent
    return first[0] if first else None


def digest_of(batch: Any) -> str:
    """Hash what a batch holds: tensors, arrays, numbers and strings, in mappings and sequences.

    Objects of other types count by the name of their type only.
    """
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            for key in value:
                add(str(key))
                add(value[key])
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)} items".encode())
            for item in value:
                add(item)
        elif hasattr(value, "tolist"):  # numpy's arrays and numbers
            add(value.tolist())
        else:
            plain = value is None or isinstance(value, (str, bytes, bool, int, float))
            digest.update((repr(value) if plain else type(value).__name__).encode() + b";")

    add(batch)
    return digest.hexdigest()[:16]
