"""Compiled, autocast, checkpointed, caching and packed models: the statistics are those of the plain model."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_init import ExactPCA, collect, find_targets, principal_angles
from lora_init.layers import wrappers
from lora_init.layers.identity import fingerprint
from lora_init.layers.wrappers import (
    Precision,
    gathered,
    is_below,
    is_offloaded,
    is_sharded,
    is_tensor_parallel,
    model_id,
    plain_name,
    plain_names,
    quantization_of,
    unwrapped,
    weights,
)
from tests.collection.made import labelled
from tests.conftest import batches_for, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert, "t5": tiny_t5}


def assert_same(stats, expected):
    """Bit for bit: the plain model ran the same operations."""
    assert list(stats) == list(expected)
    assert stats.group_of == expected.group_of
    assert stats.unsupported == expected.unsupported
    for name in expected:
        assert stats[name].n_samples == expected[name].n_samples
        assert torch.equal(stats[name].components, expected[name].components), name
        assert stats.total_variance(name) == expected.total_variance(name)


def compiled_whole(model):
    return torch.compile(model, backend="eager")


def compiled_and_used(model):
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(**batches_for("llama")[0])  # there is a graph without hooks
    return compiled


def compiled_in_place(model):
    model.compile(backend="eager")
    with torch.no_grad():
        model(**batches_for("llama")[0])
    return model


def compiled_by_layer(model):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    with torch.no_grad():
        model(**batches_for("llama")[0])
    return model


def compiled_by_layer_in_place(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    with torch.no_grad():
        model(**batches_for("llama")[0])
    return model


WAYS = [compiled_whole, compiled_and_used, compiled_in_place, compiled_by_layer, compiled_by_layer_in_place]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_compiled_models(way):
    model, batches = tiny_llama(), batches_for("llama")
    expected = collect(model, batches, rank=2)
    compiled = way(copy.deepcopy(model))
    torch._dynamo.utils.counters.clear()
    stats = collect(compiled, batches, rank=2)
    assert not torch._dynamo.utils.counters["frames"]  # nothing was compiled for the pass
    assert_same(stats, expected)
    assert stats.provenance.model_class == "LlamaForCausalLM"
    assert stats.provenance.fingerprint == expected.provenance.fingerprint
    with torch.no_grad():  # it works as before, without hooks
        torch.testing.assert_close(compiled(**batches[0]).logits, model(**batches[0]).logits)


def test_names_and_fingerprints_are_those_of_the_plain_model():
    model = tiny_llama()
    for wrapped in (torch.compile(model), nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        assert unwrapped(wrapped) is model
        assert find_targets(wrapped).layers == find_targets(model).layers
        assert fingerprint(wrapped) == fingerprint(model)
    parts = compiled_by_layer(copy.deepcopy(model))
    assert list(plain_names(parts)) == [name for name, _ in model.named_modules()]
    assert fingerprint(parts) == fingerprint(model)
    assert find_targets(parts).layers == find_targets(model).layers


@pytest.mark.parametrize("inside", [False, True], ids=["around collect", "inside forward"])
def test_autocast(inside):
    """Rows are what the layers read under autocast, some of them bfloat16; the sums are not done in bfloat16."""
    model, batches = tiny_llama(), batches_for("llama", n_batches=8)
    name = "model.layers.1.mlp.down_proj"
    rows = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for batch in batches:
            model(**batch)
    handle.remove()
    assert rows[0].dtype == torch.bfloat16
    exact = ExactPCA()
    for x, batch in zip(rows, batches, strict=True):
        exact.partial_fit(x[batch["attention_mask"].bool()])

    def forward(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**{key: value for key, value in batch.items() if key != "labels"})

    if inside:
        stats = collect(model, batches, rank=4, forward=forward)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            stats = collect(model, batches, rank=4)
            assert torch.is_autocast_enabled("cpu")
    best = exact.spectrum()
    assert stats[name].n_samples == best.n_samples
    # Exact sums, but for float32: in bfloat16 they would have two digits.
    assert stats.total_variance(name) == pytest.approx(best.total_variance, rel=1e-5)
    torch.testing.assert_close(stats[name].mean, best.mean, atol=1e-6, rtol=1e-4)
    # The same rows without autocast: the same decomposition, bit for bit.
    plain = collect(nn.ModuleDict({"d": nn.Linear(48, 2)}), [r[b["attention_mask"].bool()].float() for r, b in
                    zip(rows, batches, strict=True)], rank=4, forward=lambda m, x: m["d"](x))  # fmt: skip
    assert principal_angles(stats[name].components, plain["d"].components).max() < 1e-5
    # And close to the float32 model's: bfloat16 keeps three digits of a row.
    full = collect(model, batches, rank=4)
    assert stats.total_variance(name) == pytest.approx(full.total_variance(name), rel=0.02)


def test_around_a_pass_autocast_changes_nothing_that_the_model_does_not_compute():
    """Where the model leaves it, every number is the one that there is without."""

    def forward(model, batch):
        with torch.autocast("cpu", enabled=False):
            return model(**batch)

    model, batches = tiny_llama(), labelled("llama")
    asked = dict(rank=4, gradients=True, forward=forward)
    plain = collect(model, batches, **asked)
    with torch.autocast("cpu", torch.bfloat16):
        found = collect(model, batches, **asked)
    assert_same(found, plain)
    assert found.provenance.keeps == plain.provenance.keeps
    for name in plain:
        ours, theirs = found.gradient(name), plain.gradient(name)
        assert torch.equal(ours.weighted.components, theirs.weighted.components)
        assert torch.equal(ours.left, theirs.left) and torch.equal(ours.right, theirs.right)
        assert ours.importance == theirs.importance


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    model, batches = MODELS[name](), batches_for(name)
    expected = collect(model, batches, rank=2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert_same(collect(model, batches, rank=2), expected)
    assert model.training
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_in_a_models_own_code_does_not_count_rows_twice(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, again=True):
            if not again:
                return self.b(self.a(x).relu())
            return checkpoint(lambda y: self.b(self.a(y).relu()), x, use_reentrant=reentrant)

    model, batches = Net().train(), [torch.randn(20, 8) for _ in range(3)]
    expected = collect(model, batches, rank=2, forward=lambda m, x: m(x, again=False))
    stats = collect(model, batches, rank=2)
    assert_same(stats, expected)
    assert stats["b"].n_samples == 60
    with torch.enable_grad():  # also where a caller's forward turns gradients on and goes backward

        def there_and_back(model, x):
            with torch.enable_grad():
                model(x.clone().requires_grad_()).sum().backward()

        stats = collect(model, batches, rank=2, forward=there_and_back)
    assert stats["a"].n_samples == 60


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sequences_packed_into_one_row_give_the_rows_of_the_sequences(name):
    """No mask but position_ids: every token counts, and none reads another sequence's."""
    from transformers import DataCollatorWithFlattening

    model, batches = MODELS[name](), batches_for(name, n_batches=3)
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    packed = []
    for batch in batches:
        lengths = batch["attention_mask"].sum(1).tolist()
        packed.append(
            collate([{"input_ids": ids[:n].tolist()} for ids, n in zip(batch["input_ids"], lengths, strict=True)])
        )
    assert all("attention_mask" not in batch for batch in packed)
    expected = collect(model, batches, rank=2)
    stats = collect(model, packed, rank=2)
    for layer in expected:
        assert stats[layer].n_samples == expected[layer].n_samples
        # The same rows, computed in matrices of another shape.
        assert stats.total_variance(layer) == pytest.approx(expected.total_variance(layer), rel=1e-4)
        torch.testing.assert_close(stats[layer].mean, expected[layer].mean, atol=1e-5, rtol=1e-3)


def test_autocast_of_an_accelerator_is_switched_with_that_of_the_processor(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda", 0))
    try:
        torch.set_autocast_enabled("cuda", True)
        precision = Precision()
        with precision.off():
            assert not torch.is_autocast_enabled("cuda")
        assert torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize(("name", "plain"), [
    ("a.b.weight", "a.b.weight"), ("_orig_mod.a._orig_mod.b", "a.b"), ("a._fsdp_wrapped_module.b", "a.b"),
    ("module.a", "module.a"),  # a part of somebody's model may have this name
])  # fmt: skip
def test_names_are_those_without_wrappers(name, plain):
    assert plain_name(name) == plain


@pytest.mark.parametrize(("name", "owner", "below"), [
    ("a.b", "a", True), ("a", "a", True), ("ab", "a", False), ("a", "a.b", False), ("a.b", "", True), ("", "", True),
])  # fmt: skip
def test_a_module_is_below_another_by_name(name, owner, below):
    assert is_below(name, owner) is below


def test_the_id_of_a_model_is_where_it_was_loaded_from():
    model = tiny_llama()
    assert model_id(model) == model_id(nn.Linear(2, 2)) == ""
    model.config.name_or_path = "org/model"
    assert model_id(model) == "org/model"
    model.config = SimpleNamespace(name_or_path=None)
    assert model_id(model) == ""


def test_how_a_model_was_quantized():
    model = nn.Module()
    assert quantization_of(model) is quantization_of(tiny_llama()) is None
    model.config = SimpleNamespace(quantization_config={"bits": 4})
    assert quantization_of(model) == {"bits": 4} and quantization_of(model) is not model.config.quantization_config
    settings = '{"load_in_4bit": true, "_private": 1, "quant_method": "other"}'
    for method in ("q", SimpleNamespace(value="q")):
        config = SimpleNamespace(quant_method=method, to_json_string=lambda: settings)
        model.config = SimpleNamespace(quantization_config=config)
        assert quantization_of(model) == {"quant_method": "other", "load_in_4bit": True}


def test_weights_that_are_elsewhere_are_brought():
    """As accelerate keeps them: a map of weights in a hook, or in one of several that are chained."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    plain = [layer.weight.detach() for layer in model]
    maps = [SimpleNamespace(weights_map={"weight": weight}) for weight in plain]
    assert not is_offloaded(model)
    for layer in model[:2]:
        layer.to("meta")
    model[0]._hf_hook, model[1]._hf_hook = maps[0], SimpleNamespace(hooks=[SimpleNamespace(), maps[1]])
    model[2]._hf_hook = SimpleNamespace(weights_map=None)
    assert is_offloaded(model) and not is_offloaded(model[2])
    found = dict(weights(model))
    assert [*found] == ["0.weight", "1.weight", "2.weight"]
    assert all(torch.equal(one, other) for one, other in zip(found.values(), plain, strict=True))


def test_a_weight_that_is_in_place_is_taken_as_it_is():
    """A layer may have a hook that offloads and a weight in memory, as one that is tied to another."""
    layer = nn.Linear(2, 2, bias=False)
    layer._hf_hook = SimpleNamespace(weights_map={})
    assert torch.equal(dict(weights(layer))["weight"], layer.weight)


class Split:
    """A parameter of which each process holds a part."""

    device_mesh = SimpleNamespace(device_type="cpu")

    def to(self, device):
        self.device = device
        return self

    def full_tensor(self):
        return self.device


def test_what_processes_hold_in_parts_is_gathered_where_they_can_talk(monkeypatch):
    whole = torch.ones(2)
    assert gathered(whole) is whole and gathered(Split()) == "cpu"
    assert not is_tensor_parallel(nn.Linear(2, 2)) and not is_sharded(nn.Linear(2, 2))
    layer = nn.Linear(2, 2)
    layer.weight.full_tensor = lambda: None
    assert is_tensor_parallel(layer)
    monkeypatch.setattr(wrappers, "_fsdp_module", lambda: nn.Linear)
    assert is_sharded(layer) and not is_tensor_parallel(layer)  # whose parameters are gathered before it is called


def test_precision_is_switched_as_it_was():
    with torch.autocast("cpu", torch.float16):
        precision = Precision()
        with precision.off():
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16), precision.on():
        assert torch.get_autocast_dtype("cpu") == torch.float16
    with precision.on():
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    with Precision().on():
        assert not torch.is_autocast_enabled("cpu")
