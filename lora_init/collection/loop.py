"""One bounded pass over the data: the running decompositions of all layers, and when they have seen enough.

What is trained from is a subspace and its size, so a pass has seen enough when other data would give the same ones.
Two halves of the batches test that: the share of one half's variance that the other half's directions capture. In the
project's studies this share orders what training loses by stopping early. How well the next batch is predicted does
not, and said enough where 1.5 % were lost: it only has to be steady, as a guard against data that drift.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import length_hint
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lora_init.collection.activations import ActivationHooks, Sink
from lora_init.collection.backward import BackwardHooks
from lora_init.collection.processes import Processes, Shard
from lora_init.errors import LoraInitError, first_line, is_out_of_memory, warn
from lora_init.layers.masks import NothingCountsError
from lora_init.layers.running import Forward, naming_strange_tokens
from lora_init.layers.wrappers import run_eagerly
from lora_init.statistics.gradient_spectrum import MeanGradient
from lora_init.statistics.incremental_svd import IncrementalSVD

# Batches before which the start counts as unknown: two halves of fewer say little, of sorted data least of all.
MIN_BATCHES = 8
# Share of what a start captures that it may lose on other data. With 0.05 training ended as after 64 batches; see docs.
TOLERANCE = 0.05
# Seconds between two calls of `save`.
SAVE_EVERY = 60.0

_Half = TypeVar("_Half", IncrementalSVD, MeanGradient)


@dataclass
class Halves(Generic[_Half]):
    """Two records of a layer: even batches go to one, odd batches to the other; `whole` merges them.

    If both halves of the data give the same start, other data would give it, too: `reliability` estimates how much.
    """

    halves: tuple[_Half, _Half]
    reliability: float = 0.0  # share of what the start captures that it would keep on other data

    @property
    def current(self) -> _Half:
        """The half that the next batch goes to."""
        return self.halves[0]

    def merge(self, other: Halves[_Half]) -> None:
        """Take in what another process has seen of this layer: more of it into the smaller half."""
        # Halves that stay about equal compare best. Even with even would not do: every process begins with an even one.
        ours = sorted(self.halves, key=_n_samples)
        theirs = sorted(other.halves, key=_n_samples)
        ours[0].merge(theirs[1])
        ours[1].merge(theirs[0])

    def whole(self) -> _Half:
        """Merge the halves, which stay as they are."""
        even, odd = map(copy, self.halves)  # a state is replaced as a whole, never changed
        return even.merge(odd)

    @property
    def n_samples(self) -> int:
        """Rows taken in so far."""
        return sum(half.n_samples for half in self.halves)

    def update(self) -> bool:
        """Complete a batch; return whether it had any rows."""
        half, other = self.halves
        before = half.n_samples
        half.update()
        if half.n_samples == before:
            return False
        self.halves = (other, half)
        return True

    def compare(self, rank: int) -> None:
        """Compare the first `rank` directions of the halves, and set `reliability`.

        They agree as two samples of half the size do. What a sample of this size keeps follows by the formula
        of Spearman and Brown, which corrects split-half reliabilities.
        """
        agreement = self.halves[0].agreement(self.halves[1], rank)
        self.reliability = 2 * agreement / (1 + agreement)


def _n_samples(half: IncrementalSVD | MeanGradient) -> int:
    return half.n_samples


@dataclass
class GroupRecord(Halves[IncrementalSVD]):
    """The running decomposition of one input group and how well it predicted the batches it had not seen."""

    # For each batch that its half could be tested by: its number, the share of its variance that the components
    # captured, and that share over the one of the rows before.
    shares: list[tuple[int, float, float]] = field(default_factory=list)

    def record_share(self, number: int) -> bool:
        """Record how well the last batch, of this number, was predicted; return whether there were earlier ones."""
        half = self.halves[1]  # `update` has exchanged the halves
        if half.held_out is None:
            return False
        captured, total = half.held_out
        share = relative = 1.0  # a batch without variance is no surprise
        if total > 0:
            share = float(captured[: half.n_components].sum()) / total
        if half.captured > 0:
            relative = share / half.captured
        self.shares.append((number, share, relative))
        return True

    def held_out(self) -> float:
        """Mean share captured over the later half of the batches; NaN where no batch was predicted."""
        later = [share for _, share, _ in self.shares[len(self.shares) // 2 :]]
        if not later:
            return math.nan
        return statistics.fmean(later)

    def merge(self, other: Any) -> None:
        """Take in what another process has seen of this group."""
        super().merge(other)
        self.shares = sorted(self.shares + other.shares)


def is_enough(keeps: float, relative: Sequence[float], tolerance: float) -> bool:
    """Check whether more data would leave the start as it is, by at most `tolerance`.

    Halves of data that drift agree, too. There later batches are captured worse than the rows before, while the
    components follow, and then better than what they hold of both kinds. So the later half of the batches has to be
    captured as well as the rows before it, and not to rise by more than twice that; single batches differ.
    `relative` has for each batch the share of its variance that was captured, over that share of the rows before.
    """
    # The first batch of each half could not be predicted by anything.
    if len(relative) + 2 < MIN_BATCHES or keeps < 1.0 - tolerance:
        return False
    later = relative[len(relative) // 2 :]
    middle = len(later) // 2
    rise = statistics.fmean(later[middle:]) - statistics.fmean(later[:middle])
    return abs(statistics.fmean(later) - 1.0) <= tolerance and rise <= 2 * tolerance


def falls_sharply(shares: Sequence[float]) -> bool:
    """Check whether the last batch was predicted far worse than those before: by a quarter, and five deviations."""
    if len(shares) < 4:
        return False
    *before, last = shares
    mean = statistics.fmean(before)
    return last < 0.75 * mean and last < mean - 5.0 * statistics.stdev(before)


def row_norms(x: Tensor, rows: Tensor | None, order: int) -> Tensor:
    """Compute the norm of each row of x [..., d], or of those named: [n], in float32 at least."""
    # [..., d] -> [n]; squares would lose digits in bfloat16, and overflow in float16
    norms: Tensor = torch.linalg.vector_norm(x, order, -1, dtype=torch.promote_types(x.dtype, torch.float32)).flatten()
    if rows is None:
        return norms
    return norms.index_select(0, rows)


@dataclass
class Collected:
    """What one pass found, before anything is frozen; see `Provenance` for what is not explained here."""

    groups: dict[str, GroupRecord] = field(default_factory=dict)  # by the name of a group's first layer
    weighted: dict[str, GroupRecord] = field(default_factory=dict)  # of rows times the size of their gradient, by layer
    gradients: dict[str, Halves[MeanGradient]] = field(default_factory=dict)
    # Sums over tokens, by kind and name: "inputs" of a group's |x_j|, "outputs" of a layer's mean square, and "tokens".
    sums: Counter[tuple[str, str]] = field(default_factory=Counter)
    n_labels: int = 0
    group_of: dict[str, str] = field(default_factory=dict)  # of every layer that ran
    n_batches: list[int] = field(default_factory=lambda: [0])  # by process
    empty: list[str] = field(default_factory=list)  # why nothing of a batch counted, for each such batch
    bad: list[str] = field(default_factory=list)  # why a batch failed, for each that was skipped
    stop_reason: str = "interrupted"
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "decomposition": 0.0, "data": 0.0})

    @property
    def kinds(self) -> tuple[dict[str, Any], ...]:
        """The halves of all layers by name, of each kind."""
        return self.groups, self.weighted, self.gradients

    @property
    def keeps(self) -> float:
        """Share of what the start captures that it would keep on other data, in the mean over layers.

        Of inputs, weighted rows and gradients it is the least; 0 before anything was compared.
        """
        means = []
        for kind in self.kinds:
            if kind:
                means.append(statistics.fmean(halves.reliability for halves in kind.values()))
        return min(means, default=0.0)

    @property
    def relative(self) -> list[float]:
        """How well each batch was captured against the rows before it, in the mean over layers, see `is_enough`."""
        # By the number of the batch: a layer that did not run in a batch has no entry for it.
        of_batch: dict[int, list[float]] = {}
        for record in chain(self.groups.values(), self.weighted.values()):
            for number, _, relative in record.shares:
                of_batch.setdefault(number, []).append(relative)
        return [statistics.fmean(of_batch[number]) for number in sorted(of_batch)]

    def merge(self, other: Collected) -> None:
        """Take in what another process has collected in the same pass."""
        for ours, theirs in zip(self.kinds, other.kinds, strict=True):
            for name, halves in theirs.items():
                if name in ours:
                    ours[name].merge(halves)
                else:
                    ours[name] = halves
        self.sums.update(other.sums)
        self.n_labels += other.n_labels
        self.group_of = other.group_of | self.group_of
        self.n_batches = self.n_batches + other.n_batches
        self.empty, self.bad = self.empty + other.empty, self.bad + other.bad
        # Processes work at the same time: the slowest is how long it took.
        self.seconds = {part: max(value, other.seconds[part]) for part, value in self.seconds.items()}


@dataclass
class Pass(Sink):
    """Take in batches, one at a time, and know when there have been enough; `found` is what this process has so far."""

    hooks: ActivationHooks
    forward: Forward
    n_components: int  # of each group
    rank: int  # number of directions that a start takes, by which halves are compared
    backward: BackwardHooks | None = None
    center: bool = True  # weighted rows keep their mean, for it is part of the gradient
    tolerance: float = TOLERANCE
    seed: int = 0
    n_triplets: int = 0  # of each mean gradient
    found: Collected = field(default_factory=Collected, init=False)
    failure: BaseException | None = field(default=None, init=False)  # what ended the pass, here or in another process
    failed: str = field(default="", init=False)  # the name of the batch that did
    _n_labels: int = field(default=0, init=False)  # of the batch that was projected
    _sums: dict[tuple[str, str], Any] = field(default_factory=dict, init=False)  # of it, on the model's device

    @property
    def converged(self) -> bool:
        """Whether all layers have run and the start, in the mean over them, needs no more data."""
        # A layer that runs in some batches only is waited for: it would have no statistics at all.
        all_ran = len(self.hooks.group_of) == len(self.hooks.modules)
        return all_ran and is_enough(self.found.keeps, self.found.relative, self.tolerance)

    def project(self, batch: Any, name: str) -> bool:
        """Run the model on a batch, called `name` in errors; `update` then takes it in, `forget` drops it.

        False if no token of the batch counts; the model has not been run then.
        """
        collected, seconds = self.found, self.found.seconds
        start, before = time.perf_counter(), seconds["decomposition"]
        try:
            with naming_strange_tokens():  # the batch is named below
                self._n_labels = self._run(batch, self)
            for layer, mean in collected.gradients.items():
                with self._computing(layer):
                    mean.current.check_batch()
            return True
        except NothingCountsError as error:
            collected.empty.append(f"{name}: {error}")
            return False
        except (LoraInitError, MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise LoraInitError(f"{name}: out of memory. Use a smaller batch or shorter sequences.") from error
            if isinstance(error, LoraInitError):
                raise error.within(name) from error
            raise
        finally:
            # Decompositions run inside the hooks of the forward pass, and have their own time.
            seconds["forward"] += time.perf_counter() - start - (seconds["decomposition"] - before)

    def forget(self) -> None:
        """Drop the batch that was projected, or what there is of it."""
        self._n_labels, self._sums = 0, {}
        for kind in self.found.kinds:
            for halves in kind.values():
                halves.current.forget_batch()

    def idle(self, batch: Any) -> None:
        """Run a batch that does not count: the other processes run their part of a sharded model with this one."""
        self._run(batch, Sink())

    def _run(self, batch: Any, sink: Sink) -> int:
        if self.backward is not None:
            return self.backward.run(batch, sink)
        with torch.no_grad(), self.hooks.watch(batch, sink) as moved, run_eagerly():
            self.forward(self.hooks.model, moved)
        return 0

    def rows(self, group: str, rows: Tensor) -> None:
        """Add rows to the batch of a group."""
        with self._computing(group):
            self._record(self.found.groups, group).current.project(rows)
            self._add("inputs", group, row_norms(rows, None, 1).sum())

    def output(self, layer: str, y: Tensor, tokens: Tensor | None) -> None:
        """Add to the mean square of what a layer computes."""
        norms = row_norms(y, tokens, 2)
        self._add("outputs", layer, norms.square().sum() / y.shape[-1])
        self._add("tokens", layer, len(norms))

    def _add(self, kind: str, name: str, value: Any) -> None:
        self._sums[kind, name] = self._sums.get((kind, name), 0.0) + value

    def gradient(self, name: str, x: Tensor, g: Tensor) -> None:
        """Add to the batch of a layer's mean gradient, and of the rows weighted by its size."""
        with self._computing(name):
            if name not in self.found.gradients:
                make = partial(MeanGradient, self.n_triplets, self.seed)
                self.found.gradients[name] = Halves((make(), make()))
            self.found.gradients[name].current.project(g, x)
            # The second moment of the rows |g_t| x_t is the sum of G_t^T G_t over tokens, for G_t = g_t x_t^T.
            self._record(self.found.weighted, name).current.project(x, row_norms(g, None, 2))

    def _record(self, records: dict[str, GroupRecord], name: str) -> GroupRecord:
        if name not in records:
            center = self.center and records is self.found.groups
            make = partial(IncrementalSVD, self.n_components, center, self.seed)
            records[name] = GroupRecord((make(), make()))
        return records[name]

    @contextmanager
    def _computing(self, layer: str) -> Iterator[None]:
        """Count the time that a block takes as time of decompositions, and name the layer in its errors."""
        start = time.perf_counter()
        try:
            yield
        except LoraInitError as error:
            raise LoraInitError(f"layer {layer!r}: {error}") from None
        finally:
            self.found.seconds["decomposition"] += time.perf_counter() - start

    def update(self, name: str) -> None:
        """Complete the batch for all groups; compare their halves where the pass may end."""
        number = self.found.n_batches[0]
        self.found.n_batches[0] += 1
        self.found.n_labels, self._n_labels = self.found.n_labels + self._n_labels, 0
        # Only here do they leave the model's device: who reads a number has to wait for a GPU.
        self.found.sums.update({key: float(value) for key, value in self._sums.items()})
        self._sums = {}
        self.found.group_of = dict(self.hooks.group_of)
        compared = []
        for kind in self.found.kinds:
            for layer, halves in kind.items():
                with self._computing(layer):
                    if not halves.update():
                        continue
                    if number + 1 >= MIN_BATCHES:
                        halves.compare(self.rank)
                    if isinstance(halves, GroupRecord) and halves.record_share(number):
                        compared.append(halves)
        n_falls = 0
        for record in compared:
            if falls_sharply([share for _, share, _ in record.shares]):
                n_falls += 1
        if 2 * n_falls > len(compared):
            warn(
                f"{name}: far less of it is captured than of all batches before, in {n_falls} of {len(compared)} "
                "inputs, as if another kind of data began. Shuffle the data: sorted, its end counts for too little."
            )


def _next_batch(run: Pass, shard: Shard, total: int, max_batches: int, processes: Processes) -> tuple[int, Any]:
    """Read the batch that this process takes in this step; return its position, and None where it takes none.

    `total` batches were taken by all processes before this step.
    """
    wants = not (processes.interrupted or run.converged)
    wanting = processes.gather(wants)
    before = sum(wanting[: processes.rank])  # processes that take a batch of this step before this one does
    position = shard.start
    if shard.common:
        # The next batches go to those that want one, so that none is left out where a process has had enough.
        position += total + before
    else:
        position += run.found.n_batches[0]
    if not wants or before >= max_batches - total:
        return position, None
    batch = _read(shard, position, run.found.seconds, processes)
    if batch is None:
        run.failure = shard.error
    return position, batch


def run_pass(
    run: Pass,
    shard: Shard,
    max_batches: int,
    processes: Processes,
    progress: tqdm[Any],
    save: Callable[[], None] | None = None,
    skip_bad_batches: int = 0,
) -> Collected:
    """Take in batches until there is a reason to stop, the same for all processes, and merge what all have found.

    Before each batch all processes tell each other whether they have one, have seen enough, or were interrupted; after
    it whether it failed: where the pass goes on, the others take in theirs, and where it ends, none does. Those that
    share the parts of one model run it together: one that has no batch runs its spare one, and one that fails raises at
    once, for the others wait inside the model. `max_batches` bounds the batches of all together, and `skip_bad_batches`
    those that may fail; `run.failure` is then what ended the pass. `save` is called about once a minute, in all
    processes at the same time.
    """
    collected, total, n_bad, saved = run.found, 0, 0, time.monotonic()
    while True:
        position, batch = _next_batch(run, shard, total, max_batches, processes)
        # One clock decides: several would not all say so in the same step.
        due = processes.rank == 0 and time.monotonic() - saved > SAVE_EVERY
        reading, converged, interrupts, saving, failed = processes.sum(
            batch is not None, run.converged, processes.interrupted, due, run.failure is not None
        )
        if interrupts or failed or not reading:
            break
        # Before the batch: what is written is of complete batches.
        if saving and save is not None:
            save()
            saved = time.monotonic()
        name = f"batch {position}"
        failure = _attempt(run, batch, name, shard.spare, processes)
        if processes.interrupted and processes.size == 1:
            continue  # to the end; the batch was not completed
        n_bad += processes.sum(failure is not None)[0]
        if n_bad > skip_bad_batches:
            run.failure, run.failed, failed = failure, name, 1
            break
        if failure is not None:
            run.forget()
            collected.bad.append(_line(failure, name))
        # A batch that failed is completed, too: it has no rows, but its number is used.
        if batch is not None:
            run.update(name)
        total += reading
        if collected.keeps:
            progress.set_postfix_str(f"the start would keep {collected.keeps:.0%}", refresh=False)
        progress.update(reading)
    run.forget()  # a batch that was not completed
    processes.interrupted |= interrupts > 0
    everyone, at_limit = converged == processes.size, total >= max_batches
    run.failure, collected.stop_reason = _outcome(run, processes, interrupts > 0, failed > 0, everyone, at_limit)
    return processes.merge(collected)


def _outcome(
    run: Pass, processes: Processes, interrupted: bool, failed: bool, converged: bool, at_limit: bool
) -> tuple[BaseException | None, str]:
    """Return the error that ended the pass of all processes, None if none did, and why it ended in a word."""
    if interrupted:
        return KeyboardInterrupt(), "interrupted"
    if failed:
        return _first_failure(run, processes), "failed"
    if converged:
        return None, "converged"
    if at_limit:
        return None, "max_batches"
    return None, "exhausted"


def _first_failure(run: Pass, processes: Processes) -> BaseException:
    """Return the error of this process, or else one that names whose ended the pass."""
    own_line = None
    if run.failure is not None:
        own_line = _line(run.failure, run.failed)
    lines = processes.gather(own_line)
    if run.failure is not None:
        return run.failure
    rank = next(rank for rank, line in enumerate(lines) if line)
    return LoraInitError(f"rank {rank} failed: {lines[rank]}")


def _attempt(
    run: Pass, batch: list[Any] | Exception | None, name: str, spare: Any, processes: Processes
) -> Exception | None:
    """Run a batch, or what takes its place; return the error if it fails. When alone, Ctrl-C ends it."""
    alone = processes.size == 1
    try:
        with processes.interruptible() if alone else nullcontext():
            if isinstance(batch, Exception):  # of the data, which `_read` has kept for here
                raise batch
            ran = batch is not None and run.project(batch[0], name)
            if not ran and spare is not None:
                run.idle(spare)
    except KeyboardInterrupt:
        if not alone:
            raise
        processes.interrupted = True
    except Exception as error:
        # The others wait inside the sharded model and would never be told: this process has to end.
        if spare is not None and not alone:
            raise
        return error
    return None


def _line(error: BaseException, name: str) -> str:
    if isinstance(error, LoraInitError):
        return str(error)
    return f"{name or 'the data'}: {type(error).__name__}: {first_line(error)}"


def progress_bar(batches: Iterable[Any], max_batches: int, progress: bool | None) -> tqdm[Any]:
    """Make a progress bar on stderr; by default it is shown on a terminal only."""
    total = min(max_batches, length_hint(batches, max_batches))
    disable = None if progress is None else not progress  # None: shown on a terminal
    return tqdm(total=total, desc="collect", unit="batch", disable=disable, dynamic_ncols=True)


def _read(shard: Shard, position: int, seconds: dict[str, float], processes: Processes) -> list[Any] | Exception | None:
    """Read a batch; return what the data raises in its place, None at their end."""
    start = time.perf_counter()
    try:
        with processes.interruptible():
            return [shard.read(position)]
    except StopIteration:
        return None
    except KeyboardInterrupt:
        processes.interrupted = True
        return None
    except Exception as error:
        return error
    finally:
        seconds["data"] += time.perf_counter() - start
