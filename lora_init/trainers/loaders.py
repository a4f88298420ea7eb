"""The loader of a trainer: read without a trace, and how long a training is by what it draws.

A loader may draw by weights, repeat rows, leave some out, or have batches of its own. So what draws its examples is run
on a copy, for as many epochs as the training has, and each example is counted.
"""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from lora_init.rates.training_length import TrainingLength

_MOST_DRAWN = 1_000_000  # examples, to count them; of longer epochs each is taken to come once
_ASKED = 8  # examples that are put into batches, to see how many rows each becomes


@contextmanager
def undisturbed() -> Iterator[None]:
    """Draw random numbers, of torch, numpy and Python, as collators do, that will be drawn again after the block."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        yield


@contextmanager
def without_trace(loader: Any) -> Iterator[None]:
    """Read a loader's batches: whoever reads them after the block gets the same ones in the same order."""
    with undisturbed(), ExitStack() as stack:
        batches = getattr(loader, "batch_sampler", None)
        for held in (loader, getattr(loader, "sampler", None), batches, _of_all_processes(batches)):
            for generator in getattr(held, "__dict__", {}).values():
                _put_back(generator, stack)
        reads = getattr(loader, "base_dataloader", loader)  # accelerate's holds the one that reads
        if hasattr(reads, "collate_fn"):  # which may have a generator of its own
            stack.callback(setattr, reads, "collate_fn", reads.collate_fn)
            reads.collate_fn = _copied(reads.collate_fn)
        if hasattr(loader, "end"):  # accelerate's: it would take training for a part of this pass
            stack.callback(loader.end)
        yield


def _copied(used: Any, *shared: Any) -> Any:
    """Copy something with all that it holds but what is shared; itself where that is not possible."""
    with suppress(Exception):
        return copy.deepcopy(used, {id(one): one for one in shared})
    return used


def _put_back(generator: Any, stack: ExitStack) -> None:
    """Let the stack put back the state of something, if that is a generator of random numbers."""
    if isinstance(generator, torch.Generator):
        stack.callback(generator.set_state, generator.get_state())
    elif isinstance(generator, np.random.Generator):
        stack.callback(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    elif isinstance(generator, random.Random):
        stack.callback(generator.setstate, generator.getstate())


def is_used_up(rows: Any) -> bool:
    """Return whether rows may be there only once: a stream, but not of datasets, which begin anew each time."""
    return isinstance(rows, IterableDataset) and not type(rows).__module__.startswith("datasets.")


def examples_of_a_step(args: Any) -> int:
    """Count the examples of a step, of all processes, by a trainer's arguments."""
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def examples_of_a_batch(args: Any, loader: Any) -> float:
    """Count the examples of a batch, of all processes: in the mean, where their number differs."""
    return _examples_of_a_batch(args, loader, _draw(loader, 1)[0])


def length_of(args: Any, steps: int, loader: Any = None) -> TrainingLength:
    """Describe a training of so many steps by a trainer's arguments and its loader."""
    steps, accumulated, data = int(steps), args.gradient_accumulation_steps, getattr(loader, "dataset", None)
    if not has_length(data):
        return TrainingLength(steps, max(1, round(examples_of_a_batch(args, loader) * accumulated)))
    epochs = steps / math.ceil(len(loader) / accumulated)
    drawn, played = _draw(loader, epochs)
    each, rows_an_item = _examples_of_a_batch(args, loader, drawn), _rows_of_an_item(loader, drawn)
    counts = Counter(chain.from_iterable(drawn))
    an_epoch = counts.total() * rows_an_item / played if drawn else min(len(data), len(loader) * each)
    batch_size = max(1, round(min(each * accumulated, an_epoch)))
    rows = round(len(counts) * rows_an_item if drawn else an_epoch)
    if not drawn or (rows >= batch_size and max(counts.values()) - min(counts.values()) <= 1):
        return TrainingLength(steps, batch_size, max(1, rows))
    again = sum(count * count for count in counts.values()) / counts.total()  # of the same as a draw, itself counted
    return TrainingLength(steps, batch_size, max(rows, batch_size), seen=again * epochs / played)


def _examples_of_a_batch(args: Any, loader: Any, drawn: list[list[Any]]) -> float:
    batches = getattr(loader, "batch_sampler", None)
    items = getattr(loader, "batch_size", None) or getattr(_of_all_processes(batches), "batch_size", None)
    if not isinstance(items, int):
        items = fmean(map(len, drawn)) if drawn else args.train_batch_size
    # accelerate's samplers and dispatchers may hand each process a part of a batch instead of one
    is_split = getattr(batches, "split_batches", False) or getattr(loader, "split_batches", False)
    return float(items * (1 if is_split else args.world_size) * _rows_of_an_item(loader, drawn))


def _of_all_processes(batches: Any) -> Any:
    """Return the sampler of the batches of all processes, of which accelerate's gives each process its share."""
    return getattr(batches, "batch_sampler", batches)


def _draw(loader: Any, epochs: float) -> tuple[list[list[Any]], float]:
    """Draw the batches of some epochs, as the numbers of their examples; none of streams and of very long epochs.

    Returns them, and of how many epochs they are.
    """
    data, source = getattr(loader, "dataset", None), _of_all_processes(getattr(loader, "batch_sampler", None))
    source = getattr(loader, "sampler", None) if source is None else source
    drawn: list[list[Any]] = []
    played = 0.0
    if isinstance(data, IterableDataset) or not has_length(data) or len(data) > _MOST_DRAWN:
        return drawn, played
    with undisturbed(), suppress(Exception):
        # Whoever draws may hold the data, which stay where they are.
        holders = (source, getattr(source, "sampler", None))
        source = _copied(source, data, *(getattr(one, "data_source", None) for one in holders))
        while played < epochs and sum(map(len, drawn)) < _MOST_DRAWN:
            batches = [[*one] if isinstance(one, (list, tuple)) else [one] for one in source]
            part = min(1.0, epochs - played)
            drawn += batches[: math.ceil(part * len(batches))]
            played += part
    return drawn, played


def _rows_of_an_item(loader: Any, drawn: list[list[Any]]) -> float:
    """Count the rows that an item of the data becomes: it may be a batch, or a long text that the collator parts."""
    numbers = [*dict.fromkeys(chain.from_iterable(drawn))]
    some = [[number] for number in numbers[:: max(1, len(numbers) // _ASKED)][:_ASKED]]
    rows = []
    with undisturbed(), suppress(Exception):
        data, collate = loader.dataset, _copied(loader.collate_fn)
        if loader.batch_sampler is not None:
            rows = [_rows_of(collate([data[i] for i in items])) for items in some]
        elif isinstance(next(iter(loader.sampler)), (list, tuple)):  # the data are asked for whole batches
            rows = [_rows_of(collate(data[items])) for items in some]
        else:
            rows = [_rows_of(collate(data[i])) for (i,) in some]
    return fmean(rows or [1])  # none of a stream


def _rows_of(batch: Mapping[str, Any]) -> int:
    """Count the rows of a batch, by its tokens if it has any: lengths of packed sequences may lie beside them."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    return max(map(len, [tensors["input_ids"]] if "input_ids" in tensors else tensors.values()))
