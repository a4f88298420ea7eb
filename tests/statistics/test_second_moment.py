"""The second moment of a layer's inputs: the form of a statistics file against the dense matrix, in float64."""

import pytest
import torch

from lora_init.statistics.second_moment import SecondMoment
from tests.statistics.made import dense, spectrum_of


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
