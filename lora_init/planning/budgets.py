"""Units that people budget in, and what a rank of each layer costs in them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_init.errors import LoraInitError
from lora_init.layers.targets import Target, file_prefixes

IntArray = NDArray[np.int64]

BYTES_PER_PARAMETER = {"float32": 4, "float16": 2, "bfloat16": 2}
_SAFETENSORS_NAME = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
COVERAGES = ("every-layer", "total")


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


def parse_count(value: float | str, argument: str) -> int:
    """Read a count such as `2500000` or `"2.5M"` (k, M, B or G after a number, in either case).

    Raises:
        LoraInitError: It is no number, or not at least 1.

    Example:
        >>> parse_count("2.5M", "parameters")
        2500000
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:[_,]\d{3})*(?:\.\d+)?)\s*([kmbg]?)\s*", value.lower())
        if match is None:
            raise LoraInitError(f'{argument}={value!r} is not a count. Write it like 2500000, "2.5M" or "800k".')
        # Over integers: 2.3 * 10**6 is not 2300000 in floats.
        whole, _, decimals = re.sub("[_,]", "", match[1]).partition(".")
        count = int(whole + decimals) * _SUFFIXES[match[2]] // int("1" + "0" * len(decimals))
    else:
        number = math.nan if isinstance(value, bool) else _as_float(value)
        if not number.is_integer():
            raise LoraInitError(f"{argument}={value!r} is not a whole number.")
        count = int(value)
    if count < 1:
        raise LoraInitError(f"{argument}={value!r}: a budget of at least 1 is needed.")
    return count


def choose_budget(
    n_layers: int,
    n_parameters: int,
    default_rank: int,
    *,
    rank: int | None,
    total_rank: int | str | None,
    parameters: int | str | None,
    fraction: float | None,
    megabytes: float | None,
    variance: float | None,
    dtype: str,
    coverage: str,
) -> Budget:
    """Turn the one budget that was given into a limit.

    Args:
        n_layers: Layers that take part.
        n_parameters: Parameters of the base model; 0 if unknown.
        default_rank: The budget if none is given: average rank.

    Raises:
        LoraInitError: Two budgets at once, one out of range, or `fraction` of an unknown model size.
    """
    given = {
        name: value
        for name, value in [
            ("rank", rank), ("total_rank", total_rank), ("parameters", parameters), ("fraction", fraction),
            ("megabytes", megabytes), ("variance", variance),
        ]
        if value is not None
    }  # fmt: skip
    if len(given) > 1:
        shown = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise LoraInitError(f"{shown} are {len(given)} budgets. Give one.")
    kind, value = next(iter(given.items()), ("rank", default_rank))
    if kind in ("rank", "total_rank", "parameters"):
        count = parse_count(value, kind)
        limit = count * n_layers if kind == "rank" else count
        return Budget(kind, count, "parameters" if kind == "parameters" else "ranks", limit)
    number = _number(value, kind)
    if kind == "megabytes":
        if dtype not in BYTES_PER_PARAMETER:
            raise LoraInitError(f"dtype={dtype!r} is unknown. Choose from {', '.join(BYTES_PER_PARAMETER)}.")
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


def _number(value: object, kind: str) -> float:
    number = _as_float(value)
    if not 0.0 < number < math.inf:
        raise LoraInitError(f"{kind}={value!r}: a number above 0 is needed.")
    return number


def _as_float(value: object) -> float:
    """Convert to a float; NaN for what is no number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def adapter_bytes(ranks: Mapping[str, int], targets: Mapping[str, Target], dtype: str = "float32") -> int:
    """Count the bytes of the `adapter_model.safetensors` that PEFT saves for these ranks, header included."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # safetensors lays tensors of one dtype out by name.
    for key, shape in sorted(
        (key, shape)
        for name, prefix in file_prefixes(targets[name] for name, rank in ranks.items() if rank).items()
        for key, shape in _tensors(prefix, targets[name], ranks[name]).items()
    ):
        size = math.prod(shape) * BYTES_PER_PARAMETER[dtype]
        entries[key] = _entry(dtype, shape, offset, offset + size)
        offset += size
    header = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + header + -header % 8 + offset


def entry_bytes(target: Target, dtype: str, limit: int) -> int:
    """Bound what the two tensors of a layer add to the header of a file of at most `limit` bytes."""
    prefix = f"base_model.model.{target.module}{'.base_layer' * bool(target.experts)}"
    shapes = _tensors(prefix, target, target.in_features)
    entries = {key: _entry(dtype, shape, limit, limit) for key, shape in shapes.items()}
    # A comma before each of the two takes the place of the braces that this counts.
    return len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())


def _tensors(prefix: str, target: Target, rank: int) -> dict[str, tuple[int, ...]]:
    a, b = target.shapes(rank)
    return {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}


def _entry(dtype: str, shape: tuple[int, ...], start: int, end: int) -> dict[str, object]:
    return {"dtype": _SAFETENSORS_NAME[dtype], "shape": shape, "data_offsets": [start, end]}


def costs(budget: Budget, targets: list[Target]) -> tuple[IntArray, IntArray]:
    """Say what each layer costs in the unit of the budget: [n] per rank, and [n] once if it has any rank."""
    widths = np.array([target.cost for target in targets], dtype=np.int64)
    once = np.zeros_like(widths)
    if budget.unit == "parameters":
        return widths, once
    if budget.unit == "bytes":
        once = np.array([entry_bytes(target, budget.dtype, int(budget.limit)) for target in targets], dtype=np.int64)
        return widths * BYTES_PER_PARAMETER[budget.dtype], once
    return np.ones_like(widths), once
