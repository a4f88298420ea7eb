"""What the base weights cannot give up is refused, before anything is changed."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import lora_init
from lora_init import build_adapter
from lora_init.starts.starts import find_start
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
