"""How a layer's adapter starts: a function for each `Start` of the registry, and the mathematics that they share.

Each takes, by name, what it needs of `PROVIDERS`. It returns A, float32 [rank, d_in]; or A and B, float32
[d_out, rank], where B is not zero.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_init.errors import LoraInitError
from lora_init.starts.weights import LoraWeights
from lora_init.statistics.gradient_spectrum import GradientSpectrum, product_svd
from lora_init.statistics.incremental_svd import leading_rows
from lora_init.statistics.second_moment import SecondMoment
from lora_init.statistics.spectrum import NEGLIGIBLE, Spectrum


def eva(spectrum: Spectrum, rank: int, generator: torch.Generator, whiten: bool = False) -> Tensor:
    """Start A from the top principal directions of what the layer reads (EVA, Paischer et al., arXiv 2410.07170).

    The rows are orthonormal (`as_large_as_random` gives all of them one other length); with `whiten` each is divided by
    `whitening_scale`, as PEFT does. Where the data had fewer directions than `rank`, as a single expert's may, random
    ones fill up.
    """
    check_rank(spectrum, rank)
    principal = spectrum.components[:rank].float()  # [at most rank, d_in]
    rows = torch.cat([principal, random_orthonormal(rank - len(principal), principal, generator)])  # [rank, d_in]
    return rows / whitening_scale(spectrum, rank)[:, None] if whiten else rows


def random(width: int, rank: int, generator: torch.Generator) -> Tensor:
    """Start A as PEFT does by default: U(-1/sqrt(d_in), 1/sqrt(d_in)). Its rows have norm 0.58."""
    return nn.init.kaiming_uniform_(torch.empty(rank, width), a=math.sqrt(5), generator=generator)


def gaussian(width: int, rank: int, generator: torch.Generator) -> Tensor:
    """Start A as PEFT's `gaussian`: standard deviation 1 / rank, so that the norm of the rows depends on the rank."""
    return torch.randn(rank, width, generator=generator) / rank


def orthogonal(width: int, rank: int, generator: torch.Generator) -> Tensor:
    """Start A from random orthonormal directions, `eva` without the data; PEFT's `orthogonal` changes B too.

    Example:
        >>> import torch
        >>> a = orthogonal(4, 3, layer_generator(0, "layer"))
        >>> torch.allclose(a @ a.T, torch.eye(3), atol=1e-6)
        True
    """
    return random_orthonormal(rank, torch.empty(0, width), generator)


# A control of `eva` in rows of length one. With B = 0 and Adam, B's first steps move every entry by the learning rate,
# so a larger A is a higher rate for B. This keeps the size of `eva`, layer by layer, and leaves the directions to
# chance.
def random_scaled(spectrum: Spectrum, rank: int, generator: torch.Generator) -> Tensor:
    """Start A as `random` does, times one number: A x then has as much energy, E |A x|^2, as with the A of `eva`."""
    check_rank(spectrum, rank)
    of_unit_rows = energy(spectrum, spectrum.components[:rank])
    return with_energy(spectrum, random(spectrum.components.shape[1], rank, generator), of_unit_rows)


def as_large_as_random(spectrum: Spectrum, a: Tensor) -> Tensor:
    """Multiply A [r, d_in] by the number with which A x has the energy that it has on average with `random`.

    A in directions of next to no variance would become too long for that: its norm is at most ten times `random`'s.
    """
    # The entries of `random` are U(-1/sqrt(d_in), 1/sqrt(d_in)), of variance 1 / (3 d_in). So E |A x|^2 is
    # r / (3 d_in) E |x|^2 on average, and |A| is sqrt(r / 3).
    size_of_x = spectrum.total_variance + float(spectrum.mean.double().square().sum())  # E |x|^2
    sized = with_energy(spectrum, a, len(a) / (3 * a.shape[1]) * size_of_x)
    if not bool(sized.any()):
        return sized
    longest = _LONGEST * math.sqrt(len(a) / 3)
    return sized * min(1.0, longest / float(sized.norm()))


def with_energy(spectrum: Spectrum, a: Tensor, wanted: float) -> Tensor:
    """Multiply A by the number that gives it this `energy`; by 1 where it has none, or none is wanted."""
    own = energy(spectrum, a)
    return a * math.sqrt(wanted / own) if own > 0.0 and wanted > 0.0 else a


def energy(spectrum: Spectrum, a: Tensor) -> float:
    """Compute E |A x|^2, mean included, for the rows x of a spectrum, isotropic outside its components; A is [r, d_in].

    Example:
        >>> import torch
        >>> s = Spectrum(torch.eye(4)[:1], torch.tensor([5.0]).double(), 8.0, torch.tensor([0.0, 2.0, 0.0, 0.0]), 9)
        >>> energy(s, torch.eye(4)[:2])  # 5 along the component, 1 of the rest, 4 of the mean
        10.0
    """
    return float(energies(spectrum, a).sum())


def energies(spectrum: Spectrum, a: Tensor) -> Tensor:
    """Compute E (A x)_i^2 as `energy` does, for each row of A, float64 [r]."""
    # Probabilistic PCA's model of x: variance explained_variance along the k components, noise_variance in every other
    # direction, and a mean. Written as noise everywhere plus an excess along the components, no d x d matrix is needed.
    rest = spectrum.noise_variance
    along = (a @ spectrum.components.to(a).T).square().double().cpu()  # [r, k]
    of_mean = (a @ spectrum.mean.to(a)).square().double().cpu()  # [r]
    excess = (spectrum.explained_variance - rest).clamp_min(0.0)  # [k]
    return along @ excess + rest * a.square().sum(dim=1).double().cpu() + of_mean


def layer_generator(seed: int, name: str) -> torch.Generator:
    """Seed a generator by the layer's name, so that a layer's numbers don't depend on which other layers there are."""
    # Not Python's hash(), which differs from process to process. Seven bytes are within the seeds that torch takes.
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def whitening_scale(spectrum: Spectrum, rank: int) -> Tensor:
    """Return what `whiten=True` divides each row of A by: ((n - 1) * explained_variance_i) ** (1/4), float32 [rank].

    That is EVA's and PEFT's definition, kept so that published settings carry over; textbook whitening divides by
    sqrt(explained_variance_i). A direction without variance takes the scale of the last one that has; 1 if none has.
    """
    singular = ((spectrum.n_samples - 1) * spectrum.explained_variance[:rank]).clamp(min=0.0).sqrt()
    if not len(singular):  # of which there is no max()
        return torch.ones(rank)
    # Below this a direction is the rounding noise of the float32 rows that the first direction came from.
    alive = singular > singular.max() * torch.finfo(torch.float32).eps
    last = singular[alive].min() if alive.any() else torch.ones((), dtype=torch.float64)
    scale = last.expand(rank).clone()  # also of random directions, which fill up
    scale[: len(singular)] = torch.where(alive, singular, last)
    return scale.sqrt().float()


def check_rank(spectrum: Spectrum, rank: int, where: str = "") -> None:
    """Refuse a rank below which the decomposition was cut off although the data holds more."""
    n_components, width = spectrum.components.shape
    # n centered rows span at most n - 1 directions, and directions beyond the last variance do not exist either.
    has_all_variance = float(spectrum.explained_variance.sum()) >= (1.0 - 1e-6) * spectrum.total_variance
    is_cut_off = n_components < min(width, spectrum.n_samples - 1) and not has_all_variance
    if n_components < rank and is_cut_off:
        raise LoraInitError(
            f"{where}rank {rank} needs {rank} components and the statistics hold {n_components}. "
            f"Collect again with rank * rho >= {rank}, or ask for rank {n_components} at most."
        )


def random_orthonormal(n_rows: int, against: Tensor, generator: torch.Generator) -> Tensor:
    """Draw orthonormal rows [n_rows, d] orthogonal to the orthonormal rows `against` [k, d], float32."""
    basis = against.double()  # [k, d]
    rank, width = n_rows + len(basis), basis.shape[1]
    if rank > width:
        raise LoraInitError(f"rank {rank} is larger than the layer's input width {width}. Ask for at most {width}.")
    draw = torch.randn(n_rows, width, generator=generator, dtype=torch.float64)
    draw = draw - (draw @ basis.T) @ basis
    q, r = torch.linalg.qr(draw.T)  # [d, n_rows], [n_rows, n_rows]
    # Signs of R's diagonal make the distribution uniform; one more projection removes what rounding left of `against`.
    rows = (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T
    cleaned: Tensor = rows - (rows @ basis.T) @ basis
    return cleaned.float()


_LONGEST = 10.0  # times random's norm
# Directions beyond the rank in the search for the leading ones.
_OVERSAMPLED = 16
# Share of the mean of a second moment that is added to it before it is inverted.
_DAMPING = 0.01


def eva_grad(gradient: GradientSpectrum, rank: int) -> Tensor:
    """Start A from the directions of the rows |g_t| x_t that hold most of their energy; B is zero.

    dL/dB for one token is g_t (A x_t)^T, so among all A with orthonormal rows this one has the largest expected squared
    gradient of B: EVA's theorem 3.2 (arXiv 2410.07170) without its assumption that g and x are independent.
    """
    return gradient.weighted.components[:rank].clone()


def grad_a(gradient: GradientSpectrum, rank: int) -> Tensor:
    """Start A from the right singular vectors of the mean gradient G, the rows of largest |G A^T|^2; B is zero."""
    return gradient.right[:rank].clone()


def natural_gradient(spectrum: Spectrum, gradient: GradientSpectrum, rank: int) -> Tensor:
    """Start A from the right singular vectors of a step along the natural gradient, see `natural_step`; B is zero.

    It prefers directions of little variance, along which B learns slowly: it takes a larger `lora_alpha` or rate.
    """
    _, _, right = natural_step(spectrum, gradient, rank)
    return right


def natural_gradient_step(spectrum: Spectrum, gradient: GradientSpectrum, rank: int) -> LoraWeights:
    """Start from a step of rank r along the natural gradient, see `natural_step`, of the size that `lora_one` has."""
    return _step(*natural_step(spectrum, gradient, rank), rank)


def lora_ga(gradient: GradientSpectrum, rank: int) -> LoraWeights:
    """Start as LoRA-GA does (Wang et al., arXiv 2407.05000): A = V[:r], B = U[:, r:2r], from the mean gradient U S V.

    The base weight gives up what B A adds. PEFT's `lora_ga` with the same directions also multiplies B by its S.
    """
    if len(gradient.singular_values) < 2 * rank:
        raise LoraInitError(
            f"method 'lora-ga' at rank {rank} needs {2 * rank} singular vectors of the mean gradient, and there are "
            f"{len(gradient.singular_values)}. Give no layer more than rank {len(gradient.singular_values) // 2}, or "
            "collect from more data or for a larger rank."
        )
    return LoraWeights(gradient.right[:rank], gradient.left[rank : 2 * rank].T)


def lora_one(gradient: GradientSpectrum, rank: int) -> LoraWeights:
    """Start as LoRA-One does (Zhang et al., arXiv 2502.01235): from the best rank-r part of a step down the gradient.

    With -G = U S V, B = U[:, :r] sqrt(S / S_1) and A = sqrt(S / S_1) V[:r], both scaled as `scaled_by_gamma` does. The
    authors' later code scales by 1 / sqrt(gamma) alone: the same step has a gamma smaller by sqrt(d_out) there.
    """
    return _step(-gradient.left, gradient.singular_values, gradient.right, rank)


# A step along the natural gradient. The curvature of the loss is K-FAC's, S_x = E x x^T for the input and S_y = E g g^T
# for the output, so that without a bound on the rank the best step is D = -S_y^-1 G S_x^-1. Of rank r the best one is
# S_y^-1/2 W S_x^-1/2, with W the first r singular triplets of S_y^1/2 D S_x^1/2 = -S_y^-1/2 G S_x^-1/2; truncating D
# itself promises less. S_x is modelled as its r leading directions, the mean and an isotropic rest, so that its powers
# cost r x d; S_y as its diagonal. Both are damped by 0.01 of their mean eigenvalue. LoRA-DA (arXiv 2510.24561) has the
# same D with d x d factors, less a term for the variance of D, which between S_y^1/2 and S_x^1/2 is the same in all
# directions.
def natural_step(spectrum: Spectrum, gradient: GradientSpectrum, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the step of rank r that lowers the loss most, by its gradient and curvature, without a d x d matrix.

    Returns the step's singular triplets: left [r, d_out], values [r], right [r, d_in], float32 but for the values.
    """
    spectrum = replace(
        spectrum, components=spectrum.components[:rank], explained_variance=spectrum.explained_variance[:rank]
    )
    inputs = SecondMoment.of(spectrum, _DAMPING)
    moment = gradient.output_moment  # [d_out], the diagonal of S_y
    root = (moment + _DAMPING * moment.mean()).rsqrt()  # S_y^-1/2
    k = 2 * rank  # even where more are known: a start does not depend on what else statistics are for
    # W, from -S_y^-1/2 G [d_out, k] and S_x^-1/2 [k, d_in].
    left = -(gradient.left[:k].double() * root).T * gradient.singular_values[:k]
    left, values, right = product_svd(left, inputs.times(gradient.right[:k].double(), -0.5), rank)
    # S_y^-1/2 W S_x^-1/2, whose own triplets differ from the triplets of W.
    left, values, right = product_svd(root[:, None] * left * values, inputs.times(right, -0.5), rank)
    return left.T.float(), values, right.float()


def scaled_by_gamma(weights: LoraWeights, gamma: float) -> LoraWeights:
    """Scale A and B by d_out^(1/4) / sqrt(gamma), LoRA-GA's stable scale."""
    return weights.times(len(weights.b) ** 0.25 / gamma**0.5)


# QERA minimizes what the quantization error does to the output, E |(W - Q - s B A) x|^2 = |(W - Q - s B A) S^1/2|^2
# with S = E x x^T as `SecondMoment.of` has it. The best s B A of rank r is [(W - Q) S^1/2]_r S^-1/2 by the paper. With
# U the first r left singular vectors of (W - Q) S^1/2 that is U U^T (W - Q), without an inverse. U is found by subspace
# iteration: of an error without any structure 0.3 % more is left than with the exact one.
def qera(spectrum: Spectrum, error: Tensor, rank: int, scaling: float, generator: torch.Generator) -> LoraWeights:
    """Start from what quantization took from the weights, where the data are (QERA, Zhang et al., arXiv 2410.06040).

    Of all matrices of rank r, scaling * B A is the one with the least |(W - Q - scaling * B A) S^1/2|. Where the error
    has a lower rank, further rows of A are random, those of B zero.
    """
    weighted = SecondMoment.of(spectrum).to(error).times(error, 0.5)  # [d_out, d_in]
    start = torch.randn(rank + _OVERSAMPLED, len(error), generator=generator).to(error)
    factor = leading_rows(weighted.T, start)[:rank]  # singular values times U^T, [at most r, d_out]
    scale = torch.linalg.norm(factor, dim=1, keepdim=True)
    # Strictly larger, so that an error of zero leaves no direction.
    left = (factor / scale)[scale[:, 0] ** 2 > NEGLIGIBLE * scale[:1, 0] ** 2]  # U^T, [at most r, d_out]
    right = left @ error  # U^T (W - Q), [at most r, d_in]
    size = torch.linalg.norm(right, dim=1, keepdim=True)
    share = (size / scaling).sqrt()  # both factors get the same length, row by row
    a, b = random(error.shape[1], rank, generator), torch.zeros(error.shape[0], rank)
    a[: len(left)] = (right / size * share).cpu().float()
    b[:, : len(left)] = (left * share).T.cpu().float()
    return LoraWeights(a, b)


def error_seen(spectrum: Spectrum, error: Tensor) -> float:
    """Compute the root of E |E x|^2: how far an error [d_out, d_in] of the weights moves the output of the layer."""
    return math.sqrt(energy(spectrum, error))


def _step(left: Tensor, values: Tensor, right: Tensor, rank: int) -> LoraWeights:
    """Return A and B whose product is the best rank-r part of left^T values right, of norm 1."""
    # The root of each singular value in A and in B, so that neither factor is the larger one.
    root = (values[:rank] / values[0]).sqrt().float()  # [r]
    return LoraWeights(root[:, None] * right[:rank], left[:rank].T * root)
