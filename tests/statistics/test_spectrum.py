"""The result of a decomposition by hand, and the pieces that both decompositions are made of."""

import pytest
import torch

from lora_init import ExactPCA, IncrementalSVD, principal_angles
from lora_init.statistics.spectrum import Moments, Spectrum, _leading, check_rows, freeze, principal_directions
from lora_init.statistics.spectrum import raise_if_not_finite as check_finite
from tests.conftest import refused


def spectrum(kept, width, total):
    return Spectrum(torch.eye(width)[: len(kept)], torch.tensor(kept).double(), total, torch.zeros(width), 9)


@pytest.mark.parametrize(("kept", "width", "total", "noise", "shares"), [
    ([3.0, 1.0], 4, 8.0, 2.0, [0.375, 0.125]),
    ([3.0], 2, 4.0, 1.0, [0.75]),
    ([3.0, 1.0], 2, 4.0, 0.0, [0.75, 0.25]),
    ([3.0, 1.0], 2, 4.5, 0.5, [6 / 9, 2 / 9]),  # all directions: what rounding leaves
    ([3.0, 1.0], 3, 3.5, 0.0, [6 / 7, 2 / 7]),  # less than the sum, by rounding
    ([0.0, 0.0], 3, 0.0, 0.0, [0.0, 0.0]),
    ([], 3, 6.0, 2.0, []),
])  # fmt: skip
def test_what_is_left_out_is_spread_over_the_other_directions(kept, width, total, noise, shares):
    found = spectrum(kept, width, total)
    assert found.n_components == len(kept) and found.noise_variance == noise
    assert found.explained_variance_ratio.tolist() == pytest.approx(shares)


@pytest.mark.parametrize("rows", [torch.zeros(3, 5), torch.zeros(5, 3), torch.full((3, 5), 1e-200)])
def test_rows_of_which_nothing_is_left_have_no_directions(rows):
    weights, directions = principal_directions(rows.double(), 3)
    assert weights.shape == (0,) and directions.shape == (0, rows.shape[1])


@pytest.mark.parametrize("largest", [-1e-30, 0.0])
def test_eigenvalues_that_rounding_makes_negative_are_none(largest):
    weights, vectors = _leading(torch.tensor([-2e-30, largest]).double().diag(), 2)
    assert weights.shape == (0,) and vectors.shape == (2, 0)


def test_a_result_has_signs_lengths_and_variances_by_rule():
    """The largest entry of each direction is positive; variances are divided by n - 1, and by 1 for a single row."""
    moments = Moments(5, torch.tensor([1.0, 2.0, 3.0]).double(), 12.0)
    rows = torch.tensor([[-3.0, 1.0, 0.0], [1.0, 3.0, 0.0]]).double() / 10**0.5
    found = freeze(moments, rows, torch.tensor([8.0, 2.0]).double())
    assert torch.allclose(found.components, torch.tensor([[3.0, -1.0, 0.0], [1.0, 3.0, 0.0]]) / 10**0.5)
    assert (found.explained_variance.tolist(), found.total_variance, found.n_samples) == ([2.0, 0.5], 3.0, 5)
    assert found.mean.tolist() == [1.0, 2.0, 3.0]
    for part, dtype in (("components", torch.float32), ("explained_variance", torch.float64), ("mean", torch.float32)):
        assert getattr(found, part).dtype == dtype
    of_one = freeze(Moments(1, moments.mean, 12.0), rows, torch.tensor([8.0, 2.0]).double())
    assert of_one.total_variance == 12.0 and of_one.explained_variance.tolist() == [8.0, 2.0]


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (5, 5)])
@pytest.mark.parametrize(("rank", "size", "kept"), [(5, 3, 3), (2, 3, 2), (5, 9, 5), (0, 3, 0)])
def test_directions_are_those_of_the_svd(shape, rank, size, kept):
    u, s, vh = torch.linalg.svd(torch.randn(shape).double(), full_matrices=False)
    s[rank:] = 0.0
    weights, directions = principal_directions(u * s @ vh, size)
    torch.testing.assert_close(weights, s[:kept].square())
    torch.testing.assert_close((directions @ vh[:kept].T).abs(), torch.eye(kept).double(), atol=1e-6, rtol=0.0)


def test_two_sets_add_up_to_their_moments():
    rows = torch.randn(9, 4).double() + 5.0
    parts = [Moments(len(one), one.mean(0), float((one - one.mean(0)).square().sum())) for one in rows.split((2, 7))]
    found, drift = parts[0].plus(parts[1])
    assert found.n_samples == 9 and torch.allclose(found.mean, rows.mean(0))
    assert found.scatter == pytest.approx(float((rows - rows.mean(0)).square().sum()))
    assert float(drift @ drift) == pytest.approx(found.scatter - parts[0].scatter - parts[1].scatter)


@pytest.mark.parametrize(("rows", "width", "message"), [
    (torch.ones(3), None, r"^rows of shape \(3,\), expected two dimensions \[n, d\].$"),
    (torch.ones(2, 3).int(), None, "^rows of type torch.int32, expected floating point.$"),
    (torch.ones(2, 3), 4, "^rows of width 3, expected 4 as before.$"),
])  # fmt: skip
def test_rows_of_another_form_are_refused(rows, width, message):
    refused(message, check_rows, rows, width)
    check_rows(torch.ones(2, 4).half(), width)
    check_rows(torch.ones(0, 4), width)


def test_rows_that_are_not_finite_are_counted():
    words = (
        r"^2 of 4 rows contain NaN or inf \(first at row 1\). The model produces them; statistics were not updated.$"
    )
    refused(words, check_finite, torch.tensor([0.0, float("inf"), 1.0, float("nan")]))
    check_finite(torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(("a", "b", "got"), [
    ([[1.0]], torch.eye(2), "list"),
    (torch.eye(2), "x", "str"),
    (torch.ones(2), torch.eye(2), r"\[2\]"),
    (torch.eye(3), torch.eye(2), r"\[3, 3\]"),
])  # fmt: skip
def test_what_spans_nothing_has_no_angles(a, b, got):
    words = rf"^principal_angles\(\) got {got}, expected two tensors \[k, d\] of one d.$"
    refused(words, principal_angles, a, b)


def test_angles_rise():
    angles = principal_angles(torch.eye(3)[:2], torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))
    assert angles.tolist() == pytest.approx([0.0, torch.pi / 4], abs=1e-7)


@pytest.mark.parametrize("kind", [ExactPCA, IncrementalSVD])
def test_nothing_merges_with_something_either_way(kind):
    rows = torch.randn(30, 6)
    whole, empty = kind(2).partial_fit(rows), kind(2)
    assert empty.n_samples == 0 and empty.merge(kind(2)).n_samples == 0
    expected = whole.spectrum()
    for merged in (kind(2).merge(kind(2).partial_fit(rows)), kind(2).partial_fit(rows).merge(empty)):
        found = merged.spectrum()
        assert torch.equal(found.components, expected.components) and found.total_variance == expected.total_variance
        assert torch.equal(found.mean, expected.mean) and merged.n_samples == found.n_samples == 30


def test_all_directions_are_reported_where_no_number_is_given():
    assert ExactPCA().partial_fit(torch.randn(30, 6)).spectrum().n_components == 6
    assert not ExactPCA(2, center=False).partial_fit(torch.ones(3, 2)).spectrum().mean.any()


def test_directions_that_are_orthonormal_to_few_digits_are_so_to_all_afterwards():
    generator = torch.Generator().manual_seed(0)
    exact = torch.linalg.qr(torch.randn(12, 4, generator=generator, dtype=torch.float64)).Q.T
    rough = exact + 1e-3 * torch.randn(4, 12, generator=generator, dtype=torch.float64)
    made = freeze(Moments(9, torch.zeros(12), 10.0), rough, torch.ones(4, dtype=torch.float64)).components
    torch.testing.assert_close(made @ made.T, torch.eye(4), rtol=0.0, atol=1e-6)
    assert float((made.double() * exact).sum(1).abs().min()) > 0.999
