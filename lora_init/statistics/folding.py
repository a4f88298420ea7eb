"""Rows taken into a state exactly, up to the truncation to its k directions: first and small batches, and merges."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_init.statistics.moments import NEGLIGIBLE, Moments
from lora_init.statistics.nystrom import State, orthonormal

_POWER_ITERATIONS = 4


def compress(rows: Tensor, start: Tensor) -> Tensor:
    """Reduce centred rows [n, d] to at most k with nearly the same scatter matrix: a randomised SVD.

    Args:
        rows: The rows. Those with NaN or inf come back as they are.
        start: Directions [k, d] to start from, random where none are known.
    """
    size = min(start.shape)
    if rows.shape[0] <= size or not bool(rows.isfinite().all()):
        return rows
    basis = torch.linalg.qr(start[:size].T).Q  # [d, k]
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
    _, scale, vectors = torch.linalg.svd(rows @ basis, full_matrices=False)
    factor: Tensor = scale[:, None] * (vectors @ basis.T)
    return factor


def fold(state: State | None, moments: Moments, factor: Tensor, shift: Tensor | None, size: int) -> State:
    """Add rows with these moments and factor^T factor as scatter matrix to a state, and keep `size` directions.

    Args:
        state: None if these are the first rows.
        moments: Of the rows.
        factor: [m, d], any m.
        shift: Taken off the rows that will come, [d]; a state has its own.
        size: Most directions to keep.
    """
    dtype = torch.promote_types(factor.dtype, torch.float32)
    rows = factor.double()  # [m, d]
    if state is not None:
        shift, dtype = state.shift, state.test.dtype
        moments, drift = state.moments.plus(moments)
        rows = torch.cat([state.factor().double(), rows, drift[None]])
    weights, vectors = torch.linalg.eigh(rows @ rows.T)
    weights, vectors = weights.flip(0), vectors.flip(1)
    kept = int((weights > weights[:1].clamp_min(0.0) * NEGLIGIBLE).sum())
    kept = min(kept, rows.shape[1], size)
    weights, vectors = weights[:kept], vectors[:, :kept]
    # The Gram matrix has cost the directions of the smallest weights some digits.
    directions = orthonormal((vectors.T @ rows) / weights.sqrt()[:, None])
    return State.of(moments, directions.to(dtype), weights, shift)
