"""Losses against transformers' own, metrics against scikit-learn and by hand."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_init.comparison.tasks import load_task
from lora_init.comparison.training import evaluate, metrics, text_loss, token_losses, training_loss
from lora_init.loading.batches import pad_batch
from tests.comparisons import make_home
from tests.conftest import batches_for, tiny_bert, tiny_gpt2, tiny_llama


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("scoring"))


@pytest.fixture(scope="module")
def task(home):
    tokenizer = AutoTokenizer.from_pretrained(home / "llama")
    return load_task(home / "rows.jsonl", tokenizer, template="{passage}", options="options", validation_samples=20)


@pytest.fixture(scope="module")
def model(home):
    return AutoModelForCausalLM.from_pretrained(home / "llama").eval()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_loss_is_that_of_transformers(make, task):
    # float32, sums of a few hundred terms in another order
    model = make()
    batch = task.batch(task.train[:6])
    assert float(training_loss(model, task, batch)) == pytest.approx(float(model(**batch).loss), rel=1e-5)
    for text in batches_for("llama", n_batches=2):
        losses, labelled = token_losses(model, text)
        assert float(losses.sum() / labelled.sum()) == pytest.approx(float(model(**text).loss), rel=1e-5)


def test_the_loss_of_a_classifier_is_that_of_transformers(home, task):
    model, labels = tiny_bert(), torch.tensor([0, 1, 1])
    batch = {**task.batch(task.train[:3]), "labels": labels}
    batch["input_ids"] = batch["input_ids"] % 64
    found = training_loss(model, replace(task, kind="classification"), batch)
    assert float(found) == pytest.approx(float(model(**batch).loss), rel=1e-5)


def test_options_are_scored_one_by_one(task, model):
    score = evaluate(model, task, with_metrics=True)
    expected, losses = [], []
    for item in task.validation:
        of_item = []
        for choice in item.choices:
            batch = pad_batch([choice], task.padding)
            n = int((batch["labels"] != -100).sum())
            of_item.append((float(model(**batch).loss) * n, n))
        expected.append(int(np.argmin([loss for loss, _ in of_item])))
        losses.append(of_item[item.answer])
    truth = [item.answer for item in task.validation]
    assert score.metrics["accuracy"] == accuracy_score(truth, expected)
    assert score.loss == pytest.approx(sum(a for a, _ in losses) / sum(n for _, n in losses), rel=1e-5)
    # With and without metrics the loss is the same thing, up to the rounding of other paddings.
    assert evaluate(model, task, with_metrics=False).loss == pytest.approx(score.loss, rel=1e-5)
    assert evaluate(model, task, with_metrics=False).metrics is None


def test_normalising_divides_by_the_number_of_tokens(task):
    """Option 0 has a lower loss in all, option 1 a lower one for each token."""

    class Even(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask, use_cache=None):
            logits = torch.zeros(*input_ids.shape, 64)
            logits[..., 9] = 1.0  # a little likelier than the rest
            return type("Output", (), {"logits": logits + self.weight})

    item = replace(
        task.validation[0], choices=(([5, 6, 7], [-100, -100, 7]), ([5, 6, 9, 9], [-100, -100, 9, 9])), answer=0
    )
    small = replace(task, validation=[item, item])
    assert evaluate(Even(), small, True).metrics["accuracy"] == 1.0
    assert evaluate(Even(), replace(small, normalize=True), True).metrics["accuracy"] == 0.0


def test_metrics_are_those_of_scikit_learn():
    truth, predicted = [0, 1, 2, 2, 1, 0, 0], [0, 2, 2, 2, 1, 1, 0]
    assert metrics(truth, predicted) == {
        "accuracy": accuracy_score(truth, predicted),
        "macro_f1": pytest.approx(f1_score(truth, predicted, average="macro")),
        "mcc": pytest.approx(matthews_corrcoef(truth, predicted)),
    }


def test_a_classifier_is_scored(home):
    tokenizer = AutoTokenizer.from_pretrained(home / "bert")
    task = load_task(home / "rows.jsonl", tokenizer, template="{passage}", label="first", validation_samples=20)
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        home / "bert", num_labels=len(task.classes), ignore_mismatched_sizes=True
    ).eval()
    score = evaluate(model, task, True)
    batch = task.batch(task.validation)
    output = model(**batch)
    assert score.loss == pytest.approx(float(output.loss), rel=1e-5)
    assert score.metrics["accuracy"] == accuracy_score(batch["labels"], output.logits.argmax(1))


def test_evaluation_leaves_mode_and_weights(task, model):
    before = copy.deepcopy(model.state_dict())
    model.train()
    first = evaluate(model, task, True)
    assert model.training and evaluate(model, task, True) == first
    assert text_loss(model, batches_for("llama")) > 0 and model.training
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
