"""Units that people budget in, and what one rank of each layer costs in them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_init.errors import LoraInitError, did_you_mean

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

COVERAGES = ("every-layer", "total")
_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
_MOST = 10**12  # of anything that is counted; beyond that numbers of 64 bits overflow
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Budget:
    """What may be spent."""

    # The argument that was given: `"rank"`, `"total_rank"`, `"parameters"`, `"fraction"`, `"megabytes"` or
    # `"variance"`.
    kind: str
    asked: float  # its value
    unit: str  # what `limit` counts: `"ranks"`, `"parameters"`, `"bytes"` or `"variance"`
    limit: float  # the most that may be spent; for `"variance"`, the share of the variance to reach
    dtype: str = "float32"  # of the saved adapter, for `"megabytes"`
    coverage: str = ""  # `"every-layer"` or `"total"`, for `"variance"`

    @property
    def option(self) -> dict[str, Any]:
        """The argument that was given, as a message names it."""
        return {self.kind: self.asked}

    @property
    def text(self) -> str:
        """The budget in words, the argument in braces, which a message replaces by its value."""
        if self.kind == "megabytes":
            return f"{{{self.kind}}} in {self.dtype}"
        where = {"every-layer": " in every layer", "total": " over all layers"}.get(self.coverage, "")
        return f"{{{self.kind}}}{where}"

    def __str__(self) -> str:
        return self.text.format(**{self.kind: f"{self.kind}={self.asked:,}"})


def parse_count(value: object, argument: str) -> int:
    """Read a count such as `2500000` or `"2.5M"` (k, M, B or G after a number, in either case), at least 1.

    Example:
        >>> parse_count("2.5M", "parameters")
        2500000
    """
    # Commas between groups of three digits only: "2,5M" is a mistake, and not 25 million.
    text = re.sub(r",(?=\d{3}(?!\d))", "", str(value)).strip().upper()
    scale = _SUFFIXES.get(text[-1:], 1)
    if scale > 1:
        text = text[:-1]
    try:
        # Decimals are exact: 2.3 * 10**6 is not 2300000 in floats.
        count = Decimal(text) * scale
    except InvalidOperation:
        count = Decimal(0)
    # "nan" and "inf" are decimals, too. What has a fraction left, such as "1.5", is a mistake and is not rounded.
    if not count.is_finite() or not 1 <= count <= _MOST or count % 1:
        raise LoraInitError(
            f'{{{argument}}}: a whole number from 1 to 10^12 is needed, such as 2500000, "2.5M" or "800k".',
            **{argument: value},
        )
    return int(count)


def choose_budget(
    values: Mapping[str, object], n_layers: int, default_rank: int, n_parameters: int, dtype: str, coverage: str
) -> Budget:
    """Return the one budget that was given, `values` by their kinds; `default_rank` on average if none was."""
    given = {kind: value for kind, value in values.items() if value is not None}
    if len(given) > 1:
        shown = " and ".join(f"{{{kind}}}" for kind in given)
        raise LoraInitError(f"{shown} are {len(given)} budgets. Give one.", **given)
    kind, value = next(iter(given.items()), ("rank", default_rank))
    if kind == "rank":
        count = parse_count(value, kind)
        return Budget(kind, count, "ranks", count * n_layers)
    if kind == "total_rank":
        count = parse_count(value, kind)
        return Budget(kind, count, "ranks", count)
    if kind == "parameters":
        count = parse_count(value, kind)
        return Budget(kind, count, "parameters", count)
    number = float(value) if isinstance(value, Real) else math.nan
    most = _MOST if kind == "megabytes" else 1  # the others are shares
    # Negated, so that NaN is refused, too.
    if not 0.0 < number <= most:
        raise LoraInitError(f"{{{kind}}}: a number above 0 and not above {most:,} is needed.", **{kind: value})
    if kind == "megabytes":
        bytes_per_parameter(dtype)  # refuses an unknown type before anything is computed
        return Budget(kind, number, "bytes", round(number * 10**6), dtype)
    if kind == "variance":
        if coverage not in COVERAGES:
            raise LoraInitError(f"{{coverage}} is unknown. {did_you_mean(str(coverage), COVERAGES)}", coverage=coverage)
        return Budget(kind, number, "variance", number, coverage=coverage)
    if n_parameters < 1:
        raise LoraInitError(
            "{fraction} needs the size of the base model, which these statistics do not hold. "
            "Give {parameters} instead, or collect them again.",
            fraction=value,
            parameters=...,
        )
    return Budget(kind, number, "parameters", int(number * n_parameters))


def bytes_per_parameter(dtype: str) -> int:
    """Return the size of a saved parameter."""
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise LoraInitError(f"{{dtype}} is unknown. {did_you_mean(str(dtype), _BYTES)}", dtype=dtype)
    return _BYTES[dtype]


def costs(budget: Budget, widths: IntArray) -> IntArray:
    """Return the cost of one rank of each layer in the unit of the budget, [n]; `widths` are its parameters."""
    if budget.unit in ("ranks", "variance"):
        return np.ones(len(widths), dtype=np.int64)
    if budget.unit == "bytes":
        return bytes_per_parameter(budget.dtype) * widths
    return widths
