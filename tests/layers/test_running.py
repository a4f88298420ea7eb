"""How a model is run."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BatchEncoding

from lora_init.layers.running import call_model, disabled, on_device_of
from tests.conftest import refused, tiny_llama


def test_keys_and_values_are_kept_only_if_the_batch_asks_for_them():
    batch = {"input_ids": torch.tensor([[3, 4, 5]])}
    assert call_model(tiny_llama(), batch).past_key_values is None
    assert call_model(tiny_llama(), batch | {"use_cache": True}).past_key_values is not None


@pytest.mark.parametrize("batch", [None, {}, {"labels": torch.tensor([[3, 4, 5]])}])
def test_a_batch_without_inputs_is_refused(batch):
    refused("the batch holds no input of LlamaForCausalLM", call_model, tiny_llama(), batch)


def test_a_batch_that_moves_itself_stays_with_the_caller_as_it_is():
    class Moves(BatchEncoding):
        def to(self, device):
            self["input_ids"] = self["input_ids"] + 1
            return self

    batch = Moves({"input_ids": torch.tensor([[3, 4, 5]])})
    moved = on_device_of(tiny_llama(), batch)
    assert moved["input_ids"].tolist() == [[4, 5, 6]] and batch["input_ids"].tolist() == [[3, 4, 5]]


def test_a_batch_of_lists_is_refused():
    refused(r"a batch has lists, expected tensors: return_tensors='pt'", call_model, tiny_llama(), [[[3, 4], [5, 6]]])


def test_what_is_frozen_is_frozen_after_the_adapter_was_off():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_B." in name)
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with disabled(model):
        pass
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains
