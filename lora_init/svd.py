"""The running decomposition of rows that arrive in batches: k x d of state, a few thin products a batch."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_init.errors import LoraInitError
from lora_init.moments import NEGLIGIBLE, NO_ROWS, Moments, check_alike, check_rows, freeze, raise_if_not_finite
from lora_init.products import times_transposed
from lora_init.spectrum import Spectrum

# Ridge on the unit diagonal of the small system: keeps its Cholesky factor when directions are nearly dependent.
_RIDGE = 1e-6
# Power iterations on the first batch, which has no basis to start from.
_POWER_ITERATIONS = 4
# The mean is taken off the rows themselves, not off their products, where it outweighs the variance by this factor.
_LARGE_MEAN = 100.0
# Numbers that one update works on together: a few MB stay in a CPU's cache, a GPU wants few large calls.
_PIECE_ON_CPU, _PIECE = 2**20, 2**25
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
    test: Tensor  # [k + 1, d]: V, whose rows are orthonormal, nearly by falling scatter; then a row of zeros
    bias: Tensor  # [k + 1]: minus the mean along V; then a one
    core: Tensor  # S, [k, k], float64: scatter in the coordinates of V, nearly diagonal

    @property
    def directions(self) -> Tensor:
        """V, [k, d]."""
        return self.test[:-1]

    def principal(self) -> tuple[Tensor, Tensor]:
        """Scatter along the principal directions, falling, [k]; and the turn from V to them, in columns, [k, k]."""
        weights, turn = torch.linalg.eigh(self.core)
        return weights.flip(0).clamp_min(0.0), turn.flip(1)

    def factor(self) -> Tensor:
        """Rows [k, d] whose scatter matrix is V^T S V."""
        weights, turn = self.principal()
        return (weights.sqrt() * turn).T.to(self.directions.dtype) @ self.directions


class _Batch(NamedTuple):
    """A batch, or several, reduced to what the update needs. The rows themselves are gone.

    With T = [(rows - mean before) V^T, 1], which is one product with the state's test matrix and bias. Its last column
    brings the sums of the others into the Gram matrix and the sum of the rows into the image, at no further pass.
    """

    n_samples: int
    row_norms: Tensor  # [n], not finite where a row is not
    squares: Tensor  # scalar, float64: sum of all squares
    gram: Tensor | None = None  # T^T T, [k + 1, k + 1]
    image: Tensor | None = None  # T^T rows, [k + 1, d]
    mean: Tensor | None = None  # [d]; where there is no image
    factor: Tensor | None = None  # [m, d]: factor^T factor is the batch's scatter matrix, up to rank k; likewise


class IncrementalSVD:
    """Estimate the leading principal components of rows that arrive in batches.

    Keeps C ~ V^T S V with V of k x d. Rows X update it by a Nystrom step on the sum of old and new: with the present
    directions as test matrix, Y = C V^T + X^T (X V^T), core M = V Y, and the new C is Y M^-1 Y^T. That is one step of
    subspace iteration on all rows seen, at two thin products a batch; a Rayleigh-Ritz step would need a third and was
    measured to be no better. Two Cholesky factors make the new V orthonormal and turn it towards the principal
    directions by one step of the LR iteration; the turn is completed when somebody asks for the spectrum. Small batches
    are gathered, in sums, before V turns. Batches of fewer than k rows, and `merge`, are exact up to the truncation to
    k.

    The state has half as many directions again as `n_components` (rounded up to a multiple of 16, less one): that is
    what brings the leading ones close to those of the exact decomposition. The mean's own drift counts (Ross et al.
    2008); the total variance is exact. All products are of rows, never of d x d covariances, and the k x k algebra is
    float64, so that float32 rows keep the components whose singular values are 1e-4 of the largest.

    Cost: 4 d k operations a row. Memory: k x d float32, twice that while batches of fewer than 32 k rows are gathered,
    and as much again within a batch. Deterministic for a given seed and thread count.

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
        # With the row of zeros that is a multiple of 16, which products of matrices like.
        self._n_directions = -(-3 * n_components // 32) * 16 - 1  # k
        self._state: _State | None = None
        self._shift: Tensor | None = None  # [d]
        self._gathered: _Batch | None = None  # rows that the directions have not turned to yet
        self._pending: _Batch | None = None

    @property
    def n_samples(self) -> int:
        """Rows taken in so far."""
        gathered = self._gathered.n_samples if self._gathered else 0
        return self._state.moments.n_samples + gathered if self._state else 0

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
        row_norms = torch.linalg.vector_norm(rows, dim=1)
        squares = torch.linalg.vector_norm(row_norms, dtype=torch.float64).square()
        gram = None
        if state is not None:
            along = times_transposed(rows, state.test, state.bias)  # T
            gram = along.T @ along
            if len(state.core) == min(self._n_directions, d) and n > self._n_directions:
                self._pending = _Batch(n, row_norms, squares, gram, image=times_transposed(along.T, rows.T))
                return
        mean = rows.mean(0) if self.center else torch.zeros_like(rows[0])
        self._pending = _Batch(n, row_norms, squares, gram, mean=mean, factor=self._compress(rows - mean))

    def _compress(self, rows: Tensor) -> Tensor:
        """Reduce centred rows [n, d] to at most k rows with nearly the same scatter matrix: a randomised SVD."""
        size = min(self._n_directions, rows.shape[1])
        if rows.shape[0] <= size or not bool(rows.isfinite().all()):
            return rows
        start = torch.randn(size, rows.shape[1], generator=torch.Generator().manual_seed(self.seed)).to(rows)
        if self._state is not None:
            start[: len(self._state.core)] = self._state.directions
        basis = torch.linalg.qr(start.T).Q  # [d, k]
        for _ in range(_POWER_ITERATIONS):
            basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
        _, scale, turn = torch.linalg.svd(rows @ basis, full_matrices=False)
        factor: Tensor = scale[:, None] * (turn @ basis.T)
        return factor

    def _gather(self, batch: _Batch) -> None:
        old = self._gathered
        if old is not None:
            assert old.gram is not None and old.image is not None and batch.gram is not None and batch.image is not None
            n, squares = old.n_samples + batch.n_samples, old.squares + batch.squares
            batch = _Batch(n, batch.row_norms, squares, old.gram + batch.gram, old.image + batch.image)
        self._gathered = batch

    def _is_due(self) -> bool:
        """Tell whether to turn the directions: to every batch at first, later to every eighth of all rows.

        That was measured to be as good as to every batch, and turning costs a fifth of what the products with 500 rows
        do. Large batches are not gathered: it would take as much memory again.
        """
        if self._state is None or self._gathered is None:
            return False
        rows = self._gathered.n_samples
        return 8 * rows >= self._state.moments.n_samples or rows >= 32 * self._n_directions

    def _settled(self) -> IncrementalSVD:
        one = copy.copy(self)
        settle([one])
        return one

    def _take_in(self, batch: _Batch) -> None:
        """Complete a batch that is the first, or small."""
        settle([self])
        n, state = batch.n_samples, self._state
        assert batch.mean is not None and batch.factor is not None
        mean = batch.mean.double()
        scatter = float(batch.squares - n * (mean @ mean))
        if self._shift is not None:
            mean = mean + self._shift
        if state is not None and batch.gram is not None:
            gap = mean - state.moments.mean
            captured = batch.gram.diagonal()[:-1].double()
            self.held_out = HeldOut(captured, scatter + n * float(gap @ gap), n)
        self._fold(Moments(n, mean, scatter), batch.factor)

    def _fold(self, moments: Moments, factor: Tensor) -> None:
        """Add rows with these moments and factor^T factor as scatter matrix: exact but for the truncation to k."""
        state, dtype = self._state, torch.promote_types(factor.dtype, torch.float32)
        rows = factor.double()  # [m, d]
        if state is not None:
            dtype = state.test.dtype
            moments, drift = state.moments.plus(moments)
            rows = torch.cat([state.factor().double(), rows, drift[None]])
        weights, turn = torch.linalg.eigh(rows @ rows.T)
        weights, turn = weights.flip(0), turn.flip(1)
        kept = int((weights > weights[:1].clamp_min(0.0) * NEGLIGIBLE).sum())
        kept = min(kept, rows.shape[1], self._n_directions)
        weights, turn = weights[:kept], turn[:, :kept]
        # The Gram matrix has cost the directions of the smallest weights some digits.
        directions = _orthonormal((turn.T @ rows) / weights.sqrt()[:, None])
        test = nn.functional.pad(directions.to(dtype), (0, 0, 0, 1))
        bias = _bias(test, self._shifted(moments.mean))
        self._state = _State(moments, test, bias, torch.diag(weights))

    def _shifted(self, mean: Tensor) -> Tensor:
        return mean if self._shift is None else mean - self._shift

    def merge(self, other: IncrementalSVD) -> IncrementalSVD:
        """Take in what another one has seen, as if its rows had come here. `other` is not changed.

        Exact for counts, means and total variance. For the components exact up to the truncation to k directions: the
        variance captured is never overstated.

        Raises:
            LoraInitError: Other width or other `center`.
        """
        check_alike(self.center, other.center)
        settle([self])
        other = other._settled()
        if other._state is None:
            return self
        if self._state is None:
            self._shift = other._shift
        else:
            check_rows(other._state.directions, self._state.moments.mean.shape[0])
        self._fold(other._state.moments, other._state.factor())
        return self

    def release(self) -> None:
        """Take the state out of the memory that it shares with other decompositions, when no more rows will come."""
        settle([self])
        if self._state is not None:
            moments, test, bias, core = self._state
            self._state = _State(moments, test.clone(), bias.clone(), core.clone())

    def spectrum(self) -> Spectrum:
        """Freeze the present estimate: at most `n_components` components, fewer where the rows span fewer directions.

        Raises:
            LoraInitError: No rows so far.
        """
        state = self._settled()._state
        if state is None:
            raise LoraInitError(NO_ROWS)
        weights, turn = state.principal()
        kept = min(self.n_components, int((weights > weights[:1] * NEGLIGIBLE).sum()))
        # Updates leave the directions orthonormal to about 1e-6 only.
        directions = _orthonormal(turn[:, :kept].T @ state.directions.double())
        return freeze(state.moments, directions, weights[:kept])


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
    for one, batch in waiting:
        if batch.image is None:
            one._take_in(batch)  # the first, or a small one: exact
    projected = [(one, batch) for one, batch in waiting if batch.image is not None]
    for alike in _by_shape(projected):
        _measure(alike)
    for one, batch in projected:
        one._gather(batch)
    settle(one for one, _ in projected if one._is_due())


def settle(decompositions: Iterable[IncrementalSVD]) -> None:
    """Turn the directions of many decompositions to what was gathered since they last turned."""
    gathered = [(one, one._gathered) for one in decompositions if one._gathered is not None]
    for alike in _by_shape(gathered):
        _nystrom_step(alike)


_Alike = list[tuple["IncrementalSVD", _Batch]]


def _by_shape(batches: _Alike) -> Iterator[_Alike]:
    """Sort batches by shape, device and type of their images, and cut each kind into pieces of a handy size."""
    kinds: dict[tuple[torch.Size, torch.device, torch.dtype, bool], _Alike] = defaultdict(list)
    for one, batch in batches:
        assert batch.image is not None
        kinds[batch.image.shape, batch.image.device, batch.image.dtype, one.center].append((one, batch))
    for (shape, device, *_), alike in kinds.items():
        size = max(1, (_PIECE_ON_CPU if device.type == "cpu" else _PIECE) // shape.numel())
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _moments(alike: _Alike) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Collect the moments of g batches of one shape.

    Returns:
        Rows [g, 1], mean before [g, d], distance of the batch's own mean from it [g, d], and the sum of squares about
        the mean before [g]; float64, in the coordinates of the rows as they were multiplied.
    """
    states = [one._state for one, _ in alike if one._state is not None]
    before = torch.stack([one._shifted(state.moments.mean) for (one, _), state in zip(alike, states, strict=True)])
    n = torch.tensor([[batch.n_samples] for _, batch in alike], dtype=torch.float64, device=before.device)
    if not alike[0][0].center:
        gap = torch.zeros_like(before)
    else:
        gap = torch.stack([batch.image[-1] for _, batch in alike if batch.image is not None]).double() / n - before
    squares = torch.stack([batch.squares for _, batch in alike])
    return n, before, gap, squares - n[:, 0] * (before * (before + 2.0 * gap)).sum(1)


def _measure(alike: _Alike) -> None:
    """Note what the directions capture of batches that they have not seen."""
    totals = _moments(alike)[3].tolist()
    captured = torch.stack([batch.gram.diagonal()[:-1] for _, batch in alike if batch.gram is not None]).double()
    for (one, batch), along, total in zip(alike, captured, totals, strict=True):
        one.held_out = HeldOut(along, total, batch.n_samples)


def _nystrom_step(alike: _Alike) -> None:
    """Update decompositions of one shape together: g of them, k directions, width d."""
    states = [one._state for one, _ in alike if one._state is not None]
    n, before, gap, totals = _moments(alike)
    n_before = torch.tensor([[state.moments.n_samples] for state in states], dtype=torch.float64, device=n.device)
    share = n * n / (n_before + n)  # sums about the mean before, less this times gap^2, are sums about the mean after
    test = torch.stack([state.test for state in states])  # [g, k + 1, d]
    core = _bordered(torch.stack([state.core for state in states]))  # S, [g, k + 1, k + 1]
    image = torch.stack([batch.image for _, batch in alike if batch.image is not None])  # [g, k + 1, d]
    gram = torch.stack([batch.gram for _, batch in alike if batch.gram is not None]).double()  # [g, k + 1, k + 1]
    along_gap = gram[:, -1] / n if alike[0][0].center else torch.zeros_like(gram[:, -1])  # [g, k + 1]
    along_gap[:, -1] = 0.0

    weights = core.clone()
    weights[:, :, -1] = -along_gap
    test[:, -1] = n * before + share * gap
    image.baddbmm_(weights.to(image.dtype), test)  # Y^T = V C; its last row counts no longer
    core += gram - share[:, :, None] * along_gap[:, :, None] * along_gap[:, None]  # M = V C V^T
    scale, _, inverse = _scaled_root(core[:, :-1, :-1])
    factor = _bordered(inverse * scale.mT).to(image.dtype) @ image  # F = M^-1/2 Y^T: F^T F is the new C
    scale, root, inverse = _scaled_root((factor @ factor.mT)[:, :-1, :-1].double())  # F F^T = R R^T
    test = _bordered(inverse * scale.mT).to(image.dtype) @ factor  # R^-1 F
    root = root / scale
    core = root.mT @ root  # F^T F = V^T (R^T R) V

    step = gap * (n / (n_before + n))
    bias = _bias(test, before + step)
    scatter = (totals - share[:, 0] * gap.square().sum(1)).tolist()
    for i, ((one, batch), state) in enumerate(zip(alike, states, strict=True)):
        old = state.moments
        moments = Moments(old.n_samples + batch.n_samples, old.mean + step[i], old.scatter + scatter[i])
        one._gathered, one._state = None, _State(moments, test[i], bias[i], core[i])


def _bordered(matrices: Tensor) -> Tensor:
    """Add a last row and column of zeros: products of k + 1 = 48 rows are twice as fast as those of 47."""
    return nn.functional.pad(matrices, (0, 1, 0, 1))


def _bias(test: Tensor, mean: Tensor) -> Tensor:
    """What centres products of rows with the test matrix [..., k + 1, d] about a mean [..., d], and adds the ones."""
    bias = -(test * mean.to(test.dtype)[..., None, :]).sum(-1)
    bias[..., -1] = 1.0
    return bias


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


def _check_finite(waiting: list[tuple[IncrementalSVD, _Batch]]) -> None:
    # One transfer a device, not one a layer.
    for device in {batch.squares.device for _, batch in waiting}:
        here = [(one, batch) for one, batch in waiting if batch.squares.device == device]
        if bool(torch.stack([batch.squares for _, batch in here]).isfinite().all()):
            continue
        for one, batch in here:
            try:
                raise_if_not_finite(batch.row_norms)
            except LoraInitError as error:
                error.decomposition = one  # type: ignore[attr-defined]
                raise
