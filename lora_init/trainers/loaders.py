"""The loader of a trainer: read without a trace, and how long a training is by what it draws.

A loader may draw by weights, repeat rows, leave some out, or have batches of its own. So what draws its examples is run
on a copy, for as many epochs as the training has, and each example is counted.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice
from statistics import fmean
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DistributedSampler, IterableDataset, RandomSampler
from transformers.trainer_utils import has_length

from lora_init.collection.processes import digest_of
from lora_init.errors import warn
from lora_init.rates.training_length import TrainingLength
from lora_init.trainers.put_back import GENERATORS, put_back, put_back_values, undisturbed

if TYPE_CHECKING:
    from lora_init.adapters.adapter_init import AdapterInit

_MOST_DRAWN = 1_000_000  # examples, to count them; of longer epochs each is taken to come once
_EVEN = 0.1  # of how often an example is seen: so far from epochs it may be, and is said in epochs
_AS_NEW = "a stream: its examples are taken to be all new"
_ASKED = 8  # examples that are put into batches, to see how many rows each becomes


@contextmanager
def without_trace(loader: Any) -> Iterator[None]:
    """Read a loader's batches: whoever reads them after the block gets the same ones in the same order."""
    with undisturbed(), ExitStack() as stack:
        reads = getattr(loader, "base_dataloader", loader)  # accelerate's holds the one that reads
        collate = getattr(reads, "collate_fn", None)
        # accelerate's loader and torch's inside it may have samplers of their own, and so may what makes batches.
        samplers = [getattr(one, "sampler", None) for one in (loader, reads, _source_of(loader))]
        batches, data = getattr(loader, "batch_sampler", None), getattr(reads, "dataset", None)
        data = None if is_used_up(data) else data  # a stream goes on
        # Loaders count batches for themselves.
        of_loaders = [one for held in (loader, reads) for one in vars(held).values() if isinstance(one, GENERATORS)]
        seen: set[int] = set()  # one for all, since they hold each other
        for one in (*of_loaders, *samplers, batches, _source_of(loader), data, collate):
            put_back(one, stack, seen)
        put_back_values(getattr(collate, "__self__", None), stack, seen)  # of a trainer, perhaps
        if collate is not None:  # which may hold what cannot be put back
            stack.callback(setattr, reads, "collate_fn", collate)
            reads.collate_fn = _copied(collate)
        if getattr(reads, "persistent_workers", False):  # which would go on drawing where this pass ended
            stack.callback(vars(reads).update, persistent_workers=True)
            vars(reads).update(persistent_workers=False)
        if hasattr(loader, "end"):  # accelerate's: it would take training for a part of this pass
            stack.callback(loader.end)
        yield


def check_repeats(loader: Any) -> None:
    """Warn of a loader whose first batch is another one each time: it goes by what `put_back` does not know."""
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return  # it may be there only once, and to begin anew may take long
    digests = set()
    with suppress(Exception):  # the pass says what is wrong
        for _ in range(2):
            with without_trace(loader):
                digests.add(digest_of(next(iter(loader), None)))
    if len(digests) > 1:
        warn(
            "the loader's first batch is another one each time that it is read, by a counter, an iterator or random "
            "numbers that cannot be put back. So training sees other batches than it would have seen without this "
            "pass. Keep numbers and generators as attributes of the data, or make the adapter by `lora-init init`."
        )


def _copied(used: Any, *shared: Any) -> Any:
    """Copy something with all that it holds but models and what is shared; itself where that is not possible."""
    if isinstance(used, MethodType):  # of a trainer, perhaps
        return used
    with suppress(Exception):  # a class may raise what it likes when it is copied
        # In the memo of deepcopy stands what was copied already, so that this is taken as it is.
        return copy.deepcopy(used, {id(one): one for one in (*shared, *_models_in(used))})
    return used


def _models_in(holder: Any, depth: int = 3) -> Iterator[nn.Module]:
    """Find the models that something holds, as a collator may, which another may hold."""
    # Not deeper, since objects may hold each other in circles.
    for value in getattr(holder, "__dict__", {}).values() if depth else ():
        if isinstance(value, nn.Module):
            yield value
        else:
            yield from _models_in(value, depth - 1)


def is_used_up(rows: Any) -> bool:
    """Return whether rows may be there only once: a stream, but not of datasets, which begin anew each time."""
    return isinstance(rows, IterableDataset) and not type(rows).__module__.startswith("datasets.")


def examples_of_a_step(args: Any) -> int:
    """Count the examples of a step, of all processes, by a trainer's arguments."""
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def length_of(args: Any, steps: int, loader: Any = None) -> TrainingLength:
    """Describe a training of so many steps by a trainer's arguments and its loader."""
    # `len(loader)` counts the batches of this process, and `each` below the examples of a batch of all of them.
    steps, accumulated, data = int(steps), args.gradient_accumulation_steps, getattr(loader, "dataset", None)
    if not has_length(data) or not has_length(loader):
        each = _examples_of_a_batch(args, loader, _draw(loader, 1))
        return TrainingLength(steps, max(1, round(each * accumulated)), why="" if loader is None else _AS_NEW)
    epochs = steps / max(1, math.ceil(len(loader) / accumulated))  # no batch where `drop_last` leaves none
    drawn = _draw(loader, max(1.0, epochs))
    each = _examples_of_a_batch(args, loader, drawn)
    if not drawn.batches:  # then each example comes once in an epoch, as far as is known
        an_epoch = min(len(data), len(loader) * each)
        return TrainingLength(steps, max(1, round(min(each * accumulated, an_epoch))), max(1, round(an_epoch)))
    counts, sampler = Counter(chain.from_iterable(drawn.batches)), getattr(_source_of(loader), "sampler", None)
    parts = sampler.num_replicas if isinstance(sampler, DistributedSampler) else 1  # the others draw others
    # One that draws `num_samples` of them may not have come to all.
    different = len(sampler.data_source) if isinstance(sampler, RandomSampler) else min(len(counts) * parts, len(data))
    an_epoch = counts.total() * drawn.rows_an_item * parts / drawn.epochs
    batch_size = max(1, round(min(each * accumulated, an_epoch)))
    length = TrainingLength(steps, batch_size, max(batch_size, round(different * drawn.rows_an_item)))
    if parts > 1:  # shuffled, it draws other rows in each epoch, and those that it leaves out are drawn by the others
        return length
    # In the mean over draws and not over examples: what is learned from is what is drawn. For counts c an example comes
    # sum c^2 / sum c times, which is 1 if each comes once.
    again = sum(count * count for count in counts.values()) / counts.total() - 1.0  # how often a draw comes once more
    seen = 1.0 + again * epochs / drawn.epochs
    whole, part = divmod(length.epochs, 1.0)  # by the end of 1.5 epochs half of all examples have come twice
    even = (whole**2 * (1.0 - part) + (whole + 1.0) ** 2 * part) / length.epochs
    return length if abs(seen / even - 1.0) < _EVEN else replace(length, seen=seen)


def batch_of_one_process(length: TrainingLength, args: Any) -> float:
    """Count the examples of a batch of one process; a pass counts the batches of all processes."""
    return float(length.batch_size / (args.gradient_accumulation_steps * args.world_size))


def of_stream(length: TrainingLength | None, args: Any, init: AdapterInit) -> TrainingLength | None:
    """Add how many examples a stream has where the pass over it has come to its end: they come again in training."""
    made = init.provenance
    if length is None or length.why != _AS_NEW or made.stop_reason != "exhausted":
        return length
    rows = made.n_batches * batch_of_one_process(length, args)
    return replace(length, rows=max(length.batch_size, round(rows)), why="")


@dataclass(frozen=True)
class _Drawn:
    """What a loader draws: the batches of all processes, of how many epochs, and what an item of the data becomes."""

    batches: list[list[Any]] = field(default_factory=list)
    epochs: float = 0.0
    rows_an_item: float = 1.0


def _examples_of_a_batch(args: Any, loader: Any, drawn: _Drawn) -> float:
    """Count the examples of a batch, of all processes: in the mean, where their number differs."""
    source, items = _source_of(loader), getattr(loader, "batch_size", None)
    if type(source) is BatchSampler:
        items = source.batch_size
    elif drawn.batches:  # what another says of itself may be meant in tokens
        items = fmean(map(len, drawn.batches))
    # accelerate's samplers and dispatchers may hand each process a part of a batch instead of one
    is_split = getattr(getattr(loader, "batch_sampler", loader), "split_batches", getattr(loader, "split_batches", 0))
    return float((items or args.train_batch_size) * (1 if is_split else args.world_size) * drawn.rows_an_item)


def _source_of(loader: Any) -> Any:
    """Return what draws a loader's batches, of all processes: accelerate's gives each process its share."""
    batches = getattr(loader, "batch_sampler", None)
    if type(batches).__module__.startswith("accelerate."):
        batches = getattr(batches, "batch_sampler", batches)
    return getattr(loader, "sampler", None) if batches is None else batches


def _draw(loader: Any, epochs: float) -> _Drawn:
    """Draw the batches of some epochs on a copy; none of streams and of very long epochs."""
    data: Any = getattr(loader, "dataset", None)
    source: Any = _source_of(loader)
    if isinstance(data, IterableDataset):
        return _Drawn(rows_an_item=_rows_of_an_item(loader, []))
    if not has_length(data) or not has_length(source) or len(data) > _MOST_DRAWN:
        return _Drawn()
    n_batches = len(source)  # of an epoch
    batches: list[list[Any]] = []
    played, n_drawn = 0.0, 0  # epochs and examples
    with undisturbed(), suppress(Exception):  # a sampler of one's own may raise what it likes; then nothing is known
        # Whoever draws may hold the data, which stay where they are.
        inner = getattr(source, "sampler", None)
        source = _copied(source, data, *(getattr(one, "data_source", None) for one in (source, inner)))
        for epoch in count():
            if played >= epochs or n_drawn >= _MOST_DRAWN:
                break
            # A sampler that has `set_epoch` draws the same each time without it; `id` stands in for no method.
            for one in (source, getattr(source, "sampler", None)):
                getattr(one, "set_epoch", id)(epoch)
            part = min(1.0, epochs - played)  # the training may end within an epoch
            for one in islice(source, math.ceil(part * n_batches)):  # which may not end by itself
                batches.append(_numbers(one))
                n_drawn += len(batches[-1])
            played += part
        return _Drawn(batches, played, _rows_of_an_item(loader, batches))
    return _Drawn()


def _numbers(drawn: Any) -> list[Any]:
    """Return the numbers of what a sampler draws: one, or those of a batch; tensors are equal by what they hold."""
    if isinstance(drawn, (Tensor, np.ndarray)):
        drawn = drawn.tolist()
    some = [*drawn] if isinstance(drawn, (list, tuple, range)) else [drawn]
    some = [one.item() if isinstance(one, Tensor) else one for one in some]
    return [repr(one) if isinstance(one, (list, dict, set)) else one for one in some]  # what can be counted


def _rows_of_an_item(loader: Any, batches: list[list[Any]]) -> float:
    """Count the rows that an item of the data becomes: it may be a batch, or a long text that the collator parts."""
    numbers = [*dict.fromkeys(chain.from_iterable(batches))]
    # Spread over what is drawn: neighbors may be of one kind.
    some = [[number] for number in numbers[:: max(1, len(numbers) // _ASKED)][:_ASKED]]
    rows = []
    with undisturbed(), suppress(Exception):
        data, collate = loader.dataset, _copied(loader.collate_fn)
        # As torch's loader fetches: items one by one and put together, or, without batches, what a sampler draws.
        if isinstance(data, IterableDataset) and not is_used_up(data):
            # Of a stream not the first ones alone: TRL packs the longest texts of each thousand first.
            rows = [_rows_of(collate([item])) for item in islice(data, 0, _ASKED * _ASKED, _ASKED)]
        elif loader.batch_sampler is not None:
            rows = [_rows_of(collate([data[i] for i in items])) for items in some]
        elif any(len(batch) > 1 for batch in batches):  # the data are asked for whole batches
            rows = [_rows_of(collate(data[items])) for items in some]
        else:
            rows = [_rows_of(collate(data[i])) for (i,) in some]
    return fmean(rows or [1])


def _rows_of(batch: Mapping[str, Any]) -> int:
    """Count the rows of a batch, by its tokens if it has any; of texts packed into a row each counts."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    rows = max(map(len, [tensors["input_ids"]] if "input_ids" in tensors else tensors.values()))
    # The gradient of a packed row is that of its texts. Positions begin anew with each; zeros after zeros are padding.
    positions = tensors.get("position_ids", torch.empty(1))
    positions = positions[0] if positions.ndim > 2 else positions  # of text, and in images
    begins = (positions[..., :-1] == 0) & (positions[..., 1:] == 1)
    return max(rows, int(begins.sum()))
