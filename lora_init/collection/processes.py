"""The pass that several processes make together: which batches each reads, and when they meet and stop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from lora_init.collection.activations import ActivationTap
from lora_init.collection.checkpoint import Checkpoint
from lora_init.collection.exchange import Exchange, take_over
from lora_init.collection.mail import Message, RankFailedError
from lora_init.collection.shards import Shard, batch_digest
from lora_init.collection.state import MIN_BATCHES, Collected
from lora_init.collection.team import Team
from lora_init.errors import LoraInitError
from lora_init.statistics.incremental_svd import IncrementalSVD

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
