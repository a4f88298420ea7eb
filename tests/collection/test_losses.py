"""The loss of a batch is what transformers computes, and labels are counted as it averages them."""

import pytest
import torch
from torch import nn

from lora_init.collection.losses import batch_loss, count_labels
from lora_init.loading.batches import pad_batch
from tests.conftest import batches_for, tiny_bert, tiny_gpt2, tiny_llama


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
    (torch.tensor([1, 0, 1, -100]), "ForSequenceClassification", 3),
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
