"""Initialisations: what A's rows are, and that nothing but the layer's name and the seed decides about random ones."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from lora_init.errors import LoraInitError
from lora_init.starts.initializers import (
    as_large_as_random,
    energy,
    eva,
    gaussian,
    layer_generator,
    orthogonal,
    random,
    random_scaled,
    whitening_scale,
)
from lora_init.starts.starts import buildable, changes_base, find_start
from lora_init.statistics.spectrum import ExactPCA, Spectrum


def spectrum(k=4, width=12, n_samples=100, variances=None, total=None):
    components = torch.linalg.qr(torch.randn(width, k, generator=torch.Generator().manual_seed(1))).Q.T
    variances = torch.tensor(variances or [2.0 ** (3 - i) for i in range(k)], dtype=torch.float64)
    total = float(variances.sum()) * 1.5 if total is None else total
    return Spectrum(components.contiguous(), variances, total, torch.zeros(width), n_samples)


def identity_error(rows):
    return (rows @ rows.T - torch.eye(len(rows))).abs().max()


def test_eva_takes_the_top_components_and_owns_them():
    source = spectrum()
    rows = eva(source, 3, layer_generator(0, "x"))
    assert torch.equal(rows, source.components[:3]) and rows.dtype == torch.float32
    rows.zero_()
    assert source.components.abs().sum() > 0


def test_eva_fills_up_with_orthogonal_directions_where_the_data_had_no_more():
    source = spectrum(k=4, n_samples=5)  # five centred rows span four directions
    rows = eva(source, 9, layer_generator(0, "x"))
    assert torch.equal(rows[:4], source.components)
    assert identity_error(rows) < 1e-6  # float32 rows: 12 products of rounding 6e-8 each


def test_eva_refuses_a_rank_that_the_statistics_were_cut_below():
    with pytest.raises(LoraInitError, match=r"rank 5 needs 5 components and the statistics hold 4.*rank 4 at most"):
        eva(spectrum(), 5, layer_generator(0, "x"))
    with pytest.raises(LoraInitError, match="the statistics hold 4"):  # six centred rows span five directions
        eva(spectrum(n_samples=6), 5, layer_generator(0, "x"))


def test_random_scaled_has_evas_energy_on_rows_and_the_directions_of_random():
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(4000, 12, generator=generator).double() * torch.tensor([9.0, 5.0, 3.0, *[1.0] * 9])
    rows = rows + torch.linspace(-2, 2, 12)
    pca = ExactPCA(6).partial_fit(rows.float())
    found = pca.spectrum()
    drawing = (random_scaled, found), (random, 12)
    a, drawn = (method(of, 4, layer_generator(0, "x")).double() for method, of in drawing)
    assert torch.allclose(a / a.norm(), drawn / drawn.norm(), atol=1e-6)
    measured = [(rows @ weights.T).square().sum(1).mean() for weights in (a, found.components[:4].double())]
    # Six components are kept; the other six directions have one variance each, so the model is right up to sampling.
    assert measured[0] == pytest.approx(float(measured[1]), rel=0.02)
    assert energy(found, a.float()) == pytest.approx(float(measured[0]), rel=0.02)
    nothing = Spectrum(torch.empty(0, 12), torch.empty(0, dtype=torch.float64), 0.0, torch.zeros(12), 9)
    assert torch.equal(random_scaled(nothing, 4, layer_generator(0, "x")), drawn.float())


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_size_of_a_does_not_depend_on_the_size_of_what_the_layer_reads(scale):
    source = spectrum()
    other = Spectrum(
        source.components, source.explained_variance * scale, source.total_variance * scale, source.mean, 100
    )
    sized = [as_large_as_random(one, one.components[:3]) for one in (source, other)]
    drawn = [random_scaled(one, 3, layer_generator(0, "x")) for one in (source, other)]
    for first, second in (sized, drawn):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)
    for one in (source, other):  # the energy that random has on average
        a = as_large_as_random(one, one.components[:3])
        assert energy(one, a) == pytest.approx(3 / (3 * 12) * one.total_variance)


@pytest.mark.parametrize(("initialisation", "of"), [(eva, spectrum(n_samples=4)), (orthogonal, 12)])
def test_rank_beyond_the_width_is_refused(initialisation, of):
    with pytest.raises(LoraInitError, match="input width 12"):
        initialisation(of, 13, layer_generator(0, "x"))


def test_whitening_is_pefts_definition():
    """PEFT divides by sqrt(singular_values_) of the centred rows; checked against an SVD of such rows."""
    rows = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)).double() * torch.arange(1, 13)
    centred = rows - rows.mean(0)
    _, singular, vt = torch.linalg.svd(centred, full_matrices=False)
    variances, total = singular[:4] ** 2 / 49, float(centred.pow(2).sum() / 49)
    source = Spectrum(vt[:4].float(), variances, total, rows.mean(0).float(), 50)
    expected = vt[:4] / singular[:4].sqrt()[:, None]
    got = eva(source, 4, layer_generator(0, "x"), whiten=True)
    torch.testing.assert_close(got, expected.float(), rtol=1e-6, atol=1e-7)  # one float32 division
    plain = eva(source, 4, layer_generator(0, "x"))
    assert not torch.allclose(got, plain)


def test_whitening_survives_directions_without_variance():
    source = spectrum(k=4, variances=[4.0, 1.0, 0.0, 0.0], total=5.0)
    scale = whitening_scale(source, 6)
    assert torch.isfinite(scale).all() and (scale[2:] == scale[1]).all() and scale[0] > scale[1]
    assert torch.isfinite(eva(source, 6, layer_generator(0, "x"), whiten=True)).all()
    dead = spectrum(k=2, variances=[0.0, 0.0], total=0.0)
    assert torch.equal(whitening_scale(dead, 3), torch.ones(3))


def test_the_rounding_noise_of_a_direction_is_not_whitened():
    """Below the resolution of float32 a direction takes the scale of the last one that is above it."""
    source = spectrum(k=3, variances=[4.0, 1.0, 1e-15], total=5.0)  # singular values of 1 and 1.6e-8 of the first
    scale = whitening_scale(source, 3)
    assert scale[2] == scale[1] and eva(source, 3, layer_generator(0, "x"), whiten=True).abs().max() < 1.0
    kept = whitening_scale(spectrum(k=3, variances=[4.0, 1.0, 1e-12], total=5.0), 3)  # 5e-7 of the first
    assert kept[2] == pytest.approx((99 * 1e-12) ** 0.25)


def test_a_component_below_the_noise_has_as_much_energy_as_the_noise():
    source = spectrum(k=2, variances=[5.0, 0.25], total=15.25)  # ten other directions of variance 1
    assert [energy(source, source.components[i : i + 1]) for i in (0, 1)] == pytest.approx([5.0, 1.0])


def test_random_is_pefts_kaiming_draw():
    rows = random(400, 64, layer_generator(3, "x"))
    expected = nn.init.kaiming_uniform_(torch.empty(64, 400), a=5**0.5, generator=layer_generator(3, "x"))
    assert torch.equal(rows, expected)
    assert rows.abs().max() <= 400**-0.5
    assert abs(rows.norm(dim=1).mean() - 3**-0.5) < 0.01  # 64 rows of 400: standard error 0.0006


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 12), seed=st.integers(0, 2**40))
def test_orthogonal_rows_are_orthonormal(rank, seed):
    assert identity_error(orthogonal(12, rank, layer_generator(seed, "x"))) < 1e-6


WITHOUT_GRADIENTS = [name for name in buildable() if find_start(name).needed <= {"inputs"}]


def _draw(method, generator):
    known = {"spectrum": spectrum(n_samples=5), "width": 12, "rank": 8, "generator": generator, "whiten": False}
    return find_start(method).compute(**known)


@pytest.mark.parametrize("method", WITHOUT_GRADIENTS)
def test_a_layers_numbers_depend_on_its_name_and_the_seed_alone(method):
    draw = lambda seed, name: _draw(method, layer_generator(seed, name))  # noqa: E731
    torch.manual_seed(1)
    first = draw(0, "a")
    torch.manual_seed(2)
    draw(0, "b")
    assert torch.equal(first, draw(0, "a"))
    assert not torch.equal(first, draw(0, "b"))
    assert not torch.equal(first, draw(1, "a"))


def test_gaussian_is_pefts_draw():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights="gaussian")
    peft_model = get_peft_model(nn.Sequential(nn.Linear(2000, 4)), config)
    theirs = peft_model.base_model.model[0].lora_A["default"].weight.detach()
    ours = gaussian(2000, 4, layer_generator(0, "x"))
    assert ours.shape == theirs.shape
    # The standard deviation of 8000 draws is off by 0.8 %.
    assert float(ours.std()) == pytest.approx(1 / 4, rel=0.05)
    assert float(theirs.std()) == pytest.approx(1 / 4, rel=0.05)


@pytest.mark.parametrize(("name", "changes"), [
    ("pissa", True), ("pissa_niter_4", True), ("PISSA_niter_16", True), ("olora", True), ("lora-ga", True),
    ("eva", False), ("gaussian", False), ("orthogonal", False), ("full", False),
])  # fmt: skip
def test_a_start_changes_the_base_by_the_beginning_of_its_name(name, changes):
    assert changes_base(name) is changes
