"""One bounded pass over the data: the running decompositions of all layers, and when they have seen enough."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lora_init.collection.activations import ActivationHooks, Forward
from lora_init.collection.backward import BackwardHooks
from lora_init.collection.processes import Processes, Shard, from_bytes, to_bytes
from lora_init.collection.state import Collected, GroupRecord, falls_sharply, has_converged
from lora_init.errors import LoraInitError, is_out_of_memory
from lora_init.layers.wrappers import run_eagerly
from lora_init.statistics.incremental_svd import IncrementalSVD
from lora_init.statistics.mean_gradient import MeanGradient

# Seconds between two calls of `save`.
SAVE_EVERY = 60.0


@dataclass(frozen=True)
class PassOptions:
    """What a pass computes, and when a group has seen enough.

    Attributes:
        n_components: Components of each group.
        center: Subtract the mean.
        tolerance: See `collect`.
        seed: Seed of the decompositions.
        n_triplets: Singular triplets of each mean gradient.
    """

    n_components: int
    center: bool = True
    tolerance: float = 0.02
    seed: int = 0
    n_triplets: int = 0

    def empty_svd(self, weighted: bool = False) -> IncrementalSVD:
        """Make the decomposition of a group. Weighted rows keep their mean, for it is part of the gradient."""
        return IncrementalSVD(self.n_components, self.center and not weighted, self.seed)

    def empty_mean(self) -> MeanGradient:
        """Make the mean gradient of a layer."""
        return MeanGradient(self.n_triplets, self.seed)


class Pass:
    """Take in batches, one at a time, and know when there have been enough.

    Args:
        hooks: Hands out what layers read.
        options: What to compute.
        forward: Runs the model on a batch.
        backward: Hands out gradients as well.

    Attributes:
        found: What this process has found so far.
        options: What to compute.
    """

    def __init__(
        self,
        hooks: ActivationHooks,
        options: PassOptions,
        forward: Forward,
        backward: BackwardHooks | None = None,
    ) -> None:
        self.found = Collected()
        self.options = options
        self._hooks, self._forward, self._backward = hooks, forward, backward
        self._warned = False

    @property
    def n_converged(self) -> int:
        """Groups that need no more data."""
        return sum(record.converged_at is not None for record in self._records)

    @property
    def n_groups(self) -> int:
        """Groups found so far, those of weighted rows included."""
        return len(self.found.groups) + len(self.found.weighted)

    @property
    def converged(self) -> bool:
        """Whether all layers have run and no group needs more data."""
        all_ran = len(self._hooks.group_of) == len(self._hooks.modules)
        return all_ran and 0 < self.n_groups == self.n_converged

    @property
    def _records(self) -> Iterator[GroupRecord]:
        return chain(self.found.groups.values(), self.found.weighted.values())

    def take(self, batch: Any, number: int) -> None:
        """Take in a batch; `number` counts the batches of this process, from 0.

        Raises:
            LoraInitError: See `collect`; nothing of the batch was taken in.
        """
        found, seconds = self.found, self.found.seconds
        start, before = time.perf_counter(), seconds["decomposition"]
        try:
            found.n_labels += self._run(batch)
            with self._timed():
                self._update(number)
        except (LoraInitError, MemoryError, RuntimeError) as error:
            if isinstance(error, LoraInitError):
                raise LoraInitError(f"batch {number}: {error}") from error
            if is_out_of_memory(error):
                message = f"batch {number}: out of memory. Use a smaller batch or shorter sequences."
                raise LoraInitError(message) from error
            raise
        seconds["forward"] += time.perf_counter() - start - (seconds["decomposition"] - before)
        found.n_batches[0] += 1
        found.group_of, found.n_calls = dict(self._hooks.group_of), dict(self._hooks.n_calls)

    def idle(self, batch: Any) -> None:
        """Run a batch that does not count: the other processes run their part of a sharded model with this one."""
        if self._backward is None:
            self._activations(batch, _nothing)
        else:
            self._backward.run(batch, _nothing, lambda name, x, g: None, lambda group: False)

    def _run(self, batch: Any) -> int:
        if self._backward is None:
            self._activations(batch, self._take_rows)
            return 0
        return self._backward.run(batch, self._take_rows, self._take_gradient, self._wanted)

    @torch.no_grad()
    def _activations(self, batch: Any, sink: Callable[[str, Tensor], None]) -> None:
        with self._hooks.watch(batch, sink, self._wanted) as moved, run_eagerly():
            self._forward(self._hooks.model, moved)

    def _wanted(self, group: str) -> bool:
        return _is_open(self.found.groups, group)

    def _take_rows(self, group: str, rows: Tensor) -> None:
        with self._timed(), _naming(group):
            self._record(self.found.groups, group).svd.project(rows)

    def _take_gradient(self, name: str, x: Tensor, g: Tensor) -> None:
        with self._timed(), _naming(name):
            if name not in self.found.gradients:
                self.found.gradients[name] = self.options.empty_mean()
            self.found.gradients[name].project(g, x)
            if _is_open(self.found.weighted, name):
                norms = torch.linalg.vector_norm(g, dim=1, dtype=torch.promote_types(g.dtype, torch.float32))
                self._record(self.found.weighted, name).svd.project(x, norms)

    def _record(self, records: dict[str, GroupRecord], name: str) -> GroupRecord:
        if name not in records:
            records[name] = GroupRecord(self.options.empty_svd(records is self.found.weighted))
        return records[name]

    def _update(self, number: int) -> None:
        """Complete the batch for all groups, and decide which of them have seen enough."""
        for name, record in chain(self.found.groups.items(), self.found.weighted.items()):
            with _naming(name):
                record.svd.update()
        for name, mean in self.found.gradients.items():
            with _naming(name):
                mean.update()
        compared = [record for record in self._records if record.converged_at is None and record.compare(number)]
        falls = 0
        for record in compared:
            shares = [share for _, share in record.shares]
            falls += falls_sharply(shares)
            if has_converged(shares, record.svd.captured, self.options.tolerance):
                record.converged_at = number + 1
        if 2 * falls > len(compared) and not self._warned:
            self._warned = True
            warnings.warn(
                f"batch {number}: far less of it is captured than of all batches before, in {falls} of {len(compared)} "
                "inputs, as if another kind of data began. Shuffle the data: sorted, its end counts for too little.",
                stacklevel=2,
            )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.found.seconds["decomposition"] += time.perf_counter() - start


def run_pass(
    run: Pass,
    shard: Shard,
    max_batches: int,
    processes: Processes,
    progress: tqdm[Any],
    save: Callable[[], None] | None = None,
) -> Collected:
    """Take in batches until there is a reason to stop, the same for all processes, and merge what all have found.

    Before each batch all processes tell each other whether they have one, have seen enough, or were interrupted. Those
    that share the parts of one model run it together: one that has no batch runs its spare one.

    Args:
        run: Takes them in.
        shard: The batches of this process.
        max_batches: Bound on the number of batches, of all processes together.
        processes: The processes.
        progress: Counts batches, of all processes.
        save: Called about once a minute, in all processes at the same time.

    Returns:
        What all processes have found, the same in all of them.
    """
    try:
        run.found.stop_reason = _take_all(run, shard, max_batches, processes, progress, save)
    except KeyboardInterrupt:
        if processes.size > 1:  # outside of what can be interrupted in one process alone
            raise
        run.found.stop_reason = "interrupted"
    whole = processes.merge(run.found)
    if processes.size > 1:  # rank 0 reads the bytes, too: all do the same with them
        return from_bytes(processes.share(whole and to_bytes(whole)))
    return run.found


def _take_all(
    run: Pass,
    shard: Shard,
    max_batches: int,
    processes: Processes,
    progress: tqdm[Any],
    save: Callable[[], None] | None,
) -> str:
    found, total, interrupted, saved = run.found, 0, False, time.monotonic()
    while True:
        wanted = not (interrupted or run.converged) and processes.rank < max_batches - total
        try:
            batch = _read(shard.batches, found.seconds) if wanted else None
        except KeyboardInterrupt:
            batch, interrupted = None, True
        due = processes.rank == 0 and time.monotonic() - saved > SAVE_EVERY
        reading, converged, interrupts, saving = processes.sum(batch is not None, run.converged, interrupted, due)
        if interrupts:
            return "interrupted"
        if not reading:
            limit = "max_batches" if total >= max_batches else "exhausted"
            return "converged" if converged == processes.size else limit
        if saving and save is not None:
            save()
            saved = time.monotonic()
        try:
            if batch is not None:
                run.take(batch[0], found.n_batches[0])
            elif shard.spare is not None:
                run.idle(shard.spare)
        except KeyboardInterrupt:
            if shard.spare is not None:  # the others are in the middle of a pass that needs this process
                raise
            interrupted = True
        total += reading
        progress.set_postfix_str(f"{run.n_converged}/{run.n_groups} inputs converged", refresh=False)
        progress.update(reading)


def progress_bar(batches: Iterable[Any], max_batches: int, progress: bool | None) -> tqdm[Any]:
    """Make a progress bar on stderr; by default it is shown on a terminal only."""
    try:
        total = min(max_batches, len(batches)) if isinstance(batches, Sized) else max_batches
    except TypeError:  # a DataLoader has a length, but not over data that has none
        total = max_batches
    show = sys.stderr.isatty() if progress is None else progress
    return tqdm(total=total, desc="collect", unit="batch", disable=not show, dynamic_ncols=True)


def _read(batches: Iterator[Any], seconds: dict[str, float]) -> list[Any] | None:
    start = time.perf_counter()
    try:
        return [next(batches)]
    except StopIteration:
        return None
    finally:
        seconds["data"] += time.perf_counter() - start


def _is_open(records: Mapping[str, GroupRecord], name: str) -> bool:
    return name not in records or records[name].converged_at is None


def _nothing(group: str, rows: Tensor) -> None:
    """Read nothing."""


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    try:
        yield
    except LoraInitError as error:
        raise LoraInitError(f"layer {layer!r}: {error}") from None
