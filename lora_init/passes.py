"""One bounded pass over the data: the running decompositions of all layers, and when they have seen enough."""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lora_init.activations import ActivationTap, Forward, RowsFunction
from lora_init.errors import LoraInitError
from lora_init.svd import IncrementalSVD, apply_updates, settle

# Batches before which no layer can count as converged: the held-out share of so few says little.
_MIN_BATCHES = 8
# Batches whose captured shares are kept, for the sampling error of the ranks.
_KEPT_BATCHES = 16


@dataclass
class GroupRecord:
    """The running decomposition of one input group and how well it predicted the batches it had not seen.

    Attributes:
        svd: The decomposition.
        ratios: For each of the last batches, the share of its variance along each component, float64 [k].
        shares: For each batch but the first, the share captured by all components to report.
        converged_at: Number of batches after which the group needed no more; None while it does.
    """

    svd: IncrementalSVD
    ratios: deque[Tensor] = field(default_factory=lambda: deque(maxlen=_KEPT_BATCHES))
    shares: list[float] = field(default_factory=list)
    converged_at: int | None = None

    def held_out(self) -> float:
        """Mean share captured over the later half of the batches; NaN before the second batch."""
        return statistics.fmean(self._later()) if self.shares else float("nan")

    def _later(self) -> list[float]:
        return self.shares[len(self.shares) // 2 :]

    def _has_converged(self, tolerance: float) -> bool:
        """Tell whether more data has nothing left to improve.

        What any k directions can capture lies between the held-out share and the share on the rows seen, which the
        components were chosen to fit. They are done when the two meet, the held-out share less its standard error: by
        luck of a few easy batches they meet too early.
        """
        later = self._later()
        error = statistics.stdev(later) / len(later) ** 0.5
        gap = self.svd.captured - (statistics.fmean(later) - error)
        return bool(gap <= tolerance * self.svd.captured)

    def after_batch(self, tolerance: float, n_batches: int) -> None:
        """Record the batch that was just taken in, and decide whether more are needed."""
        if self.svd.held_out is None:
            return
        captured, total, _ = self.svd.held_out
        self.svd.held_out = None
        ratios = torch.zeros(self.svd.n_components, dtype=torch.float64)
        if total > 0:
            ratios[: len(captured)] = captured[: self.svd.n_components].cpu() / total
        self.ratios.append(ratios)
        self.shares.append(float(ratios.sum()) if total > 0 else 1.0)
        if n_batches >= _MIN_BATCHES and len(self.shares) > 2 and self._has_converged(tolerance):
            self.converged_at = n_batches
            self.svd.release()


@dataclass
class Collected:
    """What one pass found: a decomposition per input group, before anything is frozen.

    Attributes:
        groups: Record of each group, by the name of its first layer.
        group_of: Group of every layer that ran, in the order of `modules`.
        never_ran: Layers that no batch reached.
        n_calls: Largest number of runs of each layer in one forward pass.
        n_batches: Batches taken in.
        stop_reason: `"converged"`, `"exhausted"`, `"max_batches"` or `"interrupted"`.
        seconds: Wall time of the parts `forward`, `decomposition` and `data`.
    """

    groups: dict[str, GroupRecord] = field(default_factory=dict)
    group_of: dict[str, str] = field(default_factory=dict)
    never_ran: list[str] = field(default_factory=list)
    n_calls: dict[str, int] = field(default_factory=dict)
    n_batches: int = 0
    stop_reason: str = "exhausted"
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "decomposition": 0.0, "data": 0.0})


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
) -> Collected:
    """Run the model over the batches and decompose what each module receives. The loop under `collect`.

    Args:
        model: Any torch model; its mode and hooks are as before afterwards, also after an exception.
        modules: Modules to watch, by name.
        batches: Any iterable; read once, from its start, `max_batches` at most.
        n_components: Components of each group.
        center: Subtract the mean.
        token_mask: See `collect`.
        max_batches: Bound on the number of batches.
        tolerance: See `collect`.
        seed: Seed of the decompositions.
        forward: Runs the model on a batch.
        rows: Rows of a module from its name and arguments, in place of the masking; modules are then not grouped.
        progress: Show a progress bar; by default only on a terminal.

    Returns:
        The running decompositions; after Ctrl-C with `stop_reason="interrupted"`.

    Raises:
        LoraInitError: See `collect`.
    """
    if max_batches < 1:
        raise LoraInitError(f"max_batches={max_batches}, expected at least 1.")
    found = Collected()
    seconds = found.seconds

    def sink(group: str, group_rows: Tensor) -> None:
        start = time.perf_counter()
        if group not in found.groups:
            found.groups[group] = GroupRecord(IncrementalSVD(n_components, center, seed))
        try:
            found.groups[group].svd.project(group_rows)
        except LoraInitError as error:
            raise LoraInitError(f"layer {group!r}: {error}") from None
        seconds["decomposition"] += time.perf_counter() - start

    def wanted(group: str) -> bool:
        return group not in found.groups or found.groups[group].converged_at is None

    with (
        ActivationTap(model, modules, token_mask, forward, rows) as tap,
        _progress_bar(batches, max_batches, progress) as bar,
    ):
        try:
            for batch in _timed(islice(batches, max_batches), seconds):
                started, inside = time.perf_counter(), seconds["decomposition"]
                try:
                    tap.run(batch, sink, wanted)
                    passed = time.perf_counter()
                    _take_in(found, tolerance)
                except (LoraInitError, MemoryError, RuntimeError) as error:
                    raise _explained(error, found.n_batches) from error
                seconds["forward"] += passed - started - (seconds["decomposition"] - inside)
                seconds["decomposition"] += time.perf_counter() - passed
                converged = sum(not wanted(group) for group in found.groups)
                bar.set_postfix_str(f"{converged}/{len(found.groups)} inputs converged", refresh=False)
                bar.update()
                if converged == len(found.groups) and len(tap.group_of) == len(modules):
                    found.stop_reason = "converged"
                    break
            else:
                found.stop_reason = "max_batches" if found.n_batches == max_batches else "exhausted"
        except KeyboardInterrupt:
            found.stop_reason = "interrupted"
        settle(record.svd for record in found.groups.values())
        found.group_of = {name: tap.group_of[name] for name in modules if name in tap.group_of}
        found.never_ran = [name for name in modules if name not in tap.group_of]
        found.n_calls = dict(tap.n_calls)
    return found


def _take_in(found: Collected, tolerance: float) -> None:
    """Complete the batch that was projected, for all groups at once."""
    try:
        apply_updates(record.svd for record in found.groups.values())
    except LoraInitError as error:
        name = next(n for n, r in found.groups.items() if r.svd is getattr(error, "decomposition", None))
        raise LoraInitError(f"layer {name!r}: {error}") from None
    found.n_batches += 1
    for record in found.groups.values():
        if record.converged_at is None:
            record.after_batch(tolerance, found.n_batches)


def _explained(error: Exception, n_batches: int) -> Exception:
    """Say in which batch an error happened; leave errors alone that are neither ours nor a lack of memory."""
    if isinstance(error, LoraInitError):
        return LoraInitError(f"batch {n_batches}: {error}")
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in text or "allocate" in text:
        return LoraInitError(f"batch {n_batches}: out of memory. Use a smaller batch or shorter sequences.")
    return error


def _timed(batches: Iterable[Any], seconds: dict[str, float]) -> Iterator[Any]:
    iterator = iter(batches)
    while True:
        start = time.perf_counter()
        try:
            batch = next(iterator)
        except StopIteration:
            return
        finally:
            seconds["data"] += time.perf_counter() - start
        yield batch


def _progress_bar(batches: Iterable[Any], max_batches: int, progress: bool | None) -> tqdm[Any]:
    total = min(max_batches, len(batches)) if isinstance(batches, Sized) else max_batches
    show = sys.stderr.isatty() if progress is None else progress
    return tqdm(total=total, desc="collect", unit="batch", disable=not show, dynamic_ncols=True)
