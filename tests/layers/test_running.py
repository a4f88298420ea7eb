"""How a model is run."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BatchEncoding

from lora_init import LoraInitError
from lora_init.layers.running import (
    call_model,
    check_batches,
    disabled,
    evaluating,
    naming_strange_tokens,
    on_device_of,
    restoring,
)
from tests.conftest import refused, tiny_llama, tiny_t5


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


class Recorder(nn.Module):
    """A model that keeps what it is called with."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x=None, labels=None, use_cache=None):
        self.seen = {"x": x, "labels": labels, "use_cache": use_cache}


class Loose(Recorder):
    def forward(self, **inputs):
        self.seen = inputs


X, Y = torch.ones(1, 2), torch.zeros(1, 2)


@pytest.mark.parametrize(("model", "batch", "seen"), [
    (Recorder, {"x": X}, {"x": X, "labels": None, "use_cache": False}),
    (Recorder, {"x": X, "labels": Y, "use_cache": True}, {"x": X, "labels": Y, "use_cache": True}),  # its own
    (Recorder, (X, Y), {"x": X, "labels": Y, "use_cache": None}),
    (Recorder, [X], {"x": X, "labels": None, "use_cache": None}),
    (Recorder, X, {"x": X, "labels": None, "use_cache": None}),
    (Recorder, [[1.0]], {"x": [1.0], "labels": None, "use_cache": None}),  # who knows what somebody's own model takes
    (Recorder, [{"x": X}], {"x": {"x": X}, "labels": None, "use_cache": None}),
    (Loose, {"x": X, "other": Y, "labels": Y}, {"x": X, "other": Y}),
])  # fmt: skip
def test_what_a_model_is_called_with(model, batch, seen):
    made = model()
    call_model(made, batch)
    assert repr(made.seen) == repr(seen)


def test_labels_reach_a_loss_and_a_decoder_that_has_no_other_inputs():
    ids = torch.tensor([[3, 4, 5]])
    batch = {"input_ids": ids, "labels": ids}
    llama, t5 = tiny_llama(), tiny_t5()
    assert call_model(llama, batch).loss is None and call_model(llama, batch, with_labels=True).loss is not None
    assert call_model(t5, batch).loss is not None and [*batch] == ["input_ids", "labels"]
    for inputs in ({"decoder_input_ids": ids}, {"decoder_inputs_embeds": torch.ones(1, 3, 32)}):
        assert call_model(t5, batch | inputs).loss is None


IDS = torch.tensor([[3, 4, 5]])


@pytest.mark.parametrize(("batch", "message"), [
    (3, "^the batch holds no input of LlamaForCausalLM. Check its columns, or the collator.$"),
    ("text", "^the batch holds no input of LlamaForCausalLM"),
    ([{"input_ids": IDS}], "^a batch is a list of batches. Pass all of them in one list.$"),
    ({"input_ids": [[3, 4]]}, "^the batch has a list of 'input_ids', expected a tensor: return_tensors='pt'.$"),
    ({"input_ids": IDS, "attention_mask": [[1]]}, "^the batch has a list of 'attention_mask', expected a tensor"),
    ({"input_ids": IDS.float()}, r"^input_ids of the batch are torch.float32 \[1, 3\], expected whole numbers "
     r"\[batch, length\] in int64.$"),
    ({"input_ids": IDS.short()}, r"^input_ids of the batch are torch.int16 \[1, 3\]"),
    ({"input_ids": IDS[0]}, r"^input_ids of the batch are torch.int64 \[3\]"),
    ({"input_ids": IDS[:, :0]}, r"^input_ids of the batch are torch.int64 \[1, 0\]"),
    ({"input_ids": np.array([[3, 4]])}, "^input_ids of the batch are ndarray, expected whole numbers"),
])  # fmt: skip
def test_a_batch_that_is_no_input_is_one_line(batch, message):
    refused(message, call_model, tiny_llama(), batch)


def test_keywords_that_a_model_does_not_take_are_named():
    words = "^the batch has 'y', 'z', which Recorder.forward does not take. Leave them out, or pass forward=.$"
    refused(words, call_model, Recorder(), {"x": X, "y": Y, "z": Y})
    assert call_model(tiny_llama(), {"input_ids": IDS.int()}).logits.shape == (1, 3, 64)


def test_a_model_takes_any_keywords_where_one_of_its_parameters_does():
    class Open(Recorder):
        def forward(self, x=None, **others):
            self.seen = others

    model = Open()
    call_model(model, {"x": X, "y": Y})
    assert [*model.seen] == ["y"]


@pytest.mark.parametrize(("labels", "got"), [
    (IDS[:, :2], r"torch.int64 \[1, 2\]"), (IDS.int(), r"torch.int32 \[1, 3\]"), (IDS[0], r"torch.int64 \[3\]"),
])  # fmt: skip
def test_labels_that_are_none_of_each_token_are_one_line(labels, got):
    words = rf"^labels of the batch are {got}, expected \[1, 3\] as input_ids, in int64\.$"
    refused(words, call_model, tiny_llama(), {"input_ids": IDS, "labels": labels}, with_labels=True)
    refused(words, call_model, OwnLoss(), {"input_ids": IDS, "labels": labels}, with_labels=True)


def test_labels_of_the_last_tokens_go_with_logits_of_these_alone():
    batch = {"input_ids": IDS, "labels": IDS[:, 1:], "logits_to_keep": 2}
    assert call_model(tiny_llama(), batch, with_labels=True).logits.shape == (1, 2, 64)


class OwnLoss(nn.Module):
    """A user's own model, which may take other labels, and raises for these."""

    loss_type = "ForCausalLM"

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, input_ids, labels):
        raise ValueError("labels")


def test_what_a_users_own_model_raises_passes_where_its_labels_are_of_tokens():
    with pytest.raises(ValueError, match="labels"):
        call_model(OwnLoss(), {"input_ids": IDS, "labels": IDS}, with_labels=True)


@pytest.mark.parametrize("merged", [0, 1])
def test_an_adapter_of_which_a_layer_is_merged_cannot_be_left_out(merged):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].merged, model[1].merged = merged == 0, merged == 1
    with (
        pytest.raises(
            LoraInitError, match=r"^the adapter is merged into the base .* Call unmerge_adapter\(\) first\.$"
        ),
        disabled(model),
    ):
        pass


@pytest.mark.parametrize(("batches", "got"), [
    (["a text"], "texts"),
    (("a text",), "texts"),
    ([3, 4], "a list"),
    ([0.5], "a list"),
    ("a text", "a str"),
    (Path("rows.jsonl"), "a PosixPath"),
    ({"input_ids": IDS}, "a dict"),
    (IDS, "a Tensor"),
    (nn.Linear(2, 2), "a Linear"),
    (pd.DataFrame({"text": ["a"]}), "a DataFrame"),
    (None, "a NoneType"),
    (3, "a int"),
])  # fmt: skip
def test_what_is_no_list_of_batches_is_refused(batches, got):
    words = (
        rf"^collect\(\) got {got} for the batches, expected an iterable of batches. Make them of texts and files with "
    )
    refused(words, check_batches, batches, "collect()")


@pytest.mark.parametrize("batches", [[], (), [IDS], [{"input_ids": IDS}], iter([IDS]), (IDS for _ in range(2)), [None]])
def test_anything_that_yields_batches_will_do(batches):
    check_batches(batches, "collect()")


def test_a_strange_token_is_named_by_its_batch():
    words = "^batch 3: index out of range in self. Has it a token or a label that is not in the model's vocabulary.$"

    def run():
        with naming_strange_tokens("batch 3"):
            nn.Embedding(4, 2)(torch.tensor([7]))

    refused(words, run)
    with pytest.raises(KeyError), naming_strange_tokens("batch 3"):
        raise KeyError


class Held:
    def method(self):
        return 1


def test_what_was_changed_is_restored_whatever_raises():
    """A method that an object hides is uncovered; one that it has of its own comes back."""
    plain, own, model = Held(), Held(), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    own.method = "its own"
    with pytest.raises(KeyError), restoring("method", [plain, own]):
        plain.method = own.method = "hidden"
        raise KeyError
    assert "method" not in vars(plain) and plain.method() == 1 and own.method == "its own"
    model.train()
    model[1].eval()
    model[0].support_avx512bf16_for_cpu = True
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert model[0].support_avx512bf16_for_cpu is False and not hasattr(model[1], "support_avx512bf16_for_cpu")
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]
    assert model[0].support_avx512bf16_for_cpu is True


def test_a_batch_goes_where_the_weights_are_unless_all_are_elsewhere():
    batch = {"input_ids": IDS, "about": "text"}
    moved = on_device_of(nn.Linear(2, 2), batch)
    assert moved == batch and moved is not batch
    with torch.device("meta"):
        away = nn.Linear(2, 2)
    assert on_device_of(away, batch) is batch
    half = nn.Sequential(away, nn.Linear(2, 2))
    assert on_device_of(half, [IDS])[0].device.type == "cpu"
