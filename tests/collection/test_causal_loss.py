"""The loss of a causal language model: transformers' number and gradient, from fewer logits."""

import pytest
import torch
from torch import nn

from lora_init.collection import backward as causal_loss
from lora_init.collection.backward import CausalLoss, linear_layers_by_onednn
from lora_init.collection.collect import collect
from lora_init.errors import LoraInitError
from tests.conftest import tiny_gpt2, tiny_llama, tiny_vit


def batch(n_answer=3, n=4, length=20):
    """Rows whose labels are their last tokens, which end at different places."""
    ids = torch.randint(0, 64, (n, length), generator=torch.Generator().manual_seed(n_answer))
    labels = ids.clone()
    for row in range(n):
        labels[row, : length - n_answer - row] = labels[row, length - row :] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradient(model, data):
    embedded = model.get_input_embeddings()(data["input_ids"]).detach().requires_grad_()
    rest = {key: value for key, value in data.items() if key != "input_ids"}
    loss = model(inputs_embeds=embedded, **rest).loss
    (loss * 7).backward()
    return loss.detach(), embedded.grad


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("block", [64, 2**20])
@pytest.mark.parametrize("onednn", [True, False])
def test_the_loss_is_that_of_transformers(monkeypatch, make, block, onednn):
    """Before and after it is known that logits may be left out, in blocks of one row and in one."""
    monkeypatch.setattr(causal_loss, "_BLOCK_ON_CPU", block)
    model, data = make(), batch()
    expected = loss_and_gradient(model, data)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape[:-1]))
    if onednn:
        linear_layers_by_onednn(model).__enter__()
    with CausalLoss(model) as loss:
        found = []
        for _ in range(2):
            loss.start(data)
            found.append(loss_and_gradient(model, data))
    for got in found:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert seen == [(4, 20), (1, 12)]  # three labels in each of four rows
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert model.loss_function.__name__ == "ForCausalLMLoss"


def test_logits_that_the_model_needs_for_their_gradient_are_left_alone():
    class Capped(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, x):
            return self.head(x).tanh()  # which keeps what it returns

    model, data = tiny_llama(), batch()
    model.lm_head = Capped(model.lm_head)
    expected = loss_and_gradient(model, data)
    with CausalLoss(model):
        torch.testing.assert_close(loss_and_gradient(model, data), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("times", [0, 2])
def test_a_model_that_makes_its_logits_in_another_way_makes_them_all(times):
    """Not by calling its output embedding, or twice, to predict further ahead."""
    model, data, seen = tiny_llama(), batch(), []
    head = model.lm_head

    class Wrapped(nn.Module):
        def forward(self, x):
            logits = nn.functional.linear(x, head.weight) if times == 0 else head(x)
            seen.append(len(logits))
            return logits if times < 2 else logits + head(x * 0.0)

    model.lm_head = Wrapped()
    model.get_output_embeddings = lambda: head
    expected = loss_and_gradient(model, data)
    with CausalLoss(model) as loss:
        for _ in range(2):
            loss.start(data)
            torch.testing.assert_close(loss_and_gradient(model, data), expected, rtol=1e-5, atol=1e-6)
    assert seen == [4, 4, 4]


def test_what_trainers_pass_along_goes_to_the_loss_of_transformers():
    model, data = tiny_llama(), batch()
    expected = model(**data, num_items_in_batch=5).loss
    with CausalLoss(model):
        torch.testing.assert_close(model(**data, num_items_in_batch=5).loss, expected)


def test_a_later_batch_without_labels_is_said():
    data = batch()
    with pytest.raises(LoraInitError, match="batch 1: the batch has 'input_ids' and no 'labels'"):
        collect(tiny_llama(), [data, {"input_ids": data["input_ids"]}], rank=4, gradients=True)


@pytest.mark.parametrize("change", ["another loss", "whole", "not a language model"])
def test_other_models_make_all_their_logits(change):
    model = tiny_vit() if change == "not a language model" else tiny_llama()
    if change == "another loss":
        model.loss_function = lambda logits, labels, **options: logits.square().mean()
    before = model.loss_function
    seen = []
    if change != "not a language model":
        model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[:-1]))
    with CausalLoss(model, whole=change == "whole") as loss:
        for _ in range(2):
            loss.start(batch())
            if change != "not a language model":
                loss_and_gradient(model, batch())
    assert set(seen) <= {(4, 20)}
    assert model.loss_function == before


def test_collect_makes_few_logits_and_all_where_somebody_may_look_at_them():
    model, data, seen = tiny_llama(), [batch(n_answer) for n_answer in (3, 4, 5)], []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output[..., 0].numel()))

    def logits_per_batch(**options):
        seen.clear()
        stats = collect(model, data, rank=4, gradients=True, **options)
        return list(seen), stats

    few, stats = logits_per_batch()
    assert few == [80, 16, 20]
    for options in (
        {"loss": lambda output, batch: output.loss},
        {"forward": lambda model, batch: model(**batch)},
        {"target_modules": ["q_proj", "lm_head"]},
    ):
        whole, other = logits_per_batch(**options)
        assert whole == [80, 80, 80]
        name = "model.layers.0.self_attn.q_proj"
        a, b = stats.gradient(name), other.gradient(name)
        torch.testing.assert_close(a.singular_values[:4], b.singular_values[:4], rtol=1e-3, atol=0.0)
        assert a.weighted.total_variance == pytest.approx(b.weighted.total_variance, rel=1e-4)
