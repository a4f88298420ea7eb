"""The start of a quantized base: the closed form is the optimum, and a statistics file is enough for it."""

import pytest
import torch

from lora_init.starts.initializers import error_seen, layer_generator, qera
from lora_init.statistics.spectrum import ExactPCA
from tests.statistics.made import dense, spectrum_of

D_OUT, RANK, SCALING = 9, 3, 0.5


def error_of(d_in=12):
    return 0.01 * torch.randn(D_OUT, d_in, dtype=torch.float64)


def product(spectrum, error, rank=RANK, scaling=SCALING):
    a, b = qera(spectrum, error, rank, scaling, layer_generator(0, "layer"))
    assert a.dtype == b.dtype == torch.float32
    return scaling * b.double() @ a.double(), a, b


def root_of(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def test_it_is_the_closed_form_of_the_dense_matrix():
    spectrum, error = spectrum_of(), error_of()
    root, inverse = root_of(dense(spectrum))
    u, s, v = torch.linalg.svd(error @ root)
    expected = u[:, :RANK] * s[:RANK] @ v[:RANK] @ inverse
    made, a, b = product(spectrum, error)
    assert float((made - expected).norm() / expected.norm()) < 1e-5
    # Eckart-Young: what is left is the tail of the singular values, and no matrix of this rank leaves less.
    assert error_seen(spectrum, error - made) == pytest.approx(float(s[RANK:].norm()), rel=1e-5)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_a_layer_that_quantization_left_as_it_was_begins_at_zero():
    made, a, b = product(spectrum_of(), torch.zeros(D_OUT, 12, dtype=torch.float64))
    assert not made.any() and not b.any() and bool(a.isfinite().all()) and bool(a.any())


def test_no_other_matrix_of_the_rank_does_better():
    spectrum, error = spectrum_of(), error_of()
    made, a, b = product(spectrum, error)
    best, generator = error_seen(spectrum, error - made), torch.Generator().manual_seed(1)
    for size in [1e-3, 1e-2, 1e-1, 1.0] * 50:
        b_near = b + size * b.norm() / 5 * torch.randn(b.shape, generator=generator)
        a_near = a + size * a.norm() / 5 * torch.randn(a.shape, generator=generator)
        other = SCALING * b_near.double() @ a_near.double()
        assert error_seen(spectrum, error - other) >= best
    u, s, v = torch.linalg.svd(error)
    assert error_seen(spectrum, error - u[:, :RANK] * s[:RANK] @ v[:RANK]) > 1.05 * best  # what LoftQ starts with


@pytest.mark.parametrize("n", [40, 4000], ids=["few rows", "nearly isotropic"])
def test_of_a_large_layer_as_much_is_left_as_of_the_optimum(n):
    """Of singular values that fall slowly no vector is found to many digits, and what they leave is."""
    generator, rank = torch.Generator().manual_seed(2), 16
    spectrum = ExactPCA(32).partial_fit(torch.randn(n, 200, generator=generator)).spectrum()
    error = torch.randn(300, 200, generator=generator)
    made, _, _ = product(spectrum, error, rank)
    values = torch.linalg.svdvals(error.double() @ root_of(dense(spectrum))[0])
    left = error_seen(spectrum, error - made) / float(values[rank:].norm())
    assert 1.0 - 1e-6 < left < 1.004


def test_rows_without_variance_and_errors_of_low_rank():
    spectrum = spectrum_of(k=12, n=5)  # five rows: S has no inverse
    error = error_of()
    made, _, _ = product(spectrum, error, rank=5)
    assert error_seen(spectrum, error - made) < 1e-5 * error_seen(spectrum, error)
    low = torch.outer(torch.randn(D_OUT), torch.randn(12)).double()
    made, a, b = product(spectrum_of(), low)
    torch.testing.assert_close(made, low, rtol=1e-5, atol=1e-5)
    assert bool((b[:, 1:] == 0).all()) and bool((a[1:].norm(dim=1) > 0.1).all())
