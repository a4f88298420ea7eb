"""Messages from one process to another, over gloo, and word of a failure for when the connections are gone."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from lora_init.errors import LoraInitError

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
