"""Rows reach the sink: the right ones, once, and the model is as before."""

import copy
import gc
import weakref
from contextlib import suppress

import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from lora_init import collect, find_targets
from lora_init.collection.activations import ActivationHooks, input_of
from lora_init.layers.masks import TokenMasks
from lora_init.layers.running import call_model
from tests.collection.made import recorded, run
from tests.conftest import MODELS, batches_for, refused, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5


def watched(model, targets="all-linear"):
    return {name: model.get_submodule(name) for name in find_targets(model, targets).layers}


def hooks_on(model, targets="all-linear", token_mask="attention"):
    return ActivationHooks(model, watched(model, targets), TokenMasks(model, token_mask))


def rows_of(model, batch, targets="all-linear", passes=1, token_mask="attention", forward=call_model):
    seen = {}
    with hooks_on(model, targets, token_mask) as hooks:
        for _ in range(passes):
            seen.clear()
            run(hooks, batch, lambda group, rows: seen.setdefault(group, []).append(rows.clone()), forward=forward)
    return {group: torch.cat(rows) for group, rows in seen.items()}, hooks


@pytest.mark.parametrize("name", sorted(MODELS))
def test_each_layer_gets_the_rows_that_a_plain_hook_sees_without_padding(name):
    model, batch = MODELS[name](), batches_for(name)[0]
    rows, hooks = rows_of(model, batch)
    assert set(hooks.group_of) == set(watched(model))
    for layer, group in hooks.group_of.items():
        x = recorded(model, batch, layer)
        mask = batch.get("attention_mask")
        if (
            name == "t5"
            and "decoder" in layer
            and "EncDecAttention.k" not in layer
            and "EncDecAttention.v" not in layer
        ):
            mask = batch["labels"] != -100
        expected = x[mask.bool()] if mask is not None and x.dim() == 3 else x.reshape(-1, x.shape[-1])
        torch.testing.assert_close(rows[group], expected)


def test_layers_that_read_one_tensor_form_one_group():
    _, hooks = rows_of(tiny_llama(), batches_for("llama")[0])
    block = "model.layers.0."
    for members in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
        assert {hooks.group_of[block + member] for member in members} == {block + members[0]}
    assert len(set(hooks.group_of.values())) == 2 * 4


def test_equal_values_in_two_tensors_are_two_groups():
    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            y = self.a(x) + self.b(x.clone())
            x += 1  # the same object, other values
            return y + self.c(x)

    _, hooks = rows_of(Copies(), torch.randn(5, 4))
    assert hooks.group_of == {"a": "a", "b": "b", "c": "c"}


@pytest.mark.parametrize("read", [lambda x: [x * 2], lambda x: [x, x * 2], lambda x: [x * 2, x]])
def test_layers_that_read_one_tensor_in_one_batch_and_two_in_another_are_refused(read):
    """Their rows would be mixed: what one of them read in the second batch, alone or too, would count for the other."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) + sum(map(self.b, [x] if len(x) > 3 else read(x)))

    long, short = torch.randn(5, 4), torch.randn(3, 4)
    said = "layers 'a' and 'b' read the same tensor in batches before, and not in this one"
    refused(said, collect, Gated(), [long, short], rank=1)
    if len(read(short)) == 1:  # negative: the other way round
        assert set(collect(Gated(), [short, long], rank=1).group_of.values()) == {"a", "b"}


def test_cross_attention_takes_the_encoders_mask_even_at_equal_lengths():
    model, batch = tiny_t5(), batches_for("t5", length=12)[0]
    batch["labels"] = torch.randint(3, 64, (4, 12))
    batch["labels"][:, 9:] = -100
    rows, hooks = rows_of(model, batch)
    n_encoder, n_decoder = int(batch["attention_mask"].sum()), 4 * 9
    assert n_encoder != n_decoder
    key = "decoder.block.1.layer.1.EncDecAttention.k"
    assert rows[hooks.group_of[key]].shape[0] == n_encoder
    assert hooks.group_of[key] == "decoder.block.0.layer.1.EncDecAttention.k"  # all read the encoder's output
    assert rows["decoder.block.0.layer.1.EncDecAttention.q"].shape[0] == n_decoder
    assert rows["encoder.block.0.layer.0.SelfAttention.q"].shape[0] == n_encoder


def test_token_mask_labels_keeps_only_labelled_tokens():
    batch = batches_for("llama")[0]
    batch["labels"][:, :4] = -100
    rows, _ = rows_of(tiny_llama(), batch, token_mask="labels")
    assert {r.shape[0] for r in rows.values()} == {int((batch["labels"] != -100).sum())}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_output_embedding_and_the_loss_never_run(name):
    model, batches = MODELS[name](), batches_for(name)
    calls = []
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: calls.append("lm_head"))
    model.loss_function = lambda *a, **k: calls.append("loss")
    rows_of(model, batches[0], passes=3)
    assert calls == []
    rows, _ = rows_of(model, batches[0], targets=r".*lm_head")
    assert "lm_head" in rows  # negative: as a target it runs
    assert calls == ["lm_head"]


def test_a_module_that_runs_twice_gives_all_its_rows():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(torch.relu(self.a(x)))

    rows, hooks = rows_of(Twice(), torch.randn(5, 4), passes=2)
    assert rows["a"].shape == (10, 4)
    assert "unused" not in hooks.group_of


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, None])
def test_hooks_modes_and_batches_are_as_before(error):
    model, batch = tiny_llama(), batches_for("llama")[0]
    model.train()
    model.model.layers[1].eval()  # a mode of its own
    modes = [module.training for module in model.modules()]
    other = model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda *_: None)
    kept = copy.deepcopy(batch)

    def sink(group, rows):
        if error is not None:
            raise error

    try:
        with hooks_on(model) as hooks:
            assert not model.training
            run(hooks, batch, sink)
    except (KeyboardInterrupt, ValueError) as raised:
        assert type(raised) is error
    assert [module.training for module in model.modules()] == modes
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == 1
    other.remove()
    assert torch.is_grad_enabled()
    assert batch.keys() == kept.keys()
    assert all(torch.equal(batch[key], kept[key]) for key in kept)


def test_no_activation_outlives_its_pass():
    model, batch = tiny_bert(), batches_for("bert")[0]
    kept = []
    with hooks_on(model) as hooks:
        run(hooks, batch, lambda group, rows: kept.append(weakref.ref(rows)))
        gc.collect()
        assert all(reference() is None for reference in kept)
    assert kept


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, None])
def test_nothing_is_known_of_a_batch_after_its_pass(error):
    """A later input of the same shape has no padding, whatever the batch before it had."""
    model, batch = tiny_t5(), batches_for("t5")[0]

    def sink(group, rows):
        if error is not None:
            raise error

    with hooks_on(model) as hooks:
        with suppress(KeyboardInterrupt, ValueError):
            run(hooks, batch, sink)
        for name in hooks.modules:
            assert hooks.masks.tokens(name, torch.zeros(4, 12, 32)) is None


def test_a_function_of_rows_takes_the_place_of_all_masks():
    """Also of those of single calls, of which one may keep no token."""
    model, ids, seen = tiny_gpt2(), batches_for("gpt2")[0]["input_ids"], {}

    def every_row(name, args, kwargs):
        return args[0].flatten(0, -2)

    masks = TokenMasks(model, "attention")
    with ActivationHooks(model, watched(model), masks, rows=every_row) as hooks:
        for batch in ({"text": ids}, {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}):
            run(hooks, batch, lambda group, rows: seen.update({group: len(rows)}), forward=lambda m, b: m(
                input_ids=ids, attention_mask=torch.zeros_like(ids)))  # fmt: skip
            assert seen == dict.fromkeys(watched(model), ids.numel())
            seen.clear()


def masked_calls(model, batch):
    """Run the model on two texts of a batch, each with a mask of its own."""
    return [model(input_ids=batch[name], attention_mask=batch[f"{name} mask"]) for name in ("chosen", "rejected")]


@pytest.mark.parametrize("of_batch", [False, True])
def test_each_call_of_a_batch_has_its_mask_unless_the_batch_has_one(of_batch):
    ids, mask = torch.full((4, 6), 5), (torch.arange(6) < torch.tensor([[1], [2], [3], [4]])).long()
    batch = {"chosen": ids, "rejected": ids, "chosen mask": mask, "rejected mask": 1 - mask}
    if of_batch:
        batch["attention_mask"] = mask
    rows, _ = rows_of(tiny_bert(None), batch, r".*query", forward=masked_calls)
    assert {len(found) for found in rows.values()} == {20 if of_batch else 24}


@pytest.mark.parametrize("form", ["dict", "encoding", "tuple", "tensor", "forward"])
def test_batches_of_every_form(form):
    model, batch = tiny_gpt2(), batches_for("gpt2")[0]
    ids = batch["input_ids"]
    given, arguments = {
        "dict": (batch, {}),
        "encoding": (BatchEncoding(dict(batch)), {}),
        "tuple": ((ids,), {}),
        "tensor": (ids, {}),
        "forward": ({"text": ids}, {"forward": lambda m, b: m(input_ids=b["text"])}),
    }[form]
    rows, _ = rows_of(model, given, **arguments)
    masked = form in ("dict", "encoding")
    n = int(batch["attention_mask"].sum()) if masked else ids.numel()
    assert {r.shape[0] for r in rows.values()} == {n}


def test_somebody_elses_forward_pass_is_not_touched():
    model, batch = tiny_llama(), batches_for("llama")[0]
    seen = []
    with hooks_on(model) as hooks, torch.no_grad():
        run(hooks, batch, lambda group, rows: seen.append(group))
        n_seen = len(seen)
        assert model(**batch).logits.shape == (4, 12, 64)
    assert len(seen) == n_seen == 8


def test_the_input_of_a_layer_is_its_first_argument_or_the_first_tensor_that_is_named():
    x, other = torch.ones(2), torch.zeros(2)
    assert input_of("a", (x, other), {"scale": other}) is x
    assert input_of("a", (), {"scale": 2.0, "x": x, "more": other}) is x
    for args, named, kind in (
        (([1.0],), {"x": x}, "list"),
        ((None, x), {}, "NoneType"),
        ((), {"scale": 2}, "NoneType"),
    ):
        refused(f"layer 'a': input of type {kind}, expected a tensor. Exclude this layer", input_of, "a", args, named)
