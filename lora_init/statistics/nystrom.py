"""The update under `IncrementalSVD`: what a batch leaves behind, and how the states of many take it in together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_init.statistics.moments import NEGLIGIBLE, Moments

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
