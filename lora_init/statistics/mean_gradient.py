"""The running mean of a weight's gradient as a product of two thin matrices, and the second moment beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_init.errors import LoraInitError

# The first batch meets random directions: one more step of subspace iteration brings them near those of its gradient.
_FIRST_STEPS = 2
# The directions turn to every batch while there are fewer rows than this for each.
_FEW_ROWS = 32
# A row of R this many times smaller than the largest is float32 rounding.
_ROUNDING = 1e-6


class _State(NamedTuple):
    """A sum of gradients, left^T right up to what l directions miss. Replaced as a whole."""

    left: Tensor  # [l, d_out], orthonormal rows
    right: Tensor  # [l, d_in]
    squares: Tensor  # [d_out], float64: sum of the squares of all rows g
    n_samples: int
    n_since: int  # rows since the directions turned

    def to(self, device: torch.device) -> _State:
        """Move to a device."""
        return self._replace(left=self.left.to(device), right=self.right.to(device), squares=self.squares.to(device))


class MeanGradient:
    """Estimate the leading singular triplets of G = sum of g_t x_t^T, for tokens that arrive in batches.

    g_t is the gradient with respect to a layer's output at a token and x_t what the layer reads there, so G is the
    gradient of its weight. Keeps G ~ Q^T R with Q of l x d_out and R of l x d_in. A batch H is taken in by one step of
    subspace iteration on the sum of old and new: V is R, the new Q spans V (Q^T R + H)^T, and the new R is
    Q (Q^T R + H), whose rows are nearly orthogonal, since iteration turns Q to the singular vectors. Both products
    with H = g^T x are thin, (x V^T)^T g and (g Q^T)^T x, so nothing of d_out x d_in is ever made. The directions turn
    to every batch while there are few rows, later to every eighth of all; in between, R gains Q H. A batch loses what
    lies outside of the l directions that it meets or turns to; a sum of rank l at most, seen from its first batch on,
    is exact.

    The sum of the squares of g is exact, so that scores of layers have one unit.

    Cost: 2 l (d_in + d_out) operations a row, and as many and a QR factorisation of d_out x l for a turn. Memory:
    l (d_in + d_out) float32, twice that within a batch.

    Args:
        n_components: Triplets to report. As many directions are kept, in multiples of 8.
        seed: Seed of the random start.

    Example:
        >>> g, x = torch.ones(5, 2), torch.ones(5, 3)
        >>> mean = MeanGradient(1)
        >>> mean.project(g, x); mean.update()
        >>> [round(float(t.norm()), 3) for t in mean.triplets(1)]
        [1.0, 12.247, 1.0]
    """

    def __init__(self, n_components: int, seed: int = 0) -> None:
        self.n_components = n_components
        self.seed = seed
        self._state: _State | None = None
        self._pending: _State | None = None

    @property
    def n_samples(self) -> int:
        """Rows taken in so far."""
        return self._state.n_samples if self._state else 0

    @property
    def squares(self) -> Tensor:
        """Sum of g_t^2 over the rows, float64 [d_out]."""
        return self._known().squares.cpu()

    def project(self, g: Tensor, x: Tensor) -> None:
        """Take in rows g [n, d_out] and x [n, d_in]; they count once `update` is called.

        Args:
            g: Gradients at the layer's output.
            x: What it read.
        """
        n, g, x = len(g), g.float(), x.float()
        state = self._pending or self._state
        if state is not None and state.left.device != g.device:  # what was loaded is on the CPU
            state = state.to(g.device)
        if state is None:
            state = self._first(g, x)
            for _ in range(_FIRST_STEPS - 1):
                state = state._replace(right=_plus(state, g, x, self._turned(state, g, x)).right)
        due = 8 * (state.n_since + n) >= state.n_samples or state.n_samples < _FEW_ROWS * len(state.left)
        turned = self._turned(state, g, x) if due else None
        self._pending = _plus(state, g, x, turned)._replace(
            squares=state.squares + g.square().sum(0),
            n_samples=state.n_samples + n,
            n_since=0 if due else state.n_since + n,
        )

    def update(self) -> None:
        """Complete the batch.

        Raises:
            LoraInitError: It has NaN or inf; nothing was updated.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if not bool(torch.isfinite(pending.squares.sum() + pending.right.sum())):
            raise LoraInitError("its gradient has NaN or inf. The model produces them; statistics were not updated.")
        self._state = pending

    def _first(self, g: Tensor, x: Tensor) -> _State:
        size = min(-(-self.n_components // 8) * 8, g.shape[1], x.shape[1])
        left, right = (rows.new_zeros(size, rows.shape[1], dtype=torch.float32) for rows in (g, x))
        return _State(left, right, left.new_zeros(left.shape[1], dtype=torch.float64), 0, 0)

    def _turned(self, state: _State, g: Tensor, x: Tensor) -> Tensor:
        """Turn Q to a batch, [l, d_out]."""
        test = self._test(state.right)
        image = (x @ test.T).T @ g + (test @ state.right.T) @ state.left  # [l, d_out]
        # Contiguous, as what is read from a file is: products of other layouts differ in the last bits.
        basis: Tensor = torch.linalg.qr(image.T).Q.T.contiguous()
        return basis

    def _test(self, right: Tensor) -> Tensor:
        """Give V: the rows of R, and random ones for those that are rounding, which would all be alike."""
        norms = torch.linalg.vector_norm(right, dim=1)
        smallest, largest = norms.aminmax()
        if float(smallest) > _ROUNDING * float(largest):
            return right
        drawn = torch.randn(right.shape, generator=torch.Generator().manual_seed(self.seed)).to(right)
        empty = norms <= _ROUNDING * largest
        return torch.where(empty[:, None], nn.functional.normalize(drawn, dim=1) * largest.clamp_min(1), right)

    def merge(self, other: MeanGradient) -> MeanGradient:
        """Take in what another one has seen; exact up to the truncation to l directions. `other` is not changed."""
        if other._state is None:
            return self
        if self._state is None:
            self._state = other._state
            return self
        a, b = self._state, other._state.to(self._state.left.device)
        u, s, v = product_svd(torch.cat([a.left, b.left]).T, torch.cat([a.right, b.right]), len(a.right))
        self._state = _State(
            u.T.to(a.left).contiguous(), (s[:, None] * v).to(a.right), a.squares + b.squares,
            a.n_samples + b.n_samples, a.n_since + b.n_since,
        )  # fmt: skip
        return self

    def triplets(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Give the leading singular triplets of G: left [k, d_out], values [k] float64, right [k, d_in], on the CPU.

        Rows are orthonormal; there are fewer where G has fewer directions.
        """
        state = self._known()
        u, s, v = torch.linalg.svd(state.right.double(), full_matrices=False)
        return freeze_triplets(state.left.T.double() @ u, s, v, k)

    def _known(self) -> _State:
        if self._state is None:
            raise LoraInitError("no gradients were seen. Feed rows with project and update first.")
        return self._state

    def state_dict(self) -> dict[str, Tensor]:
        """Return what was learned, empty before the first rows: views, not copies."""
        if self._state is None:
            return {}
        left, right, squares, n_samples, n_since = self._state
        counts = torch.tensor([n_since, self.n_components, self.seed])
        return {
            "left": left, "right": right, "squares": squares, "n_samples": torch.tensor(n_samples), "counts": counts
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Tensor]) -> MeanGradient:
        """Go on from a copy of what `state_dict` returned."""
        self._state = self._pending = None
        if state:
            left, right, squares = (state[name].clone() for name in ("left", "right", "squares"))
            n_since, self.n_components, self.seed = state["counts"].tolist()
            self._state = _State(left, right, squares, int(state["n_samples"]), n_since)
        return self


def product_svd(left: Tensor, right: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose left @ right, of thin factors [d_out, m] and [m, d_in], without making it.

    Returns:
        The `size` leading left singular vectors in columns, values and right ones in rows, float64; fewer if there are.
    """
    left, r_left = torch.linalg.qr(left.double())
    right, r_right = torch.linalg.qr(right.double().T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return left @ u[:, :size], s[:size], v[:size] @ right.T


def freeze_triplets(u: Tensor, s: Tensor, v: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep k singular triplets, fewer where the rest is rounding: as `MeanGradient.triplets` gives them."""
    kept = min(k, int((s > s[:1] * _ROUNDING).sum()))
    return u[:, :kept].T.float().cpu().contiguous(), s[:kept].cpu(), v[:kept].float().cpu().contiguous()


def _plus(state: _State, g: Tensor, x: Tensor, turned: Tensor | None) -> _State:
    """Add g^T x, along new left directions if they have turned."""
    left, right = state.left, state.right
    if turned is not None:
        left, right = turned, (turned @ left.T) @ right
    return state._replace(left=left, right=right + (g @ left.T).T @ x)
