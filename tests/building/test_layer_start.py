"""The start of one layer: what its function is handed, and what becomes of what it returns."""

from dataclasses import replace

import pytest
import torch

from lora_init.adapters.init_config import Shape
from lora_init.building.layer_start import BuildContext, layer_start
from lora_init.starts.initializers import as_large_as_random, layer_generator
from lora_init.starts.providers import PROVIDERS
from lora_init.starts.starts import Start, find_start
from lora_init.starts.weights import LoraWeights
from tests.adapters.made import made_up_statistics
from tests.conftest import refused, tiny_gpt2, tiny_llama

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def stats():
    return made_up_statistics(tiny_llama(), ["down_proj"])


def made(function, **settings):
    return Start("mine", "", function=function, **settings)


def test_a_function_is_handed_what_is_known_of_the_layer(stats):
    model, given = tiny_llama(), {}
    model.base = None

    def function(spectrum, error, weight, width, rank, scaling, whiten, generator):
        given.update(locals())
        return torch.ones(rank, width), torch.ones(32, rank)

    errors = {DOWN: torch.randn(32, 48).bfloat16()}
    shape = Shape(lora_alpha=6.0, use_rslora=True, whiten=True)
    start = made(function, b_is_zero=False)
    context = BuildContext(start, stats, shape, seed=5, errors=errors, model=model, rank=9)
    layer_start(context, DOWN, 3, context.error(DOWN))
    assert given.pop("given") is given and given.keys() == PROVIDERS.keys() - {"gradient"}
    assert {name: given[name] for name in ("width", "rank", "scaling", "whiten")} == dict(
        width=48, rank=3, scaling=2.0, whiten=True
    )
    assert torch.equal(given["spectrum"].components, stats[DOWN].components)
    assert torch.equal(given["weight"], model.get_submodule(DOWN).weight)
    assert given["error"].dtype == torch.float32 and torch.equal(given["error"], errors[DOWN].float())
    assert given["generator"].initial_seed() == layer_generator(5, DOWN).initial_seed()


def test_the_weight_of_a_transposed_layer_is_handed_over_as_it_multiplies():
    model = tiny_gpt2()
    stats = made_up_statistics(model, ["c_attn"])
    name = next(iter(stats))
    start = made(lambda weight, rank: (weight[:rank, :], weight[:, :rank]), b_is_zero=False)
    own = layer_start(BuildContext(start, stats, Shape(), model=model), name, 2, None)
    weight = model.get_submodule(name).weight.T
    torch.testing.assert_close(own, LoraWeights(weight[:2], weight[:, :2]))


@pytest.mark.parametrize(("settings", "shape", "sized"), [
    ({}, Shape(), True), ({}, Shape(unit_rows=True), False), (dict(matched=True), Shape(), False),
    ({}, Shape(gamma=4.0), True),  # of no effect where B is zero
])  # fmt: skip
def test_a_is_sized_where_b_is_zero_unless_it_has_a_size_of_its_own(settings, shape, sized, stats):
    rows = torch.randn(3, 48)
    own = layer_start(BuildContext(made(lambda: rows, **settings), stats, shape), DOWN, 3, None)
    expected = as_large_as_random(stats[DOWN], rows) if sized else rows
    assert torch.equal(own.a, expected) and torch.equal(own.b, torch.zeros(32, 3))
    assert not torch.equal(as_large_as_random(stats[DOWN], rows), rows)


@pytest.mark.parametrize(("gamma", "scale"), [(None, 1.0), (4.0, 32**0.25 / 2.0)])
def test_a_step_is_divided_by_the_root_of_its_gamma(gamma, scale, stats):
    a, b = torch.randn(3, 48, dtype=torch.float64, requires_grad=True), torch.randn(32, 3)
    start = made(lambda: (a, b), b_is_zero=False)
    own = layer_start(BuildContext(start, stats, Shape(gamma=gamma)), DOWN, 3, None)
    assert own.a.dtype == own.b.dtype == torch.float32 and not own.a.requires_grad
    torch.testing.assert_close(own, LoraWeights(a.detach().float() * scale, b * scale))


def with_experts(stats, spectra):
    """The statistics with these spectra, by name, of as many experts in one of the layers."""
    target = replace(stats.targets[DOWN], experts=len(spectra))
    return replace(
        stats, targets={**stats.targets, DOWN: target}, groups={**stats.groups, **spectra},
        group_of={**stats.group_of, **{name: name for name in spectra}},
    )  # fmt: skip


def test_experts_have_numbers_of_their_own_and_stand_in_the_layout_of_peft(stats):
    own = with_experts(stats, {f"{DOWN}.{i}": stats[DOWN] for i in range(2)})
    for b_is_zero in (True, False):
        parts = []

        def function(rank, width, generator):
            a, b = (torch.randn(shape, generator=generator) for shape in ((rank, width), (32, rank)))
            parts.append(LoraWeights(a, b))  # noqa: B023
            return a if b_is_zero else (a, b)  # noqa: B023

        got = layer_start(BuildContext(made(function, b_is_zero=b_is_zero, matched=True), own, Shape()), DOWN, 3, None)
        assert torch.equal(got.a, torch.cat([part.a for part in parts])) and got.a.shape == (6, 48)
        first = torch.randn(3, 48, generator=layer_generator(0, f"{DOWN}.0"))
        assert torch.equal(got.a[:3], first) and not torch.equal(got.a[3:], first)
        of_experts = got.of_experts(2).b
        for b, part in zip(of_experts, parts, strict=True):
            assert torch.equal(b, torch.zeros(32, 3) if b_is_zero else part.b)


def test_the_a_of_an_expert_has_the_size_that_its_own_rows_ask_for(stats):
    whole = stats[DOWN]
    spectra = {f"{DOWN}.{i}": replace(whole, total_variance=whole.total_variance * (1 + 4 * i)) for i in range(2)}
    own = with_experts(stats, spectra)
    rows = torch.randn(3, 48)
    got = layer_start(BuildContext(made(lambda: rows), own, Shape()), DOWN, 3, None).a
    assert torch.equal(got, torch.cat([as_large_as_random(spectrum, rows) for spectrum in spectra.values()]))
    assert not torch.equal(got[:3], got[3:])


def returns(value, **settings):
    return made(lambda: value, **settings)


A, B = torch.ones(3, 48), torch.ones(32, 3)


@pytest.mark.parametrize(("start", "words"), [
    (returns(torch.ones(2, 48)), "returned [[2, 48]], expected A of shape [[3, 48]]."),
    (returns((A, B)), "returned [[3, 48], [32, 3]], expected A of shape [[3, 48]]. To return A and B, set "
                      "b_is_zero=False in its Start."),
    (returns((A, B, B)), "returned [[3, 48], [32, 3], [32, 3]], expected A of shape [[3, 48]]."),
    (returns(A, b_is_zero=False), "returned [[3, 48]], expected A and B of shape [[3, 48], [32, 3]]."),
    (returns((B, A), b_is_zero=False), "returned [[32, 3], [3, 48]], expected A and B of shape [[3, 48], [32, 3]]."),
    (returns(None), "returned ['NoneType'], expected A of shape [[3, 48]]."),
    (returns(A * torch.nan), "returned NaN or inf, or what is too large for float32."),
    (returns((A, B.double() * 1e300), b_is_zero=False), "returned NaN or inf, or what is too large for float32."),
    (made(lambda: {}["x"]), "raised KeyError: 'x'."),
])  # fmt: skip
def test_what_a_function_returns_is_checked(start, words, stats):
    said = refused(".", layer_start, BuildContext(start, stats, Shape()), DOWN, 3, None)
    assert said == f"layer '{DOWN}': start 'mine': its function {words}"


def test_who_interrupts_a_function_gets_no_error_of_the_start(stats):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        layer_start(BuildContext(made(interrupted), stats, Shape()), DOWN, 3, None)


def test_the_error_of_a_layer_is_checked_and_read_in_float32_at_least(stats):
    context = BuildContext(find_start("qera"), stats, Shape())
    assert BuildContext(find_start("eva"), stats, Shape()).error(DOWN) is None
    for given, got in ((torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        assert replace(context, errors={DOWN: torch.ones(32, 48, dtype=given)}).error(DOWN).dtype == got
    one_is_not_finite = torch.ones(32, 48)
    one_is_not_finite[3, 4] = torch.inf
    for error in (torch.ones(48, 32), one_is_not_finite, torch.ones(32)):
        words = f"layer '{DOWN}': its error is {list(error.shape)}, expected [32, 48], all finite."
        assert refused(".", replace(context, errors={DOWN: error}).error, DOWN) == words
    words = (
        f"layer '{DOWN}': start 'qera' corrects what quantization took from its weight. Pass errors=, such as "
        "QuantizationErrors(model, stats.targets)."
    )
    for errors in (None, {}, {"other": B}):
        assert refused(".", replace(context, errors=errors).error, DOWN) == words
    start = made(lambda weight: weight)
    words = f"layer '{DOWN}': the start is made from its weight. Pass model=."
    assert refused(".", layer_start, BuildContext(start, stats, Shape()), DOWN, 3, None) == words
