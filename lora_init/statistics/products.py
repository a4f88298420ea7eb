"""Thin products of rows, by the faster of the two libraries that torch brings along."""

from __future__ import annotations

import torch
from torch import Tensor

# So few rows are not rounded to bfloat16. In sums over more of them the error does not show beside that of sampling.
_EXACT_ROWS = 128
_OPERATOR = "_linear_pointwise"  # what torch.compile calls for a linear layer on a CPU; not in torch's public interface


def times_transposed(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a b^T + bias for a [n, d], b [k, d] and bias [k], to [n, k].

    Where one is bfloat16 and the other float32, both go in as bfloat16 and the product comes back as float32: rounding
    to 8 bits, which sums over many rows do not show.

    For float32 on a CPU by oneDNN. The BLAS that torch would call, MKL, does not use the full vector width on
    processors that Intel did not make: on one of them thin products ran at 190 GFLOP/s by MKL and at 410 by oneDNN.
    """
    if a.dtype != b.dtype and torch.bfloat16 in (a.dtype, b.dtype):
        product: Tensor = (a.bfloat16() @ b.bfloat16().T).float()
        return product if bias is None else product + bias
    empty = 0 in (*a.shape, len(b))  # the operator refuses that
    if a.device.type == "cpu" and a.dtype == b.dtype == torch.float32 and not empty and _has_onednn():
        product = getattr(torch.ops.mkldnn, _OPERATOR)(a, b, bias, "none", [], "")
    elif bias is None:
        product = a @ b.T
    else:
        product = torch.addmm(bias, a, b.T)
    return product


def rounded(rows: Tensor) -> Tensor:
    """Round rows [n, d] of float32 to bfloat16 if they are more than 128; others come back as they are."""
    return rows.bfloat16() if rows.dtype == torch.float32 and len(rows) > _EXACT_ROWS else rows


def as_multiplied(rows: Tensor) -> Tensor:
    """Give rows [n, d] in the type in which they go into products.

    Many rows of bfloat16 stay as they are on a device that is faster for it; others become float32, or stay float64.
    """
    if rows.dtype == torch.float64 or (
        rows.dtype == torch.bfloat16 and len(rows) > _EXACT_ROWS and _is_faster_in_bfloat16(rows.device)
    ):
        return rows
    return rows.float()


def _is_faster_in_bfloat16(device: torch.device) -> bool:
    """Tell whether a device multiplies bfloat16 in its own instructions, at twice the speed of float32 or more."""
    if device.type == "cpu":
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, _OPERATOR)  # type: ignore[no-untyped-call]
