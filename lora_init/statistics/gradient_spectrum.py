"""The gradient of the loss by the weight of one layer: its running mean, and the frozen result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_init.errors import LoraInitError
from lora_init.statistics.spectrum import Spectrum

_TENSORS = ("left", "singular_values", "right", "output_moment")
# Directions to keep in addition to those to report. With 16 the left vectors r to 2 r of r = 8 lie within 0.8 of the
# exact ones.
_MARGIN = 16
# Parts of the core that the two sides agree on to less than this share are not inverted.
_AGREEMENT = 0.1
# A row this many times smaller than the largest is float32 rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class GradientSpectrum:
    """Directions of one layer that the loss depends on.

    g is the gradient of the summed loss with respect to the layer's output at one token, x what the layer reads there.
    All tensors are on the CPU.

    Attributes:
        weighted: Principal directions of the rows |g| x, uncentered. `explained_variance` is the expected squared
            gradient of B, for one token, along each of them; the first r maximize its sum over all A of r orthonormal
            rows. `total_variance` is E |g|^2 |x|^2. Layers are comparable: all are gradients of one loss.
        left: Left singular vectors of the mean gradient G of the weight, orthonormal rows, float32 [k, d_out].
        singular_values: Its singular values, falling, float64 [k].
        right: Its right singular vectors, float32 [k, d_in].
        output_moment: E g^2 at each output, float64 [d_out]; its sum is E |g|^2.
        importance: Mean of |W * G| over all entries, GoRA's measure; G from its triplets. NaN where W is not known:
            after a merge, and in the file of a pass that has not ended.
        n_samples: Number of tokens that G and `output_moment` are of: all of the pass, while `weighted` may have seen
            enough before its end.
    """

    weighted: Spectrum
    left: Tensor
    singular_values: Tensor
    right: Tensor
    output_moment: Tensor
    importance: float
    n_samples: int

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Write it as plain values and tensors."""
        weighted = self.weighted
        numbers = {
            "total_variance": weighted.total_variance,
            "n_samples": weighted.n_samples,
            "importance": None if math.isnan(self.importance) else self.importance,
            "n_tokens": self.n_samples,
        }
        tensors = {"components": weighted.components, "explained_variance": weighted.explained_variance}
        for name in _TENSORS:
            tensors[name] = getattr(self, name)
        return numbers, tensors

    @classmethod
    def unpack(cls, numbers: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> GradientSpectrum:
        """Read what `pack` wrote; `tensor` gives a tensor by its name."""
        # Gradients are uncentered: the mean row is zero, and is not in the file.
        components, along = tensor("components"), tensor("explained_variance")
        n_samples, total = int(numbers["n_samples"]), float(numbers["total_variance"])
        return cls(
            weighted=Spectrum(components, along, total, torch.zeros(components.shape[1]), n_samples),
            importance=math.nan if numbers["importance"] is None else float(numbers["importance"]),
            # Files from before this number was kept have divided by the other one.
            n_samples=int(numbers.get("n_tokens", n_samples)),
            **{name: tensor(name) for name in _TENSORS},
        )

    def with_importance(self, weight: Tensor) -> GradientSpectrum:
        """Compute the importance from the weight of the layer, [d_out, d_in]."""
        scaled = (self.singular_values[:, None] * self.right.double()).to(weight.device, torch.float32)  # [k, d_in]
        total = 0.0
        # In slices of rows, so that G is never there as a whole.
        for rows, left in zip(torch.split(weight, 256), torch.split(self.left.to(scaled), 256, dim=1), strict=True):
            # 256 x d_in of W and of G = left^T diag(values) right; a sum of so many needs float64.
            total += float((rows.float() * (left.T @ scaled)).abs().sum(dtype=torch.float64))
        return replace(self, importance=total / max(weight.numel(), 1))


class _State(NamedTuple):
    """A sum of gradients G by what it does to l directions of either side. Replaced as a whole."""

    outputs: Tensor  # Q, orthonormal rows [l, d_out]
    inputs: Tensor  # V, orthonormal rows [l, d_in]
    left: Tensor  # V G^T, [l, d_out]
    right: Tensor  # Q G, [l, d_in]
    squares: Tensor  # [d_out], float64: sum of the squares of all rows g
    n_samples: int
    n_chosen: int  # rows that had been seen when Q and V were chosen

    def to(self, device: torch.device) -> _State:
        outputs, inputs, left, right, squares = (part.to(device) for part in self[:5])
        return _State(outputs, inputs, left, right, squares, self.n_samples, self.n_chosen)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Estimate G by A B with A [d_out, l] and B [l, d_in] in float64.

        B is Q G. As far as Q reaches, G is Q^T Q G. What G V^T has in addition, G V^T - Q^T Q G V^T, is expressed by
        the rows of Q G, too: A is Q^T + (G V^T - Q^T Q G V^T) (Q G V^T)^+. Only well-determined parts are inverted.
        """
        outputs, left, right = self.outputs.double(), self.left.double(), self.right.double()
        if len(self.inputs) == self.inputs.shape[1]:  # V has all directions: nothing is to be estimated
            return left.T, self.inputs.double()
        # Balanced first, so that `rtol` measures how well two directions agree, not how large their values are.
        left_factors, right_factors = _balancing(left), _balancing(right)
        core = outputs @ left.T  # Q G V^T: l x d_out, d_out x l -> l x l
        inverse = torch.linalg.pinv(right_factors[:, None] * core * left_factors, rtol=_AGREEMENT)
        outside = left.T - outputs.T @ core  # what Q does not reach of G V^T, d_out x l
        return outputs.T + outside @ (left_factors[:, None] * inverse * right_factors), right


class MeanGradient:
    """Estimate the leading singular triplets of G = sum of g_t x_t^T, for tokens that arrive in batches.

    g_t is the gradient with respect to a layer's output at a token and x_t what the layer reads there, so G is the
    gradient of its weight. Keeps V G^T and Q G for l directions V of inputs and Q of outputs. For a batch these are
    thin products, (x V^T)^T g and (g Q^T)^T x, so nothing of d_out x d_in is ever made; and they are sums, so that
    batches that cancel leave nothing. G is estimated from both (generalised Nystrom, Nakatsukasa 2020), which is exact
    for a sum of rank l at most.

    The better Q and V fit the singular vectors, the less is missed. So before a batch is added, they are chosen anew
    whenever there are half as many rows again as the last time: by one step of subspace iteration on the estimate and
    that batch. The estimate takes the place of the sums. That loses what it misses, so it waits for the third batch.

    The sum of the squares of g is exact, so that scores of layers have one unit.

    Cost: 4 l (d_in + d_out) operations a row, half as much again where the directions change. Memory:
    2 l (d_in + d_out) float32, twice that within a batch.

    Error: of 27 layers of a real 135M model, 24 batches and 16 triplets, the leading 8 left or right vectors captured
    at least 0.99 and in the median 0.9995 of the energy that any 8 could.
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
        assert self._state is not None  # asked for once there are rows, as the triplets are
        return self._state.squares.cpu()

    def project(self, g: Tensor, x: Tensor) -> None:
        """Take in rows g [n, d_out] and x [n, d_in] of any float type; they count once `update` is called.

        Projecting again before that adds to the same batch.
        """
        g, x = g.float(), x.float()
        # `_state` stays as it was until `update`, so that a batch can be dropped whole.
        state = self._pending or self._state or self._empty(g, x)
        state = state.to(g.device)  # what another process sent is on the CPU
        # Half as many rows again: measured to be level with a quarter, at 7 choices in 24 batches in place of 11. Not
        # within a batch, whose sums are images of one Q and V.
        if self._pending is None and 2 * state.n_samples >= 3 * state.n_chosen:
            left, right, outputs, inputs = self._chosen_for(state, g, x, n_steps=1 if state.n_samples else 2)
            n_chosen = state.n_samples or len(g)
        else:
            outputs, inputs, n_chosen = state.outputs, state.inputs, state.n_chosen
            left = state.left + _left_image(g, x, inputs)
            right = state.right + _right_image(g, x, outputs)
        squares = state.squares + g.square().sum(0)
        self._pending = _State(outputs, inputs, left, right, squares, state.n_samples + len(g), n_chosen)

    def check_batch(self) -> None:
        """Refuse what was projected since the last `update` if it has NaN or inf."""
        new = self._pending
        # Sums are enough: NaN and inf stay what they are in a sum, or become NaN.
        if new is not None and not bool(torch.isfinite(new.squares.sum() + new.left.sum() + new.right.sum())):
            self.forget_batch()
            raise LoraInitError("its gradient has NaN or inf. The model produces them; statistics were not updated.")

    def forget_batch(self) -> None:
        """Drop what was projected since the last `update`."""
        self._pending = None

    def update(self) -> None:
        """Complete the batch."""
        self._state, self._pending = self._pending or self._state, None

    def _empty(self, g: Tensor, x: Tensor) -> _State:
        """Make a state without rows, with random directions."""
        size = min(self.n_components + _MARGIN, g.shape[1], x.shape[1])
        left, right = torch.zeros_like(g[:1]).expand(size, -1), torch.zeros_like(x[:1]).expand(size, -1)
        inputs = self._basis(right)
        return _State(self._basis(left), inputs, left, right, left.new_zeros(g.shape[1], dtype=torch.float64), 0, 0)

    def _chosen_for(self, state: _State, g: Tensor, x: Tensor, n_steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choose Q and V anew for the sum of what is known and a batch; return its V G^T, Q G, Q and V.

        This is subspace iteration: from V come the images V G^T, whose span is the next Q; from Q come the images Q G,
        whose span is the next V. Each step brings both nearer to the leading singular vectors of G.
        """
        a, b = (part.float() for part in state.factors())  # G so far is a b: [d_out, l] and [l, d_in]
        inputs = state.inputs
        left = inputs @ b.T @ a.T + _left_image(g, x, inputs)
        for _ in range(n_steps):
            outputs = self._basis(left)
            right = outputs @ a @ b + _right_image(g, x, outputs)
            inputs = self._basis(right)
            left = inputs @ b.T @ a.T + _left_image(g, x, inputs)
        return left, right, outputs, inputs

    def _basis(self, rows: Tensor) -> Tensor:
        """Make rows orthonormal; random ones take the place of those that are rounding."""
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        empty = norms <= _ROUNDING * norms.max()
        if bool(empty.any()):
            # Drawn on the CPU by a generator of its own: the same on every device, and the caller's stays as it was.
            drawn = torch.randn(rows.shape, generator=torch.Generator().manual_seed(self.seed)).to(rows)
            rows = torch.where(empty, drawn, rows)
        # Contiguous, whatever QR returns: products of other layouts differ in the last bits.
        basis: Tensor = torch.linalg.qr(rows.T).Q.T.contiguous()
        return basis

    def merge(self, other: MeanGradient) -> MeanGradient:
        """Take in what another one has seen; exact up to the truncation to l directions. `other` is not changed."""
        if other._state is None:
            return self
        if self._state is None:
            self._state = other._state
            return self
        state, other_state = self._state, other._state.to(self._state.left.device)
        # The two have chosen other directions, so their images cannot be added, but the estimates can.
        (a, b), (c, d) = state.factors(), other_state.factors()  # G1 = a b and G2 = c d, so G1 + G2 = [a c] [b; d]
        u, s, v = product_svd(torch.cat([a, c], 1), torch.cat([b, d]), len(state.left))
        n_samples = state.n_samples + other_state.n_samples
        outputs, inputs = u.T.float().contiguous(), v.float().contiguous()
        left, right = (s[:, None] * u.T).float(), (s[:, None] * v).float()
        squares = state.squares + other_state.squares
        self._state = _State(outputs, inputs, left, right, squares, n_samples, n_samples)
        return self

    def agreement(self, other: MeanGradient, rank: int) -> float:
        """Compute the cosine of the two mean gradients, at least 0; `rank` as in `IncrementalSVD.agreement`."""
        if self._state is None or other._state is None:
            return 0.0
        (a, b), (c, d) = self._state.factors(), other._state.to(self._state.left.device).factors()
        product = _inner_product(a, b, c, d)
        square, other_square = _inner_product(a, b, a, b), _inner_product(c, d, c, d)
        if min(square, other_square) > 0:
            return max(product, 0.0) / math.sqrt(square * other_square)
        return 1.0  # a gradient of zeros has no direction to differ in

    def triplets(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the leading singular triplets of G: left [k, d_out], values [k] float64, right [k, d_in], on the CPU.

        Rows are orthonormal; there are fewer where G has fewer directions.
        """
        assert self._state is not None
        return freeze_triplets(*product_svd(*self._state.factors(), k), k)


def _inner_product(p: Tensor, q: Tensor, r: Tensor, s: Tensor) -> float:
    """Compute <p q, r s> = trace((p q)^T r s) from l x l products alone."""
    return float(((p.T @ r) * (q @ s.T)).sum())


def _balancing(rows: Tensor) -> Tensor:
    """Compute factors that bring entries of the core to one size: singular values span orders of magnitude."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    # 1e-300 for a core of zeros, where the largest is 0, too.
    factors: Tensor = norms.clamp_min(max(_ROUNDING * float(norms.max()), 1e-300)).rsqrt()
    return factors


def _left_image(g: Tensor, x: Tensor, inputs: Tensor) -> Tensor:
    """Compute V G^T of a batch, [l, d_out]."""
    return (x @ inputs.T).T @ g  # [l, n] @ [n, d_out]


def _right_image(g: Tensor, x: Tensor, outputs: Tensor) -> Tensor:
    """Compute Q G of a batch, [l, d_in]."""
    return (g @ outputs.T).T @ x  # [l, n] @ [n, d_in]


def product_svd(left: Tensor, right: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose left @ right, of thin factors [..., d_out, m] and [..., m, d_in], without making it, in float64.

    The `size` leading left singular vectors stand in columns, the right ones in rows; fewer if there are.
    """
    left, r_left = torch.linalg.qr(left.double())  # [..., d_out, m] = [..., d_out, p] [..., p, m]
    right, r_right = torch.linalg.qr(right.double().mT)  # [..., d_in, m] = [..., d_in, q] [..., q, m]
    # The product is left (r_left r_right^T) right^T with orthonormal columns outside: the core [..., p, q] has its SVD.
    u, s, v = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    return left @ u[..., :size], s[..., :size], v[..., :size, :] @ right.mT


def freeze_triplets(u: Tensor, s: Tensor, v: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep k singular triplets, fewer where the rest is rounding: as `MeanGradient.triplets` gives them."""
    kept = min(k, int((s > s[:1] * _ROUNDING).sum()))  # strictly: a gradient of zeros keeps none
    return u[:, :kept].T.float().cpu().contiguous(), s[:kept].cpu(), v[:kept].float().cpu().contiguous()


def freeze_gradient(mean: MeanGradient, weighted: Spectrum, n_labels: int) -> GradientSpectrum:
    """Make the result of a layer, its importance not known yet: the sum over all labels becomes the mean."""
    left, values, right = mean.triplets(mean.n_components)
    # G is a mean over labels, as the loss is; the moment one over tokens, as `weighted` is.
    moment = mean.squares / max(mean.n_samples, 1)
    return GradientSpectrum(weighted, left, values / max(n_labels, 1), right, moment, math.nan, mean.n_samples)
