"""The processes of a distributed run: reports and tensors between them, and what happens if one of them fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

import torch

from lora_init.collection.mail import Mail, Message, RankFailedError, in_words, read_timeout
from lora_init.errors import LoraInitError

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
