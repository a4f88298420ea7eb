"""The processes of a distributed run: reports and tensors between them, and what happens if one of them fails."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from lora_init.errors import LoraInitError

# Seconds to wait for the slowest process: as long as torch.distributed itself waits by default.
_TIMEOUT = 1800.0
# Seconds in which a process that gave up on another one tells the rest why.
_GRACE = 3.0
_founded = 0


class Message(NamedTuple):
    """What travels: a JSON-serialisable header and tensors on the CPU."""

    header: dict[str, Any]
    tensors: dict[str, Tensor]


class RankFailedError(LoraInitError):
    """A process failed; all others have been told, or have seen it."""


class Team:
    """All processes of the default process group, or this one alone where there is no group.

    A context manager. Inside it the processes `meet`, `combine` and `share`, all of them in the same order. One that
    raises tells the others at their next meeting, and each raises `RankFailedError` with its rank and message. So they
    do when the connection to a process closes (it was killed), or when it has not come for `LORA_INIT_TIMEOUT` seconds.

    All goes through a gloo group of its own, which a run on GPUs can have beside NCCL: states are small, and gloo tells
    at once when a process has died. Nothing is pickled.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        bytes_sent: Bytes that this process has sent.
    """

    def __init__(self, alone: bool = False) -> None:
        there = not alone and torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if there else 0
        self.size = torch.distributed.get_world_size() if there else 1
        self.bytes_sent = 0
        self._timeout = _timeout() if there else _TIMEOUT
        self._group: Any = None
        self._key = ""
        self._over = True

    def __enter__(self) -> Team:
        if self.size == 1:
            return self
        global _founded  # noqa: PLW0603  (the same number in all processes: they found their teams in one order)
        _founded += 1
        self._key = f"lora_init/{_founded}/failed"
        try:
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=self._timeout))
        except RuntimeError as error:
            raise RankFailedError(
                f"rank {self.rank}: the {self.size} processes did not find each other within {self._timeout:.0f} s "
                f"({_first_line(error)}). Each of them has to call this function; LORA_INIT_TIMEOUT sets the time."
            ) from error
        self._over = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        try:
            if error is not None and not isinstance(error, RankFailedError) and not self._over:
                self.tell(in_words(error))
                with suppress(RankFailedError):
                    self._gather_reports({"failed": [self.rank, in_words(error)]})
        finally:
            with suppress(Exception):
                torch.distributed.destroy_process_group(self._group)
        if isinstance(error, LoraInitError) and not isinstance(error, RankFailedError) and not self._over:
            raise RankFailedError(f"rank {self.rank} failed: {error}") from error

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
                self._send(0, Message(mine, {}))
            # The first process may be as late as the timeout allows, and may then wait as long for another.
            return self._verdict(self._receive(0, 2 * self._timeout))
        received = [Message(mine, {})] + [self._receive(rank, self._timeout) for rank in range(1, self.size)]
        failed = next((one.header for one in received if "failed" in one.header), None)
        verdict = Message(failed or {"reports": [one.header["report"] for one in received]}, {})
        for rank in range(1, self.size):
            self._try_to_send(rank, verdict)
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
        for child in self._children():
            message = self._guarded(merge, message, self._receive(child, self._timeout))
        if self.rank == 0:
            message = self._guarded(finish, message)
        else:
            self._try_to_send(self._parent(), message)
        return self.share(lambda: message)

    def share(self, make: Callable[[], Message]) -> Message:
        """Give the message that the first process makes to all.

        Raises:
            RankFailedError: A process failed or died.
        """
        message = self._receive(self._parent(), 2 * self._timeout) if self.rank else self._guarded(make)
        for child in reversed(self._children()):
            self._try_to_send(child, message)
        self._raise_if_failed(message)
        return message if self.rank else _unpacked(_packed(message))  # the first one, too, owns its tensors

    def _guarded(self, function: Callable[..., Message], *messages: Message) -> Message:
        failed = next((one for one in messages if "failed" in one.header), None)
        if failed is not None:
            return failed
        try:
            return function(*messages)
        except Exception as error:
            return Message({"failed": [self.rank, in_words(error)]}, {})

    def _children(self) -> list[int]:
        """Ranks that send to this one in the tree, nearest first: 0 hears of 1, 2, 4, ..., and 2 of 3, 4 of 5 and 6."""
        steps = [1 << bit for bit in range(self.size.bit_length())]
        return [self.rank + s for s in steps if not self.rank & (2 * s - 1) and self.rank + s < self.size]

    def _parent(self) -> int:
        return self.rank & (self.rank - 1)

    def _raise_if_failed(self, message: Message) -> None:
        if "failed" in message.header:
            rank, reason = message.header["failed"]
            raise RankFailedError(f"rank {rank} failed: {reason}")

    def _send(self, rank: int, message: Message) -> None:
        parts = _packed(message)
        sizes = torch.tensor([len(part) for part in parts])
        for tensor in (sizes, *parts):
            if tensor.numel():
                work = torch.distributed.isend(tensor, rank, group=self._group)
                assert work is not None  # this process belongs to the group
                # It ends when the other one receives, so a sender waits as long as a receiver.
                work.wait(timedelta(seconds=2 * self._timeout))
                self.bytes_sent += tensor.numel() * tensor.element_size()

    def _try_to_send(self, rank: int, message: Message) -> None:
        """Send; if the other one is gone, those that wait for it will say so."""
        with suppress(RuntimeError):
            self._send(rank, message)

    def _receive(self, rank: int, seconds: float) -> Message:
        """Receive a message; one that says so if the other process is gone.

        Raises:
            RankFailedError: It has not come in time. This breaks gloo's connections, so no other way is left.
        """
        try:
            sizes = self._receive_tensor(rank, torch.empty(2, dtype=torch.int64), seconds)
            parts = [self._receive_tensor(rank, torch.empty(n, dtype=torch.uint8), seconds) for n in sizes.tolist()]
            return _unpacked(parts)
        except RuntimeError as error:
            told = self.told()
            if told:
                raise RankFailedError(told) from error
            if not any(sign in str(error) for sign in ("imed out", "timeout")):
                return Message(
                    {"failed": [rank, f"its process has ended, or cannot be reached ({_first_line(error)})."]}, {}
                )
            reason = f"it did not answer for {seconds:.0f} s. LORA_INIT_TIMEOUT sets how long to wait."
            self.tell(reason, rank)
            time.sleep(_GRACE)  # the reason may lie with this process
            raise RankFailedError(f"rank {rank} failed: {reason}") from error

    def _receive_tensor(self, rank: int, tensor: Tensor, seconds: float) -> Tensor:
        if tensor.numel():
            work = torch.distributed.irecv(tensor, rank, group=self._group)
            assert work is not None  # this process belongs to the group
            work.wait(timedelta(seconds=seconds))
        return tensor

    def tell(self, reason: str, rank: int | None = None) -> None:
        """Leave word of a failure beside the connections, for when those break before a meeting."""
        text = f"rank {self.rank if rank is None else rank} failed: {reason}"
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


def _timeout() -> float:
    given = os.environ.get("LORA_INIT_TIMEOUT", str(_TIMEOUT))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < 1e7:
        raise LoraInitError(f"LORA_INIT_TIMEOUT={given}, expected a number of seconds above 0.")
    return seconds


def _packed(message: Message) -> list[Tensor]:
    parts = [json.dumps(message.header).encode()]
    parts.append(save({k: v.contiguous() for k, v in message.tensors.items()}) if message.tensors else b"")
    return [torch.frombuffer(bytearray(part), dtype=torch.uint8) if part else torch.empty(0) for part in parts]


def _unpacked(parts: list[Tensor]) -> Message:
    header, body = (part.numpy().tobytes() for part in parts)
    return Message(json.loads(header), load(body) if body else {})


def in_words(error: BaseException) -> str:
    """Say in one line what an error is, its kind too unless it is one of ours."""
    return " ".join((str(error) if isinstance(error, LoraInitError) else f"{type(error).__name__}: {error}").split())


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return text.split("] ", 1)[-1].split(". ", 1)[0][:120].rstrip(".")


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
