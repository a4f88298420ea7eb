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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from lora_init.errors import LoraInitError, first_line, warn

if TYPE_CHECKING:
    from lora_init.collection.loop import Collected


class Processes:
    """All processes of the default process group of `torch.distributed`, or this one alone where there is none.

    A context manager. Inside it all processes call the same methods in the same order. Tensors travel on the CPU, by
    gloo: by the default group if that is its backend, else by a group of its own.

    Since the others rely on each, Ctrl-C (and any signal that Python treats so) is only noted, and raised when the
    context ends. `alone` takes no notice of a process group.
    """

    def __init__(self, alone: bool = False) -> None:
        self.rank, self.size = 0, 1
        if not alone and torch.distributed.is_available() and torch.distributed.is_initialized():
            self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.interrupted = False
        self._group: Any = None
        self._raises = False  # whether Ctrl-C is raised at once; else only noted
        self._signals: list[int] = []

    def __enter__(self) -> Processes:
        if self.size > 1 and torch.distributed.get_backend() != "gloo":
            with self._named_errors():
                self._group = torch.distributed.new_group(backend="gloo")
        # Python lets only the main thread set handlers. Somebody else's handler is left alone.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is signal.default_int_handler:
                    signal.signal(number, self._note)
                    self._signals.append(number)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number in self._signals:
            signal.signal(number, signal.default_int_handler)
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)
            self._group = None
        if self.interrupted and kind is None:  # an error of the block goes before
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
        # processes x numbers -> numbers
        return [sum(column) for column in zip(*self.gather(numbers), strict=True)]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        values = [value] * self.size
        if self.size > 1:
            with self._named_errors():
                torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def check_alike(self, asked: Mapping[str, Any]) -> None:
        """Raise in all processes if they were given different things; the error names what differs and where."""
        everywhere = self.gather(dict(asked))
        for rank, theirs in enumerate(everywhere):
            for setting, first in everywhere[0].items():
                if theirs.get(setting) != first:
                    raise LoraInitError(
                        f"rank {rank} has {setting} {theirs.get(setting)!r}, rank 0 has {first!r}. "
                        "Give all processes the same model and arguments."
                    )

    def merge(self, collected: Collected) -> Collected:
        """Return what all processes have collected: two neighbors merged, then two such pairs, and so on.

        So it takes as many rounds as the binary logarithm of their number. What this process has collected is not
        changed.
        """
        if self.size == 1:
            return collected
        whole, step = from_bytes(to_bytes(collected)), 1  # a copy
        with self._named_errors():
            # In the round of `step` the ranks that are multiples of it are left; every second of them gives away what
            # it has to the one before it, and is done.
            while step < self.size and self.rank % step == 0:
                if self.rank % (2 * step):
                    torch.distributed.send_object_list([to_bytes(whole)], self.rank - step, group=self._group)
                elif self.rank + step < self.size:
                    received: list[Any] = [None]
                    torch.distributed.recv_object_list(received, self.rank + step, group=self._group)
                    whole.merge(from_bytes(received[0]))
                step *= 2
        content = to_bytes(whole) if self.rank == 0 else None
        shared: Collected = from_bytes(self.share(content))
        return shared  # rank 0 reads the bytes, too: all do the same

    def share(self, value: Any, source: int = 0) -> Any:
        """Return what the process of rank `source` has; no tensors but those on the CPU."""
        values = [value]
        if self.size > 1:
            with self._named_errors():
                torch.distributed.broadcast_object_list(values, source, group=self._group)
        return values[0]


def to_bytes(content: Any) -> bytes:
    """Write what a pass has found as bytes, for `from_bytes`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def from_bytes(content: bytes) -> Any:
    """Read what `to_bytes` wrote, here or in another process: onto the CPU, since a GPU may be another's."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)


class Shard:
    """The batches of one process, read by where they are in the data."""

    def __init__(self, stream: Iterator[Any], spare: Any, first: str, common: bool, start: int) -> None:
        self.spare = spare  # a batch to run a sharded model on when there is none left; None if no process has a batch
        self.first = first  # hash of the first batch of rank 0, empty if there is none: another one means other data
        self.common = common  # all processes have the same loader and each reads its part of it
        self.start = start  # where in the data this pass begins
        self.error: Exception | None = None  # why what was read last, wanted or not, could not be read
        self._stream, self._next = stream, 0

    def read(self, position: int) -> Any:
        """Read the batch at a position, past those before it; unlike with `islice`, also past one that cannot be read.

        If `error` is set when the data ends, that may have been the end of the iterator, as of a generator, and nobody
        knows what else it had.
        """
        # Positions are counted also where reading fails, so that they are the same for a pass that goes on later.
        while True:
            here, self._next = self._next, self._next + 1
            try:
                item, self.error = next(self._stream), None
            except StopIteration:
                raise
            except Exception as error:
                self.error = error
                if here == position:
                    raise
            else:
                if here == position:
                    return item


def own_batches(processes: Processes, batches: Iterable[Any], used: Sequence[int], in_step: bool) -> Shard:
    """Open the batches that are this process's, past those that an earlier pass has used.

    A loader that gives each process its own is read as it is. One that gives all of them the same, which the hash of
    the first batch tells, is read as one data set: before each step the next batches go to the processes that want one,
    so that what was used is a number of batches from the first on. `used` has a number for each process of the earlier
    pass, or one for all of a loader that they had in common. Processes that run a sharded model together (`in_step`)
    get a spare batch.
    """
    if type(batches).__name__ == "DataLoaderDispatcher" and processes.size > 1:
        raise LoraInitError(
            "the loader reads in one process and sends batches to the others (accelerate's dispatch_batches), which "
            "works only as long as all want as many. Prepare it with dispatch_batches=False."
        )
    stream = iter(batches)
    with processes.interruptible():  # data may be slow to begin
        first = list(islice(stream, 1))
    digests = processes.gather([digest_of(batch) for batch in first])
    spare = None
    if in_step:
        spare = _spare(processes, first, digests)
    stream = chain(first, stream)
    # A rank without a batch has an empty list of digests, and is like no other.
    same = [rank for rank, digest in enumerate(digests) if digest and digests.count(digest) > 1]
    common = len(same) == processes.size == digests.count(digests[0])  # and not two by two
    if common:
        # What was used is counted from the first batch on, by however many processes.
        return Shard(stream, spare, "".join(digests[0]), common, sum(used))
    if same and processes.rank == 0:
        warn(
            f"ranks {', '.join(map(str, same))} got a first batch that another one got; what they read alike "
            "counts as often. Give each rank data of its own, or all of them the same loader."
        )
    if used and len(used) != processes.size:
        raise LoraInitError(
            f"the pass to go on with was made by {len(used)} processes, each with data of its own, and this one by "
            f"{processes.size}. Start as many as before."
        )
    start = used[processes.rank] if used else 0
    return Shard(stream, spare, "".join(digests[0]), common, start)


def _spare(processes: Processes, first: list[Any], digests: list[list[str]]) -> Any:
    """Return a batch to run a sharded model on: the first one, or another process's where there is none."""
    ranks = [rank for rank, digest in enumerate(digests) if digest]
    # Where all have a batch, or none has, nothing travels.
    if ranks and len(ranks) < processes.size:
        lent = processes.share(send_to_device(first, "cpu"), ranks[0])
        first = first or lent
    return first[0] if first else None


def digest_of(batch: Any) -> str:
    """Hash what a batch holds: tensors, arrays, numbers and strings, in mappings, sequences, sets and plain objects.

    What has no attributes counts by the name of its type only, and so does what can be called.
    """
    digest, met = hashlib.sha256(), set()

    # Each value with its form, so that [1, 23] and [12, 3] differ.
    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            # As bytes, since numpy has no bfloat16.
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
        elif value is None or isinstance(value, (str, bytes, bool, int, float)):
            digest.update(repr(value).encode() + b";")
        elif isinstance(value, (set, frozenset)):
            add(sorted(map(repr, value)))
        else:
            digest.update(type(value).__name__.encode() + b";")
            if hasattr(value, "__dict__") and not callable(value) and id(value) not in met:  # it may hold itself
                met.add(id(value))
                add(vars(value))

    add(batch)
    return digest.hexdigest()[:16]
