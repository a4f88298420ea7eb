"""What is different in trainers of TRL: answers by a mask of their own, and a head that a loss multiplies by."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from lora_init.trainers.trl import TRLIntegration, _check_head
from tests.conftest import refused, tiny_llama


@pytest.fixture
def integration():
    integration = object.__new__(TRLIntegration)
    integration.name = "OwnTrainer"
    return integration


def test_answers_that_a_mask_tells_are_labels_unless_there_are_labels(integration):
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[0, 1, 1], [1, 1, 0]])
    of_mask, plain = {"input_ids": ids, "completion_mask": mask}, {"input_ids": ids}
    labelled = of_mask | {"labels": ids}
    found, *others = integration.batches([of_mask, plain, labelled])
    assert found.pop("labels").tolist() == [[-100, 6, 7], [8, 9, -100]] and found.keys() == of_mask.keys()
    assert all(one is other for one, other in zip(others, (plain, labelled), strict=True))


@pytest.mark.parametrize("batch", [[1, 2], {"prompt": ["a text"]}, {}])
def test_a_batch_without_tokens_is_refused(batch, integration):
    words = "^OwnTrainer makes its batches of tokens while it trains, so there are none to learn from yet."
    refused(words, next, integration.batches([batch]))


class Fused(LlamaForCausalLM):
    """A model whose loss takes the weight of the head, as TRL patches it."""

    def forward(self, *args, fused_lm_head=None, **named):
        return super().forward(*args, **named)


@pytest.mark.parametrize("target_modules", [["lm_head"], "lm_head", ["q_proj", "lm_head"]])
def test_an_adapter_on_a_head_that_the_loss_multiplies_by_is_refused(target_modules):
    fused = Fused(tiny_llama().config)
    words = "^SFTTrainer computes its loss from the weight of the head alone, so that an adapter there would never be"
    refused(words, _check_head, fused, target_modules, "SFTTrainer")
    for model, targets in ((tiny_llama(), target_modules), (fused, ["q_proj"]), (fused, ()), (fused, "all-linear")):
        _check_head(model, targets, "SFTTrainer")


def test_a_head_is_known_by_what_it_is_and_not_by_its_name():
    fused = Fused(tiny_llama().config)
    fused.words, fused.lm_head = fused.lm_head, torch.nn.Linear(16, 16)
    fused.get_output_embeddings = lambda: fused.words
    refused("^OwnTrainer computes its loss from the weight of the head", _check_head, fused, ["words"], "OwnTrainer")
    _check_head(fused, ["lm_head"], "OwnTrainer")


def test_no_adapter_is_checked_on_a_head_where_one_is_there_already(integration, monkeypatch):
    """It has its layers."""
    monkeypatch.setattr("lora_init.trainers.trainers.TrainerIntegration.check", lambda self, config: None)
    config = SimpleNamespace(given={"target_modules": ["lm_head"]})
    integration.handle = SimpleNamespace(model=Fused(tiny_llama().config), wraps_anew=False)
    integration.check(config)
    integration.handle.wraps_anew = True
    refused("^OwnTrainer computes its loss from the weight of the head", integration.check, config)
