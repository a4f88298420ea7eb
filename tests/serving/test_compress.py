"""Compression is the best of its rank, its error is the one that is reported, and ranks go where they help."""

import itertools
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from lora_init import LoraInitError, export_adapter
from lora_init.serving.compress import Factors, best_ranks, check_most_rank, errors, factorise, fit, truncate
from lora_init.serving.trained import Layer, Trained, read_trained
from tests.conftest import refused, tiny_llama
from tests.serving.made import load, logits, randomise, train


def layer(d_in=12, d_out=9, rank=5, scaling=0.7, dtype=torch.float32, decay=0.3):
    a = torch.randn(rank, d_in) * decay ** torch.arange(rank)[:, None]
    return Layer(a.to(dtype), torch.randn(d_out, rank).to(dtype), scaling)


@pytest.mark.parametrize("shape", [dict(), dict(d_in=3), dict(d_out=2, rank=5), dict(rank=1)])
def test_truncation_is_the_best_approximation_of_each_rank(shape):
    one = layer(**shape)
    update = one.scaling * (one.b @ one.a).double()
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    factors = factorise(one)
    for rank in range(1, one.rank):
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        cut = truncate(one, factors, rank)
        assert cut.rank == min(rank, *one.widths)
        torch.testing.assert_close(cut.scaling * (cut.b @ cut.a).double(), best, atol=1e-5, rtol=1e-5)
        relative, total = errors({"x": factors}, {"x": rank})
        expected = float((update - best).norm() / update.norm())
        assert math.isclose(relative["x"], expected, abs_tol=1e-6) and math.isclose(total, expected, abs_tol=1e-6)
    assert truncate(one, factors, one.rank) is one


def test_bfloat16_stays_bfloat16():
    one = layer(dtype=torch.bfloat16)
    cut = truncate(one, factorise(one), 4)
    assert cut.a.dtype == cut.b.dtype == torch.bfloat16
    assert ((cut.b.float() @ cut.a.float()) - (one.b.float() @ one.a.float())).norm() < 0.05 * (one.b @ one.a).norm()


def test_ranks_go_to_the_largest_singular_values():
    layers = {name: layer(rank=3, scaling=scaling) for name, scaling in (("a", 1.0), ("b", 3.0), ("c", 0.2))}
    factors, costs = {name: factorise(one) for name, one in layers.items()}, dict.fromkeys(layers, 1)
    squares = {name: torch.linalg.svdvals(one.scaling * (one.b @ one.a)).square() for name, one in layers.items()}

    def left(ranks):
        lost = sum(float(squares[name][rank:].sum()) for name, rank in ranks.items())
        return math.sqrt(lost / sum(float(of.sum()) for of in squares.values()))

    for budget in range(10):
        chosen = best_ranks(factors, costs, budget)
        assert sum(chosen.values()) <= budget
        products = itertools.product(range(4), repeat=3)
        every = (dict(zip(factors, ranks, strict=True)) for ranks in products if sum(ranks) <= budget)
        assert errors(factors, chosen)[1] == pytest.approx(min(map(left, every)), abs=1e-4)


def energies(**of_layers):
    none = torch.zeros(0)
    return {name: Factors(none, none, none, some) for name, some in of_layers.items()}


@pytest.mark.parametrize(("budget", "kept", "found"), [
    (0, (), (0, 0)),
    (1, (), (1, 0)),  # of equal ones the first layer's
    (1, ("b",), (0, 1)),
    (2, ("b",), (1, 1)),
    (3, ("b",), (2, 1)),  # the first rank alone is kept
    (9, (), (2, 2)),
])  # fmt: skip
def test_first_ranks_of_kept_layers_come_first_and_then_the_largest(budget, kept, found):
    factors = energies(a=(4.0, 1.0), b=(4.0, 1.0))
    assert best_ranks(factors, {"a": 1, "b": 1}, budget, kept) == dict(zip("ab", found, strict=True))


def test_errors_are_shares_of_each_layer_and_of_all():
    factors = energies(x=(16.0, 9.0), y=(144.0,), zero=(0.0, 0.0))
    assert errors(factors, {"x": 1, "y": 1, "zero": 0}) == ({"x": 0.6, "y": 0.0, "zero": 0.0}, pytest.approx(3 / 13))
    assert errors(factors, {"x": 2, "y": 0, "zero": 0})[0] == {"x": 0.0, "y": 1.0, "zero": 0.0}
    assert errors(energies(zero=(0.0,)), {"zero": 0}) == ({"zero": 0.0}, 0.0)


def test_each_expert_is_cut_to_its_best_and_their_energies_add_up():
    one = Layer(torch.randn(3, 4, 12), torch.randn(3, 9, 4), 0.7)
    factors = factorise(one)
    u, s, vh = torch.linalg.svd(0.7 * one.b @ one.a, full_matrices=False)
    assert factors.energies == pytest.approx(s.square().sum(0)[:4].tolist(), rel=1e-4)
    cut = truncate(one, factors, 2)
    best = (u[..., :2] * s[:, None, :2]) @ vh[:, :2]
    torch.testing.assert_close(cut.scaling * cut.b @ cut.a, best, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cut.a.norm(dim=2), cut.b.norm(dim=1))  # both of one size


WIDTHS = {"h.0.up": (12, 9), "h.0.down": (9, 12), "h.1.up": (12, 9), "h.1.down": (9, 12), "h.1.other": (5, 5)}


def in_two_layers(**more):
    """An adapter of ranks 3 and 5, which stand in another order than the layers of the model."""
    return Trained({}, {"h.1.up": layer(rank=3, **more), "h.0.down": layer(9, 12, rank=5, **more)}, {})


@pytest.mark.parametrize(("rank", "most", "found"), [
    (None, None, 8), (4, None, 4), (5, None, 5), (16, None, 16), (None, 84 * 9, 8), (None, 84 * 3 + 83, 3),
    (None, 84, 1),
])  # fmt: skip
def test_one_rank_is_that_of_all_layers_of_a_kind_in_the_order_of_the_model(rank, most, found):
    """A rank of the four layers that are there then costs 4 x (12 + 9) = 84 parameters."""
    trained = in_two_layers()
    fitted, lost, error = fit(trained, rank, most, False, WIDTHS)
    assert [*fitted.layers] == [*WIDTHS][:4] and {one.rank for one in fitted.layers.values()} == {found}
    assert {*lost} == {name for name, one in trained.layers.items() if one.rank > found} and bool(error) == bool(lost)
    for name, one in fitted.layers.items():
        before = trained.layers.get(name)
        update = torch.zeros(one.widths[::-1]) if before is None else before.b @ before.a
        assert lost.get(name, 0.0) == pytest.approx(
            float((one.b @ one.a - update).norm() / (update.norm() or 1)), abs=1e-5
        )


@pytest.mark.parametrize(("rank", "most", "found"), [(None, None, 8), (2, None, 4), (None, 21 * 4 + 20, 4)])
def test_ranks_of_their_own_are_of_trained_layers_alone(rank, most, found):
    trained = in_two_layers()
    fitted, lost, error = fit(trained, rank, most, True, WIDTHS)
    assert [*fitted.layers] == ["h.0.down", "h.1.up"] and sum(one.rank for one in fitted.layers.values()) == found
    assert bool(lost) == bool(error) == (found < 8)
    if not lost:
        assert all(fitted.layers[name] is one for name, one in trained.layers.items())


def test_layers_with_a_bias_or_magnitudes_keep_a_rank_and_get_no_neighbors():
    plain = in_two_layers()
    weak = {name: one if name == "h.1.up" else Layer(one.a * 1e-3, one.b, 1.0) for name, one in plain.layers.items()}
    assert [*fit(Trained({}, weak, {}), 1, None, True, WIDTHS)[0].layers] == ["h.1.up"]
    for beside in ("bias", "weight"):  # a weight that was changed before training
        others = {f"base_model.model.h.0.down.base_layer.{beside}": torch.ones(12)}
        assert [*fit(Trained({}, weak, others), 1, None, True, WIDTHS)[0].layers] == ["h.0.down", "h.1.up"]
    dora = {name: Layer(one.a, one.b, 1.0, magnitude=torch.ones(one.widths[1])) for name, one in weak.items()}
    for keep_ranks in (False, True):
        fitted, *_ = fit(Trained({}, dora, {}), 1, None, keep_ranks, WIDTHS)
        assert [*fitted.layers] == ["h.0.down", "h.1.up"] and {one.rank for one in fitted.layers.values()} == {1}
    said = "layer 'h.0.down' has a bias, weight or lengths of its own, and the budget is below rank 1. Give more"
    refused(said, fit, Trained({}, dora, {}), None, 41, True, WIDTHS)


def test_a_budget_below_rank_1_is_refused_with_what_it_takes():
    wide = {name: (1000 * d_in, d_out) for name, (d_in, d_out) in WIDTHS.items()}
    trained = Trained({}, {"h.1.up": layer(12_000, 9)}, {})
    said = "^a budget of 24,017 parameters: rank 1 in all 2 layers takes 24,018.$"
    refused(said, fit, trained, None, 24_017, False, wide)
    assert fit(trained, None, 24_018, False, wide)[0].rank == 1


@pytest.mark.parametrize(("rank", "widest"), [(512, 32), (513, 32), (600, 600), (601, 600), (None, 1)])
def test_no_rank_is_above_the_widest_layer_and_the_largest_that_vllm_has(rank, widest):
    if rank is None or rank in (512, 600):
        check_most_rank(rank, widest)
    else:
        said = f"^rank={rank}: no layer of this adapter can have more than rank {widest}. Choose less"
        refused(said, check_most_rank, rank, widest)


def test_the_widest_layer_is_the_one_whose_update_may_have_the_highest_rank():
    """The narrower side of each layer counts."""
    layers = {"h.0.up": layer(700, 600, rank=1), "h.0.down": layer(900, 5, rank=1)}
    trained = Trained({}, layers, {})
    refused("^rank=601: no layer of this adapter can have more than rank 600", fit, trained, 601, None, False, {})
    assert {one.rank for one in fit(trained, 600, None, False, {})[0].layers.values()} == {600}


@pytest.mark.parametrize("keep_ranks", [False, True])
def test_a_budget_counts_a_rank_of_all_experts(keep_ranks):
    trained = Trained({}, {"experts": Layer(torch.randn(3, 4, 12), torch.randn(3, 9, 4), 0.7)}, {})
    for most, rank in ((2 * 3 * 21, 2), (2 * 3 * 21 - 1, 1)):
        assert fit(trained, None, most, keep_ranks, {})[0].layers["experts"].rank == rank


def test_a_budget_of_parameters_counts_what_a_rank_costs():
    none = torch.zeros(0)
    factors = {"wide": Factors(none, none, none, (8.0, 1.0)), "thin": Factors(none, none, none, (0.1, 0.001))}
    costs = {"wide": 800, "thin": 8}
    assert best_ranks(factors, costs, 808) == {"wide": 1, "thin": 1}  # 0.01 and 0.0125 for each parameter
    assert best_ranks(factors, costs, 807) == {"wide": 0, "thin": 2}


@torch.no_grad()
def update_error(base, trained, served):
    """The relative error of all merged weights, from PEFT's own products."""
    lost = whole = 0.0
    deltas = [
        {n: m.get_delta_weight("default") for n, m in PeftModel.from_pretrained(load(base), d).named_modules()
         if hasattr(m, "get_delta_weight")}
        for d in (trained, served)
    ]  # fmt: skip
    for name, delta in deltas[0].items():
        lost += float((delta - deltas[1].get(name, torch.zeros(()))).square().sum())
        whole += float(delta.square().sum())
    return math.sqrt(lost / whole)


SIZES = [
    dict(rank=2), dict(parameters="2k"), dict(megabytes=0.008), dict(rank=2, keep_ranks=True),
    dict(parameters=1500, keep_ranks=True),
]  # fmt: skip


@pytest.mark.parametrize("options", SIZES)
def test_an_export_has_the_size_and_the_error_that_it_says(options, base, tmp_path):
    trained = train(
        base, tmp_path / "trained", target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 7}, lora_alpha=5
    )
    exported = export_adapter(trained, tmp_path / "served", **options)
    tensors = load_file(tmp_path / "served/adapter_model.safetensors")
    parameters = sum(tensor.numel() for tensor in tensors.values())
    assert exported.parameters == parameters and exported.error == pytest.approx(
        update_error(base, trained, tmp_path / "served"), abs=1e-4
    )
    assert 0 < exported.error < 1 and max(exported.errors.values()) >= exported.error
    ranks = {name: one.rank for name, one in read_trained(tmp_path / "served").layers.items()}
    if "rank" in options:
        assert sum(ranks.values()) <= 2 * 6 and (options.get("keep_ranks") or set(ranks.values()) == {2})
    assert parameters <= {"2k": 2000, 1500: 1500}.get(options.get("parameters"), 2000)
    record = json.loads((tmp_path / "served/export.json").read_text())
    assert record["errors"] == exported.errors and record["rank"] == exported.rank


@pytest.mark.parametrize("options", [dict(), dict(keep_ranks=True)])
def test_a_budget_in_megabytes_counts_the_type_that_is_written(options, base, tmp_path):
    trained = train(base, tmp_path / "trained", target_modules=["q_proj", "up_proj"], r=7)
    whole = export_adapter(trained, tmp_path / "whole", rank=7, dtype="bfloat16")
    most = whole.parameters * 2 / 10**6  # just enough in bfloat16
    half = export_adapter(trained, tmp_path / "half", megabytes=most, dtype="bfloat16", **options)
    assert half.parameters == whole.parameters and not half.errors
    tensors = load_file(tmp_path / "half/adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    single = export_adapter(trained, tmp_path / "single", megabytes=most, **options)
    assert 4 * single.parameters <= most * 10**6 and single.errors
    file = export_adapter(tmp_path / "half", tmp_path / "half.gguf", "llama.cpp", megabytes=most)  # float32 alone
    assert 4 * file.parameters <= most * 10**6
    # bfloat16 has 8 bits: each of A and B is off by at most 2^-9 of it.
    assert update_error(base, trained, tmp_path / "half") < 2**-7


def train_weakly(directory, **settings):
    """Make an adapter with trained biases or magnitudes that does next to nothing in one layer but for these."""
    tiny_llama(num_hidden_layers=2, attention_bias=True).save_pretrained(directory / "base")
    model = get_peft_model(load(directory / "base"), LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
    randomise(model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter.requires_grad:
            parameter.data.normal_()
        if "layers.1.self_attn.v_proj.lora_B" in name:
            parameter.data.mul_(1e-4)
    model.save_pretrained(directory / "trained")
    return directory / "trained"


@pytest.mark.parametrize("settings", [dict(bias="lora_only"), dict(use_dora=True)])
def test_no_rank_budget_drops_a_bias_or_a_magnitude(settings, tmp_path):
    trained = train_weakly(tmp_path, target_modules=["v_proj", "o_proj"], **settings)
    exported = export_adapter(trained, tmp_path / "served", rank=3, keep_ranks=True)
    assert 0 < exported.error < 0.5
    served = read_trained(tmp_path / "served")
    assert served.layers["model.layers.1.self_attn.v_proj"].rank == 1
    assert served.others.keys() == read_trained(trained).others.keys()
    expected, got = logits(load(tmp_path / "base"), trained), logits(load(tmp_path / "base"), tmp_path / "served")
    assert (got - expected).norm() < 0.5 * (expected - logits(load(tmp_path / "base"))).norm()
    with pytest.raises(LoraInitError, match="has a bias, weight or lengths of its own, and the budget is below"):
        export_adapter(trained, tmp_path / "smaller", parameters=150, keep_ranks=True)
