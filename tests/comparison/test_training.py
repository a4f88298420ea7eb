"""One run learns, repeats, and says when it diverges; losses are those of transformers, metrics of scikit-learn."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lora_init.collection.losses import text_loss
from lora_init.comparison import training
from lora_init.comparison.tasks import LoadingOptions, load_task
from lora_init.comparison.training import REPLAYED, Training, evaluate, metrics, peak_bytes, reset_peak, train
from lora_init.loading.batches import pad_batch
from tests.conftest import batches_for, refused, tiny_llama


def read(home, model, samples, **options):
    asked = LoadingOptions(template="{passage}", selection_samples=4, report_samples=samples, **options)
    return load_task(home / "rows.jsonl", AutoTokenizer.from_pretrained(home / model), asked, 8)


@pytest.fixture(scope="module")
def task(home):
    return read(home, "llama", 12, options="options")


@pytest.fixture(scope="module")
def model(home):
    return AutoModelForCausalLM.from_pretrained(home / "llama").eval()


def with_adapter(model=None):
    torch.manual_seed(0)
    return get_peft_model(model or tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))


def run(task, seed=0, steps=8, rate=1e-2, points=(0, 4, 8), model=None, warmup=0.25, plain_loss=4.0, replay=()):
    model = model or with_adapter()
    training = Training(steps, 4, warmup, points)
    return model, train(model, task, training, learning_rate=rate, seed=seed, plain_loss=plain_loss, replay=replay)


def test_it_learns_and_measures(task):
    model, done = run(task)
    assert done.status == "finished" and done.error is None
    assert done.evaluation_points == [0, 4, 8] and len(done.report_loss) == 3 and len(done.training_loss) == 8
    assert done.report_loss[-1] < done.report_loss[0]
    assert set(done.metrics) == {"accuracy", "macro_f1", "mcc"}
    assert done.training_seconds > 0
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" not in name)


def test_the_same_run_gives_the_same_numbers(task):
    (_, first), (_, again), (_, other) = run(task), run(task), run(task, seed=1)
    assert first.training_loss == again.training_loss and first.report_loss == again.report_loss
    assert first.data_order == again.data_order != other.data_order
    assert first.training_loss != other.training_loss


def test_the_first_step_is_as_large_as_adamw_makes_it(task):
    """In its first step Adam moves every parameter that has a gradient by the rate."""
    model, _ = run(task, steps=1, rate=1e-3, points=(0, 1), warmup=0.0)
    b = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert torch.allclose(b.abs(), torch.full_like(b, 1e-3), rtol=1e-2)


@pytest.mark.parametrize("replays", [False, True])
def test_it_is_the_loop_that_one_would_write(task, replays):
    """AdamW without decay, clipping to 1, a line up and a cosine down, a text weighed beside each batch: the same."""
    texts = [task.batch(next(iter(task.order(7, 1, 4))))] * replays
    model, _ = run(task, replay=texts)
    plain = with_adapter().train()
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for step, items in enumerate(task.order(0, 8, 4)):
        factor = (step + 1) / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 6)) / 2
        optimizer.param_groups[0]["lr"] = 1e-2 * factor
        optimizer.zero_grad()
        plain(**task.batch(items)).loss.backward()
        for text in texts:
            (REPLAYED * plain(**text).loss).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    ours = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Only the logits of labelled positions are computed, in another order: rounding, which Adam carries on.
    for own, other in zip(ours, trained, strict=True):
        assert torch.allclose(own, other, atol=1e-4)


def test_the_schedule():
    factors = [Training(40, 4, 0.1, [0, 40]).factor(step) for step in range(40)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and factors[4] == 1.0
    assert factors[4:] == sorted(factors[4:], reverse=True) and 0 < factors[-1] < 0.01
    assert Training(1, 4, 0.0, [0, 1]).factor(0) == 1.0
    # To the nearest whole number: 0.29 x 100 is 28.999999999999996.
    for steps, warmup, n_warm in ((100, 0.29, 29), (100, 0.57, 57), (10, 0.26, 3), (10, 0.24, 2), (6, 0.05, 0)):
        factors = [Training(steps, 4, warmup, [0, steps]).factor(step) for step in range(steps)]
        assert factors.index(1.0) == max(0, n_warm - 1) and factors.count(1.0) == (2 if n_warm else 1)
    all_warm = Training(4, 4, 0.9, [0, 4])  # the scheduler asks once more, after the last step
    assert [all_warm.factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(("growth", "status"), [(0.0, "finished"), (100.0, "unstable")])
def test_a_diverging_run_is_unstable_and_ends(task, growth, status):
    model = with_adapter()
    steps = []

    def drift(module, arguments, output):
        steps.extend([1] * module.training)
        output.logits = output.logits * (1.0 + growth * len(steps))
        return output

    model.base_model.model.register_forward_hook(drift)
    _, done = run(task, model=model, rate=1e-4, steps=40, points=(0, 40))
    assert done.status == status
    if status == "unstable":
        assert "training loss" in done.error and "for the plain model" in done.error and len(done.training_loss) < 40


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_run_ends_before_a_step_that_would_write_nan(what, task):
    model, steps = with_adapter(), []

    def third(value):
        steps.append(1)
        return value * (math.nan if len(steps) == 3 else 1.0)

    def spoil(module, arguments, output):
        if module.training:
            output.logits = third(output.logits)

    if what == "gradient":
        next(parameter for parameter in model.parameters() if parameter.requires_grad).register_hook(third)
    else:
        model.base_model.model.register_forward_hook(spoil)
    _, done = run(task, model=model)
    assert done.status == "unstable" and len(done.training_loss) == 3 and done.evaluation_points == [0]
    assert done.error == f"loss {done.training_loss[-1]:.3g}, gradient nan in step 3" and done.selection_loss is None
    assert math.isnan(done.training_loss[-1]) == (what == "loss")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_where_the_system_does_not_say_the_peak_is_unknown(tmp_path, monkeypatch):
    reset_peak()
    assert peak_bytes() > 2**20 or not training._STATUS.exists()
    monkeypatch.setattr(training, "_STATUS", tmp_path / "none")
    reset_peak()
    assert peak_bytes() == 0
    for text, peak in (("Name:\tx\nVmHWM:\t   12 kB\nVmRSS:\t 3 kB\n", 12 * 1024), ("Name:\tx\n", 0)):
        monkeypatch.setattr(training, "_STATUS", tmp_path / "status")
        (tmp_path / "status").write_text(text)
        assert peak_bytes() == peak


@pytest.mark.parametrize(("options", "message"), [
    (dict(evaluation_points=[0, 5, 20, 10]), "expected rising steps from 0 to 10"),
    (dict(evaluation_points=[0, 20]), "expected rising steps from 0 to 10"),
    (dict(steps=0, evaluation_points=[0]), "expected rising steps"),
    (dict(evaluation_points=[5, 10]), r"evaluation_points=\[5, 10\]: expected rising steps from 0 to 10, the last."),
    (dict(evaluation_points=[0, 5, 5, 10]), "expected rising steps from 0 to 10"),
    (dict(evaluation_points=[0, 5]), "expected rising steps from 0 to 10"),
    (dict(warmup=1.0), "warmup=1.0: expected a share of the steps, at least 0 and less than 1."),
    (dict(warmup=-0.1), "warmup=-0.1: expected a share"),
    (dict(warmup="0.1"), "warmup='0.1': expected a share"),
])  # fmt: skip
def test_bad_settings(options, message):
    refused(message, Training, **dict(steps=10, batch_size=4, warmup=0.1, evaluation_points=[0, 10]) | options)


def test_options_are_scored_one_by_one(task, model):
    score = evaluate(model, task, task.report, with_metrics=True)
    expected, losses = [], []
    for item in task.report:
        of_item = []
        for choice in item.choices:
            batch = pad_batch([choice], task.padding)
            n = int((batch["labels"] != -100).sum())
            of_item.append((float(model(**batch).loss) * n, n))
        expected.append(int(np.argmin([loss for loss, _ in of_item])))
        losses.append(of_item[item.answer])
    truth = [item.answer for item in task.report]
    assert score.metrics["accuracy"] == accuracy_score(truth, expected)
    assert score.loss == pytest.approx(sum(a for a, _ in losses) / sum(n for _, n in losses), rel=1e-5)
    # With and without metrics the loss is the same thing, up to the rounding of other paddings.
    assert evaluate(model, task, task.report, with_metrics=False).loss == pytest.approx(score.loss, rel=1e-5)
    assert evaluate(model, task, task.report, with_metrics=False).metrics is None


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

    item = replace(task.report[0], choices=(([5, 6, 7], [-100, -100, 7]), ([5, 6, 9, 9], [-100, -100, 9, 9])), answer=0)
    small = replace(task, report=[item, item])
    assert evaluate(Even(), small, small.report, True).metrics["accuracy"] == 1.0
    assert evaluate(Even(), replace(small, normalize=True), small.report, True).metrics["accuracy"] == 0.0


def test_metrics_are_those_of_scikit_learn():
    truth, predicted = [0, 1, 2, 2, 1, 0, 0], [0, 2, 2, 2, 1, 1, 0]
    assert metrics(truth, predicted) == {
        "accuracy": accuracy_score(truth, predicted),
        "macro_f1": pytest.approx(f1_score(truth, predicted, average="macro")),
        "mcc": pytest.approx(matthews_corrcoef(truth, predicted)),
    }


def test_a_classifier_is_scored(home):
    task = read(home, "bert", 20, label="first")
    model = AutoModelForSequenceClassification.from_pretrained(
        home / "bert", num_labels=len(task.classes), ignore_mismatched_sizes=True
    ).eval()
    score = evaluate(model, task, task.report, True)
    batch = task.batch(task.report)
    output = model(**batch)
    assert score.loss == pytest.approx(float(output.loss), rel=1e-5)
    assert score.metrics["accuracy"] == accuracy_score(batch["labels"], output.logits.argmax(1))
    model.train()  # with dropout
    assert evaluate(model, task, task.report, True) == score and model.training


def test_evaluation_leaves_mode_and_weights(task, model):
    before = copy.deepcopy(model.state_dict())
    model.train()
    first = evaluate(model, task, task.report, True)
    assert model.training and evaluate(model, task, task.report, True) == first
    assert text_loss(model, batches_for("llama")) > 0 and model.training
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("report", "steps", "said"), [
    ([8.5], [99.0] * 4, None),  # four steps say nothing yet
    ([9.0, 8.5], [99.0, *[8.5] * 5], None),  # twice the plain model's and a half; the last five steps count
    ([8.6], [], "loss 8.6 after step 0, 4 for the plain model"),
    ([math.nan], [1.0], "loss nan after step 1, 4 for the plain model"),
    ([1.0], [8.5, 8.5, 8.5, 8.5, 9.0], "training loss 8.6 after step 5, 4 for the plain model"),
])  # fmt: skip
def test_a_run_has_diverged_above_twice_the_plain_loss_and_a_half(report, steps, said):
    result = training.TrainingResult(report_loss=report, training_loss=steps)
    assert training._diverged(result, 4.0) is (said is not None) and result.error == said


def test_each_step_is_told_and_what_ended_early_has_no_loss_to_select_by(task):
    steps, model = [], with_adapter()
    asked = dict(learning_rate=1e-3, seed=0, on_step=lambda: steps.append(model.training))
    done = train(model, task, Training(3, 4, 0.0, [0, 2, 3]), plain_loss=4.0, **asked)
    assert steps == [True] * 3 and done.evaluation_points == [0, 2, 3] and done.status == "finished"
    assert done.selection_loss == evaluate(model, task, task.selection).loss and len(done.data_order) == 32
    lost = train(with_adapter(), task, Training(3, 4, 0.0, [0, 2, 3]), plain_loss=-0.2, **asked)
    assert (lost.status, lost.selection_loss, lost.training_loss, lost.evaluation_points) == ("unstable", None, [], [0])
    assert lost.metrics is None and done.metrics == evaluate(model, task, task.report, True).metrics
    assert lost.error.startswith("loss ") and lost.error.endswith(" after step 0, -0.2 for the plain model")


def test_what_is_dropped_out_is_decided_by_the_seed_and_by_no_random_state_before(task):
    losses = []
    for seed, state in ((0, 1), (0, 2), (1, 2)):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "v_proj"]))
        torch.manual_seed(state)
        asked = dict(steps=2, points=(0, 2), rate=0.1, warmup=0.0)
        losses.append(run(replace(task, train=task.train[:4]), seed, model=model, **asked)[1].training_loss[1])
    assert losses[0] == losses[1] != losses[2]


def test_a_text_is_replayed_beside_each_step_and_again_when_all_were(task, monkeypatch):
    losses, seen = [], []

    def batch_loss(model, batch):
        loss = real(model, batch)
        losses.append(float(loss.detach()))
        seen.append(batch["input_ids"].tolist())
        return loss

    real = training.batch_loss
    monkeypatch.setattr(training, "batch_loss", batch_loss)
    texts = [task.batch([item]) for item in task.report[:3]]
    words, orders = [text["input_ids"].tolist() for text in texts], []
    for seed in range(4):
        seen.clear(), losses.clear()
        _, done = run(task, seed, steps=5, points=(0, 5), replay=texts)
        assert done.training_loss == losses[::2] and len(losses) == 10
        replayed = [words.index(ids) for ids in seen[1::2]]
        assert sorted(replayed[:3]) == [0, 1, 2] and replayed[3:] == replayed[:2]
        assert seen[::2] == [task.batch(items)["input_ids"].tolist() for items in task.order(seed, 5, 4)]
        orders.append(tuple(replayed))
    assert len(set(orders)) > 1


def test_a_run_whose_last_loss_is_far_above_the_plain_models_is_unstable(task, monkeypatch):
    losses = iter([1.0, 9.0])
    monkeypatch.setattr(training, "evaluate", lambda *_, **__: training.Score(next(losses), None))
    _, done = run(task, steps=2, points=(0, 2))
    assert (done.status, done.selection_loss, done.report_loss) == ("unstable", None, [1.0, 9.0])
    assert done.error == "loss 9 after step 2, 4 for the plain model"
