"""The pass that several processes make together: which batches each reads, and when they meet and stop."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm.auto import tqdm

from lora_init.collection.activations import ActivationTap
from lora_init.collection.state import KEPT_BATCHES, MIN_BATCHES, Collected, GroupRecord, pack_means, unpack_means
from lora_init.errors import LoraInitError
from lora_init.statistics.gradient_spectrum import mean_group
from lora_init.statistics.incremental_svd import IncrementalSVD
from lora_init.statistics.mean_gradient import MeanGradient
from lora_init.statistics.tensorfile import TensorFile, flatten, nest, write_tensors

# Seconds to wait for the slowest process: as long as torch.distributed itself waits by default.
_TIMEOUT = 1800.0
# Seconds in which a process that gave up on another one tells the rest why.
_GRACE = 3.0
_opened = 0


class Message(NamedTuple):
    """What travels: a JSON-serialisable header and tensors on the CPU. The header of a failure has the key `failed`."""

    header: dict[str, Any]
    tensors: dict[str, Tensor]

    def to_bytes(self) -> list[Tensor]:
        """Write header and tensors as two tensors of bytes. Nothing is pickled."""
        parts = [json.dumps(self.header).encode()]
        parts.append(save({name: t.contiguous() for name, t in self.tensors.items()}) if self.tensors else b"")
        return [torch.frombuffer(bytearray(part), dtype=torch.uint8) if part else torch.empty(0) for part in parts]

    @classmethod
    def from_bytes(cls, parts: list[Tensor]) -> Message:
        """Read what `to_bytes` wrote."""
        header, body = (part.numpy().tobytes() for part in parts)
        return cls(json.loads(header), load(body) if body else {})


class RankFailedError(LoraInitError):
    """A process failed; all others have been told, or have seen it."""


class Mail:
    """A gloo group of its own, beside whatever else the processes have: gloo tells at once when one of them has died.

    Args:
        rank: Number of this process.
        size: Number of processes.

    Attributes:
        timeout: Seconds to wait for another process, from `LORA_INIT_TIMEOUT`.
        bytes_sent: Bytes that this process has sent.

    Raises:
        LoraInitError: The timeout is no number of seconds, or the processes do not find each other within it.
    """

    def __init__(self, rank: int, size: int) -> None:
        global _opened  # noqa: PLW0603
        self._rank = rank
        self.timeout = read_timeout()
        self.bytes_sent = 0
        _opened += 1  # the same number in all processes: they open theirs in one order
        self._key = f"lora_init/{_opened}/failed"
        try:
            self._group: Any = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise RankFailedError(
                f"rank {rank}: the {size} processes did not find each other within {self.timeout:.0f} s "
                f"({_first_line(error)}). Each of them has to call this function; LORA_INIT_TIMEOUT sets the time."
            ) from error

    def close(self) -> None:
        """End the group."""
        with suppress(Exception):
            torch.distributed.destroy_process_group(self._group)

    def send(self, rank: int, parts: list[Tensor]) -> None:
        """Send what `Message.to_bytes` wrote, and wait until it is received.

        Raises:
            RuntimeError: The other process is gone.
        """
        sizes = torch.tensor([len(part) for part in parts])
        for tensor in (sizes, *parts):
            if tensor.numel():
                work = torch.distributed.isend(tensor, rank, group=self._group)
                assert work is not None  # this process belongs to the group
                # It ends when the other one receives, so a sender waits as long as a receiver.
                work.wait(timedelta(seconds=2 * self.timeout))
                self.bytes_sent += tensor.numel() * tensor.element_size()

    def try_to_send(self, rank: int, parts: list[Tensor]) -> None:
        """Send; if the other one is gone, those that wait for it will say so."""
        with suppress(RuntimeError):
            self.send(rank, parts)

    def receive(self, rank: int, seconds: float) -> Message:
        """Receive a message; one that says so if the other process is gone.

        Raises:
            RankFailedError: It has not come in time. This breaks gloo's connections, so no other way is left.
        """
        try:
            sizes = self._receive_tensor(rank, torch.empty(2, dtype=torch.int64), seconds)
            parts = [self._receive_tensor(rank, torch.empty(n, dtype=torch.uint8), seconds) for n in sizes.tolist()]
            return Message.from_bytes(parts)
        except RuntimeError as error:
            if not any(sign in str(error) for sign in ("imed out", "timeout")):
                told = self.told()
                if told:
                    raise RankFailedError(told) from error
                gone = f"its process has ended, or cannot be reached ({_first_line(error)})."
                return Message({"failed": [rank, gone]}, {})
            # At once: the others see their connections break, and look for the reason no longer than a moment.
            reason = f"it did not answer for {seconds:.0f} s. LORA_INIT_TIMEOUT sets how long to wait."
            self.tell(reason, rank)
            time.sleep(_GRACE)  # this process may be the one that keeps the reason
            raise RankFailedError(self.told() or f"rank {rank} failed: {reason}") from error

    def _receive_tensor(self, rank: int, tensor: Tensor, seconds: float) -> Tensor:
        if tensor.numel():
            work = torch.distributed.irecv(tensor, rank, group=self._group)
            assert work is not None  # this process belongs to the group
            work.wait(timedelta(seconds=seconds))
        return tensor

    def tell(self, reason: str, rank: int | None = None) -> None:
        """Leave word of a failure beside the connections, for when those break before a meeting."""
        text = f"rank {self._rank if rank is None else rank} failed: {reason}"
        with suppress(Exception):
            self._store().compare_set(self._key, "", text)

    def told(self) -> str:
        """Read such word; empty if there is none."""
        deadline = time.monotonic() + _GRACE / 3
        with suppress(Exception):
            store = self._store()
            while not store.check([self._key]):
                if time.monotonic() > deadline:
                    return ""
                time.sleep(0.05)
            return str(store.get(self._key).decode())
        return ""

    @staticmethod
    def _store() -> Any:
        world: Any = torch.distributed.group.WORLD
        return world.get_group_store()


def read_timeout() -> float:
    """Read how many seconds to wait for another process."""
    given = os.environ.get("LORA_INIT_TIMEOUT", str(_TIMEOUT))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < 1e7:
        raise LoraInitError(f"LORA_INIT_TIMEOUT={given}, expected a number of seconds above 0.")
    return seconds


def in_words(error: BaseException) -> str:
    """Say in one line what an error is, its kind too unless it is one of ours."""
    return " ".join((str(error) if isinstance(error, LoraInitError) else f"{type(error).__name__}: {error}").split())


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return text.split("] ", 1)[-1].split(". ", 1)[0][:120].rstrip(".")


_present: Team | None = None


class Team:
    """All processes of the default process group, or this one alone where there is no group.

    A context manager. Inside it the processes `meet`, `combine` and `share`, all of them in the same order. One that
    raises tells the others at their next meeting, and each raises `RankFailedError` with its rank and message. So they
    do when the connection to a process closes (it was killed), or when it has not come for `LORA_INIT_TIMEOUT` seconds.

    A team inside another one is that one: what goes wrong between two passes is told as well.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    def __init__(self, alone: bool = False) -> None:
        there = not alone and torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if there else 0
        self.size = torch.distributed.get_world_size() if there else 1
        self._mail: Mail | None = None
        self._over = True
        if there:
            read_timeout()  # said before the others wait

    @property
    def bytes_sent(self) -> int:
        """Bytes that this process has sent."""
        return self._mail.bytes_sent if self._mail is not None else 0

    def __enter__(self) -> Team:
        global _present  # noqa: PLW0603  (one process group, one team at a time)
        if self.size == 1:
            return self
        if _present is not None:
            return _present
        self._mail, self._over = Mail(self.rank, self.size), False
        _present = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _present  # noqa: PLW0603
        if self._mail is None:
            return
        try:
            if error is not None and not isinstance(error, RankFailedError) and not self._over:
                self._fail(error)
        finally:
            self._mail.close()
            self._mail = _present = None

    def _fail(self, error: BaseException) -> None:
        """Tell the others, and raise what they raise; an error that is not ours goes on as it is."""
        self._post.tell(in_words(error))
        try:
            self._gather_reports({"failed": [self.rank, in_words(error)]})
        except RankFailedError as told:
            if isinstance(error, LoraInitError):
                raise told from error

    @property
    def _post(self) -> Mail:
        assert self._mail is not None  # there are other processes
        return self._mail

    def leave(self, error: BaseException) -> NoReturn:
        """End where the others cannot come to a meeting: leave word, for when they find this process gone.

        Raises:
            RankFailedError: Always; about the process that failed first.
        """
        self._post.tell(in_words(error))
        self._over = True
        raise RankFailedError(self._post.told() or in_words(error)) from error

    def finish(self) -> None:
        """Say that no more meetings follow: what goes wrong from here on is no other process's business."""
        self._over = True

    def meet(self, report: Any) -> list[Any]:
        """Exchange small JSON-serialisable reports.

        Returns:
            The reports of all processes, by rank.

        Raises:
            RankFailedError: A process failed, died or did not come.
        """
        if self.size == 1:
            return [report]
        reports: list[Any] = self._gather_reports({"report": report})
        return reports

    def _gather_reports(self, mine: dict[str, Any]) -> list[Any]:
        """Send reports to the first process, and receive all of them or the first failure."""
        if self.rank != 0:
            with suppress(RuntimeError):  # if the first process is gone, receiving from it says so
                self._post.send(0, Message(mine, {}).to_bytes())
            # The first process may be as late as the timeout allows, and may then wait as long for another.
            return self._verdict(self._post.receive(0, 2 * self._post.timeout))
        received = [Message(mine, {})] + [self._post.receive(rank, self._post.timeout) for rank in range(1, self.size)]
        failed = next((one.header for one in received if "failed" in one.header), None)
        verdict = Message(failed or {"reports": [one.header["report"] for one in received]}, {})
        parts = verdict.to_bytes()
        for rank in range(1, self.size):
            self._post.try_to_send(rank, parts)
        return self._verdict(verdict)

    def _verdict(self, message: Message) -> list[Any]:
        self._raise_if_failed(message)
        reports: list[Any] = message.header["reports"]
        return reports

    def combine(
        self,
        make: Callable[[], Message],
        merge: Callable[[Message, Message], Message],
        finish: Callable[[Message], Message] = lambda message: message,
    ) -> Message:
        """Merge the messages of all processes two by two, in a tree of fixed order, and give the result to all.

        Args:
            make: Makes the message of this process.
            merge: Makes one message of two, the first from lower ranks. May change them.
            finish: What the first process makes of the result before it goes to all.

        Returns:
            The result, the same bytes in every process.

        Raises:
            RankFailedError: A process failed or died.
        """
        message = self._guarded(make)
        for child in children_of(self.rank, self.size):
            message = self._guarded(merge, message, self._post.receive(child, self._post.timeout))
        if self.rank == 0:
            message = self._guarded(finish, message)
        else:
            self._post.try_to_send(self._parent(), message.to_bytes())
        return self.share(lambda: message)

    def share(self, make: Callable[[], Message]) -> Message:
        """Give the message that the first process makes to all.

        Raises:
            RankFailedError: A process failed or died.
        """
        message = self._post.receive(self._parent(), 2 * self._post.timeout) if self.rank else self._guarded(make)
        children = children_of(self.rank, self.size)
        parts = message.to_bytes() if children or self.rank == 0 else []
        for child in reversed(children):
            self._post.try_to_send(child, parts)
        self._raise_if_failed(message)
        return message if self.rank else Message.from_bytes(parts)  # the first one, too, owns its tensors

    def _guarded(self, function: Callable[..., Message], *messages: Message) -> Message:
        failed = next((one for one in messages if "failed" in one.header), None)
        if failed is not None:
            return failed
        try:
            return function(*messages)
        except Exception as error:
            return Message({"failed": [self.rank, in_words(error)]}, {})

    def _parent(self) -> int:
        return self.rank & (self.rank - 1)

    def _raise_if_failed(self, message: Message) -> None:
        if "failed" in message.header:
            rank, reason = message.header["failed"]
            raise RankFailedError(f"rank {rank} failed: {reason}")


def children_of(rank: int, size: int) -> list[int]:
    """Give the ranks that send to this one in the tree, nearest first.

    Example:
        >>> [children_of(rank, 8) for rank in (0, 1, 2, 4)]
        [[1, 2, 4], [], [3], [5, 6]]
    """
    steps = [1 << bit for bit in range(size.bit_length())]
    return [rank + step for step in steps if not rank & (2 * step - 1) and rank + step < size]


def check_alike(team: Team, asked: Mapping[str, Any]) -> None:
    """Check that all processes were given the same things.

    Args:
        team: The processes.
        asked: What has to be the same, in words: setting to value.

    Raises:
        LoraInitError: They differ, on every rank: says what differs and where.
    """
    everywhere = team.meet(dict(asked))
    for rank, theirs in enumerate(everywhere):
        for setting, first in everywhere[0].items():
            if theirs.get(setting) != first:
                raise RankFailedError(
                    f"rank {rank} has {setting} {theirs.get(setting)!r}, rank 0 has {first!r}. "
                    "Give all processes the same model and arguments."
                )


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


class Exchange:
    """Make one `Collected` of what all processes have found since they last met, the same in each.

    Between two meetings every process goes on from the common state with its share of the weight: all shares together,
    merged, are the state that one process would have. Decompositions that are done travel no more; mean gradients go on
    to the end of the pass.

    Args:
        team: The processes.
        make: Makes an empty decomposition for a group.
        tolerance: See `collect`.
    """

    def __init__(self, team: Team, make: Callable[[str], IncrementalSVD], tolerance: float) -> None:
        self._team, self._make, self._tolerance = team, make, tolerance
        self._n_batches = self._n_labels = 0
        self._known: dict[str, tuple[list[float], list[Tensor]]] = {}  # shares and ratios, as of the last meeting

    def bring_together(self, found: Collected) -> Collected:
        """Merge, and decide which layers are done.

        Args:
            found: What this process has found. Not changed.

        Returns:
            What all have found, on the CPU, equal bit for bit in all processes.

        Raises:
            RankFailedError: A process failed or died.
        """
        done = {name: record for name, record in found.groups.items() if record.converged_at is not None}
        message = self._team.combine(lambda: self._pack(found), self._merge, self._conclude)
        return self._whole(message, done)

    def spread(self, read: Callable[[Collected], list[list[str]]]) -> tuple[Collected, list[list[str]]]:
        """Give what the first process reads from a file to all.

        Args:
            read: Brings an empty `Collected` to where the file is; returns the hashes of the batches used, by rank.

        Returns:
            The same in all processes: what was read, and the hashes.
        """

        def make() -> Message:
            found = Collected()
            used = read(found)
            header, tensors = found.pack()
            return Message({**header, "used": used}, tensors)

        message = self._team.share(make)
        return self._whole(message, {}), message.header["used"]

    def hand_out(self, whole: Collected, found: Collected) -> None:
        """Let this process go on with its share of what all have found.

        Args:
            whole: From `bring_together` or `spread`, the same in all processes.
            found: Is changed.
        """
        for record in whole.groups.values():
            if record.converged_at is None:
                record.svd.load_state_dict(_share_of(record.svd.state_dict(), self._team.rank, self._team.size))
        for mean in whole.gradients.values():
            mean.load_state_dict(_share_of(mean.state_dict(), self._team.rank, self._team.size))
        self._n_batches, self._n_labels = whole.n_batches, whole.n_labels
        self._known = {name: (list(r.shares), list(r.ratios)) for name, r in whole.groups.items()}
        take_over(whole, found)

    def _whole(self, message: Message, done: dict[str, GroupRecord]) -> Collected:
        whole = Collected()
        whole.unpack(message.header, message.tensors, self._make)
        whole.groups = {**done, **whole.groups}
        return whole

    def _pack(self, found: Collected) -> Message:
        """Write what this process has found: the state of each layer, and the shares of the batches since."""
        parts: dict[str, dict[str, Tensor]] = {}
        news: dict[str, list[list[Any]]] = {}
        for name, record in found.groups.items():
            if record.converged_at is not None:
                continue
            shares = record.shares[len(self._known.get(name, ([], []))[0]) :]
            # By this they are put in order: the first of each process, then the second of each, as one would see them.
            news[name] = [[position, self._team.rank, share] for position, share in enumerate(shares)]
            parts[name] = dict(record.svd.state_dict())
            if shares:
                parts[name]["ratios"] = torch.stack(list(record.ratios)[-len(shares) :])
        # One that was made in a batch that was interrupted has seen nothing.
        gradients = {name: mean for name, mean in found.gradients.items() if mean.n_samples}
        parts |= pack_means(gradients)
        header = {
            "news": news,
            "gradients": list(gradients),
            "group_of": found.group_of,
            "n_calls": found.n_calls,
            "n_batches": found.n_batches - self._n_batches,
            "n_labels": found.n_labels - self._n_labels,
            "seconds": found.seconds,
        }
        return Message(header, flatten(parts))

    def _merge(self, one: Message, other: Message) -> Message:
        (parts, gradients), (others, more) = _unpack(one), _unpack(other)
        for name, mean in more.items():
            gradients[name] = gradients[name].merge(mean) if name in gradients else mean
        news: dict[str, list[list[Any]]] = one.header["news"]
        for name, theirs in other.header["news"].items():
            ours = news.setdefault(name, [])
            mine, its = parts.setdefault(name, {}), others[name]
            ratios = list(zip(ours[-KEPT_BATCHES:], mine.pop("ratios", ()), strict=True))
            ratios += zip(theirs[-KEPT_BATCHES:], its.pop("ratios", ()), strict=True)
            svd = self._make(name).load_state_dict(mine)
            parts[name] = dict(svd.merge(self._make(name).load_state_dict(its)).state_dict())
            if ratios:
                kept = sorted(ratios, key=lambda pair: pair[0])[-KEPT_BATCHES:]
                parts[name]["ratios"] = torch.stack([row for _, row in kept])
            news[name] = sorted(ours + theirs)
        parts |= pack_means(gradients)
        a, b = one.header, other.header
        header = {
            "news": news,
            "gradients": list(gradients),
            "group_of": b["group_of"] | a["group_of"],
            "n_calls": dict(Counter(a["n_calls"]) | Counter(b["n_calls"])),  # the larger of each
            "n_batches": a["n_batches"] + b["n_batches"],
            "n_labels": a["n_labels"] + b["n_labels"],
            "seconds": {part: max(a["seconds"][part], b["seconds"][part]) for part in a["seconds"]},
        }
        return Message(header, flatten(parts))

    def _conclude(self, message: Message) -> Message:
        """Decide which layers are done, and write what all processes go on with."""
        header, found = message.header, Collected()
        found.group_of, found.n_calls, found.seconds = header["group_of"], header["n_calls"], header["seconds"]
        found.n_batches = self._n_batches + header["n_batches"]
        found.n_labels = self._n_labels + header["n_labels"]
        groups, found.gradients = _unpack(message)
        for name, parts in groups.items():
            if found.group_of.get(name, name) != name:
                continue  # a process whose first batch did not reach all layers took its input for one of its own
            shares, ratios = self._known.get(name, ([], []))
            news = header["news"][name]
            record = GroupRecord(self._make(name), shares=[*shares, *(share for *_, share in news)])
            record.ratios.extend((*ratios, *parts.pop("ratios", ())))
            record.svd.load_state_dict(parts)
            if news:
                record.decide(self._tolerance, found.n_batches)
            found.groups[name] = record
        return Message(*found.pack())


def _share_of(state: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """Give the same directions with one of `size` shares of the sums, and its share of the counts."""
    share = dict(state)
    if share:
        whole = int(share["n_samples"])
        n = whole * (rank + 1) // size - whole * rank // size
        share["n_samples"] = torch.tensor(n)
        for name in ("weights", "scatter", "right", "squares"):
            if name in share:
                share[name] = share[name] * (n / max(whole, 1))
    return share


def _unpack(message: Message) -> tuple[dict[str, dict[str, Tensor]], dict[str, MeanGradient]]:
    """Read a message from `_pack`: the parts of each decomposition, and the mean gradients."""
    names = message.header["gradients"]
    parts = nest(message.tensors, [*message.header["news"], *map(mean_group, names)])
    gradients = unpack_means(names, parts)
    return parts, gradients


def take_over(whole: Collected, found: Collected) -> None:
    """Bring `found`, to which others hold on, to where `whole` is."""
    found.groups, found.gradients = whole.groups, whole.gradients
    found.group_of, found.n_calls = dict(whole.group_of), dict(whole.n_calls)
    found.n_batches, found.n_labels = whole.n_batches, whole.n_labels
    found.seconds.update(whole.seconds)


# Takes in a batch, given the tap, the batch and its number in this process.
TakeIn = Callable[[ActivationTap, Any, int], None]
# Runs a batch that does not count, given the tap and the batch.
RunIdly = Callable[[ActivationTap, Any], None]
# Batches of one process between two meetings, at most.
_LONGEST_ROUND = 16


def own_batches(team: Team, batches: Iterable[Any]) -> Iterator[Any]:
    """Read the batches that are this process's.

    A loader that gives each process its own is read as it is. One that gives all of them the same, which the hash of
    the first batch tells, is read as one data set: the process of rank r takes batches r, r + size, and so on.

    Raises:
        LoraInitError: A loader that cannot be read by one process alone.

    Warns:
        UserWarning: A loader that is made to give each process its own gives all the same; or some of them the same.
    """
    if team.size == 1:
        return iter(batches)
    if type(batches).__name__ == "DataLoaderDispatcher":
        raise LoraInitError(
            "the loader reads in one process and sends batches to the others (accelerate's dispatch_batches), which "
            "works only as long as all want as many. Prepare it with dispatch_batches=False."
        )
    stream = iter(batches)
    first = list(islice(stream, 1))
    seen = team.meet([batch_digest(batch) for batch in first])
    digests = [digest for found in seen for digest in found]
    if len(digests) == team.size and len(set(digests)) == 1:
        if _gives_each_its_own(batches) and team.rank == 0:
            warnings.warn(
                f"the loader has a sampler for several processes, but all {team.size} ranks got the same first batch. "
                "Their data is taken as one data set, of which each reads its part. Check num_replicas and rank.",
                stacklevel=2,
            )
        return islice(chain(first, stream), team.rank, None, team.size)
    if len(set(digests)) < len(digests) and team.rank == 0:
        alike = [rank for rank, found in enumerate(seen) if found and digests.count(found[0]) > 1]
        warnings.warn(
            f"ranks {', '.join(map(str, alike))} got the same first batch; what they read alike counts as often. "
            "Give each rank data of its own, or all of them the same loader.",
            stacklevel=2,
        )
    return chain(first, stream)


def _gives_each_its_own(batches: Any) -> bool:
    """Tell whether a loader was made for one of several processes, by its sampler, by accelerate or by datasets."""
    samplers = [getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)]
    samplers += [getattr(sampler, "sampler", None) for sampler in samplers]
    if any(hasattr(sampler, "num_replicas") or hasattr(sampler, "process_index") for sampler in samplers):
        return True
    return getattr(getattr(batches, "dataset", None), "_distributed", None) is not None


def batches_of_a_round(n_batches: int, max_batches: int, rank: int, size: int) -> int:
    """Say how many batches a process takes before the next meeting, `n_batches` having been used by all together.

    The first meeting is when a layer can count as converged; then all have to take half as many again, so that the
    number of meetings grows with the logarithm of the pass and no pass is much longer than it has to be.

    Example:
        >>> [batches_of_a_round(n, 64, 0, 2) for n in (0, 8, 16, 24, 36, 54, 63, 64)]
        [4, 4, 4, 6, 9, 5, 1, 0]
    """
    each = -(-max(MIN_BATCHES, n_batches // 2) // size)
    left = max_batches - n_batches
    return min(each, _LONGEST_ROUND, left // size + (rank < left % size))


class Rounds:
    """Rounds of batches, each process its own, with a meeting after each.

    Args:
        team: The processes.
        make: Makes an empty decomposition for a group.
        tolerance: See `collect`.
        found: What this process has found; ends as what all have found.
        tap: Where its rows come from.
        shard: Its batches.
        bar: Shows the batches of all.
        checkpoint: File to go on from, and to write to at a meeting; the first process does both.
    """

    def __init__(
        self,
        team: Team,
        make: Callable[[str], IncrementalSVD],
        tolerance: float,
        found: Collected,
        tap: ActivationTap,
        shard: Shard,
        bar: tqdm[Any],
        checkpoint: Checkpoint | None,
    ) -> None:
        self._team, self._make, self._checkpoint = team, make, checkpoint
        self._found, self._tap, self._shard, self._bar = found, tap, shard, bar
        self._exchange = Exchange(team, make, tolerance)
        self._spare: list[Any] = []  # a batch to run a sharded model on when this process has none left
        self._used: list[list[str]] = [[] for _ in range(team.size)]  # hashes of the batches used, by rank

    def run(self, one_batch: TakeIn, idle: RunIdly, max_batches: int) -> str:
        """Take in batches until there is a common reason to stop, and return it.

        Args:
            one_batch: Takes in a batch.
            idle: Runs one that does not count.
            max_batches: Bound on the batches of all processes.

        Raises:
            RankFailedError: A process failed or died.
            LoraInitError: See `collect`.
        """
        team, found, shard = self._team, self._found, self._shard
        reason = self._go_on(self._resume(self._checkpoint), max_batches) if self._checkpoint is not None else ""
        while not reason:
            n, used, interrupted = found.n_batches, len(shard.digests), False
            try:
                self._round(one_batch, idle, batches_of_a_round(n, max_batches, team.rank, team.size))
            except KeyboardInterrupt:
                interrupted = True
            found.group_of, found.n_calls = dict(self._tap.group_of), dict(self._tap.n_calls)
            reports = team.meet([shard.digests[used:], shard.ended, interrupted])
            for all_used, (newly_used, *_) in zip(self._used, reports, strict=True):
                all_used.extend(newly_used)
            whole = self._exchange.bring_together(found)
            if any(interrupted for *_, interrupted in reports):
                reason = "interrupted"
            elif self._checkpoint is not None and team.rank == 0:
                self._checkpoint.write_if_due(whole, self._used)
            ended = all(ended for _, ended, _ in reports)
            reason = self._go_on(whole, max_batches, reason or "exhausted" * ended)
        return reason

    def _round(self, one_batch: TakeIn, idle: RunIdly, n: int) -> None:
        if self._tap.sharded:
            self._round_in_step(one_batch, idle, n)
            return
        for _ in range(n):
            for batch in self._shard.take(1):
                one_batch(self._tap, batch, self._shard.n_taken - 1)

    def _round_in_step(self, one_batch: TakeIn, idle: RunIdly, n: int) -> None:
        """Take in `n` batches of a sharded model, whose passes all processes make together.

        One whose data has ended runs a batch again that does not count, and so does one with an error, until the
        others are through and it can tell them.
        """
        tap, position = self._tap, self._shard.n_taken
        taken = self._shard.take(n)
        self._spare = self._spare or taken[:1]
        counts = self._team.meet([len(taken), not self._spare])
        without = [rank for rank, (_, none) in enumerate(counts) if none]
        if without:
            self._lend(without[0])
        end, error = tap.n_passes + max(count for count, _ in counts), None
        while tap.n_passes < end:
            counts_in, before = error is None and bool(taken), tap.n_passes
            try:
                if counts_in:
                    position += 1
                    one_batch(tap, taken.pop(0), position - 1)
                else:
                    idle(tap, self._spare[0])
            except LoraInitError as caught:
                error = error or caught
                halfway = isinstance(caught.__cause__, (RuntimeError, MemoryError))
                if halfway or tap.broken or (not counts_in and before == tap.n_passes):
                    self._team.leave(error)
            except Exception as caught:
                self._team.leave(caught)
        if error is not None:
            raise error

    def _lend(self, rank: int) -> None:
        """Give a batch to those that have none at all and yet have to run the model, as `rank`."""
        spare = self._spare[0] if self._spare else {}
        lendable = isinstance(spare, Mapping) and all(isinstance(value, Tensor) for value in spare.values())
        message = Message({"lent": list(spare)}, dict(spare)) if lendable else Message({"lent": []}, {})
        lent = self._team.combine(lambda: message, lambda one, other: one if one.header["lent"] else other)
        if not lent.header["lent"]:
            raise RankFailedError(
                f"rank {rank} has no batch, and a sharded model runs in all processes together. None of the others has "
                "a batch to lend, a mapping of names to tensors. Give every process at least one batch."
            )
        self._spare = self._spare or [lent.tensors]

    def _resume(self, checkpoint: Checkpoint) -> Collected:
        """Read the file, read past the batches that were used, and begin the file."""
        read = partial(checkpoint.read, make=self._make, of=self._team.size)
        whole, self._used = self._exchange.spread(read)
        self._shard.skip(self._used[self._team.rank], str(checkpoint.path))
        self._team.meet(None)  # the file stays as it is if the data of any process is not that of the file
        if self._team.rank == 0:
            checkpoint.begin(whole, self._used)
        return whole

    def _go_on(self, whole: Collected, max_batches: int, reason: str = "") -> str:
        """Take over what all have found; return the reason to stop, empty if there is none."""
        done = [record.converged_at is not None for record in whole.groups.values()]
        if done and all(done) and len(whole.group_of) == len(self._tap.modules):
            reason = "converged"
        elif whole.n_batches >= max_batches:
            reason = "max_batches"
        if reason:
            take_over(whole, self._found)
        else:
            self._exchange.hand_out(whole, self._found)
        self._tap.resume(whole.group_of, whole.n_calls)
        self._bar.update(whole.n_batches - self._bar.n)
        return reason
