"""Units that people budget in, and what one rank of each layer costs in them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_init.errors import LoraInitError
from lora_init.layers.targets import Target

IntArray = NDArray[np.int64]

COVERAGES = ("every-layer", "total")
_COUNTS = ("rank", "total_rank", "parameters")
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Budget:
    """What may be spent.

    Attributes:
        kind: The argument that was given: `"rank"`, `"total_rank"`, `"parameters"`, `"fraction"`, `"megabytes"` or
            `"variance"`.
        asked: Its value.
        unit: What `limit` counts: `"ranks"`, `"parameters"`, `"bytes"` or `"variance"`.
        limit: The most that may be spent; for `"variance"`, the share of the variance to reach.
        dtype: Of the saved adapter, for `"megabytes"`.
        coverage: `"every-layer"` or `"total"`, for `"variance"`.
    """

    kind: str
    asked: float
    unit: str
    limit: float
    dtype: str = "float32"
    coverage: str = ""

    def __str__(self) -> str:
        if self.kind == "variance":
            where = "in every layer" if self.coverage == "every-layer" else "over all layers"
            return f"variance={self.asked:g} {where}"
        if self.kind == "megabytes":
            return f"megabytes={self.asked:g} in {self.dtype}"
        return f"{self.kind}={self.asked:,}"


def parse_count(value: object, argument: str) -> int:
    """Read a count such as `2500000` or `"2.5M"` (k, M, B or G after a number, in either case).

    Raises:
        LoraInitError: It is no whole number, or not at least 1.

    Example:
        >>> parse_count("2.5M", "parameters")
        2500000
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:[_,]\d{3})*)(?:\.(\d+))?\s*([kmbg]?)\s*", value.lower())
        if match is None:
            raise LoraInitError(f'{argument}={value!r} is not a count. Write it like 2500000, "2.5M" or "800k".')
        # Over integers: 2.3 * 10**6 is not 2300000 in floats.
        decimals = match[2] or ""
        digits = int(re.sub("[_,]", "", match[1]) + decimals)
        count, rest = divmod(digits * _SUFFIXES[match[3]], int(10 ** len(decimals)))
        is_whole = rest == 0
    else:
        number = math.nan if isinstance(value, bool) else _as_float(value)
        is_whole = number.is_integer()
        count = int(number) if is_whole else 0
    if not is_whole:
        raise LoraInitError(f"{argument}={value!r} is not a whole number.")
    if count < 1:
        raise LoraInitError(f"{argument}={value!r}: a budget of at least 1 is needed.")
    return count


def choose_budget(
    values: Mapping[str, object], n_layers: int, default_rank: int, n_parameters: int, dtype: str, coverage: str
) -> Budget:
    """Make a limit of the one budget that was given.

    Args:
        values: By kind; None where it was not given.
        n_layers: Layers that take part.
        default_rank: The budget if none is given: average rank.
        n_parameters: Parameters of the base model; 0 if unknown.
        dtype: For `"megabytes"`.
        coverage: For `"variance"`.

    Raises:
        LoraInitError: Two budgets at once, one out of range, or a fraction of an unknown model size.
    """
    given = {kind: value for kind, value in values.items() if value is not None}
    if len(given) > 1:
        shown = " and ".join(f"{kind}={value!r}" for kind, value in given.items())
        raise LoraInitError(f"{shown} are {len(given)} budgets. Give one.")
    kind, value = next(iter(given.items()), ("rank", default_rank))
    if kind in _COUNTS:
        count = parse_count(value, kind)
        limit = count * n_layers if kind == "rank" else count
        return Budget(kind, count, "parameters" if kind == "parameters" else "ranks", limit)
    number = _as_float(value)
    if not 0.0 < number < math.inf:
        raise LoraInitError(f"{kind}={value!r}: a number above 0 is needed.")
    if kind == "megabytes":
        bytes_per_parameter(dtype)
        return Budget(kind, number, "bytes", int(number * 10**6), dtype)
    if number > 1.0:
        raise LoraInitError(f"{kind}={value!r} is a share: it lies above 0 and not above 1.")
    if kind == "variance":
        if coverage not in COVERAGES:
            raise LoraInitError(f"coverage={coverage!r} is unknown. Choose from {', '.join(COVERAGES)}.")
        return Budget(kind, number, "variance", number, coverage=coverage)
    if n_parameters < 1:
        raise LoraInitError(
            f"fraction={value!r} needs the size of the base model, which these statistics do not hold. "
            "Give parameters= instead, or collect them again."
        )
    return Budget(kind, number, "parameters", int(number * n_parameters))


def _as_float(value: object) -> float:
    """Convert to a float; NaN for what is no number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def bytes_per_parameter(dtype: str) -> int:
    """Give the size of a saved parameter.

    Raises:
        LoraInitError: An unknown dtype.
    """
    if dtype not in tuple(_BYTES):  # a tuple takes unhashable values, too
        raise LoraInitError(f"dtype={dtype!r} is unknown. Choose from {', '.join(_BYTES)}.")
    return _BYTES[dtype]


def costs(budget: Budget, targets: Sequence[Target]) -> IntArray:
    """Give the cost of one rank of each layer in the unit of the budget, [n]."""
    if budget.unit in ("ranks", "variance"):
        return np.ones(len(targets), dtype=np.int64)
    bytes_each = bytes_per_parameter(budget.dtype) if budget.unit == "bytes" else 1
    return bytes_each * np.array([target.cost for target in targets], dtype=np.int64)
