"""The size of the first step of a start whose B is not zero: the one with the lowest loss on held-out batches.

The direction of such a step follows from the gradient, its best length does not: it depends on the curvature along that
direction. LoRA-GA has a constant for it. Here the loss decides, as in a line search, on examples that the direction was
not computed from: on those that it was, a step looks better than it is on new data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.peft_model import adapter_layers, as_it_was, check_plain
from lora_init.errors import LoraInitError, warn
from lora_init.layers.wrappers import unwrapped
from lora_init.packages import check_takes

# Where the search begins, and how far from there it may go down and up: by factors of 4, then by one of 2.
FIRST = 1024.0
_FARTHEST = (2.0**-10, 2.0**14)
# What is held out to measure the loss on: so many batches, and no fewer examples than that.
_N_BATCHES, LEAST = 4, 16

# A batch and its examples. An example is named by what is in it, such as its tokens, so that equal ones have one name;
# the names are compared and hashed, and nothing else is done with them.
_Named = tuple[Any, list[Any]]


class NoStepError(LoraInitError):
    """No size of a step lowers the loss."""


def find_step_size(
    model: nn.Module,
    build: Callable[[float], AdapterInit],
    loss_of: Callable[[nn.Module], float],
    gamma: float | None = None,
    first: float = FIRST,
) -> AdapterInit:
    """Search the gamma with which a start lowers the loss most, by factors of 4 and then of 2.

    B A is divided by gamma, so a larger gamma is a smaller step. The search begins at `first` and continues in the
    direction in which the loss falls. It measures the loss about eight times.

    Args:
        model: The plain model. Its layers, modes and hooks are restored afterwards, whatever `loss_of` does to them.
        build: Makes the adapter with a given gamma.
        loss_of: Measures the loss of the model with a candidate in it, such as `mean_loss` of some batches. Pass
            batches that the statistics were not made of: on the others a step looks better than it is on new data.
        gamma: Measure only this gamma.
        first: The first gamma that is tried. The search stays between 2^-10 and 2^14 times this number.

    Returns:
        The adapter with that gamma, and `losses` with what was measured.

    Raises:
        LoraInitError: The start changes the base weights instead of the output, the loss is not finite, or no gamma in
            that range lowers it below the plain model's loss.

    Example:
        >>> from functools import partial
        >>> build = partial(build_adapter, stats, 8, "lora-one")  # doctest: +SKIP
        >>> init = find_step_size(model, lambda gamma: build(gamma=gamma), loss_of)  # doctest: +SKIP
    """
    check_plain(model, "find_step_size()")
    check_takes(build, "build", "gamma")
    check_takes(loss_of, "loss_of", "model")
    model = unwrapped(model)
    with torch.random.fork_rng(devices=[]), as_it_was(model):  # PEFT draws an A for a candidate
        built_with = gamma or first
        init = build(built_with)
        _check_output_changes(init)
        before = loss_of(model)
        layers = adapter_layers(init.apply(model)).values()

        # Each candidate differs from the adapter that is on the model by one number, so it is not built anew.
        @functools.cache
        def measure(candidate: float) -> float:
            for layer in layers:  # the product B A is proportional to 1 / gamma
                layer.scaling = dict.fromkeys(layer.scaling, init.scaling * built_with / candidate)
            loss = loss_of(model)
            if not math.isfinite(loss):  # a step that is too large may overflow, and no comparison with NaN holds
                return math.inf
            return loss

        best = gamma or _lowest(measure, first)
        loss = measure(best)
    # A gamma that was given is taken as it is; one that was searched must be better than no step.
    is_finite = math.isfinite(before) and math.isfinite(loss)
    if not is_finite or not (gamma or loss < before):
        raise NoStepError(
            f"method {init.method!r}: the loss is {before:.4g} for the plain model and {loss:.4g} after the step with "
            f"{{gamma}}, the best that was found. Take a start with B = 0, or pass another gamma.",
            gamma=best,
        )
    return replace(build(best), losses=(before, loss))


def _check_output_changes(init: AdapterInit) -> None:
    """Refuse a start such as LoRA-GA's, before `apply` takes it off the base weights, which nothing would give back."""
    if init.corrects_base:
        raise LoraInitError(
            f"method {init.method!r} takes from the base weights what it adds, so the loss before training is the same "
            "with any gamma. Pass the gamma to build_adapter()."
        )


def _lowest(measure: Callable[[float], float], first: float) -> float:
    """Walk to the gamma of the lowest loss, and look half a step to both sides of it."""
    best = first
    # Where the first direction leads down, the second begins with the point that the first one left behind, which is
    # higher, and ends at once. Strictly lower, so that a flat loss ends the walk.
    for factor in (4.0, 0.25):
        while _FARTHEST[0] <= best * factor / first <= _FARTHEST[1] and measure(best * factor) < measure(best):
            best *= factor
    return min((best, best * 2.0, best / 2.0), key=measure)  # of equal losses the first, `best`


def most_held_out(batch_size: int) -> int:
    """Return how many examples are held out where there are plenty: four batches, and at least 16."""
    return max(_N_BATCHES * batch_size, LEAST)


def n_held_out(n_examples: int, batch_size: int) -> int:
    """Return how many examples are held out: `most_held_out`, but at most a quarter of those that there are.

    Example:
        >>> [n_held_out(n, batch_size=4) for n in (256, 40, 2)], n_held_out(256, batch_size=1)
        ([16, 8, 1], 16)
    """
    n = min(most_held_out(batch_size), n_examples // 4)
    return max(1, n // batch_size * batch_size or n)  # whole batches, if there is one


def hold_out(batches: Iterable[Any], more: Iterable[Any] = ()) -> tuple[list[Any], Iterable[Any]]:
    """Hold out `n_held_out` examples for the search; return batches of them, and of the others for the statistics.

    They are taken from `more`, if enough, else the first of all. No example is in both: equal tokens are one example.
    A batch whose values are not one for each example is taken whole and counts as 4. A lone batch serves both.
    """
    more = list(more)
    if more:
        spare = list(_named(more))
        if isinstance(batches, Iterator):  # which can be read once only, and is read here
            batches = list(batches)
        known, new = _names_in(_named(batches)), _names_in(spare)
        new -= known
        total = len(known) + len(new)
        if len(new) >= min(LEAST, n_held_out(total, len(spare[0][1]))):
            _warn_of_few(len(new), total)
            return _once(spare, new), batches
    # A generator: of a stream no more is read than what is needed now, the rest while the statistics are collected.
    stream = _named(chain(batches, more))
    head, different = _read_enough(stream)
    if not head:
        return [], []
    chosen = set(islice(different, n_held_out(len(different), len(head[0][1]))))
    _warn_of_few(len(chosen), len(different))
    rest = list(_without(head, chosen))
    if not rest:  # a lone batch, or copies of one
        rest = [batch for batch, _ in head]
    return _once(head, chosen), chain(rest, _without(stream, chosen))


def _named(batches: Iterable[Any]) -> Iterator[_Named]:
    """Yield each batch with the names of its examples."""
    for batch in batches:
        yield batch, _examples(batch)


def _names_in(named: Iterable[_Named]) -> set[Any]:
    names: set[Any] = set()
    for _, examples in named:
        names.update(examples)
    return names


def _read_enough(stream: Iterator[_Named]) -> tuple[list[_Named], dict[Any, None]]:
    """Read batches until a quarter of their examples is plenty; return them, and their examples in order, each once."""
    head: list[_Named] = []
    different: dict[Any, None] = {}  # a dict, since sets have no order
    for batch, examples in stream:
        head.append((batch, examples))
        different |= dict.fromkeys(examples)
        if len(different) >= 4 * most_held_out(len(head[0][1])):
            break
    return head, different


def _warn_of_few(n: int, total: int) -> None:
    if n < LEAST:
        warn(
            f"the start is judged by the loss on {n} of {total} different examples, and fewer than {LEAST} "
            f"say little about it. Give at least {4 * LEAST} different examples, or {{gamma}}.",
            gamma=...,
        )


def _examples(batch: Any) -> list[Any]:
    """Name the examples of a batch by what is in them; where they cannot be told apart, by numbers of its own."""
    if not _has_rows(batch):
        unlike = object()  # equal to nothing else
        return [(unlike, i) for i in range(4)]
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is not None and mask is not None and ids.shape == mask.shape:
        # Without padding, which depends on the batch that a text is in.
        return [tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]
    values = [ids]
    if ids is None:
        values = list(batch.values())
    # Each value as bytes, [examples, bytes of an example].
    rows = [value.detach().reshape(len(value), -1).contiguous().cpu().view(torch.uint8).numpy() for value in values]
    return [b"".join(row.tobytes() for row in of_example) for of_example in zip(*rows, strict=True)]


def _has_rows(batch: Any) -> bool:
    """Return whether a batch is a mapping of tensors with a row for each example."""
    if not isinstance(batch, Mapping) or not batch:
        return False
    values = list(batch.values())
    return all(isinstance(v, Tensor) and v.dim() and len(v) == len(values[0]) for v in values)


def _once(named: Iterable[_Named], wanted: set[Any]) -> list[Any]:
    """Return parts of batches with the wanted examples, each where it comes first."""
    missing = set(wanted)
    parts = []
    for batch, examples in named:
        kept = []
        for example in examples:
            kept.append(example in missing)
            missing.discard(example)
        part = _part(batch, kept)
        if part is not None:
            parts.append(part)
    return parts


def _without(named: Iterable[_Named], unwanted: set[Any]) -> Iterator[Any]:
    """Yield parts of batches without the unwanted examples."""
    for batch, examples in named:
        part = _part(batch, [example not in unwanted for example in examples])
        if part is not None:
            yield part


def _part(batch: Any, kept: list[bool]) -> Any:
    """Take some examples of a batch; None if it is none, and the batch itself if it is all."""
    if all(kept) or not _has_rows(batch):  # a batch without rows goes by its first example
        return batch if kept[0] else None
    rows = [i for i, keep in enumerate(kept) if keep]
    if not rows:
        return None
    return {name: value[rows] for name, value in batch.items()}
