"""Compiled, autocast, checkpointed, caching and packed models: the statistics are those of the plain model."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_init import ExactPCA, collect, find_targets, principal_angles
from lora_init.layers.identity import fingerprint
from lora_init.layers.wrappers import Precision, plain_names, unwrapped
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
