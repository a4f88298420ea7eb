"""The second moment of a layer's inputs: the form of a statistics file against the dense matrix, in float64."""

import pytest
import torch

from lora_init.statistics.second_moment import SecondMoment
from lora_init.statistics.spectrum import ExactPCA


def spectrum_of(width=12, k=4, n=200, mean=3.0):
    # Condition 1e4, and a mean far larger than the spread of most directions.
    rows = torch.randn(n, width, dtype=torch.float64) * torch.logspace(1, -3, width, dtype=torch.float64) + mean
    return ExactPCA(k).partial_fit(rows).spectrum()


def dense(spectrum):
    v, m, rest = spectrum.components.double(), spectrum.mean.double(), spectrum.noise_variance
    return (
        v.T @ torch.diag(spectrum.explained_variance - rest) @ v + torch.outer(m, m) + rest * torch.eye(len(m)).double()
    )


@pytest.mark.parametrize("power", [1.0, 0.5, -0.5, -1.0])
def test_powers_are_those_of_the_dense_matrix(power):
    spectrum, rows = spectrum_of(), torch.randn(5, 12, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(dense(spectrum))
    expected = rows @ (vectors * values**power) @ vectors.T
    # Components are float32, and not orthonormal to more digits than that.
    torch.testing.assert_close(SecondMoment.of(spectrum).times(rows, power), expected, rtol=1e-5, atol=1e-5)


def test_damping_adds_a_share_of_the_mean_eigenvalue():
    spectrum = spectrum_of()
    plain, damped = dense(spectrum), SecondMoment.of(spectrum, 0.01).times(torch.eye(12).double(), 1.0)
    expected = plain + 0.01 * plain.trace() / 12 * torch.eye(12).double()
    torch.testing.assert_close(damped, expected, rtol=1e-6, atol=1e-6)
