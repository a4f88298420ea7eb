"""The second moment of a layer's inputs: the form of a statistics file against the dense matrix, in float64."""

import pytest
import torch

from lora_init.statistics.second_moment import SecondMoment
from lora_init.statistics.spectrum import Spectrum
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


@pytest.mark.parametrize(("mean", "damping", "expected"), [
    (0.0, 0.0, [4.0, 1.75, 1.75, 1.75]),  # a component below the mean of the rest is no more than that
    (0.0, 0.5, [5.0, 2.75, 2.75, 2.75]),  # a half of a fourth of 8
    (2.0, 0.0, [4.0, 1.75, 1.75, 5.75]),
    (2.0, 1.0, [7.0, 4.75, 4.75, 8.75]),
])  # fmt: skip
def test_a_moment_by_hand(mean, damping, expected):
    means = torch.tensor([0.0, 0.0, 0.0, mean])
    spectrum = Spectrum(torch.eye(4)[:2], torch.tensor([4.0, 0.5]).double(), 8.0, means, 9)
    moment = SecondMoment.of(spectrum, damping)
    torch.testing.assert_close(moment.times(torch.eye(4).double(), 1.0), torch.tensor(expected).double().diag())
    moved = moment.to(torch.zeros(1))
    assert moved.directions.dtype == moved.excess.dtype == torch.float32 and moved.floor == moment.floor
    inverse = torch.tensor(expected).rsqrt().diag()
    torch.testing.assert_close(moved.times(torch.eye(4), -0.5), inverse)
