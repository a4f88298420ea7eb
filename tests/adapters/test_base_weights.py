"""What the base weights cannot give up is refused, before anything is changed."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch import nn

import lora_init
from lora_init import build_adapter
from lora_init.adapters.base_weights import check_correctable, correct_outputs, correct_weights
from lora_init.starts.starts import find_start
from lora_init.starts.weights import LoraWeights
from tests.adapters.made import made_up_statistics
from tests.conftest import refused, tiny_gpt2, tiny_llama

Q = "model.layers.0.self_attn.q_proj"


def test_a_start_of_another_model_is_refused_by_its_first_layer(tmp_path):
    """Statistics without a fingerprint, as older ones are: the names of the layers tell."""
    build_adapter(made_up_statistics(tiny_llama(), ["q_proj"]), 2).save_pretrained(tmp_path / "start")
    model = tiny_gpt2()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    words = f"^GPT2LMHeadModel has no layer '{Q}'. Give the base of this adapter.$"
    refused(words, lora_init.correct_base, model, tmp_path / "start")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("as_parameter", [True, False])
def test_integers_give_up_nothing(as_parameter):
    model = tiny_llama()
    init = build_adapter(made_up_statistics(model, ["q_proj"]), 2)
    init = replace(init, start=find_start("lora-ga"))
    layer, integers = model.get_submodule(Q), torch.ones(32, 32, dtype=torch.int8)
    if as_parameter:
        layer.weight = nn.Parameter(integers, requires_grad=False)
    else:  # numbers that could be changed, but in a tensor that the layer computes anew each time, say
        del layer.weight
        layer.weight = torch.ones(32, 32)
    refused(f"^layer '{Q}' is quantized, so .* or pass correct_base=False to apply", init.apply, model)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("where", ["offloaded", "sharded"])
def test_a_weight_that_is_not_here_whole_gives_up_nothing(where):
    model = tiny_llama()
    init = replace(build_adapter(made_up_statistics(model, ["q_proj"]), 2), start=find_start("lora-ga"))
    layer = model.get_submodule(Q)
    if where == "offloaded":
        layer.to("meta")
    else:
        layer.weight.full_tensor = lambda: None  # as a DTensor has it
    refused(
        f"^layer '{Q}' is offloaded or sharded, so .* shard it afterwards.$", check_correctable, model, init.targets
    )


def test_a_tied_weight_gives_up_nothing_and_the_output_may():
    """The head's weight is the embedding's, which must stay."""
    model, batch = tiny_llama(tie_word_embeddings=True), {"input_ids": torch.arange(12).reshape(2, 6)}
    before, weight = model(**batch).logits, model.lm_head.weight.detach().clone()
    init = replace(build_adapter(made_up_statistics(model, ["lm_head"]), 2), start=find_start("lora-ga"))
    for pair in init.weights.values():
        pair.b.normal_()
    refused("^layer 'lm_head' shares its weight .* or pass correct_base=False to apply", init.apply, model)
    adapted = init.apply(model, correct_base=False)
    torch.testing.assert_close(adapted(**batch).logits, before, atol=1e-5, rtol=1e-4)
    assert torch.equal(model.get_input_embeddings().weight, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "name"), [(tiny_llama, Q), (tiny_gpt2, "transformer.h.0.attn.c_attn")])
def test_what_b_a_adds_is_taken_off_the_weight_or_off_the_output_in_its_own_type(make, name, dtype):
    """Off a weight in float32, rounded once; of transformers' Conv1D the weight is transposed."""
    model, others = make().to(dtype), make().to(dtype)
    layer, other = model.get_submodule(name), others.get_submodule(name)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 32).to(dtype)
    before, plain = layer(x), layer.weight.detach().float().clone()
    weights = {name: LoraWeights(torch.randn(2, 32), torch.randn(before.shape[-1], 2))}
    added = 0.5 * weights[name].b @ weights[name].a
    correct_weights(model, weights, 0.5)
    expected = plain - (added if make is tiny_llama else added.T)
    assert layer.weight.dtype == dtype and torch.equal(layer.weight, expected.to(dtype))
    correct_outputs(others, weights, 0.5)
    assert torch.equal(other.weight.float(), plain) and other(x).dtype == dtype
    exact = before.float() - x.float() @ added.T
    # A number of 16 bits is rounded three times: x A^T B^T, the output of the layer, and the difference.
    torch.testing.assert_close(other(x).float(), exact, rtol=0.0, atol=1e-4 if dtype == torch.float32 else 0.2)


def test_what_is_taken_off_stays_the_start_whatever_becomes_of_it():
    model, x = tiny_llama(), torch.randn(3, 32)
    weights = {Q: LoraWeights(torch.randn(2, 32), torch.randn(32, 2))}
    correct_outputs(model, weights, 1.0)
    before = model.get_submodule(Q)(x)
    for weight in weights[Q]:
        weight.zero_()
    assert torch.equal(model.get_submodule(Q)(x), before)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_corrected_base_with_its_start_computes_what_the_base_did(use_rslora, tmp_path):
    model = tiny_llama()
    tokens = {"input_ids": torch.arange(3, 15)[None]}
    stats = lora_init.collect(model, [tokens | {"labels": tokens["input_ids"]}], ["q_proj"], rank=4, gradients=True)
    start = build_adapter(stats, 2, "lora-ga", use_rslora=use_rslora).save_pretrained(tmp_path / "start")
    with torch.no_grad():
        before = model(**tokens).logits
        lora_init.correct_base(model, start)
        assert not torch.allclose(model(**tokens).logits, before, atol=1e-4)
        assert torch.allclose(PeftModel.from_pretrained(model, start)(**tokens).logits, before, atol=1e-5)
    refused(
        "^correct_base.. takes a model in this place and got its name, 'org/name'",
        lora_init.correct_base,
        "org/name",
        start,
    )
