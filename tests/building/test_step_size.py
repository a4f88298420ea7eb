"""The size of a step: the best that a plain search finds, measured on the model that is then handed over."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_init
from lora_init import find_step_size, mean_loss
from lora_init.adapters.card import start_in_words
from lora_init.adapters.peft_model import adapter_layers
from lora_init.building.build import build_adapter
from lora_init.building.step_size import NoStepError, _lowest, hold_out, most_held_out, n_held_out
from lora_init.collection.collect import collect
from lora_init.errors import LoraInitError
from tests.collection.made import labelled
from tests.conftest import refused, tiny_llama

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
    assert f"loss {plain:.4g} -> {found.losses[1]:.4g}" in start_in_words(found)
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
    refused("the loss is nan for the plain model", find_step_size, model, build, lambda m: float("nan"))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_initialize_steps_and_sets_batches_aside_from_any_iterable(case, monkeypatch):
    model = case[0]
    many = [
        of(*[(7, 8, 9, 10, 11, i + k) for k in range(4)], width=6) for i in range(0, 64, 4)
    ]  # there is something to learn
    seen = []
    monkeypatch.setattr(
        "lora_init.building.pipeline.collect", lambda m, b, *rest, **named: collect(m, seen_by(b, seen), *rest, **named)
    )
    plain = mean_loss(model, many[:4])
    adapted = lora_init.initialize(copied(model), (batch for batch in many), rank=2, rho=1, method="lora-one")
    assert [id(batch) for batch in seen] == [id(batch) for batch in many[4 : 4 + len(seen)]] and len(seen) >= 8
    assert mean_loss(adapted, many[:4]) < plain


def seen_by(batches, seen):
    for batch in batches:
        seen.append(batch)
        yield batch


def of(*rows, width=3):
    """A batch of examples, each a list of tokens, padded with 0."""
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def rows_of(batches):
    return [tuple(row[kept.bool()].tolist()) for b in batches for row, kept in zip(*list(b.values())[:2], strict=True)]


def numbered(n, size=4):
    return [of(*[(1, i) for i in range(k, min(k + size, n))]) for k in range(0, n, size)]


@pytest.mark.parametrize(("n", "expected"), [(17, 4), (20, 4), (40, 8), (64, 16), (257, 16)])
def test_a_quarter_is_set_aside_until_it_is_sixteen(n, expected):
    with pytest.warns(UserWarning, match=f"on {expected} of {n} different") if expected < 16 else nullcontext():
        aside, others = hold_out(iter(numbered(n)))
    aside, others = rows_of(aside), rows_of(others)
    assert len(aside) == expected and aside + others == rows_of(numbered(n))


def test_no_example_is_on_both_sides_however_often_it_is_there():
    # 16 different ones, eight times each, padded in two ways
    batches = [of((1, i % 8), (2, i % 8), width=2 + i // 8 % 2) for i in range(64)]
    with pytest.warns(UserWarning, match="on 4 of 16 different examples"):
        aside, others = hold_out(batches)
    aside, others = rows_of(aside), rows_of(others)
    assert len(aside) == len(set(aside)) == 4 and len(others) == 12 * 8
    assert not set(aside) & set(others) and len(set(others)) == 12


def test_batches_without_rows_are_set_aside_whole():
    """Pictures cut into patches, say: not one for each example."""
    batches = [{"input_ids": torch.ones(2, 3), "pixel_values": torch.ones(7, 3)} for _ in range(40)]
    aside, others = hold_out(iter(batches))
    assert [id(one) for one in (*aside, *others)] == [id(one) for one in batches] and len(aside) == 4
    with pytest.warns(UserWarning, match="on 1 of 4 different examples"):
        aside, others = hold_out(batches[:1])
    assert aside == list(others) == batches[:1]
    assert hold_out([]) == ([], [])


def unmasked(*rows):
    return {"input_ids": torch.tensor(rows)}


def with_picture(*numbers):
    """Pictures of 2 x 2 numbers and a label each, so nothing that is text."""
    pixels = torch.tensor(numbers, dtype=torch.float32)[:, None, None].expand(-1, 2, 2)
    return {"pixel_values": pixels, "labels": torch.tensor([n % 2 for n in numbers])}


@pytest.mark.parametrize("make", [
    lambda i: unmasked((1, i), (2, i)), lambda i: with_picture(i, i + 8), lambda i: with_picture(i + 0.5, -i - 1),
    lambda i: unmasked((1, i), (2, i)) | {"attention_mask": torch.ones(2, 1, 2, 2)},  # one for each pair of tokens
    lambda i: {"input_values": torch.tensor([[1.0, i], [2.0, i]]), "attention_mask": torch.ones(2, 2)},  # of sound
])  # fmt: skip
def test_examples_without_a_mask_are_the_same_if_all_their_numbers_are(make):
    """16 different ones, four times each, in batches of two: none may be on both sides."""
    batches = [make(i % 8) for i in range(32)]
    first = next(iter(batches[0]))
    with pytest.warns(UserWarning, match="on 4 of 16 different examples"):
        aside, others = hold_out(iter(batches))
    aside, others = ([row.flatten().tolist() for batch in part for row in batch[first]] for part in (aside, others))
    assert len(aside) == 4 and len(others) == 12 * 4 and not any(row in others for row in aside)
    assert aside == [row.flatten().tolist() for batch in batches[:2] for row in batch[first]]


def test_a_picture_with_two_labels_is_two_examples():
    batches = [{"pixel_values": torch.ones(2, 2), "labels": torch.tensor([0, 1])} for _ in range(5)]
    with pytest.warns(UserWarning, match="on 1 of 2 different examples"):
        aside, others = hold_out(batches)
    assert [batch["labels"].tolist() for batch in aside] == [[0]]
    assert [batch["labels"].tolist() for batch in others] == [[1]] * 5


@pytest.mark.parametrize("make", [
    lambda: torch.ones(3, 4), lambda: (torch.ones(3, 4), torch.ones(3)), dict,
    lambda: {"input_ids": torch.ones(2, 3), "step": torch.tensor(1)},
    lambda: {"input_ids": torch.ones(2, 3), "names": ["a", "b"]},
])  # fmt: skip
def test_batches_of_no_known_form_are_set_aside_whole(make):
    batches = [make() for _ in range(40)]
    aside, others = hold_out(iter(batches))
    assert [id(one) for one in (*aside, *others)] == [id(one) for one in batches] and len(aside) == 4


@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (2, 5)], ids=["of pairs of tokens", "with a cache"])
def test_examples_are_told_apart_by_their_tokens_where_the_mask_is_of_another_shape(shape):
    ids = [torch.tensor([[i, 1, 2], [i, 1, 3]]) for i in (4, 5)]
    batches = [{"input_ids": ids[i % 2], "attention_mask": torch.ones(shape)} for i in range(8)]
    with pytest.warns(UserWarning, match="on 1 of 4 different examples"):
        aside, others = hold_out(batches)
    aside, others = ([row.tolist() for batch in part for row in batch["input_ids"]] for part in (aside, others))
    assert aside == [[4, 1, 2]] and len(others) == 12 and aside[0] not in others


def test_no_more_of_a_stream_is_read_than_four_times_what_is_set_aside():
    read = []
    aside, others = hold_out(seen_by(numbered(400), read))
    assert len(rows_of(aside)) == 16 and len(rows_of(read)) == 64
    assert len(rows_of(others)) == 400 - 16 and len(read) == 100


def modes(model):
    return [module.training for module in model.modules()]


def powers(*exponents):
    return {2.0**exponent for exponent in exponents}


@pytest.mark.parametrize(("loss", "best", "measured"), [
    (lambda gamma: abs(math.log2(gamma) + 5), 2.0**-5, powers(2, 0, -2, -4, -6, -3, -5)),
    (lambda gamma: abs(math.log2(gamma) - 3), 2.0**3, powers(0, 2, 4, 3, 1)),
    (lambda gamma: 1.0, 1.0, powers(2, 0, -2, 1, -1)),  # flat: the walk ends at once, where it began
    (lambda gamma: gamma, 2.0**-11, powers(2, *range(0, -11, -2), -9, -11)),  # no farther than these
    (lambda gamma: -gamma, 2.0**15, powers(*range(0, 15, 2), 12, 13, 15)),
])  # fmt: skip
def test_the_walk_goes_by_quarters_and_looks_half_a_step_to_both_sides(loss, best, measured):
    for first in (1.0, 64.0):
        seen = set()
        assert _lowest(lambda gamma: seen.add(gamma / first) or loss(gamma / first), first) == best * first  # noqa: B023
        assert seen == measured


def found_with(case, loss, before=3.0, **given):
    """Search on a model of losses that are known: `loss` is of gamma, of which the scaling on the model tells."""
    model, _, stats = case
    built, init = [], build_adapter(stats, {next(iter(stats)): 4}, "lora-one", gamma=1.0)

    def build(gamma):
        built.append(gamma)
        return replace(init, gamma=gamma)

    def loss_of(model):
        scalings = {layer.scaling["default"] for layer in adapter_layers(model).values()}
        if not scalings:
            return before
        (scaling,) = scalings
        return loss(built[0] * init.scaling / scaling)

    found = find_step_size(model, build, loss_of, **given)
    return found.gamma, found.losses, built


def test_a_search_measures_each_size_on_the_model_and_builds_two(case):
    before = torch.random.get_rng_state()
    assert found_with(case, lambda gamma: abs(math.log2(gamma) - 5), first=4.0) == (32.0, (3.0, 0.0), [4.0, 32.0])
    assert found_with(case, lambda gamma: abs(math.log2(gamma) - 9)) == (512.0, (3.0, 0.0), [1024.0, 512.0])
    # A step that is too large for the numbers of a computer is not taken, whatever its loss is called.
    for too_large in (math.nan, math.inf, -math.inf):
        found = found_with(case, lambda gamma: too_large if gamma < 9.0 else 1 / gamma - 1, first=4.0)  # noqa: B023
        assert found[0] == 16.0 * 4**6 * 2 and found[1][1] == pytest.approx(-1.0, abs=1e-4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_size_that_was_given_is_measured_alone_and_taken_if_its_loss_is_a_number(case):
    assert found_with(case, lambda gamma: 2.0 * gamma, gamma=8.0, first=2.0) == (8.0, (3.0, 16.0), [8.0, 8.0])
    for loss, before in ((math.nan, 3.0), (math.inf, 3.0), (2.0, math.nan), (2.0, math.inf)):
        said = refused("with gamma=8.0, the best", found_with, case, lambda gamma: loss, before, gamma=8.0)  # noqa: B023
        shown = math.inf if math.isnan(loss) else loss
        assert said == (
            f"method 'lora-one': the loss is {before:.4g} for the plain model and {shown:.4g} after the step with "
            "gamma=8.0, the best that was found. Take a start with B = 0, or pass another gamma."
        )
    with pytest.raises(NoStepError):
        found_with(case, lambda gamma: 3.0, first=4.0)  # no lower than without a step


def test_what_is_known_of_the_sample_is_not_set_aside_again(recwarn):
    batches, more = (
        numbered(64),
        [of((1, 3), (2, 0)), *(of(*[(2, i) for i in range(k, k + 4)]) for k in range(1, 17, 4))],
    )
    aside, others = hold_out(iter(batches), iter(more))
    assert rows_of(aside) == [(2, i) for i in range(17)] and isinstance(others, list)
    assert rows_of(others) == rows_of(batches) and not recwarn.list
    aside, others = hold_out(batches, more)
    assert len(rows_of(aside)) == 17 and others is batches
    # Too few are new: then the first of all, and what is beyond the sample goes to the statistics.
    aside, others = hold_out(batches, more[:2])
    assert rows_of(aside) == rows_of(batches)[:16] and rows_of(others) == rows_of(batches)[16:] + rows_of(more[:2])[1:]


def test_few_new_examples_are_enough_where_a_quarter_is_fewer():
    with pytest.warns(UserWarning) as caught:
        aside, others = hold_out(numbered(24), [of((2, 0), (2, 1)), of((2, 2), (2, 3), (2, 4), (2, 5))])
    assert rows_of(aside) == [(2, i) for i in range(6)] and rows_of(others) == rows_of(numbered(24))
    assert [str(one.message) for one in caught] == [
        "the start is judged by the loss on 6 of 30 different examples, and fewer than 16 say little about it. Give at "
        "least 64 different examples, or gamma=."
    ]


@pytest.mark.parametrize(("n_examples", "batch_size", "n"), [
    (0, 4, 1), (3, 4, 1), (8, 4, 2), (16, 4, 4), (28, 4, 4), (32, 4, 8), (63, 4, 12), (64, 4, 16), (10**6, 4, 16),
    (10**6, 32, 128), (100, 32, 25), (200, 32, 32), (100, 1, 16),
])  # fmt: skip
def test_whole_batches_of_a_quarter_at_most_are_held_out(n_examples, batch_size, n):
    assert n_held_out(n_examples, batch_size) == n
    assert most_held_out(batch_size) == max(16, 4 * batch_size)


@pytest.mark.parametrize(("change", "said"), [
    (dict(model=lambda model: get_peft_model(model, LoraConfig(r=1))), "PeftModel already has an adapter"),
    (dict(model=lambda model: "a name"), "find_step_size() takes a model in this place and got its name, 'a name'"),
    (dict(build=lambda: None), "build takes (), and is called with (gamma)"),
    (dict(build="lora-one"), "build is 'lora-one', expected a function of (gamma)"),
    (dict(loss_of=lambda model, batches: 0.0), "loss_of takes (model, batches), and is called with (model)"),
    (dict(loss_of=2.0), "loss_of is 2.0, expected a function of (model)"),
])  # fmt: skip
def test_what_no_size_can_be_found_with_is_refused_before_a_loss_is_measured(change, said):
    def build(gamma):
        raise AssertionError("it was built")

    def loss_of(model):
        raise AssertionError("a loss was measured")

    given = dict(model=lambda model: model, build=build, loss_of=loss_of) | change
    model = given["model"](tiny_llama())
    assert said in refused("", find_step_size, model, given["build"], given["loss_of"])


@pytest.mark.parametrize("gamma", [None, 8.0])
def test_a_start_that_changes_the_base_has_no_size_to_search_and_leaves_the_base_alone(case, gamma):
    model, _, stats = case
    searched = copied(model)

    def build(gamma):
        return build_adapter(stats, 4, "lora-ga", gamma=gamma)

    refused("'lora-ga' takes from the base weights what it adds", find_step_size, searched, build, lambda m: 1.0, gamma)
    for before, after in zip(model.parameters(), searched.parameters(), strict=True):
        assert torch.equal(before, after)


def test_a_wrapped_model_is_measured_without_its_wrapper(case):
    model, _, stats = case
    seen = []

    def loss_of(measured):
        seen.append(measured)
        return 3.0 - len(seen)

    build = partial(build_adapter, stats, 4, "lora-one")
    find_step_size(nn.DataParallel(copied(model)), lambda gamma: build(gamma=gamma), loss_of, gamma=2.0)
    assert [type(one).__name__ for one in seen] == ["LlamaForCausalLM"] * 2
