"""One run: it learns, it repeats, and it says when it diverges."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from lora_init.comparison.tasks import load_task
from lora_init.comparison.training import peak_bytes, reset_peak, schedule, train
from tests.comparisons import make_home
from tests.conftest import tiny_llama


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    home = make_home(tmp_path_factory.mktemp("training"))
    tokenizer = AutoTokenizer.from_pretrained(home / "llama")
    return load_task(home / "rows.jsonl", tokenizer, template="{passage}", options="options", validation_samples=12)


def run(task, seed=0, steps=8, rate=1e-2, points=(0, 4, 8), model=None, **options):
    if model is None:
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
    order = task.order(seed, steps, 4)
    settings = dict(learning_rate=rate, warmup=0.25, evaluation_points=points, seed=seed)
    return model, train(model, task, order, **settings | options)


def test_it_learns_and_measures(task):
    model, done = run(task)
    assert done.status == "finished" and done.reason is None
    assert done.evaluation_points == [0, 4, 8] and len(done.validation_loss) == 3 and len(done.training_loss) == 8
    assert done.validation_loss[-1] < done.validation_loss[0]
    assert set(done.metrics) == {"accuracy", "macro_f1", "mcc"}
    assert done.gradient_norm > 0 and done.seconds > 0
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" not in name)


def test_the_same_run_gives_the_same_numbers(task):
    (_, first), (_, again), (_, other) = run(task), run(task), run(task, seed=1)
    assert first.training_loss == again.training_loss and first.validation_loss == again.validation_loss
    assert first.data_order == again.data_order != other.data_order
    assert first.training_loss != other.training_loss


def test_the_state_of_the_random_numbers_does_not_matter(task):
    torch.manual_seed(1)
    torch.rand(3)
    model = tiny_llama(attention_dropout=0.5)
    pair = [get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear")) for _ in range(2)]
    pair[1].load_state_dict(pair[0].state_dict())
    _, first = run(task, model=pair[0])
    torch.rand(7)
    _, second = run(task, model=pair[1])
    assert first.training_loss == second.training_loss


def test_the_first_step_is_as_large_as_adamw_makes_it(task):
    """In its first step Adam moves every parameter that has a gradient by the rate."""
    model, _ = run(task, steps=1, rate=1e-3, points=(0, 1), warmup=0.0)
    b = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert torch.allclose(b.abs(), torch.full_like(b, 1e-3), rtol=1e-2)


def test_it_is_the_loop_that_one_would_write(task):
    """AdamW without decay, clipping to 1, a line up and a cosine down: the same weights."""
    model, _ = run(task)
    torch.manual_seed(0)
    plain = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear")).train()
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for step, items in enumerate(task.order(0, 8, 4)):
        factor = (step + 1) / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 6)) / 2
        optimizer.param_groups[0]["lr"] = 1e-2 * factor
        optimizer.zero_grad()
        plain(**task.batch(items)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    ours = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Only the logits of labelled positions are computed, in another order: rounding, which Adam carries on.
    for own, other in zip(ours, trained, strict=True):
        assert torch.allclose(own, other, atol=1e-4)


def test_the_gradient_norm_is_that_before_clipping(task):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
    batch = task.batch(task.order(0, 1, 4)[0])
    model(**batch).loss.backward()
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    expected = math.sqrt(float(sum(squares)))
    assert run(task)[1].gradient_norm == pytest.approx(expected, rel=1e-4)


def test_the_schedule():
    factors = [schedule(step, 40, 0.1) for step in range(40)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and factors[4] == 1.0
    assert factors[4:] == sorted(factors[4:], reverse=True) and 0 < factors[-1] < 0.01
    assert schedule(0, 1, 0.0) == 1.0


@pytest.mark.parametrize(("growth", "status"), [(0.0, "finished"), (100.0, "unstable")])
def test_a_diverging_run_is_unstable_and_ends(task, growth, status):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
    steps = []

    def drift(module, arguments, output):
        steps.extend([1] * module.training)
        output.logits = output.logits * (1.0 + growth * len(steps))
        return output

    model.base_model.model.register_forward_hook(drift)
    _, done = run(task, model=model, rate=1e-4, steps=40, points=(0, 40))
    assert done.status == status
    if status == "unstable":
        assert "training loss" in done.reason and "at 0" in done.reason and len(done.training_loss) < 40


def test_a_loss_that_is_not_finite_is_unstable_at_once(task):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
    calls = []

    def spoil(module, arguments, output):
        calls.append(1)
        if module.training and calls.count(1) > 3:
            output.logits.mul_(float("nan"))
        return output

    model.base_model.model.register_forward_hook(spoil)
    _, done = run(task, model=model)
    assert done.status == "unstable" and "nan" in done.reason
    assert len(done.training_loss) < 8 and done.evaluation_points == [0]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_peak_memory_is_that_since_the_reset():
    if not peak_bytes():
        pytest.skip("no peak on this system")
    reset_peak()
    before = peak_bytes()
    block = torch.ones(30_000_000)
    during = peak_bytes()
    del block
    reset_peak()
    # 120 MB; half of it leaves room for what else the process does.
    assert during - before > 60e6 and during - peak_bytes() > 60e6
