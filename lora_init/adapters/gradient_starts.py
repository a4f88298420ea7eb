"""Starts that the gradient decides: one function for each, from what a pass learned about a layer to A and B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_init.adapters.initializers import as_large_as_eva, eva, random_orthonormal, zero_b
from lora_init.errors import LoraInitError
from lora_init.statistics.gradient_spectrum import GradientSpectrum
from lora_init.statistics.spectrum import Spectrum

# Share of the mean of a second moment that is added to it before it is inverted.
_DAMPING = 0.01
# The function of a start: (input spectrum, gradient spectrum, rank, source of random numbers, scale) -> A, B
Start = Callable[[Spectrum, GradientSpectrum, int, torch.Generator, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class GradientMethod:
    """A start and what it does to the model.

    Attributes:
        start: Computes A float32 [rank, d_in] and B float32 [d_out, rank].
        gamma: Default of the number that A and B are divided by the root of; 0 where B is zero and there is none. For
            a step 1024, which is a small one: how large it can be depends on model and data, see `find_step_size`.
        corrects: Whether the base weights give up what B A adds, so that the output stays.
    """

    start: Start
    gamma: float = 0.0
    corrects: bool = False

    @property
    def steps(self) -> bool:
        """Whether the model's output changes at the start: B is not zero, and nothing makes up for it."""
        return self.gamma > 0.0 and not self.corrects


def eva_grad(
    spectrum: Spectrum, gradient: GradientSpectrum, rank: int, generator: torch.Generator, gamma: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Start A from the directions of the rows |g_t| x_t that hold most of their energy; B is zero.

    dL/dB for one token is g_t (A x_t)^T, so among all A with orthonormal rows this one has the largest expected squared
    gradient of B: EVA's theorem 3.2 (arXiv 2410.07170) without its assumption that g and x are independent.
    """
    return eva(gradient.weighted, rank, generator), zero_b(gradient.left.shape[1], rank)


def grad_a(
    spectrum: Spectrum, gradient: GradientSpectrum, rank: int, generator: torch.Generator, gamma: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Start A from the right singular vectors of the mean gradient G; B is zero.

    Among all A with orthonormal rows this one has the largest squared mean gradient of B, |G A^T|^2: what `eva_grad`
    does with the square inside the mean.
    """
    return _filled(gradient.right[:rank], rank, generator), zero_b(gradient.left.shape[1], rank)


def natural_gradient(
    spectrum: Spectrum, gradient: GradientSpectrum, rank: int, generator: torch.Generator, gamma: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Start A from the right singular vectors of the natural gradient, see `preconditioned`; B is zero."""
    _, _, right = preconditioned(spectrum, gradient)
    return _filled(right[:rank], rank, generator), zero_b(gradient.left.shape[1], rank)


def natural_gradient_scaled(
    spectrum: Spectrum, gradient: GradientSpectrum, rank: int, generator: torch.Generator, gamma: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Start as `natural_gradient`, with as much energy in A x as with EVA's A, see `initializers.random_scaled`.

    The preconditioner prefers directions of little variance, along which A x is small and B learns slowly.
    """
    a, b = natural_gradient(spectrum, gradient, rank, generator)
    return as_large_as_eva(spectrum, a), b


def natural_gradient_step(
    spectrum: Spectrum, gradient: GradientSpectrum, rank: int, generator: torch.Generator, gamma: float
) -> tuple[Tensor, Tensor]:
    """Start from the best rank-r part of a step along the natural gradient, of the size that `lora_one` has."""
    return _step(*preconditioned(spectrum, gradient), rank, generator, gamma)


def lora_ga(
    spectrum: Spectrum, gradient: GradientSpectrum, rank: int, generator: torch.Generator, gamma: float
) -> tuple[Tensor, Tensor]:
    """Start as LoRA-GA does (Wang et al., arXiv 2407.05000): A = V[:r], B = U[:, r:2r], from the mean gradient U S V.

    Both are scaled by d_out^(1/4) / sqrt(gamma), the paper's stable scale. The base weight gives up what B A adds.

    Raises:
        LoraInitError: There are fewer than 2 r singular vectors.
    """
    if len(gradient.singular_values) < 2 * rank:
        raise LoraInitError(
            f"method 'lora-ga' at rank {rank} needs {2 * rank} singular vectors of the mean gradient, and there are "
            f"{len(gradient.singular_values)}. Give all layers the rank that was collected for (rho=1, --rho 1), or "
            "collect for a larger one."
        )
    scale = _stable(gradient.left.shape[1], gamma)
    return gradient.right[:rank] * scale, gradient.left[rank : 2 * rank].T * scale


def lora_one(
    spectrum: Spectrum, gradient: GradientSpectrum, rank: int, generator: torch.Generator, gamma: float
) -> tuple[Tensor, Tensor]:
    """Start as LoRA-One does (Zhang et al., arXiv 2502.01235): from the best rank-r part of a step down the gradient.

    With -G = U S V, B = U[:, :r] sqrt(S / S_1) and A = sqrt(S / S_1) V[:r], both scaled by d_out^(1/4) / sqrt(gamma),
    the authors' stable scale. The model's output changes.
    """
    return _step(-gradient.left, gradient.singular_values, gradient.right, rank, generator, gamma)


def preconditioned(spectrum: Spectrum, gradient: GradientSpectrum) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the singular triplets of the natural gradient D = -S_y^-1 G S_x^-1, in d k operations.

    S_x = E x x^T is modelled as its leading directions, the mean, and an isotropic rest, so that its inverse costs
    k x d; S_y = E g g^T as its diagonal. Both are damped by 0.01 of their mean eigenvalue. LoRA-DA (arXiv 2510.24561)
    and Curvature-Guided LoRA (arXiv 2603.29824) hold d x d factors instead.

    Returns:
        Left [k, d_out], values [k], right [k, d_in], float32 but for the values; zero if G is.
    """
    mean, variance, rest = spectrum.mean.double(), spectrum.explained_variance, spectrum.noise_variance
    floor = rest + _DAMPING * (spectrum.total_variance + float(mean @ mean)) / len(mean)
    leading = (variance - rest).clamp_min(0.0).sqrt()[:, None] * spectrum.components.double()
    _, scale, directions = torch.linalg.svd(torch.cat([leading, mean[None]]), full_matrices=False)
    shrink = 1.0 / (scale.square() + floor) - 1.0 / floor if floor > 0.0 else torch.zeros_like(scale)
    right = gradient.right.double()
    right = right / (floor or 1.0) + (right @ directions.T * shrink) @ directions  # G's rows times S_x^-1
    moment = gradient.output_moment
    left = gradient.left.double() / (moment + _DAMPING * moment.mean()).clamp_min(torch.finfo(torch.float64).tiny)
    q_left, r_left = torch.linalg.qr(-left.T)
    q_right, r_right = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(r_left @ torch.diag(gradient.singular_values) @ r_right.T)
    return (q_left @ u).T.float(), values, (v @ q_right.T).float()


def _step(
    left: Tensor, values: Tensor, right: Tensor, rank: int, generator: torch.Generator, gamma: float
) -> tuple[Tensor, Tensor]:
    """Give A and B whose product is the best rank-r part of left^T values right, of norm sqrt(d_out) / gamma.

    Where there are fewer than r triplets, A has random rows and B is zero.
    """
    found = min(rank, len(values))
    root = torch.ones(rank)
    root[:found] = (values[:found] / values[:1].clamp_min(torch.finfo(torch.float64).tiny)).sqrt().float()
    scale = _stable(left.shape[1], gamma)
    b = torch.zeros(left.shape[1], rank)
    b[:, :found] = scale * left[:found].T * root[:found]
    return scale * root[:, None] * _filled(right[:found], rank, generator), b


def _stable(d_out: int, gamma: float) -> float:
    return float(d_out**0.25 / gamma**0.5)


def _filled(rows: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Fill up with random directions where the gradient has fewer than `rank`."""
    return torch.cat([rows, random_orthonormal(rank - len(rows), rows, generator)])


GRADIENT_METHODS: dict[str, GradientMethod] = {
    "eva-grad": GradientMethod(eva_grad),
    "grad-a": GradientMethod(grad_a),
    "natural-gradient": GradientMethod(natural_gradient),
    "natural-gradient-scaled": GradientMethod(natural_gradient_scaled),
    "natural-gradient-step": GradientMethod(natural_gradient_step, gamma=1024.0),
    "lora-ga": GradientMethod(lora_ga, gamma=16.0, corrects=True),
    "lora-one": GradientMethod(lora_one, gamma=1024.0),
}


def changes_output(method: str) -> bool:
    """Tell whether the model's output is another one with the start of a method, see `GradientMethod.steps`."""
    return method in GRADIENT_METHODS and GRADIENT_METHODS[method].steps
