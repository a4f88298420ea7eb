"""Products that several decompositions want of the same rows, made as one: the rows are read once for all."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lora_init.statistics.products import times_transposed


class Along(NamedTuple):
    """Asks for X V^T + bias of rows X [n, d]: [n, k]."""

    test: Tensor  # V, [k, d]
    bias: Tensor | None = None  # [k]


class Image(NamedTuple):
    """Asks for T^T X of rows X [n, d]: [k, d]."""

    along: Tensor  # T, [n, k]


# A decomposition in the middle of its batch: it yields what it wants of the rows and is sent the product.
Steps: TypeAlias = Generator[Along | Image, Tensor, None]


def multiply(rows: Tensor, decompositions: Iterable[Steps]) -> None:
    """Run decompositions of the same rows [n, d] to their ends, with one product for all that want one at a time.

    On one processor a product of 744 x 576 with 32 columns took 0.27 ms and 0.0022 ms more for each further column.
    """
    waiting: list[tuple[Steps, Along | Image]] = []
    for steps in decompositions:
        with suppress(StopIteration):
            waiting.append((steps, next(steps)))
    while waiting:
        # Images wait for each other: who wants one first has skipped a product.
        along = any(isinstance(wanted, Along) for _, wanted in waiting)
        now = [one for one in waiting if isinstance(one[1], Along) is along]
        waiting = [one for one in waiting if isinstance(one[1], Along) is not along]
        products = (_along if along else _images)(rows, [wanted for _, wanted in now])
        for (steps, _), product in zip(now, products, strict=True):
            with suppress(StopIteration):
                waiting.append((steps, steps.send(product)))


def _along(rows: Tensor, wanted: Sequence[Any]) -> Sequence[Tensor]:
    if len(wanted) == 1:
        return [times_transposed(rows, *wanted[0])]
    tests = [one.test for one in wanted]
    products = torch.split(times_transposed(rows, torch.cat(tests)), [len(test) for test in tests], 1)
    return [found if one.bias is None else found + one.bias for found, one in zip(products, wanted, strict=True)]


def _images(rows: Tensor, wanted: Sequence[Any]) -> Sequence[Tensor]:
    widths = [one.along.shape[1] for one in wanted]
    thin = wanted[0].along if len(wanted) == 1 else torch.cat([one.along for one in wanted], 1)
    return torch.split(times_transposed(thin.T, rows.T), widths)
