"""Spectra of several sets of rows, mixed: the reference is the exact decomposition of all rows, or of weighted ones."""

import numpy as np
import pytest
import torch

from lora_init import ExactPCA, IncrementalSVD, principal_angles
from lora_init.statistics.merging import mix
from tests.reference import captured

K = 8


def sets_of_rows(sizes=(300, 120, 60), width=24, seed=0, distance=3.0):
    """Sets with means and directions of their own, and variances that fall as 1 / j."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    found = []
    for size in sizes:
        own = torch.linalg.qr(common + 0.3 * torch.randn(width, width, generator=generator) / width**0.5).Q
        scale = torch.arange(1.0, width + 1).rsqrt()
        mean = distance * torch.randn(width, generator=generator) / width**0.5
        found.append((torch.randn(size, width, generator=generator) * scale) @ own.T + mean)
    return found


def spectrum_of(rows, k=K, center=True):
    return ExactPCA(k, center).partial_fit(rows).spectrum()


def covariance_of(sets, shares, center):
    """The mixture written out: sum w E, less the outer product of the mean, times n / (n - 1)."""
    rows = [one.double().numpy() for one in sets]
    n = sum(map(len, rows))
    second = sum(w * one.T @ one / len(one) for w, one in zip(shares, rows, strict=True))
    mean = sum(w * one.mean(0) for w, one in zip(shares, rows, strict=True))
    return (second - np.outer(mean, mean) * center) * n / (n - 1), mean * center


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shares", [None, (0.2, 0.5, 0.3), (0.98, 0.01, 0.01)])
def test_whole_spectra_mix_exactly(center, shares):
    sets = sets_of_rows()
    merged = mix([spectrum_of(one, None, center) for one in sets], 24, shares)
    expected, mean = covariance_of(sets, shares or [len(one) / 480 for one in sets], center)
    found = (
        merged.components.double().numpy().T * merged.explained_variance.numpy() @ merged.components.double().numpy()
    )
    # float32 components and means
    assert np.abs(found - expected).max() < 1e-5 * expected.max()
    assert merged.total_variance == pytest.approx(np.trace(expected), rel=1e-6)
    assert np.abs(merged.mean.numpy() - mean).max() < 1e-6
    assert merged.n_samples == 480


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shares", [None, (0.2, 0.5, 0.3)])
def test_cut_spectra_mix_within_the_bound(center, shares):
    sets = sets_of_rows()
    spectra = [spectrum_of(one, K, center) for one in sets]
    merged = mix(spectra, K, shares)
    shares = shares or [len(one) / 480 for one in sets]
    covariance, _ = covariance_of(sets, shares, center)
    best = np.linalg.eigvalsh(covariance)[::-1][:K]
    components = merged.components.double().numpy()
    along = np.einsum("kd,de,ke->k", components, covariance, components)
    said = merged.explained_variance.numpy()
    bound = sum(w * float(one.explained_variance[-1]) for w, one in zip(shares, spectra, strict=True))
    rounding = 1e-6 * best[0]
    assert said.sum() <= 1.004 * along.sum()
    assert (said >= best - bound - rounding).all()
    for r in range(1, K + 1):
        assert along[:r].sum() >= best[:r].sum() - r * bound
    # The bound is for the worst case; of these rows the eight components capture nearly all that any eight could.
    assert along.sum() >= 0.98 * best.sum()
    assert merged.total_variance == pytest.approx(np.trace(covariance), rel=1e-6)


@pytest.mark.parametrize(("power", "least"), [(0.5, 0.975), (0.25, 0.95)])
def test_what_is_said_of_two_different_sets_is_what_is_captured(power, least):
    generator = torch.Generator().manual_seed(0)
    sets, spectra = [], []
    for _ in range(2):
        turn = torch.linalg.qr(torch.randn(576, 576, generator=generator)).Q
        scale = torch.arange(1.0, 577) ** (-power / 2)
        sets.append((torch.randn(2000, 576, generator=generator) * scale) @ turn)
        svd = IncrementalSVD(32)
        for batch in sets[-1].split(500):
            svd.partial_fit(batch)
        spectra.append(svd.spectrum())
    merged = mix(spectra, 32)
    real = captured(torch.cat(sets), merged.components) / 3999
    assert least < float(merged.explained_variance.sum()) / real < 1.004


def test_many_parts_cost_no_more_than_the_width():
    """The smaller of the two eigenvalue problems: of 32, not of 64 x 9."""
    rows = torch.randn(640, 32)
    sizes = []
    original = torch.linalg.eigh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", lambda matrix: sizes.append(len(matrix)) or original(matrix))
        mix([spectrum_of(part) for part in rows.split(10)], K)
    assert sizes[-1] == 32


def test_two_halves_of_one_data_set_point_where_the_whole_does():
    rows = sets_of_rows((2000,))[0]
    merged = mix([spectrum_of(rows[::2]), spectrum_of(rows[1::2])], K)
    whole = spectrum_of(rows)
    assert torch.allclose(merged.mean, whole.mean, atol=1e-6)
    # Where the gap is wide the spaces agree; the last of the eight may turn towards the ninth, which was cut.
    assert principal_angles(merged.components[:3], whole.components[:3]).max() < 0.05
    assert float(merged.explained_variance.sum()) > 0.98 * float(whole.explained_variance.sum())


def test_it_agrees_with_the_merge_of_running_decompositions():
    sets = sets_of_rows()
    running = [IncrementalSVD(K).partial_fit(one) for one in sets]
    merged = mix([one.spectrum() for one in running], K)
    reference = running[0].merge(running[1]).merge(running[2]).spectrum()
    assert merged.n_samples == reference.n_samples
    assert merged.total_variance == pytest.approx(reference.total_variance, rel=1e-6)
    # The running ones keep half as many directions again, so they have a little more to merge.
    assert float(merged.explained_variance.sum()) == pytest.approx(float(reference.explained_variance.sum()), rel=0.02)


def test_shares_in_proportion_to_the_rows_are_no_shares():
    spectra = [spectrum_of(one) for one in sets_of_rows()]
    plain, shared = mix(spectra, K), mix(spectra, K, [one.n_samples / 480 for one in spectra])
    assert torch.allclose(plain.explained_variance, shared.explained_variance, rtol=1e-12)
    assert torch.allclose(plain.components, shared.components, atol=1e-6)
    assert plain.total_variance == pytest.approx(shared.total_variance, rel=1e-12)


def test_the_order_does_not_matter():
    spectra = [spectrum_of(one) for one in sets_of_rows()]
    one, other = mix(spectra, K, (0.2, 0.5, 0.3)), mix(spectra[::-1], K, (0.3, 0.5, 0.2))
    assert torch.allclose(one.explained_variance, other.explained_variance, rtol=1e-9)
    assert principal_angles(one.components, other.components).max() < 1e-5


def test_in_steps_or_at_once():
    # 24 components lose nothing; 8 lose at each step what the bound says.
    a, b, c = sets_of_rows()
    for k, tolerance in ((None, 1e-6), (K, 0.02)):
        a_, b_, c_ = (spectrum_of(one, k) for one in (a, b, c))
        at_once = mix([a_, b_, c_], k or 24, (0.4, 0.4, 0.2))
        in_steps = mix([mix([a_, b_], k or 24, (0.5, 0.5)), c_], k or 24, (0.8, 0.2))
        assert float(in_steps.explained_variance.sum()) == pytest.approx(
            float(at_once.explained_variance.sum()), rel=tolerance
        )
        assert in_steps.total_variance == pytest.approx(at_once.total_variance, rel=1e-6)


def test_the_same_rows_twice_have_the_same_spectrum():
    one = spectrum_of(sets_of_rows()[0])
    twice = mix([one, one], K)
    assert principal_angles(one.components, twice.components).max() < 1e-5
    # Divided by 2 n - 1 in place of 2 (n - 1).
    assert torch.allclose(twice.explained_variance, one.explained_variance * 598 / 599, rtol=1e-6)


def test_one_row_and_constant_rows_bring_their_mean():
    rows = sets_of_rows((40,))[0]
    parts = [rows[:1], rows[1:2], rows[2:]]
    merged, whole = mix([spectrum_of(one, None) for one in parts], 24), spectrum_of(rows, None)
    assert torch.allclose(merged.explained_variance, whole.explained_variance, rtol=1e-4)
    constant = mix([spectrum_of(torch.ones(5, 3)), spectrum_of(torch.ones(4, 3))], 2)
    assert constant.n_components == 0 and constant.total_variance == 0.0 and constant.mean.tolist() == [1, 1, 1]


def test_a_large_mean_costs_no_variance():
    sets = [one + 1000.0 for one in sets_of_rows()]
    merged, whole = mix([spectrum_of(one) for one in sets], K), spectrum_of(torch.cat(sets))
    # Means are float32: 1e3 is known to 6e-5, next to variances of 1.
    assert merged.total_variance == pytest.approx(whole.total_variance, rel=1e-4)
    assert float(merged.explained_variance.sum()) > 0.98 * float(whole.explained_variance.sum())
