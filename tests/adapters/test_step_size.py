"""The size of a step: the best that a plain search finds, measured on the model that is then handed over."""

import pytest
import torch

import lora_init
from lora_init import find_step_size, mean_loss
from lora_init.adapters.build import build_adapter
from lora_init.adapters.step_size import set_aside
from lora_init.collection.collect import collect
from lora_init.errors import LoraInitError
from tests.collection.test_backward import labelled
from tests.conftest import tiny_llama

STEPS = ["lora-one", "natural-gradient-step"]


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model, batches = tiny_llama(), labelled("llama")
    return model, batches, collect(model, batches, rank=4, gradients=True)


def copied(model):
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("method", STEPS)
def test_no_other_power_of_two_is_better_and_the_losses_are_those_of_the_model(case, method):
    model, batches, stats = case
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def build(gamma):
        return build_adapter(stats, 4, method, gamma=gamma)

    def loss_with(gamma):
        return mean_loss(build(gamma).apply(copied(model)), batches)

    found = find_step_size(model, build, lambda m: mean_loss(m, batches))
    truth = {2.0**i: loss_with(2.0**i) for i in range(16)}
    assert found.gamma == min(truth, key=truth.get)
    plain = float(sum(model(**batch).loss.detach() for batch in batches) / len(batches))
    assert found.losses == pytest.approx((plain, truth[found.gamma]), rel=1e-5) and found.losses[1] < plain - 0.01
    assert f"loss {plain:.4g} -> {found.losses[1]:.4g}" in found.start_in_words()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    asked = find_step_size(model, build, lambda m: mean_loss(m, batches), gamma=3.0)
    assert asked.gamma == 3.0 and asked.losses[1] == pytest.approx(loss_with(3.0), rel=1e-5)


def test_a_step_that_never_helps_is_refused(case):
    model, _, stats = case

    def build(gamma):
        return build_adapter(stats, 4, "lora-one", gamma=gamma)

    with pytest.raises(LoraInitError, match=r"'lora-one': the loss is 1 for the plain model and 1 after the step"):
        find_step_size(model, build, lambda m: 1.0)
    with pytest.raises(LoraInitError, match="the loss is nan for the plain model"):
        find_step_size(model, build, lambda m: float("nan"))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_initialize_steps_and_sets_batches_aside_from_any_iterable(case, monkeypatch):
    model, batches, _ = case
    many = [*batches, *batches]
    seen = []
    monkeypatch.setattr(
        "lora_init.adapters.initialize.collect",
        lambda m, b, *rest, **named: collect(m, seen_by(b, seen), *rest, **named),
    )
    plain = mean_loss(model, batches)
    adapted = lora_init.initialize(copied(model), (batch for batch in many), rank=4, method="lora-one")
    assert [id(batch) for batch in seen] == [id(batch) for batch in many[4:]]
    assert mean_loss(adapted, batches) < plain


def seen_by(batches, seen):
    for batch in batches:
        seen.append(batch)
        yield batch


def test_few_batches_serve_for_both():
    with pytest.warns(UserWarning, match="only 3 batches, so the size of the step is chosen by the loss on those"):
        aside, others = set_aside(iter("abc"))
    assert aside == list(others) == ["a", "b", "c"]
    aside, others = set_aside("abcdef")
    assert aside == ["a", "b", "c", "d"] and list(others) == ["e", "f"]


def modes(model):
    return [module.training for module in model.modules()]


def test_the_mode_of_each_submodule_stays_as_it_was(case):
    """A part in evaluation mode inside a model in training mode, as a frozen encoder or a layer of statistics is."""
    model, batches, stats = case
    model = copied(model).train()
    model.model.layers[0].eval()
    before = modes(model)
    mean_loss(model, batches)
    assert modes(model) == before

    def loss_of(model):
        model.eval()  # a user's own function may do this
        return mean_loss(model, batches)

    find_step_size(model, lambda gamma: build_adapter(stats, 4, "lora-one", gamma=gamma), loss_of)
    assert modes(model) == before
    empty = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    assert mean_loss(model, [*batches, empty]) == mean_loss(model, batches)
    for nothing in ([], [empty]):
        with pytest.raises(LoraInitError, match="no batch with a label to measure the loss on"):
            mean_loss(model, nothing)
