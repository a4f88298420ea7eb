"""One bounded pass over the data: the running decompositions of all layers, and when they have seen enough."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lora_init.collection.activations import ActivationTap, Forward, RowsFunction
from lora_init.collection.backward import GradientTap, Read
from lora_init.collection.processes import Checkpoint, Rounds, Shard, Team, length, own_batches
from lora_init.collection.state import Collected, GroupRecord
from lora_init.errors import LoraInitError
from lora_init.statistics.gradient_spectrum import is_weighted, weighted_group
from lora_init.statistics.incremental_svd import IncrementalSVD
from lora_init.statistics.mean_gradient import MeanGradient


def collect_groups(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    n_components: int,
    center: bool = True,
    token_mask: str = "attention",
    max_batches: int = 64,
    tolerance: float = 0.02,
    seed: int = 0,
    forward: Forward | None = None,
    rows: RowsFunction | None = None,
    progress: bool | None = None,
    checkpoint: Checkpoint | None = None,
    team: Team | None = None,
    gradients: Callable[[ActivationTap], GradientTap] | None = None,
) -> Collected:
    """Run the model over the batches and decompose what each module receives. The loop under `collect`.

    Args:
        model: Any torch model; its mode and hooks are as before afterwards, also after an exception.
        modules: Modules to watch, by name.
        batches: Any iterable; read once, from its start, `max_batches` at most.
        n_components: Components of each group.
        center: Subtract the mean.
        token_mask: See `collect`.
        max_batches: Bound on the number of batches, of all processes together.
        tolerance: See `collect`.
        seed: Seed of the decompositions.
        forward: Runs the model on a batch.
        rows: Rows of a module from its name and arguments, in place of the masking; modules are then not grouped.
        progress: Show a progress bar; by default only on a terminal.
        checkpoint: File to write the state to, and to go on from.
        team: The processes that make this pass together; by default this one alone.
        gradients: Makes the tap for passes that go backward, too.

    Returns:
        The running decompositions, the same in all processes; after Ctrl-C with `stop_reason="interrupted"`.

    Raises:
        LoraInitError: See `collect`.
    """
    if max_batches < 1:
        raise LoraInitError(f"max_batches={max_batches}, expected at least 1.")
    team = team or Team(alone=True)
    run = _Pass(n_components, center, seed, tolerance, alone=team.size == 1)
    found = run.found
    shard = Shard(own_batches(team, batches), found.seconds, hashed=checkpoint is not None)
    with (
        ActivationTap(model, modules, token_mask, forward, rows) as tap,
        gradients(tap) if gradients else nullcontext() as run.gradients,
        _progress_bar(batches, max_batches, progress if team.rank == 0 else False) as bar,
    ):
        if team.size > 1:
            rounds = Rounds(team, run.make, tolerance, found, tap, shard, bar, checkpoint)
            found.stop_reason = rounds.run(run.one_batch, run.idle, max_batches)
        else:
            if checkpoint is not None:
                shard.skip(checkpoint.read(found, run.make)[0], str(checkpoint.path))
                checkpoint.begin(found, [shard.digests])
                tap.resume(found.group_of, found.n_calls)
                bar.update(found.n_batches)
            found.stop_reason = "interrupted"
            with suppress(KeyboardInterrupt):
                found.stop_reason = run.all_batches(tap, shard, max_batches, bar, checkpoint)
        # A batch that was interrupted may have been the first to reach a layer.
        found.groups = {name: record for name, record in found.groups.items() if record.svd.n_samples}
        found.gradients = {name: mean for name, mean in found.gradients.items() if mean.n_samples}
        ran = [name for name in modules if tap.group_of.get(name) in found.groups]
        ran = [name for name in ran if gradients is None or name in found.gradients]
        found.group_of = {name: tap.group_of[name] for name in ran}
        found.never_ran = [name for name in modules if name not in found.group_of]
        found.n_calls = dict(tap.n_calls)
    return found


class _Pass:
    """The loop, and what the hooks call inside it."""

    def __init__(self, n_components: int, center: bool, seed: int, tolerance: float, alone: bool) -> None:
        self.found = Collected()
        self.gradients: GradientTap | None = None
        self._n_components, self._center, self._seed = n_components, center, seed
        self._tolerance = tolerance
        self._alone = alone  # several processes decide together, when they meet

    def make(self, group: str) -> IncrementalSVD:
        """Make an empty decomposition for a group; weighted rows keep their mean, for it is part of the gradient."""
        return IncrementalSVD(self._n_components, self._center and not is_weighted(group), self._seed)

    def all_batches(
        self, tap: ActivationTap, shard: Shard, max_batches: int, bar: tqdm[Any], checkpoint: Checkpoint | None
    ) -> str:
        """Take in batches until there is a reason to stop, and return it."""
        found = self.found
        while True:
            if 0 < len(found.groups) == self._n_converged() and len(tap.group_of) == len(tap.modules):
                return "converged"
            if found.n_batches >= max_batches:
                return "max_batches"
            batch = shard.take(1)
            if not batch:
                return "exhausted"
            self.one_batch(tap, batch[0], found.n_batches)
            bar.set_postfix_str(f"{self._n_converged()}/{len(found.groups)} inputs converged", refresh=False)
            bar.update()
            if checkpoint is not None:
                found.group_of, found.n_calls = dict(tap.group_of), dict(tap.n_calls)
                checkpoint.write_if_due(found, [shard.digests])

    def one_batch(self, tap: ActivationTap, batch: Any, position: int) -> None:
        """Take in one batch; `position` is for messages."""
        found, seconds = self.found, self.found.seconds
        started, inside = time.perf_counter(), seconds["decomposition"]
        try:
            if self.gradients is None:
                tap.run(batch, self._sink, self._wanted)
                labels = 0
            else:
                labels = self.gradients.run(batch, self._gradient_sink, self._wanted)
            passed = time.perf_counter()
            compared = _take_in(found)
            found.n_labels += labels
        except (LoraInitError, MemoryError, RuntimeError) as error:
            raise _explained(error, position) from error
        if self._alone:
            self._decide(compared)
        seconds["forward"] += passed - started - (seconds["decomposition"] - inside)
        seconds["decomposition"] += time.perf_counter() - passed

    def idle(self, tap: ActivationTap, batch: Any) -> None:
        """Run a batch that does not count, for the processes that run a sharded model together with this one."""
        if self.gradients is None:
            tap.run(batch, lambda group, rows: None)
        else:
            self.gradients.run(batch, lambda read: None, lambda group: True)

    def _decide(self, compared: Iterable[GroupRecord]) -> None:
        for record in compared:
            record.decide(self._tolerance, self.found.n_batches)

    def _sink(self, group: str, rows: Tensor) -> None:
        start = time.perf_counter()
        try:
            self._svd(group).project(rows)
        except LoraInitError as error:
            raise LoraInitError(f"layer {group!r}: {error}") from None
        self.found.seconds["decomposition"] += time.perf_counter() - start

    def _gradient_sink(self, read: Read) -> None:
        start = time.perf_counter()
        for group in read.inputs:
            self._svd(group).project(read.rows)
        for name, (g, norms, _) in read.gradients.items():
            self._mean(name).project(g, read.rows)
            if self._wanted(group := weighted_group(name)):
                self._svd(group).project(read.rows, norms)
        self.found.seconds["decomposition"] += time.perf_counter() - start

    def _svd(self, group: str) -> IncrementalSVD:
        if group not in self.found.groups:
            self.found.groups[group] = GroupRecord(self.make(group))
        return self.found.groups[group].svd

    def _mean(self, name: str) -> MeanGradient:
        if name not in self.found.gradients:
            assert self.gradients is not None
            self.found.gradients[name] = MeanGradient(self.gradients.n_triplets, self._seed)
        return self.found.gradients[name]

    def _wanted(self, group: str) -> bool:
        return group not in self.found.groups or self.found.groups[group].converged_at is None

    def _n_converged(self) -> int:
        return sum(not self._wanted(group) for group in self.found.groups)


def _take_in(found: Collected) -> list[GroupRecord]:
    """Complete the batch that was projected, for all groups at once; return those that it could be compared in."""
    for record in found.groups.values():
        record.svd.update()
    for name, mean in found.gradients.items():
        try:
            mean.update()
        except LoraInitError as error:
            raise LoraInitError(f"layer {name!r}: {error}") from None
    found.n_batches += 1
    return [record for record in found.groups.values() if record.converged_at is None and record.after_batch()]


def _explained(error: Exception, n_batches: int) -> Exception:
    """Say in which batch an error happened; leave errors alone that are neither ours nor a lack of memory."""
    if isinstance(error, LoraInitError):
        return LoraInitError(f"batch {n_batches}: {error}")
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in text or "allocate" in text:
        return LoraInitError(f"batch {n_batches}: out of memory. Use a smaller batch or shorter sequences.")
    return error


def _progress_bar(batches: Iterable[Any], max_batches: int, progress: bool | None) -> tqdm[Any]:
    known = length(batches)
    total = max_batches if known is None else min(max_batches, known)
    show = sys.stderr.isatty() if progress is None else progress
    return tqdm(total=total, desc="collect", unit="batch", disable=not show, dynamic_ncols=True)
