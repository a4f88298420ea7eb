"""Intruder dimensions: against brute force, against PEFT's criterion, and where their number was planted."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_init
from lora_init.adapters.peft_model import adapter_layers
from lora_init.layers.targets import find_targets
from lora_init.serving.intruders import (
    Intruders,
    LayerIntruders,
    _leading,
    intruder_dimensions,
    left_singular_vectors,
    without_intruders,
)
from tests.commands import save_model
from tests.comparison.made import assert_same, snapshot
from tests.conftest import refused, tiny_bert, tiny_gpt2, tiny_llama
from tests.versions import needs_intruders

NAMES = ["q_proj", "down_proj", "up_proj"]


def with_adapter(model, targets=NAMES, size=0.3, **options):
    """A trained adapter, as far as this is concerned: B is not zero."""
    settings = dict(r=4, lora_alpha=8, target_modules=targets) | options
    torch.manual_seed(0)
    peft_model = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for layer in adapter_layers(peft_model).values():
        b = layer.lora_B["default"].weight
        b.data = torch.randn(b.shape, generator=generator) * size
    return peft_model


def brute_force(plain, delta, k=10):
    """The definition, word for word, in float64."""
    trained = plain.double() + delta.double()
    before = torch.linalg.svd(plain.double()).U[:, : min(plain.shape)]
    u, s, _ = torch.linalg.svd(trained)
    similarities = [max(abs(float(u[:, i] @ before[:, j])) for j in range(before.shape[1])) for i in range(k)]
    new = [i for i in range(k) if similarities[i] < 0.5]
    return similarities, len(new), float((s[new] ** 2).sum() / (s[:k] ** 2).sum())


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, lambda: tiny_llama(hidden_size=160, intermediate_size=200)])
def test_against_brute_force(make):
    """The third model is large enough for the Lanczos steps."""
    model = make()
    targets = ["c_attn", "c_proj"] if make is tiny_gpt2 else NAMES
    peft_model = with_adapter(model, targets, fan_in_fan_out=make is tiny_gpt2)
    found = intruder_dimensions(peft_model)
    layers = adapter_layers(peft_model)
    assert list(found.layers) == list(layers)
    counts, energy, total = 0, 0.0, 0.0
    for name, layer in layers.items():
        weight, delta = layer.base_layer.weight.detach(), layer.get_delta_weight("default").detach()
        if make is tiny_gpt2:
            weight, delta = weight.T, delta.T
        similarities, count, share = brute_force(weight, delta)
        ours = found.layers[name]
        # float32 against float64, where two directions of nearly equal weight turn into each other.
        assert ours.similarities == pytest.approx(similarities, abs=2e-3)
        assert (ours.count, ours.of) == (count, 10)
        assert ours.energy_share == pytest.approx(share, rel=1e-4)
        counts, energy, total = counts + count, energy + share * sum(ours.energies), total + sum(ours.energies)
    assert found.count == counts and 0 < counts < found.of == 10 * len(layers)
    assert found.energy_share == pytest.approx(energy / total, rel=1e-4)


def test_a_count_leaves_the_callers_random_numbers_as_they_were(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    before, plain = torch.random.get_rng_state(), model.unload()
    intruder_dimensions(plain, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_of_a_base_in_16_bits_the_merge_is_not_rounded():
    """An update smaller than half a step of bfloat16 would be lost, and rounding be counted."""
    model = with_adapter(tiny_llama(initializer_range=1.0), size=1e-3).to(torch.bfloat16)
    found = intruder_dimensions(model)
    for name, layer in adapter_layers(model).items():
        a, b = (getattr(layer, part)["default"].weight.detach().double() for part in ("lora_A", "lora_B"))
        delta = layer.scaling["default"] * b @ a
        similarities, *_ = brute_force(layer.base_layer.weight.detach(), delta)
        assert found.layers[name].similarities == pytest.approx(similarities, abs=1e-4)
    wide = intruder_dimensions(copy.deepcopy(model).float())
    for name, layer in wide.layers.items():
        assert found.layers[name].similarities == pytest.approx(layer.similarities, abs=1e-6)
        assert found.layers[name].energies == pytest.approx(layer.energies, rel=1e-5)


@needs_intruders
def test_against_peft():
    """PEFT says how many it would reduce in each layer."""
    peft_model = with_adapter(tiny_llama())
    found = intruder_dimensions(peft_model)
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    said = []
    reduce_intruder_dimension(peft_model, logging_sink=said.append)
    theirs = {}
    for line in said[:-1]:
        name, _, text = line.partition(": ")
        theirs[name.removeprefix("base_model.model.")] = 0 if text == "No intruders" else int(text.split()[-1])
    assert theirs == {name: layer.count for name, layer in found.layers.items()}
    assert sum(theirs.values()) > 0


def planted(n_intruders, n_large=3, width=160):
    """A weight of known directions, and an adapter that adds large ones outside their span."""
    basis = torch.linalg.qr(torch.randn(width, width)).Q
    inside, outside = basis[:, : width // 2], basis[:, width // 2 :]
    right = torch.linalg.qr(torch.randn(width // 2, width // 2)).Q
    model = nn.Sequential(nn.Linear(width // 2, width, bias=False))
    model[0].weight.data = inside @ torch.diag(torch.linspace(10, 1, width // 2)) @ right.T
    peft_model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    layer = peft_model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a.data = right[:, -8:].T.contiguous()
    b.data.zero_()
    b.data[:, :n_intruders] = 20 * outside[:, :n_intruders]  # twice that after the scaling: above all others
    b.data[:, n_intruders : n_intruders + n_large] = 20 * inside[:, -8:][:, n_intruders : n_intruders + n_large]
    return peft_model


@pytest.mark.parametrize("n", [0, 1, 3, 5])
def test_a_planted_number(n):
    """Directions outside the span count; those that the weight has, made larger, do not."""
    found = intruder_dimensions(planted(n))
    assert found.count == n and found.of == 10
    similarities = sorted(found.layers["0"].similarities)
    # The small singular value that the intruder is added to leaves a cosine of about 1 / 40.
    assert all(similarity < 0.05 for similarity in similarities[:n])
    assert all(similarity > 0.99 for similarity in similarities[n:])


@pytest.mark.parametrize("start", [True, "pissa", "olora"])
def test_an_adapter_directory(start, tmp_path):
    model = tiny_llama()
    base = left_singular_vectors(model, find_targets(model).layers)
    peft_model = with_adapter(tiny_llama_again(model), init_lora_weights=start)
    expected = intruder_dimensions(peft_model, base=base)
    peft_model.save_pretrained(tmp_path / "adapter")
    before = snapshot(model)
    found = intruder_dimensions(model, tmp_path / "adapter")
    assert_same(before, snapshot(model))
    assert found.count == expected.count > 0
    for name, layer in expected.layers.items():
        assert found.layers[name].similarities == pytest.approx(layer.similarities, abs=1e-4)
    said = "q_proj' has an adapter, and base= has no"  # what is given is not computed anew
    refused(said, intruder_dimensions, model, tmp_path / "adapter", base={})


def tiny_llama_again(model):
    other = tiny_llama()
    other.load_state_dict(model.state_dict())
    return other


def test_what_cannot_be_examined():
    model = tiny_llama()
    refused("LlamaForCausalLM has no LoRA adapter", intruder_dimensions, model)
    refused("nowhere: no such adapter directory", intruder_dimensions, model, "nowhere")
    peft_model = with_adapter(model)
    refused("expected at least 1", intruder_dimensions, peft_model, k=0)
    refused(r"q_proj' has an adapter, and base= has no", intruder_dimensions, peft_model, base={})
    peft_model.merge_adapter()
    refused("merged already", intruder_dimensions, peft_model)
    peft_model.unmerge_adapter()
    weight = model.model.layers[0].self_attn.q_proj.base_layer.weight
    model.model.layers[0].self_attn.q_proj.base_layer.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    refused("q_proj' is quantized", intruder_dimensions, peft_model)


def test_an_embedding_has_no_singular_vectors_to_compare_and_is_left_out():
    found = intruder_dimensions(with_adapter(tiny_llama(), ["q_proj"]))
    both = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
    examined = intruder_dimensions(both)
    assert examined.skipped == {"model.embed_tokens": "Embedding"} and found.skipped == {}
    assert examined.layers.keys() == found.layers.keys()


def test_a_weight_of_nan_has_no_singular_vectors():
    peft_model = with_adapter(tiny_llama())
    weight = peft_model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    for number in (torch.nan, torch.inf):
        weight.data[0, 0] = number
        refused("layers.0.self_attn.q_proj': its weights have NaN or inf, so", intruder_dimensions, peft_model)


@needs_intruders
def test_what_peft_cannot_reduce_is_refused(tmp_path):
    for name, make, targets in (("gpt2", tiny_gpt2, ["c_attn"]), ("llama", tiny_llama, ["q_proj"])):
        model = make()
        model.save_pretrained(tmp_path / name)
        model = with_adapter(model, targets, fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM")
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / name)
        model.save_pretrained(tmp_path / f"{name} adapter")

    def reduce(name, model, **options):
        return lora_init.export_adapter(
            tmp_path / f"{name} adapter", tmp_path / "out", reduce_intruders=model, **options
        )

    refused(
        "layer 'transformer.h.0.attn.c_attn' is a Conv1D: PEFT reduces linear layers alone", reduce, "gpt2", tiny_gpt2()
    )
    refused("reduce_intruders= takes the base model and got str. Load it first", reduce, "llama", "llama")
    layers = {"q_proj": SimpleNamespace(experts=0), "experts.down_proj": SimpleNamespace(experts=4)}
    some = SimpleNamespace(others={}, dora=False, layers=layers)
    refused("in plain LoRA only, without DoRA, modules_to_save and ex", without_intruders, some, tmp_path, tiny_llama())
    config = json.loads((tmp_path / "llama adapter/adapter_config.json").read_text()) | {"init_lora_weights": "pissa"}
    (tmp_path / "llama adapter/adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(tmp_path / "llama adapter", tmp_path / "start")
    said = (
        "^reduce_intruders= is of an adapter as PEFT loads it. Export it by rename=True or start= first, and reduce wh"
    )
    for other in (dict(start=tmp_path / "start"), dict(rename=True)):
        refused(said, reduce, "llama", tiny_llama(), **other)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models with adapters on the disk, as a user has them."""
    home = tmp_path_factory.mktemp("intruders")
    for name, make, task in (("llama", tiny_llama, "CAUSAL_LM"), ("bert", tiny_bert, "SEQ_CLS")):
        save_model(make(), home / name)
        model = type(make()).from_pretrained(home / name)
        targets = NAMES if name == "llama" else ["query", "dense"]
        with_adapter(model, targets, task_type=task).save_pretrained(home / f"{name}_adapter")
    return home


def test_shares_are_of_the_energy_and_a_vector_at_the_threshold_is_none():
    one = LayerIntruders((0.9, 0.5, 0.4, 0.0), (8.0, 4.0, 3.0, 1.0), 0.5)
    none = LayerIntruders((0.9,), (16.0,), 0.5)
    assert (one.of, one.count, one.energy_share, none.count, none.energy_share) == (4, 2, 0.25, 0, 0.0)
    both = Intruders({"a": one, "b": none}, {})
    assert (both.of, both.count, both.energy_share) == (5, 2, 0.125)
    zeros = LayerIntruders((0.0,), (0.0,), 0.5)
    assert zeros.energy_share == Intruders({"a": zeros}, {}).energy_share == Intruders({}, {}).energy_share == 0.0


@pytest.mark.parametrize("wrong", [dict(k=0), dict(threshold=0.0), dict(threshold=1.01)])
def test_numbers_that_no_vector_can_have_are_refused(wrong):
    k, threshold = wrong.get("k", 10), wrong.get("threshold", 0.5)
    said = f"^k={k}, threshold={threshold}; expected at least 1, and a cosine above 0.$"
    refused(said, intruder_dimensions, planted(1), **wrong)
    assert intruder_dimensions(planted(1), k=1, threshold=1.0).of == 1


@pytest.mark.parametrize(("size", "k"), [(127, 3), (128, 3), (160, 3), (160, 159), (160, 160), (160, 200)])
def test_the_leading_vectors_are_the_same_by_lanczos_steps(size, k):
    """Also of as many as there are or more, for which there are no such steps."""
    weight = torch.linalg.qr(torch.randn(170, size)).Q * torch.linspace(9, 1, size)
    u, s, _ = torch.linalg.svd(weight, full_matrices=False)
    vectors, values = _leading(weight, k)
    assert vectors.shape == (170, min(k, size))
    torch.testing.assert_close(values, s[:k])
    torch.testing.assert_close((vectors * u[:, :k]).sum(0).abs(), torch.ones(min(k, size)))
    vectors, values = _leading(torch.zeros(170, size), k)
    assert vectors.shape == (170, min(k, size)) and values.tolist() == [0.0] * min(k, size)
