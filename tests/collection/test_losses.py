"""The loss of a batch is what transformers computes, and labels are counted as it averages them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from lora_init import collect, mean_loss
from lora_init.collection.losses import (
    EVALUATION_BATCH,
    batch_loss,
    class_logits,
    count_labels,
    own_loss,
    sequence_losses,
    text_loss,
    token_losses,
)
from lora_init.loading.batches import pad_batch
from tests.conftest import batches_for, refused, tiny_bert, tiny_gpt2, tiny_llama


def answered():
    """Prompts of six tokens with answers of two, which alone have labels."""
    return pad_batch([([5, 6, 7, 8, 9, i, 7, 8], [-100] * 6 + [7, 8]) for i in range(10, 14)], 0)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_loss_is_that_of_transformers(make):
    # float32, sums of a few hundred terms in another order
    model = make()
    for text in [answered(), *batches_for("llama", n_batches=2)]:
        assert batch_loss(model, text).item() == pytest.approx(float(model(**text).loss), rel=1e-5)


def test_the_loss_of_a_classifier_is_that_of_transformers():
    model = tiny_bert()
    batch = {**batches_for("bert", n_batches=1)[0], "labels": torch.tensor([0, 1, 1, 0])}
    assert float(batch_loss(model, batch)) == pytest.approx(float(model(**batch).loss), rel=1e-5)


@pytest.mark.parametrize(("labels", "loss_type", "count"), [
    (torch.tensor([[5, 5, -100], [-100, 5, 5]]), "ForCausalLM", 3),
    (torch.tensor([[5, 5, -100], [-100, 5, 5]]), None, 3),
    (torch.tensor([[5, 5, -100], [-100, 5, 5]]), "ForMaskedLM", 4),
    (torch.tensor([1, 0, 1, -100]), "ForSequenceClassification", 3), (torch.tensor([[5, -100, 5]]), "ForCausalLM", 1),
])  # fmt: skip
def test_labels_are_counted_as_the_loss_averages_them(labels, loss_type, count):
    model = nn.Linear(2, 2)
    model.loss_type = loss_type
    model.get_output_embeddings = lambda: model
    assert count_labels(model, {"labels": labels}) == count


def test_without_labels_examples_are_counted():
    model = nn.Linear(2, 2)
    assert count_labels(model, torch.ones(5, 2)) == 5
    assert count_labels(model, (torch.ones(4, 2), 3)) == 4
    assert count_labels(model, {"x": torch.ones(3, 2)}) == 3
    assert count_labels(model, {"scale": torch.tensor(7.0), "n": 7, "x": torch.ones(3, 2)}) == 3
    for nothing_with_rows in ({"n": 7}, torch.tensor(7.0), [], "text"):
        assert count_labels(model, nothing_with_rows) == 1


def test_the_loss_of_an_output_is_its_own_or_none():
    assert own_loss({"loss": 2.0}) == own_loss(SimpleNamespace(loss=2.0)) == 2.0
    assert own_loss({"logits": 2.0}) is own_loss(SimpleNamespace(logits=2.0)) is own_loss((2.0,)) is None


def by_hand(model, ids, labels):
    """The losses of the labelled tokens of a row, one by one, from all logits of the row alone, in float64."""
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].float().double().log_softmax(-1)
    return [-float(scores[i - 1, label]) for i, label in enumerate(labels) if i and label != -100]


def sequences(n=EVALUATION_BATCH + 5):
    """Of different lengths, in no order; labels begin anywhere, also at the first token, and have gaps."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 64, (4 + (7 * i) % 11,), generator=generator).tolist() for i in range(n)]
    return [(ids, [-100 if (i + j) % 3 == 0 or j < i % 4 else one for j, one in enumerate(ids)]) for i, ids in
            enumerate(drawn)]  # fmt: skip


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_sequence_has_its_own_loss_whatever_is_beside_it_and_in_which_order(make):
    model = make().train()  # with dropout, as in GPT-2: losses are of the model at rest
    found = sequence_losses(model, sequences(), padding=0)
    assert all(module.training for module in model.modules())
    model.eval()
    for (loss, count), (ids, labels) in zip(found, sequences(), strict=True):
        expected = by_hand(model, ids, labels)
        assert count == len(expected) and loss == pytest.approx(sum(expected), rel=1e-4)


def test_the_loss_of_texts_is_a_mean_over_their_tokens_and_not_over_batches():
    model, rows = tiny_llama().train(), sequences(7)
    batches = [pad_batch(rows[:1], 0), pad_batch(rows[1:], 0)]
    losses = [loss for row in rows for loss in by_hand(model, *row)]
    assert text_loss(model, batches) == pytest.approx(sum(losses) / len(losses), rel=1e-5) and model.training


def test_losses_of_a_model_in_16_bits_are_in_32():
    """Summed in 16 bits, a thousand tokens would have two digits."""
    model, batch = tiny_llama(initializer_range=0.3).bfloat16(), pad_batch(sequences(4), 0)
    losses, labelled = token_losses(model, batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    targets = batch["labels"][:, 1:]
    expected = nn.functional.cross_entropy(logits.mT, targets, reduction="none")[:, -losses.shape[1] :]
    assert losses.dtype == torch.float32 and torch.equal(labelled, targets[:, -losses.shape[1] :] != -100)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)


class Yes(LlamaForCausalLM):
    """A language model of one's own that answers with yes (token 3) or no (token 4)."""

    def forward(self, input_ids=None, labels=None, **options):
        last = super().forward(input_ids, **options).logits[:, -1, 3:5]
        if labels.is_floating_point():
            return CausalLMOutput(loss=nn.functional.mse_loss(last.softmax(-1)[:, 0], labels))
        return CausalLMOutput(loss=nn.functional.cross_entropy(last, labels))


@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), torch.tensor([0.2, 0.9])])
def test_a_language_model_of_ones_own_takes_what_labels_it_has(labels):
    torch.manual_seed(0)
    model, batch = Yes(tiny_llama().config).eval(), {"input_ids": torch.arange(12).reshape(2, 6), "labels": labels}
    assert mean_loss(model, [batch]) == model(**batch).loss.item()
    stats = collect(model, [batch], ["q_proj"], rank=16, gradients=True)
    model(**batch).loss.backward()
    for name in stats:  # of one batch: the gradient of the weight
        found, exact = stats.gradient(name), model.get_submodule(name).weight.grad.double()
        mean = found.left.double().T @ torch.diag(found.singular_values) @ found.right.double()
        torch.testing.assert_close(mean, exact, rtol=0.0, atol=1e-5 * float(exact.norm()))


def test_a_mean_loss_counts_each_batch_once_and_passes_over_those_without_a_label():
    model, (one, other, none) = tiny_llama().train(), batches_for("llama", n_batches=3)
    none["labels"] = torch.full_like(none["labels"], -100)
    expected = (mean_loss(model, [one]) + mean_loss(model, [other])) / 2
    assert mean_loss(model, [one, none, other]) == pytest.approx(expected, rel=1e-6) and model.training
    refused("there is no batch with a label to measure the loss on", mean_loss, model, [none])
    refused("there is no batch with a label to measure the loss on", mean_loss, model, [])
    refused(r"mean_loss\(\) takes a model in this place and got list", mean_loss, [one], model)
    refused(
        "a batch has no labels, so its loss is unknown", mean_loss, tiny_bert(None), [{"input_ids": one["input_ids"]}]
    )
    short = one | {"attention_mask": torch.ones_like(one["input_ids"])[:, 1:]}
    refused("Both need one entry for each token", mean_loss, model, [short])


def test_a_mean_loss_may_be_of_ones_own_forward_pass_and_loss():
    model, batches = nn.Linear(2, 2), [torch.ones(3, 2), torch.zeros(1, 2)]
    assert mean_loss(model, batches, loss=lambda output, batch: (output * 0).sum() + len(batch)) == 2.0
    found = mean_loss(model, batches, lambda model, batch: {"loss": batch.sum()})
    assert found == 3.0
    assert mean_loss(model, batches, lambda model, batch: batch.sum(), lambda output, batch: output + len(batch)) == 5.0
    refused("^mean_loss\\(\\) got texts for the batches", mean_loss, model, ["text"])


def test_losses_are_measured_without_gradients():
    model, batch, seen = tiny_llama(), answered(), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    mean_loss(model, [batch]), text_loss(model, [batch]), sequence_losses(model, sequences(2), 0)
    assert seen == [False] * 3
    batch_loss(model, batch)  # which trainings differentiate
    assert seen[3:] == [True]


def test_a_strange_token_is_named_by_the_number_of_its_batch():
    batches = [{"input_ids": torch.full((1, 4), n), "labels": torch.full((1, 4), 3)} for n in (5, 6, 999)]
    refused("^batch 2: index out of range in self. Has it a token or a label", mean_loss, tiny_llama(), batches)


@pytest.mark.parametrize("order", [1, -1])
def test_the_first_label_of_any_row_is_predicted(order):
    ids = [5, 6, 7, 8, 9, 10]
    rows = [(ids, [-100] * first + ids[first:]) for first in (5, 3, 4)][::order]
    model, batch = tiny_llama(), pad_batch(rows, 0)
    assert batch_loss(model, batch).item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert token_losses(model, batch)[1].sum() == 6


def test_only_the_logits_that_predict_a_label_are_computed():
    model, batch, seen = tiny_llama(), answered(), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    losses, labelled = token_losses(model, batch)
    # The answer is of the last two of eight tokens, so the logits of the last three are needed.
    assert seen == [(4, 3, 64)] and losses.shape == (4, 2) and labelled.all()
    batch["labels"][:, :2] = 7  # labels from the first token on
    assert token_losses(model, batch)[0].shape == (4, 7)
    assert token_losses(model, batch)[1].tolist() == [[True] + [False] * 4 + [True] * 2] * 4


def test_the_loss_of_a_head_with_classes_is_in_32_bits():
    model = tiny_bert().bfloat16()
    batch = {**batches_for("bert", n_batches=1)[0], "labels": torch.tensor([0, 1, 1, 0])}
    scores = class_logits(model, batch)
    assert scores.dtype == batch_loss(model, batch).dtype == torch.float32 and scores.shape == (4, 2)
