"""The decompositions: against numpy and scikit-learn, by their laws, and on planted spectra."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA, IncrementalPCA

from lora_init import ExactPCA, IncrementalSVD, principal_angles
from lora_init.statistics.incremental_svd import _State
from tests import reference
from tests.conftest import refused

BOTH = [ExactPCA, IncrementalSVD]


def decaying_rows(n=600, d=40, power=1.0, seed=0, mean=0.0):
    """Rows whose standard deviations fall like i^-power along random directions."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    scale = torch.arange(1, d + 1).float() ** -power
    return (torch.randn(n, d, generator=generator) * scale) @ turn.T + mean


def fit(kind, rows, sizes, k, **arguments):
    decomposition = kind(k, **arguments)
    for part in torch.split(rows, sizes):
        decomposition.partial_fit(part)
    return decomposition


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("kind", BOTH)
def test_one_batch_is_the_svd_of_that_batch(kind, center):
    rows = decaying_rows(mean=0.3)
    spectrum = kind(4, center=center).partial_fit(rows).spectrum()
    components, variances, total = reference.pca(rows, 4, center)
    # Four power iterations on a spectrum with ratio (5/4)^2 leave 1e-3 of an angle; variances err by its square.
    assert principal_angles(spectrum.components, torch.tensor(components)).max() < 5e-3
    np.testing.assert_allclose(spectrum.explained_variance, variances, rtol=1e-4)
    assert spectrum.total_variance == pytest.approx(total, rel=1e-6)
    np.testing.assert_allclose(spectrum.mean, rows.mean(0) if center else 0 * rows[0], atol=1e-6)


def test_exact_pca_is_scikit_learns_pca_with_signs_by_our_rule():
    rows = decaying_rows().double()
    ours, theirs = ExactPCA(5).partial_fit(rows).spectrum(), PCA(5, svd_solver="full").fit(rows.numpy())
    np.testing.assert_allclose(ours.explained_variance, theirs.explained_variance_, rtol=1e-10)
    np.testing.assert_allclose(ours.explained_variance_ratio, theirs.explained_variance_ratio_, rtol=1e-10)
    signs = np.sign((ours.components.numpy() * theirs.components_).sum(1))
    np.testing.assert_allclose(ours.components, signs[:, None] * theirs.components_, atol=1e-6)
    largest = ours.components.abs().argmax(1)
    assert (ours.components[torch.arange(5), largest] > 0).all()


def test_batches_capture_at_least_what_scikit_learns_incremental_pca_captures():
    rows = decaying_rows(n=2000, d=60, power=0.7)
    ours = fit(IncrementalSVD, rows, 200, 8).spectrum().components
    theirs = IncrementalPCA(8, batch_size=200).fit(rows.numpy()).components_
    assert reference.captured(rows, ours) > 0.999 * reference.captured(rows, theirs)


def test_two_sets_agree_by_the_variance_that_is_captured():
    noise = torch.randn(4000, 64)
    halves = [fit(IncrementalSVD, half, 500, 4) for half in noise.split(2000)]
    assert halves[0].agreement(halves[1], 4) > 0.6  # other directions, that capture nearly as much; 0.2 without these
    rows = decaying_rows(d=8) @ torch.eye(16)[:8]
    one, same, apart = (fit(IncrementalSVD, part, 100, 4) for part in (rows[:300], rows[300:], rows.roll(8, 1)))
    assert one.agreement(same, 4) > 0.9 and one.agreement(apart, 4) < 0.01


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_planted_directions_are_found_from_rows_of_every_type(kind, dtype):
    rows, directions = reference.planted(800, [300.0, 200.0, 100.0], 50)
    rows = torch.tensor(rows).to(dtype)
    spectrum = fit(kind, rows, 100, 3).spectrum()
    # bfloat16 keeps 8 bits: noise of 2^-9 of each entry, spread over 47 other directions.
    bound = {torch.bfloat16: 0.05, torch.float16: 0.01}.get(dtype, 1e-3)
    assert principal_angles(spectrum.components, torch.tensor(directions)).max() < bound
    assert spectrum.components.dtype == torch.float32
    assert spectrum.explained_variance.dtype == torch.float64


@pytest.mark.parametrize("n_batches", [1, 8])
@pytest.mark.parametrize("kind", BOTH)
def test_float32_rows_of_condition_1e4_keep_their_small_components(kind, n_batches):
    singular_values = np.geomspace(1e4, 1.0, 16)
    rows, directions = reference.planted(1600, singular_values, 128)
    decomposition = fit(kind, torch.tensor(rows).float(), 1600 // n_batches, 16)
    spectrum = decomposition.spectrum()
    # Storing an entry in float32 already moves it by 6e-8 * 1e4 / sqrt(128) = 5e-5 of the smallest component's scale.
    assert principal_angles(spectrum.components, torch.tensor(directions)).max() < 2e-2
    np.testing.assert_allclose(spectrum.explained_variance * 1599, singular_values**2, rtol=5e-3)


@pytest.mark.parametrize("kind", BOTH)
def test_a_mean_a_thousand_times_the_deviation_costs_no_digits(kind):
    rows = decaying_rows(n=400, mean=1000.0)
    spectrum = fit(kind, rows, 50, 4).spectrum()
    _, variances, total = reference.pca(rows, 4)
    assert spectrum.total_variance == pytest.approx(total, rel=1e-4)
    np.testing.assert_allclose(spectrum.explained_variance, variances, rtol=2e-2)


def test_the_drift_of_the_mean_counts():
    rows = torch.cat([decaying_rows(100, 10), decaying_rows(100, 10) + 5 * torch.eye(10)[3]])
    spectrum = fit(IncrementalSVD, rows, 100, 2).spectrum()
    components, variances, _ = reference.pca(rows, 2)
    assert principal_angles(spectrum.components[:1], torch.tensor(components[:1])).max() < 1e-2
    np.testing.assert_allclose(spectrum.explained_variance[:1], variances[:1], rtol=1e-3)


splits = st.lists(st.integers(0, 90), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(cuts=splits, center=st.booleans())
def test_exact_pca_does_not_depend_on_the_split(cuts, center):
    rows = decaying_rows(90, 12).double()
    bounds = sorted({0, 90, *cuts})
    whole, parts = ExactPCA(center=center).partial_fit(rows), ExactPCA(center=center)
    for start, end in zip([0, *bounds], [*bounds, 90], strict=True):
        parts.partial_fit(rows[start:end])
    a, b = whole.spectrum(), parts.spectrum()
    np.testing.assert_allclose(a.explained_variance, b.explained_variance, rtol=1e-9)
    assert a.total_variance == pytest.approx(b.total_variance, rel=1e-12)
    assert a.n_samples == b.n_samples == 90


@settings(deadline=None, max_examples=40)
@given(cuts=splits, center=st.booleans(), merged=st.booleans())
def test_incremental_svd_captures_nearly_the_same_under_any_split_or_merge(cuts, center, merged):
    rows = decaying_rows(90, 40)
    bounds = sorted({0, 90, *cuts})
    parts = IncrementalSVD(4, center=center)
    for start, end in zip([0, *bounds], [*bounds, 90], strict=True):  # 0-row and 1-row pieces too
        if merged:
            parts.merge(IncrementalSVD(4, center=center).partial_fit(rows[start:end]))
        else:
            parts.partial_fit(rows[start:end])
    spectrum = parts.spectrum()
    components, _, total = reference.pca(rows, 4, center)
    best = reference.captured(rows, components, center)
    assert reference.captured(rows, spectrum.components, center) > 0.98 * best
    assert float(spectrum.explained_variance.sum()) * 89 < best * (1 + 1e-5)  # never overstated
    assert spectrum.total_variance == pytest.approx(total, rel=1e-5)  # exact
    assert spectrum.n_samples == 90


@settings(deadline=None, max_examples=20)
@given(cuts=splits)
def test_rows_of_low_rank_are_exact_under_any_split(cuts):
    rows = torch.tensor(reference.planted(90, [9.0, 5.0, 2.0], 30, mean=1.0)[0]).float()
    bounds = sorted({0, 90, *cuts})
    parts = IncrementalSVD(4)
    for start, end in zip([0, *bounds], [*bounds, 90], strict=True):
        parts.partial_fit(rows[start:end])
    spectrum = parts.spectrum()
    assert reference.captured(rows, spectrum.components) == pytest.approx(81 + 25 + 4, rel=1e-5)


@pytest.mark.parametrize("kind", BOTH)
def test_merge_leaves_the_other_alone(kind):
    a, b = kind(3).partial_fit(decaying_rows(50, 10)), kind(3).partial_fit(decaying_rows(60, 10, seed=1))
    before = b.spectrum()
    a.merge(b).partial_fit(decaying_rows(50, 10, seed=2))
    assert torch.equal(b.spectrum().components, before.components)
    assert a.n_samples == 160


def test_weights_are_factors_of_rows():
    """First batches, small ones and others."""
    plain, weighted = IncrementalSVD(4, center=False), IncrementalSVD(4, center=False)
    generator = torch.Generator().manual_seed(0)
    for seed, n in enumerate((60, 80, 10, 300)):
        rows, factors = decaying_rows(n, 40, seed=seed), torch.rand(n, generator=generator)
        plain.partial_fit(rows * factors[:, None])
        weighted.project(rows, factors)
        weighted.update()
    a, b = weighted.spectrum(), plain.spectrum()
    assert torch.equal(a.components, b.components) and a.total_variance == b.total_variance
    assert torch.equal(weighted.held_out.captured, plain.held_out.captured)


@pytest.mark.parametrize("sizes", [(60, 300), (300, 60), (300, 5), (5, 300), (5, 5)])
def test_a_module_that_runs_twice_in_a_pass_adds_to_one_batch(sizes):
    first, rows = decaying_rows(200, 40), decaying_rows(sum(sizes), 40, seed=1, mean=0.5)
    once, twice = (IncrementalSVD(4).partial_fit(first) for _ in range(2))
    once.partial_fit(rows)
    for part in rows.split(sizes):
        twice.project(part)
    assert twice.n_samples == 200  # nothing counts yet
    twice.update()
    a, b = once.spectrum(), twice.spectrum()
    assert (b.n_samples, b.total_variance) == (a.n_samples, pytest.approx(a.total_variance, rel=1e-6))
    # A small part is taken in exactly, a large one by one step of the iteration.
    torch.testing.assert_close(a.explained_variance, b.explained_variance, rtol=2e-3, atol=0.0)
    torch.testing.assert_close(once.held_out.captured, twice.held_out.captured, rtol=1e-5, atol=0.0)
    assert once.held_out.total == pytest.approx(twice.held_out.total, rel=1e-6)


@pytest.mark.parametrize("center", [True, False])
def test_rows_that_are_gathered_count_like_all_others(center):
    rows = decaying_rows(60 * 21, 40, mean=0.5)
    svd = fit(IncrementalSVD, rows, 60, 4, center=center)
    assert svd._gathered is not None and svd.n_samples == len(rows)
    other = IncrementalSVD(4, center=center).merge(svd)
    spectrum = svd.spectrum()
    components, variances, total = reference.pca(rows, 4, center)
    assert spectrum.n_samples == other.n_samples == len(rows)
    assert spectrum.total_variance == pytest.approx(total, rel=1e-6)
    np.testing.assert_allclose(spectrum.mean, rows.mean(0) if center else 0 * rows[0], atol=1e-6)
    np.testing.assert_allclose(spectrum.explained_variance, variances, rtol=1e-3)
    assert reference.captured(rows, spectrum.components, center) > 0.9999 * reference.captured(rows, components, center)


@pytest.mark.parametrize(("n", "width", "gathered"), [
    (99, 40, True), (100, 40, False), (60, 4095, True), (60, 4096, False),
])  # fmt: skip
def test_rows_are_gathered_up_to_a_quarter_of_those_before_unless_they_are_wide(n, width, gathered):
    svd = IncrementalSVD(1).partial_fit(torch.randn(400, width)).partial_fit(torch.randn(n, width))
    assert (svd._gathered is not None) is gathered and svd.n_samples == 400 + n


@pytest.mark.parametrize(("factor", "exactly"), [(9.0, False), (11.0, True)])
@pytest.mark.parametrize("n", [40, 4000])
def test_rows_of_a_hundred_times_the_mean_square_are_taken_in_exactly_however_many_they_are(factor, exactly, n):
    svd = IncrementalSVD(4).partial_fit(torch.randn(400, 40))
    svd.project(torch.randn(n, 40) * factor)
    assert (svd._few is not None) is exactly and (svd._sums is None) is exactly


def falling(n, d, scale=1.0, first=1.0, seed=0):
    """Rows whose variances fall as 1 / j, the first direction `first` times as wide."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.arange(1.0, d + 1).rsqrt() * scale
    spread[0] *= first
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(99))).Q
    return (torch.randn(n, d, generator=generator) * spread) @ turn


def spiky(n, d, seed):
    rows = falling(n, d, seed=seed)
    rows[:, 0] += 3e3
    rows[seed::64, 1] += 1e4
    return rows


def extremes():
    """Batches that once gave wrong numbers, by what is odd about them."""
    plain = [falling(400, 64, seed=seed) for seed in range(6)]
    return {
        "a mean of 1e4 from the second batch on": [plain[0], *(batch + 1e4 for batch in plain[1:])],
        "a mean of 40 deviations": [batch + 40.0 for batch in plain],
        "a mean of 404 deviations": [batch + 404.0 for batch in plain],
        "a mean that drifts": [batch + 100.0 * i for i, batch in enumerate(plain)],
        "bfloat16, one direction of 1,000 times the spread": [
            falling(400, 64, first=1e3, seed=seed).bfloat16() for seed in range(6)
        ],
        "float16": [batch.half() for batch in plain],
        "sizes of 1e18": [batch * 1e18 for batch in plain],
        "sizes of 1e18 from the second batch on": [plain[0], *(batch * 1e18 for batch in plain[1:])],
        "sizes of 1e-18": [batch * 1e-18 for batch in plain],
        "sizes of 1e-24": [batch * 1e-24 for batch in plain],
        "a mean of 1e18 for one batch": [*plain[:3], plain[3] + 1e18, *plain[4:]],
        "one direction of 10,000 times the spread": [falling(400, 64, first=1e4, seed=seed) for seed in range(16)],
        "the same from the fourth batch on": [falling(400, 64, first=1e4 if i > 2 else 1, seed=i) for i in range(16)],
        "a channel of 3,000, another of 10,000 in few rows": [spiky(400, 64, seed) for seed in range(16)],
    }


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("what", extremes())
def test_extremes(what, center):
    """The total is exact; what is said of each component is true; those beyond the first are near the best."""
    batches = extremes()[what]
    svd = IncrementalSVD(8, center=center)
    for batch in batches:
        svd.partial_fit(batch)
    rows, spectrum = torch.cat([batch.double() for batch in batches]), svd.spectrum()
    components, _, total = reference.pca(rows, 8, center)
    assert spectrum.total_variance == pytest.approx(total, rel=1e-4)
    real = np.array([reference.captured(rows, one[None], center) for one in spectrum.components])
    best = np.array([reference.captured(rows, one[None], center) for one in components])
    said = spectrum.explained_variance.numpy() * (len(rows) - 1)
    assert (said < 1.01 * real).all()
    # Of the largest one anything would capture most. Below 1e-13 of it float32 has no digits left.
    seen = slice(1, int((best > 1e-12 * best[0]).sum()))
    assert real[seen].sum() >= 0.98 * best[seen].sum()
    assert said[seen].sum() >= 0.98 * best[seen].sum()


def test_held_out_is_measured_before_the_batch_is_used():
    first, second = decaying_rows(200, 20), decaying_rows(150, 20, seed=1)
    svd = IncrementalSVD(3).partial_fit(first)
    assert svd.held_out is None
    before = svd.spectrum()
    svd.partial_fit(second)
    offset = second - before.mean
    expected = (offset @ before.components.T).square().sum(0).double()
    np.testing.assert_allclose(svd.held_out.captured[:3], expected, rtol=1e-3)
    assert svd.held_out.total == pytest.approx(float(offset.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("kind", BOTH)
def test_no_rows_one_row_and_constant_rows(kind):
    refused("no rows were seen", kind(2).partial_fit(torch.zeros(0, 5)).spectrum)
    one = kind(2).partial_fit(torch.ones(1, 5)).spectrum()
    assert one.n_components == 0
    assert one.total_variance == 0.0
    constant = fit(kind, torch.full((300, 5), 7.3), 100, 2).spectrum()
    assert constant.total_variance == pytest.approx(0.0, abs=1e-8)
    assert constant.explained_variance_ratio.sum() <= 1.0
    torch.testing.assert_close(constant.mean, torch.full((5,), 7.3))


@pytest.mark.parametrize("row", [[7.3, 0.1, 1e3], [1e-9, -3e7, 0.7]])
@pytest.mark.parametrize("n", [3, 300])
def test_rounding_of_a_mean_is_no_direction(row, n):
    svd = IncrementalSVD(2).partial_fit(torch.tensor(row).expand(n, -1))
    assert svd.spectrum().n_components == 0 and svd.spectrum().total_variance == 0.0


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("start", [0, 60])
def test_bad_rows_are_refused_and_nothing_is_updated(kind, start):
    good, bad = decaying_rows(60, 6), decaying_rows(60, 6)
    bad[17, 2], bad[30, 1] = float("nan"), float("inf")
    decomposition = kind(2).partial_fit(good[:start])
    refused(r"2 of 60 rows contain NaN or inf \(first at row 17\)", decomposition.partial_fit, bad)
    assert decomposition.n_samples == start
    after = decomposition.partial_fit(good).spectrum()
    expected = kind(2).partial_fit(good[:start]).partial_fit(good).spectrum()
    assert torch.equal(after.components, expected.components)


@pytest.mark.parametrize("kind", BOTH)
def test_other_misuse_is_refused(kind):
    decomposition = kind(2).partial_fit(torch.randn(9, 6))
    refused("width 5, expected 6", decomposition.partial_fit, torch.randn(9, 5))
    refused("two dimensions", decomposition.partial_fit, torch.randn(2, 9, 6))
    refused("floating point", decomposition.partial_fit, torch.ones(9, 6, dtype=torch.long))
    refused("centered", decomposition.merge, kind(2, center=False).partial_fit(torch.randn(9, 6)))
    refused("width 5, expected 6", decomposition.merge, kind(2).partial_fit(torch.randn(9, 5)))
    for number in (0, -1, 2.5):
        refused(f"n_components={number}", IncrementalSVD, number)
    assert IncrementalSVD(1).n_components == 1


def test_of_no_rows_nothing_is_captured_and_of_constant_rows_all():
    decomposition = IncrementalSVD(2)
    assert math.isnan(decomposition.captured) and decomposition.n_samples == 0
    assert math.isnan(decomposition.partial_fit(torch.zeros(0, 3)).captured)
    assert decomposition.partial_fit(torch.ones(5, 3)).captured == 1.0


def test_principal_angles_small_and_large():
    rows = torch.eye(4).double()
    tilted = rows[:2].clone()
    tilted[1] = torch.tensor([0.0, np.cos(1e-10), np.sin(1e-10), 0.0])
    assert principal_angles(rows[:2], tilted)[-1] == pytest.approx(1e-10, rel=1e-4)
    np.testing.assert_allclose(principal_angles(rows[:2], rows[2:]), [np.pi / 2] * 2)
    np.testing.assert_allclose(principal_angles(rows[:1], rows[:3]), [0.0], atol=1e-12)


def test_what_was_projected_counts_once_it_is_completed_or_never():
    svd, rows = IncrementalSVD(3).partial_fit(decaying_rows(100, 40)), decaying_rows(100, 40, seed=1)
    before = svd.spectrum()
    svd.project(rows[:5])  # few rows, which are taken in exactly
    svd.project(rows)
    svd.forget_batch()
    svd.update()
    after = svd.spectrum()
    assert svd.held_out is None and torch.equal(after.components, before.components)
    assert (after.n_samples, after.total_variance) == (100, before.total_variance)


def test_what_is_captured_is_of_the_components_that_are_reported():
    svd = IncrementalSVD(3).partial_fit(decaying_rows(100, 40))
    spectrum = svd.spectrum()
    assert spectrum.n_components == 3
    assert svd.captured == pytest.approx(float(spectrum.explained_variance.sum()) / spectrum.total_variance)
    assert svd.agreement(IncrementalSVD(3), 2) == IncrementalSVD(3).agreement(svd, 2) == 0.0
    assert svd.agreement(svd, 2) == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_shares_do_not_depend_on_the_size_of_the_rows(scale):
    found = []
    for factor in (1.0, scale):
        one, other = (IncrementalSVD(4).partial_fit(rows * factor) for rows in decaying_rows(300, 40).split(150))
        found.append([one.captured, one.agreement(other, 4), *one.spectrum().explained_variance_ratio.tolist()])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_seed_decides_where_a_first_batch_begins():
    rows = torch.randn(400, 200)
    one, same, other = (IncrementalSVD(2, seed=seed).partial_fit(rows).spectrum() for seed in (1, 1, 2))
    assert torch.equal(one.components, same.components) and not torch.equal(one.components, other.components)


def test_the_state_of_a_merge_is_that_of_all_rows_in_any_order():
    parts = [IncrementalSVD(2).partial_fit(decaying_rows(80, 30, seed=seed, mean=seed)) for seed in range(3)]
    orders = [(0, 1, 2), (2, 0, 1)]
    found = []
    for order in orders:
        merged = IncrementalSVD(2)
        for i in order:
            merged.merge(parts[i])
        found.append(merged.spectrum())
    assert found[0].total_variance == pytest.approx(found[1].total_variance, rel=1e-9)
    torch.testing.assert_close(found[0].mean, found[1].mean)
    assert principal_angles(found[0].components, found[1].components).max() < 0.02


def test_what_no_direction_is_known_of_has_the_mean_variance_of_the_rest():
    """Two known directions of width 6, with 8 and 4 of a scatter of 16: the other four have 1 each."""
    moments = SimpleNamespace(scatter=16.0)
    state = _State(moments, torch.eye(6)[:2], torch.tensor([8.0, 4.0]), torch.eye(6)[:2])
    overlap = torch.tensor([[1.0, 0.0], [0.0, 0.5]])  # squared cosines: the second of two lies half in the other four
    assert state.captured_by(overlap) == pytest.approx((8.0 + 0.5 * 4.0 + 0.5 * 1.0) / 12.0)
    assert state.captured_by(overlap[1:]) == pytest.approx((0.5 * 4.0 + 0.5 * 1.0) / 8.0)
