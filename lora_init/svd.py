"""The running decomposition of rows that arrive in batches: k x d of state, a few thin products a batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lora_init.errors import LoraInitError
from lora_init.moments import NEGLIGIBLE, NO_ROWS, Moments, check_alike, check_rows, freeze, raise_if_not_finite
from lora_init.spectrum import Spectrum

# Ridge on the unit diagonal of the small system: keeps its Cholesky factor when directions are nearly dependent.
_RIDGE = 1e-6
# Power iterations on the first batch, which has no basis to start from.
_POWER_ITERATIONS = 4
# The mean is taken off the rows themselves, not off their products, where it outweighs the variance by this factor.
_LARGE_MEAN = 100.0
_ALIGNMENT = 64  # bytes; torch's own for an allocation on the CPU
_TINY = torch.finfo(torch.float64).tiny


class HeldOut(NamedTuple):
    """What the components found before a batch captured of that batch.

    Attributes:
        captured: Sum of squares along each component, about the mean known before, float64 [k].
        total: Sum of squares over all directions, about the same mean.
        n_samples: Rows of the batch.
    """

    captured: Tensor
    total: float
    n_samples: int


class _State(NamedTuple):
    """What is kept between batches. Replaced as a whole, so that an interrupt never leaves half an update."""

    moments: Moments
    directions: Tensor  # V, [k, d], rows orthonormal, nearly by falling scatter
    core: Tensor  # S, [k, k], float64: scatter in these coordinates, nearly diagonal

    def principal(self) -> tuple[Tensor, Tensor]:
        """Scatter along the principal directions, falling, [k]; and the turn from V to them, in columns, [k, k]."""
        weights, turn = torch.linalg.eigh(self.core)
        return weights.flip(0).clamp_min(0.0), turn.flip(1)

    def factor(self) -> Tensor:
        """Rows [k, d] whose scatter matrix is V^T S V."""
        weights, turn = self.principal()
        return (weights.sqrt() * turn).T.to(self.directions.dtype) @ self.directions


class _Pending(NamedTuple):
    """One batch, reduced to what the update needs. The rows themselves are gone."""

    n_samples: int
    row_norms: Tensor  # [n], squared; not finite where a row is not
    mean: Tensor  # [d], float64
    scatter: Tensor  # scalar, float64: about the batch's own mean
    held_out: tuple[Tensor, Tensor] | None
    factor: Tensor | None  # [m, d]: factor^T factor is the batch's scatter matrix, up to rank k
    gram: Tensor | None  # [k, k]: T^T T, with T = rows V^T, about the mean of all rows so far
    image: Tensor | None  # [k, d]: T^T rows, likewise

    @property
    def moments(self) -> Moments:
        return Moments(self.n_samples, self.mean, float(self.scatter))


class IncrementalSVD:
    """Estimate the leading principal components of rows that arrive in batches.

    Keeps C ~ V^T S V with V of k x d. A batch X updates it by a Nystrom step on the sum of old and new: with the
    present directions as test matrix, Y = C V^T + X^T (X V^T), core M = V Y, and the new C is Y M^-1 Y^T. That is one
    step of subspace iteration on all rows seen, at two thin products a batch; a Rayleigh-Ritz step would need a third
    and was measured to be no better. Two Cholesky factors make the new V orthonormal and turn it towards the principal
    directions by one step of the LR iteration; the turn is completed when somebody asks for the spectrum. Batches of
    fewer than k rows, and `merge`, are exact up to the truncation to k.

    The state has half as many directions again as `n_components` (rounded up to a multiple of 16): that is what brings
    the leading ones close to those of the exact decomposition. The mean's own drift counts (Ross et al. 2008); the
    total variance is exact. All products are of rows, never of d x d covariances, and the k x k algebra is float64, so
    that float32 rows keep the components whose singular values are 1e-4 of the largest.

    Cost: 4 d k operations a row. Memory: k x d float32. Deterministic for a given seed and thread count.

    Args:
        n_components: Components to report.
        center: Subtract the mean (PCA). False gives the uncentred second moment.
        seed: Seed of the random start of the first batch.

    Raises:
        LoraInitError: `n_components` is not positive.

    Example:
        >>> import torch
        >>> rows = torch.randn(100, 3) * torch.tensor([9.0, 1.0, 1.0])
        >>> IncrementalSVD(1).partial_fit(rows).spectrum().components.abs().round().tolist()
        [[1.0, 0.0, 0.0]]
    """

    def __init__(self, n_components: int, center: bool = True, seed: int = 0) -> None:
        if n_components < 1:
            raise LoraInitError(f"n_components={n_components}, expected at least 1.")
        self.n_components = n_components
        self.center = center
        self.seed = seed
        self.held_out: HeldOut | None = None
        self._n_directions = -(-3 * n_components // 32) * 16  # k
        self._state: _State | None = None
        self._shift: Tensor | None = None  # [d]
        self._pending: _Pending | None = None

    @property
    def n_samples(self) -> int:
        """Rows taken in so far."""
        return self._state.moments.n_samples if self._state else 0

    @property
    def captured(self) -> float:
        """Share of the variance of the rows seen that the components to report capture, in [0, 1]; NaN without rows."""
        if self._state is None:
            return float("nan")
        scatter = self._state.moments.scatter
        return float(self._state.core.diagonal()[: self.n_components].sum()) / scatter if scatter > 0 else 1.0

    def partial_fit(self, rows: Tensor) -> IncrementalSVD:
        """Take in rows [n, d] of any float type, n from 0 on.

        Raises:
            LoraInitError: Rows of another width than before, or with NaN or inf; nothing was updated.
        """
        self.project(rows)
        apply_updates([self])
        return self

    def project(self, rows: Tensor) -> None:
        """Do the part of `partial_fit` that needs the rows; `apply_updates` does the rest, for many at once.

        Projecting again before that adds to the same batch (a module that runs twice in one forward pass).
        """
        self._to(rows.device)
        state = self._state
        check_rows(rows, state.moments.mean.shape[0] if state else None)
        n, d = rows.shape
        if n == 0:
            return
        if self._pending is not None:
            apply_updates([self])
            state = self._state
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if state is None and self.center:
            mean = rows.mean(0)
            if n * float(mean @ mean) > _LARGE_MEAN * float((rows - mean).square().sum()):
                self._shift = mean
        if self._shift is not None:
            rows = rows - self._shift
        row_norms = torch.linalg.vector_norm(rows, dim=1).square()  # [n]
        batch_mean = torch.mv(rows.T, rows.new_full((n,), 1 / n)) if self.center else torch.zeros_like(rows[0])
        mean = batch_mean.double()
        scatter = row_norms.sum(dtype=torch.float64) - n * (mean @ mean)
        factor = gram = image = held_out = None
        if state is None:
            factor = self._compress(rows - batch_mean)
        else:
            directions, core, n_before = state.directions, state.core, state.moments.n_samples
            known = state.moments.mean if self._shift is None else state.moments.mean - self._shift
            # T about its own mean, [n, k]; the rows need not be centred for that, nor for T^T rows.
            along = torch.addmm(-(directions @ batch_mean), rows, directions.T)
            gram = along.T @ along
            gap = mean - known
            along_gap = directions @ gap.to(rows.dtype)
            # Sums of squares about the mean known so far: about the batch's own mean, plus the distance of the two.
            captured = gram.diagonal().double() + n * along_gap.double().square()
            held_out = (captured, scatter + n * (gap @ gap))
            if len(core) == min(self._n_directions, d) and n > self._n_directions:
                weight = n_before * n / (n_before + n) if self.center else 0.0
                gram.addr_(along_gap, along_gap, alpha=weight)
                image = (along.T @ rows).addr_(along_gap, gap.to(rows.dtype), alpha=weight)
            else:
                gram, factor = None, self._compress(rows - batch_mean)
        if self._shift is not None:
            mean = mean + self._shift
        self._pending = _Pending(n, row_norms, mean, scatter, held_out, factor, gram, image)

    def _compress(self, rows: Tensor) -> Tensor:
        """Reduce centred rows [n, d] to at most k rows with nearly the same scatter matrix: a randomised SVD."""
        size = min(self._n_directions, rows.shape[1])
        if rows.shape[0] <= size or not bool(rows.isfinite().all()):
            return rows
        start = torch.randn(size, rows.shape[1], generator=torch.Generator().manual_seed(self.seed)).to(rows)
        if self._state is not None:
            start[: self._state.directions.shape[0]] = self._state.directions
        basis = torch.linalg.qr(start.T).Q  # [d, k]
        for _ in range(_POWER_ITERATIONS):
            basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
        _, scale, turn = torch.linalg.svd(rows @ basis, full_matrices=False)
        factor: Tensor = scale[:, None] * (turn @ basis.T)
        return factor

    def _fold(self, moments: Moments, factor: Tensor) -> _State:
        """Add rows with these moments and factor^T factor as scatter matrix: exact but for the truncation to k."""
        state, dtype = self._state, torch.promote_types(factor.dtype, torch.float32)
        rows = factor.double()  # [m, d]
        if state is not None:
            dtype = state.directions.dtype
            moments, drift = state.moments.plus(moments)
            rows = torch.cat([state.factor().double(), rows, drift[None]])
        weights, turn = torch.linalg.eigh(rows @ rows.T)
        weights, turn = weights.flip(0), turn.flip(1)
        kept = int((weights > weights[:1].clamp_min(0.0) * NEGLIGIBLE).sum())
        kept = min(kept, rows.shape[1], self._n_directions)
        weights, turn = weights[:kept], turn[:, :kept]
        # The Gram matrix has cost the directions of the smallest weights some digits.
        directions = _orthonormal((turn.T @ rows) / weights.sqrt()[:, None])
        return _State(moments, directions.to(dtype).contiguous(), torch.diag(weights))

    def merge(self, other: IncrementalSVD) -> IncrementalSVD:
        """Take in what another one has seen, as if its rows had come here. `other` is not changed.

        Exact for counts, means and total variance. For the components exact up to the truncation to k directions: the
        variance captured is never overstated.

        Raises:
            LoraInitError: Other width or other `center`.
        """
        check_alike(self.center, other.center)
        if other._state is None or other.n_samples == 0:
            return self
        if self._state is None:
            self._shift = other._shift
        else:
            check_rows(other._state.directions, self._state.moments.mean.shape[0])
        self._state = self._fold(other._state.moments, other._state.factor())
        return self

    def spectrum(self) -> Spectrum:
        """Freeze the present estimate: at most `n_components` components, fewer where the rows span fewer directions.

        Raises:
            LoraInitError: No rows so far.
        """
        if self._state is None:
            raise LoraInitError(NO_ROWS)
        weights, turn = self._state.principal()
        kept = min(self.n_components, int((weights > weights[:1] * NEGLIGIBLE).sum()))
        # Updates leave the directions orthonormal to about 1e-6 only.
        directions = _orthonormal(turn[:, :kept].T @ self._state.directions.double())
        return freeze(self._state.moments, directions, weights[:kept])

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the decomposition has learned, empty before the first rows: views, not copies.

        Returns:
            `directions` [k, d], `core` [k, k] and `mean` [d] in float64, `n_samples` int64, `scatter` float64, and
            `shift` [d] if the rows have a large mean.
        """
        if self._state is None:
            return {}
        moments, directions, core = self._state
        found = {"directions": directions, "core": core, "mean": moments.mean}
        found["n_samples"] = torch.tensor(moments.n_samples)
        found["scatter"] = torch.tensor(moments.scatter, dtype=torch.float64)
        return found if self._shift is None else {**found, "shift": self._shift}

    def load_state_dict(self, state: Mapping[str, Tensor], share: int = 0, of: int = 1) -> IncrementalSVD:
        """Go on from a copy of what `state_dict` returned.

        With `of` parts each part has the same directions and mean, and its share of the rows: all parts merged are the
        whole again, and each has seen all of it.

        Args:
            state: From a decomposition with the same arguments. May be on another device than the rows to come.
            share: Which part to take, from 0.
            of: Number of parts.
        """
        self._pending = self.held_out = None
        self._state, self._shift = None, state["shift"].clone() if "shift" in state else None
        if state:
            whole = int(state["n_samples"])
            n = whole * (share + 1) // of - whole * share // of
            part = n / whole if whole else 0.0
            moments = Moments(n, state["mean"].clone(), float(state["scatter"]) * part)
            # A copy also lies where every allocation does: products of a mapped file's tensors differ in the last bits.
            self._state = _State(moments, state["directions"].clone(), state["core"] * part)
        return self

    def _to(self, device: torch.device) -> None:
        """Move the state to where the rows are: what was loaded or merged is on the CPU."""
        if self._state is not None and self._state.directions.device != device:
            moments, directions, core = self._state
            moments = Moments(moments.n_samples, moments.mean.to(device), moments.scatter)
            self._state = _State(moments, directions.to(device), core.to(device))
            self._shift = None if self._shift is None else self._shift.to(device)


def apply_updates(decompositions: Iterable[IncrementalSVD]) -> None:
    """Complete the `project`ed batches of many decompositions, batched over those of one shape.

    Sets `held_out` of each. Nothing is updated if any batch has a NaN or inf.

    Raises:
        LoraInitError: Rows with NaN or inf. The attribute `decomposition` of the error is the one concerned.
    """
    waiting = [(one, one._pending) for one in decompositions if one._pending is not None]
    for one, _ in waiting:
        one._pending = None
    _check_finite(waiting)
    alike: dict[tuple[torch.Size, torch.device, torch.dtype], list[tuple[IncrementalSVD, _Pending]]] = defaultdict(list)
    for one, batch in waiting:
        if batch.held_out is not None:
            one.held_out = HeldOut(batch.held_out[0], float(batch.held_out[1]), batch.n_samples)
        if batch.image is not None:
            alike[batch.image.shape, batch.image.device, batch.image.dtype].append((one, batch))
        elif batch.factor is not None:
            one._state = one._fold(batch.moments, batch.factor)
    for group in alike.values():
        _nystrom_step(group)


def _nystrom_step(alike: list[tuple[IncrementalSVD, _Pending]]) -> None:
    """Update decompositions of one shape together: g of them, k directions, width d."""
    states = [one._state for one, _ in alike if one._state is not None]
    directions = torch.stack([state.directions for state in states])  # V, [g, k, d]
    core = torch.stack([state.core for state in states])  # S, [g, k, k]
    image = torch.stack([batch.image for _, batch in alike if batch.image is not None])  # [g, k, d]
    image.baddbmm_(core.to(image.dtype), directions)  # Y^T = V C
    core += torch.stack([batch.gram for _, batch in alike if batch.gram is not None])  # M = V C V^T
    scale, _, inverse = _scaled_root(core)
    factor = (inverse * scale.mT).to(image.dtype) @ image  # F = M^-1/2 Y^T: F^T F is the new C
    scale, root, inverse = _scaled_root((factor @ factor.mT).double())  # F F^T = R R^T
    directions = (inverse * scale.mT).to(image.dtype) @ factor  # R^-1 F
    root = root / scale
    core = root.mT @ root  # F^T F = V^T (R^T R) V
    for (one, batch), state, new_directions, new_core in zip(
        alike, states, _aligned(directions), _aligned(core), strict=True
    ):
        one._state = _State(state.moments.plus(batch.moments)[0], new_directions, new_core)


def _aligned(stack: Tensor) -> list[Tensor]:
    """Take a stack apart into tensors that lie as one of its own would: products depend on it in their last bits."""
    return [tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone() for tensor in stack]


def _orthonormal(rows: Tensor) -> Tensor:
    """Make nearly orthonormal rows [k, d] orthonormal, each staying where it points."""
    q, r = torch.linalg.qr(rows.T)
    turned: Tensor = (q * r.diagonal().sign()).T
    return turned


def _scaled_root(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factor D M D = R R^T for symmetric M [g, k, k], with D scaling to a unit diagonal: M may span eight orders.

    Returns:
        The scale of the rows [g, k, 1], R and its inverse. R is a Cholesky factor, or, where rounding has left the
        matrix indefinite (the rows span fewer than k directions), the root of its positive part.
    """
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    floor = (diagonal.amax(1, keepdim=True) * NEGLIGIBLE).clamp_min(_TINY)
    scale = diagonal.maximum(floor).rsqrt()[:, :, None]
    scaled = matrix * scale * scale.mT
    scaled.diagonal(dim1=1, dim2=2).add_(_RIDGE)
    root, info = torch.linalg.cholesky_ex(scaled)
    inverse = torch.linalg.solve_triangular(root, torch.eye(root.shape[-1]).to(root), upper=False)
    if bool(info.any()):
        weights, turn = torch.linalg.eigh(scaled)
        half, turn = weights.flip(1).clamp_min(_RIDGE).sqrt()[:, None, :], turn.flip(2)
        root, inverse = turn * half, (turn / half).mT
    return scale, root, inverse


def _check_finite(waiting: list[tuple[IncrementalSVD, _Pending]]) -> None:
    # One transfer a device, not one a layer.
    for device in {batch.scatter.device for _, batch in waiting}:
        here = [(one, batch) for one, batch in waiting if batch.scatter.device == device]
        if bool(torch.stack([batch.scatter for _, batch in here]).isfinite().all()):
            continue
        for one, batch in here:
            try:
                raise_if_not_finite(batch.row_norms)
            except LoraInitError as error:
                error.decomposition = one  # type: ignore[attr-defined]
                raise
