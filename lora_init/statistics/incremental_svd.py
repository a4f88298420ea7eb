"""The running decomposition of rows that arrive in batches: k x d of state, a few thin products a batch."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lora_init.errors import LoraInitError
from lora_init.statistics.spectrum import (
    NEGLIGIBLE,
    NO_ROWS,
    Moments,
    Spectrum,
    check_alike,
    check_rows,
    freeze,
    raise_if_not_finite,
)

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


# Ridge on the unit diagonal of the small system: keeps its Cholesky factor when directions are nearly dependent.
_RIDGE = 1e-6
_TINY = torch.finfo(torch.float64).tiny
# Numbers that one update works on together: a few MB stay in a CPU's cache, a GPU wants few large calls.
_PIECE_ON_CPU, _PIECE = 2**20, 2**25


class State(NamedTuple):
    """C ~ V^T S V for k directions of width d. Replaced as a whole: an interrupt never leaves half an update."""

    moments: Moments
    test: Tensor  # [k + 1, d]: V, whose rows are orthonormal, nearly by falling scatter; then a row of zeros
    bias: Tensor  # [k + 1]: minus the mean along V; then a one
    core: Tensor  # S, [k, k], float64: scatter in the coordinates of V, nearly diagonal
    shift: Tensor | None = None  # [d]: taken off all rows before they are multiplied

    @classmethod
    def of(cls, moments: Moments, directions: Tensor, weights: Tensor, shift: Tensor | None) -> State:
        """Make a state of directions [k, d] with the scatter along each, [k]."""
        test = nn.functional.pad(directions, (0, 0, 0, 1))
        mean = moments.mean if shift is None else moments.mean - shift
        return cls(moments, test, _bias(test, mean), torch.diag(weights), shift)

    @property
    def directions(self) -> Tensor:
        """V, [k, d]."""
        return self.test[:-1]

    @property
    def shifted_mean(self) -> Tensor:
        """Mean of the rows as they are multiplied, [d], float64."""
        return self.moments.mean if self.shift is None else self.moments.mean - self.shift

    def principal(self) -> tuple[Tensor, Tensor]:
        """Scatter along the principal directions, falling, [k]; and the turn from V to them, in columns, [k, k]."""
        weights, turn = torch.linalg.eigh(self.core)
        return weights.flip(0).clamp_min(0.0), turn.flip(1)

    def factor(self) -> Tensor:
        """Rows [k, d] whose scatter matrix is V^T S V."""
        weights, turn = self.principal()
        return (weights.sqrt() * turn).T.to(self.test.dtype) @ self.directions

    def copy(self) -> State:
        """Take the tensors out of memory that other states share."""
        return self._replace(test=self.test.clone(), bias=self.bias.clone(), core=self.core.clone())

    def to(self, device: torch.device) -> State:
        """Move to a device."""
        moments = Moments(self.moments.n_samples, self.moments.mean.to(device), self.moments.scatter)
        shift = None if self.shift is None else self.shift.to(device)
        return State(moments, self.test.to(device), self.bias.to(device), self.core.to(device), shift)


class Sums(NamedTuple):
    """Rows reduced to what the update needs of them: sums of T^T T and T^T X over rows X.

    T = [(X - mean before) V^T, 1] is one product with the state's test matrix and bias. Its last column brings the sums
    of the others into the Gram matrix and the sum of the rows into the image, at no further pass over the rows.
    """

    n_samples: int
    squares: Tensor  # scalar, float64: sum of the squares of all entries
    gram: Tensor  # T^T T, [k + 1, k + 1]
    image: Tensor  # T^T X, [k + 1, d]

    def plus(self, other: Sums) -> Sums:
        """Add those of other rows, for the same state."""
        gram, image = self.gram + other.gram, self.image + other.image
        return Sums(self.n_samples + other.n_samples, self.squares + other.squares, gram, image)

    def to(self, device: torch.device) -> Sums:
        """Move to a device."""
        return Sums(self.n_samples, self.squares.to(device), self.gram.to(device), self.image.to(device))


def pieces(kinds: Sequence[Sums]) -> list[list[int]]:
    """Sort by shape, device and type, and cut each kind into pieces of a handy size: positions in the sequence."""
    alike: dict[tuple[torch.Size, torch.device, torch.dtype], list[int]] = {}
    for position, sums in enumerate(kinds):
        alike.setdefault((sums.image.shape, sums.image.device, sums.image.dtype), []).append(position)
    found = []
    for (shape, device, _), positions in alike.items():
        size = max(1, (_PIECE_ON_CPU if device.type == "cpu" else _PIECE) // shape.numel())
        found += [positions[start : start + size] for start in range(0, len(positions), size)]
    return found


class _Stacked(NamedTuple):
    """The moments of g sets of rows of one shape, in float64 and in the coordinates in which rows are multiplied."""

    n: Tensor  # [g, 1]
    before: Tensor  # [g, d], the mean before
    gap: Tensor  # [g, d], how far the rows' own mean is from it
    totals: Tensor  # [g], sum of squares about the mean before

    @classmethod
    def of(cls, states: Sequence[State], sums: Sequence[Sums], center: bool) -> _Stacked:
        before = torch.stack([state.shifted_mean for state in states])
        n = torch.tensor([[one.n_samples] for one in sums], dtype=torch.float64, device=before.device)
        means = torch.stack([one.image[-1] for one in sums]).double() / n
        gap = means - before if center else torch.zeros_like(before)
        squares = torch.stack([one.squares for one in sums])
        return cls(n, before, gap, squares - n[:, 0] * (before * (before + 2.0 * gap)).sum(1))


def measure(states: Sequence[State], sums: Sequence[Sums], center: bool) -> list[tuple[Tensor, float]]:
    """Find what the directions capture of rows that they have not seen.

    Returns:
        For each state, the sum of squares along each direction about the mean before, float64 [k], and over all
        directions.
    """
    totals = _Stacked.of(states, sums, center).totals.tolist()
    captured = torch.stack([one.gram.diagonal()[:-1] for one in sums]).double()
    return list(zip(captured, totals, strict=True))


def turn(states: Sequence[State], sums: Sequence[Sums], center: bool) -> list[State]:
    """Take rows into states of one shape, g of them: a Nystrom step on the sum of old and new, see `IncrementalSVD`."""
    n, before, gap, totals = _Stacked.of(states, sums, center)
    n_before = torch.tensor([[state.moments.n_samples] for state in states], dtype=torch.float64, device=n.device)
    share = n * n / (n_before + n)  # sums about the mean before, less this times gap^2, are sums about the mean after
    test = torch.stack([state.test for state in states])  # [g, k + 1, d]
    core = _bordered(torch.stack([state.core for state in states]))  # S, [g, k + 1, k + 1]
    image = torch.stack([one.image for one in sums])  # [g, k + 1, d]
    gram = torch.stack([one.gram for one in sums]).double()  # [g, k + 1, k + 1]
    along_gap = gram[:, -1] / n if center else torch.zeros_like(gram[:, -1])  # [g, k + 1]
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
    found = []
    for i, (state, one) in enumerate(zip(states, sums, strict=True)):
        old = state.moments
        moments = Moments(old.n_samples + one.n_samples, old.mean + step[i], old.scatter + scatter[i])
        found.append(State(moments, test[i], bias[i], core[i], state.shift))
    return found


def orthonormal(rows: Tensor) -> Tensor:
    """Make nearly orthonormal rows [k, d] orthonormal, each staying where it points."""
    q, r = torch.linalg.qr(rows.T)
    turned: Tensor = (q * r.diagonal().sign()).T
    return turned


def _bordered(matrices: Tensor) -> Tensor:
    """Add a last row and column of zeros: products of k + 1 = 48 rows are twice as fast as those of 47."""
    return nn.functional.pad(matrices, (0, 1, 0, 1))


def _bias(test: Tensor, mean: Tensor) -> Tensor:
    """What centres products of rows with the test matrix [..., k + 1, d] about a mean [..., d], and adds the ones."""
    bias = -(test * mean.to(test.dtype)[..., None, :]).sum(-1)
    bias[..., -1] = 1.0
    return bias


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
        weights, vectors = torch.linalg.eigh(scaled)
        half, vectors = weights.flip(1).clamp_min(_RIDGE).sqrt()[:, None, :], vectors.flip(2)
        root, inverse = vectors * half, (vectors / half).mT
    return scale, root, inverse


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


# Inputs as wide as this turn to every batch: gathering would double a state that is large already, and in models of
# that size turning is small next to the pass.
_WIDE = 4096
# The mean is taken off the rows themselves, not off their products, where it outweighs the variance by this factor.
_LARGE_MEAN = 100.0


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


class _Small(NamedTuple):
    """A batch that is taken in exactly: the first, or one of few rows."""

    n_samples: int
    squares: Tensor  # scalar, float64
    mean: Tensor  # [d]
    factor: Tensor  # [m, d]: factor^T factor is the batch's scatter matrix, up to rank k
    captured: Tensor | None  # [k], by the directions before
    shift: Tensor | None  # [d], taken off the rows


class _Pending(NamedTuple):
    """A batch between `project` and `apply_updates`."""

    row_norms: Tensor  # [n], not finite where a row is not
    reduced: Sums | _Small


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

    Cost: 4 d k operations a row. Memory: k x d float32, twice that while batches of fewer than 32 k rows of width below
    4096 are gathered, and as much again within a batch. Deterministic for a given seed and thread count.

    Error: of 120 inputs of a real 135M model, after 32 batches, the leading 16 of 32 components captured at least 0.977
    and in the median 0.999 of what any 16 directions could of the rows seen. They never capture less than is said.

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
        self._state: State | None = None
        self._gathered: Sums | None = None  # rows that the directions have not turned to yet
        self._pending: _Pending | None = None

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

        Args:
            rows: [n, d]; see `as_multiplied` for rows of bfloat16.
        """
        check_rows(rows, None)
        rows = as_multiplied(rows)
        multiply(rows, [self.steps(rows)])

    def steps(self, rows: Tensor, norms: Tensor | None = None, weights: Tensor | None = None) -> Steps:
        """Do what `project` does with products that are made together with those of others, see `multiply`.

        Args:
            rows: [n, d], as `as_multiplied` gives them.
            norms: Of the rows, [n], float32, if they are known.
            weights: Factors of the rows, [n], float32; for uncentred decompositions only, and with the norms.
        """
        self._to(rows.device)
        check_rows(rows, self._state.test.shape[1] if self._state else None)
        n, d = rows.shape
        if n == 0:
            return
        if self._pending is not None:
            apply_updates([self])
        state = self._state
        small = state is None or len(state.core) < min(self._n_directions, d) or n <= self._n_directions
        shared = state is not None and not small and state.shift is None
        if small and rows.dtype == torch.bfloat16:
            rows = rows.float()
        if weights is not None and small:
            rows, norms, weights = rows * weights[:, None], None, None
        shift = state.shift if state is not None else self._large_mean(rows)
        rows, norms = (rows, norms) if shift is None else (rows - shift, None)
        if norms is None:
            norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
        norms = norms if weights is None else norms * weights
        doubled = norms.double()
        squares = doubled @ doubled
        captured = None
        if state is not None:
            test = Along(state.test, state.bias)
            along = (yield test) if shared else times_transposed(rows, *test)  # T, [n, k + 1]
            along = along if weights is None else along * weights[:, None]
            gram = along.T @ along
            if not small:
                along = along if weights is None else along * weights[:, None]
                image = (yield Image(along)) if shared else times_transposed(along.T, rows.T)
                if self.center and rows.dtype == torch.bfloat16:
                    image[-1] = rows.sum(0, dtype=torch.float32)  # the mean is of it, and stays exact
                self._pending = _Pending(norms, Sums(n, squares, gram, image))
                return
            captured = gram.diagonal()[:-1].double()
        mean = rows.mean(0) if self.center else torch.zeros_like(rows[0])
        start = torch.randn(self._n_directions, d, generator=torch.Generator().manual_seed(self.seed)).to(rows)
        if state is not None:
            start[: len(state.core)] = state.directions
        self._pending = _Pending(norms, _Small(n, squares, mean, compress(rows - mean, start), captured, shift))

    def _large_mean(self, rows: Tensor) -> Tensor | None:
        if not self.center:
            return None
        mean = rows.mean(0)
        return mean if len(rows) * float(mean @ mean) > _LARGE_MEAN * float((rows - mean).square().sum()) else None

    def _is_due(self) -> bool:
        """Tell whether to turn the directions: to every batch at first, later to every eighth of all rows.

        That was measured to be as good as to every batch, and turning costs a fifth of what the products with 500 rows
        do; rows that are not centred lose nothing at every fourth. Large batches are not gathered: it would take as
        much memory again.
        """
        if self._state is None or self._gathered is None:
            return False
        rows, width = self._gathered.n_samples, self._state.test.shape[1]
        parts = 8 if self.center else 4
        return parts * rows >= self._state.moments.n_samples or rows >= 32 * self._n_directions or width >= _WIDE

    def _settled(self) -> IncrementalSVD:
        one = copy.copy(self)
        settle([one])
        return one

    def _take_in(self, batch: _Small) -> None:
        settle([self])
        mean = batch.mean.double()
        scatter = float(batch.squares - batch.n_samples * (mean @ mean))
        mean = mean if batch.shift is None else mean + batch.shift
        if self._state is not None and batch.captured is not None:
            gap = mean - self._state.moments.mean
            self.held_out = HeldOut(batch.captured, scatter + batch.n_samples * float(gap @ gap), batch.n_samples)
        self._fold(Moments(batch.n_samples, mean, scatter), batch.factor, batch.shift)

    def _fold(self, moments: Moments, factor: Tensor, shift: Tensor | None) -> None:
        self._state = fold(self._state, moments, factor, shift, self._n_directions)

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
        if other._state is None or other.n_samples == 0:
            return self
        if self._state is not None:
            check_rows(other._state.directions, self._state.test.shape[1])
        self._fold(other._state.moments, other._state.factor(), other._state.shift)
        return self

    def release(self) -> None:
        """Take the state out of the memory that it shares with other decompositions, when no more rows will come."""
        settle([self])
        if self._state is not None:
            self._state = self._state.copy()

    def spectrum(self) -> Spectrum:
        """Freeze the present estimate: at most `n_components` components, fewer where the rows span fewer directions.

        Raises:
            LoraInitError: No rows so far.
        """
        state = self._settled()._state
        if state is None:
            raise LoraInitError(NO_ROWS)
        weights, vectors = state.principal()
        kept = min(self.n_components, int((weights > weights[:1] * NEGLIGIBLE).sum()))
        # Updates leave the directions orthonormal to about 1e-6 only.
        directions = orthonormal(vectors[:, :kept].T @ state.directions.double())
        return freeze(state.moments, directions, weights[:kept])

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the decomposition has learned, empty before the first rows: views, not copies.

        Returns:
            `test` [k + 1, d], the directions and a row of zeros; `bias` [k + 1]; `core` [k, k] and `mean` [d] in
            float64, `n_samples` int64, `scatter` float64; `shift` [d] if the rows have a large mean; and if rows are
            gathered, their `gathered.image` [k + 1, d], `gathered.gram` [k + 1, k + 1], `gathered.n_samples` and
            `gathered.squares`.
        """
        if self._state is None:
            return {}
        moments, test, bias, core, shift = self._state
        found = {"test": test, "bias": bias, "core": core, "mean": moments.mean}
        found["n_samples"] = torch.tensor(moments.n_samples)
        found["scatter"] = torch.tensor(moments.scatter, dtype=torch.float64)
        if shift is not None:
            found["shift"] = shift
        if self._gathered is not None:
            n_samples, squares, gram, image = self._gathered
            found |= {"gathered.squares": squares, "gathered.gram": gram, "gathered.image": image}
            found["gathered.n_samples"] = torch.tensor(n_samples)
        return found

    def load_state_dict(self, state: Mapping[str, Tensor], share: int = 0, of: int = 1) -> IncrementalSVD:
        """Go on from a copy of what `state_dict` returned.

        With `of` parts each part has the same directions and mean, and its share of the rows: all parts merged are the
        whole again, and each has seen all of it. What was gathered must have been settled before.

        Args:
            state: From a decomposition with the same arguments. May be on another device than the rows to come.
            share: Which part to take, from 0.
            of: Number of parts.
        """
        # A copy also lies where every allocation does: products of a mapped file's tensors differ in the last bits.
        state = {name: tensor.clone() for name, tensor in state.items()}
        self._state = self._gathered = self._pending = self.held_out = None
        if state:
            whole = int(state["n_samples"])
            n = whole * (share + 1) // of - whole * share // of
            part = n / whole if whole else 0.0
            moments = Moments(n, state["mean"], float(state["scatter"]) * part)
            self._state = State(moments, state["test"], state["bias"], state["core"] * part, state.get("shift"))
        if "gathered.image" in state:
            squares, gram, image = (state[f"gathered.{name}"] for name in ("squares", "gram", "image"))
            self._gathered = Sums(int(state["gathered.n_samples"]), squares, gram, image)
        return self

    def _to(self, device: torch.device) -> None:
        """Move the state to where the rows are: what was loaded or merged is on the CPU."""
        if self._state is not None and self._state.test.device != device:
            self._state = self._state.to(device)
            self._gathered = None if self._gathered is None else self._gathered.to(device)


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
    projected = []
    for one, (_, reduced) in waiting:
        if isinstance(reduced, Sums):
            projected.append((one, reduced))
        else:
            one._take_in(reduced)
    for alike, states, sums, center in _stacks(projected):
        for one, batch, (captured, total) in zip(alike, sums, measure(states, sums, center), strict=True):
            one.held_out = HeldOut(captured, total, batch.n_samples)
    for one, batch in projected:
        one._gathered = batch if one._gathered is None else one._gathered.plus(batch)
    settle(one for one, _ in projected if one._is_due())


def settle(decompositions: Iterable[IncrementalSVD]) -> None:
    """Turn the directions of many decompositions to what was gathered since they last turned."""
    gathered = [(one, one._gathered) for one in decompositions if one._gathered is not None]
    for alike, states, sums, center in _stacks(gathered):
        for one, state in zip(alike, turn(states, sums, center), strict=True):
            one._state, one._gathered = state, None


def _stacks(
    batches: list[tuple[IncrementalSVD, Sums]],
) -> Iterator[tuple[list[IncrementalSVD], list[State], list[Sums], bool]]:
    """Cut decompositions into pieces of one shape, with the states and rows of each piece."""
    for center in (True, False):
        alike = [(one, one._state, sums) for one, sums in batches if one._state is not None and one.center is center]
        for piece in pieces([sums for *_, sums in alike]):
            ones, states, sums = zip(*(alike[position] for position in piece), strict=True)
            yield list(ones), list(states), list(sums), center


def _check_finite(waiting: list[tuple[IncrementalSVD, _Pending]]) -> None:
    # One transfer a device, not one a layer.
    for device in {batch.reduced.squares.device for _, batch in waiting}:
        here = [(one, batch) for one, batch in waiting if batch.reduced.squares.device == device]
        if bool(torch.stack([batch.reduced.squares for _, batch in here]).isfinite().all()):
            continue
        for one, batch in here:
            try:
                raise_if_not_finite(batch.row_norms)
            except LoraInitError as error:
                error.decomposition = one  # type: ignore[attr-defined]
                raise
