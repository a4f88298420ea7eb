"""Strengths do what merged weights do, their gradient is that of finite differences, and a model is left as it was."""

import copy
import math
import re
import warnings
from collections import Counter
from functools import partial
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lora_init import LoraInitError, dial
from lora_init.keep.dial import (
    STRONGEST,
    Rule,
    _batched,
    _pad,
    _read,
    _search,
    _sequences,
    _Thirds,
    _thirds,
    change_of,
    check_dialable,
    check_enough,
    choose_dial,
    example_losses,
    fit_strengths,
    fits_of,
    is_of_rows,
    label_losses,
    strengths,
)  # fmt: skip
from lora_init.keep.dialed import Change, Dial, Point
from lora_init.serving.trained import OTHER_UPDATES
from tests.conftest import batches_for, refused, tiny_gpt2, tiny_llama, tiny_t5

KINDS = {
    "plain": (tiny_llama, dict(target_modules=["q_proj", "down_proj"])),
    "rsLoRA": (tiny_llama, dict(target_modules=["q_proj", "v_proj"], use_rslora=True, rank_pattern={"q_proj": 3})),
    "alphas": (tiny_llama, dict(target_modules=["q_proj", "v_proj"], alpha_pattern={"layers.1.self_attn.v_proj": 3})),
    "embedding": (tiny_llama, dict(target_modules=["embed_tokens", "q_proj"])),
    "Conv1D": (tiny_gpt2, dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "encoder-decoder": (tiny_t5, dict(target_modules=["q", "wo"])),
}  # fmt: skip


def trained_model(kind="plain", dtype=torch.float64):
    make, settings = KINDS[kind]
    model = get_peft_model(make(), LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.1} | settings)).to(dtype)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    return model, batches_for("t5" if kind == "encoder-decoder" else "llama")


def own_strengths(model):
    """Another strength for each layer, 0 among them."""
    names = [
        name.removesuffix(".lora_A") for name, _ in model.get_base_model().named_modules() if name.endswith("lora_A")
    ]
    return {name: 0.4 * i for i, name in enumerate(names)}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_strengths_do_what_a_share_of_the_merged_update_does(kind):
    model, batches = trained_model(kind)
    chosen = own_strengths(model)
    with strengths(model, chosen):
        found = example_losses(model, batches)
    with strengths(model, 0.0), model.disable_adapter():
        base = example_losses(model, batches)
    with strengths(model, 0.0):
        torch.testing.assert_close(example_losses(model, batches), base, atol=0, rtol=0)
    updates = {name: model.get_base_model().get_submodule(name).get_delta_weight("default") for name in chosen}
    plain = model.unload()
    for name, value in chosen.items():
        plain.get_submodule(name).weight += value * updates[name]
    expected = example_losses(plain, batches)
    assert (expected - base).abs().max() > 1e-3  # there is something to get wrong
    # token losses are computed in float32, of logits in float64
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-6)


def mean(losses, labelled):
    return losses.sum() / labelled.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_takes_the_steps_of_adam_on_the_true_gradient(kind):
    model, batches = trained_model(kind)
    start, (task, keep) = own_strengths(model), (batches[:2], batches[2:])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [p.requires_grad for p in model.parameters()]
    model.train()
    found = fit_strengths(model, task, keep, 0.5, start, steps=3)
    assert model.training and trainable == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    values = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    adam = torch.optim.Adam(values.values(), lr=0.06)
    model.eval()
    for step in range(3):
        adam.param_groups[0]["lr"] = 0.06 * (1 - step / 3)
        adam.zero_grad()
        with strengths(model, values):
            sum(w * mean(*label_losses(model, part[step % 2])) for w, part in ((1, task), (0.5, keep))).backward()
        adam.step()
        for value in values.values():
            value.data.clamp_(0, STRONGEST)
    assert found == pytest.approx({name: value.item() for name, value in values.items()}, abs=1e-4)
    assert found != pytest.approx(start, abs=1e-2)


def test_a_fit_needs_gradients_of_b_alone(monkeypatch):
    """Others would cost memory, even if nothing reads them."""
    model, batches = trained_model(dtype=torch.float32)
    needed = set()

    def losses(model, batch):
        needed.update(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        return label_losses(model, batch)

    monkeypatch.setattr("lora_init.keep.dial.label_losses", losses)
    fit_strengths(model, batches[:1], batches[1:2], 0.5, steps=1)
    assert needed and all("lora_B" in name for name in needed)


def test_a_layer_that_no_batch_reaches_keeps_the_strength_that_it_began_with():
    model, batches = trained_model(dtype=torch.float32)
    last = next(module for name, module in model.named_modules() if name.endswith("layers.1"))
    last.forward = lambda hidden, *arguments, **settings: hidden
    found = fit_strengths(model, batches[:1], batches[1:2], 0.5, 0.5, steps=2)
    stayed = {name: value == 0.5 for name, value in found.items()}
    assert stayed == {name: "layers.1." in name for name in found} and any(stayed.values())


def test_a_fit_begins_at_one_strength_for_all_layers_or_at_one_each():
    model, batches = trained_model(dtype=torch.float32)
    fit = partial(fit_strengths, model, batches[:1], batches[1:2], 0.5, steps=1)
    one, each = fit(0.3), fit(dict.fromkeys(own_strengths(model), 0.3))
    assert one == each and {round(abs(value - 0.3), 3) for value in one.values()} == {0.06}  # Adam's first step
    assert fit() == fit(0.7)


def test_what_has_no_loss_is_refused():
    model, batches = trained_model(dtype=torch.float32)
    without = [batch | {"labels": torch.full_like(batch["labels"], -100)} for batch in batches]
    refused(r"no token has a label, so there is no loss\. Check labels and max_length", example_losses, model, without)
    assert example_losses(model, [without[0], batches[0]])[:, 1].tolist()[:4] == [0.0] * 4
    model.get_base_model().lm_head.weight.data[0] = torch.inf
    refused(
        "the loss is NaN or infinite: training went wrong. Use an earlier checkpoint", example_losses, model, batches
    )


@pytest.mark.parametrize(("rank", "method"), [(8, ""), (4, "lora-ga"), (None, "lora-ga")])
def test_the_origin_of_an_adapter_is_of_the_rank_that_it_began_with(rank, method):
    """One that another tool has made smaller carries the record of its start, whose numbers it has no more."""
    origin = {"method": "lora-ga"} | ({} if rank is None else {"rank": rank})
    config = {"r": 4, "init_lora_weights": True, "auto_mapping": {"lora_init": origin}}
    if method:
        refused(f"^it began as {method}, which changes or corrects the base", check_dialable, config, (), "it")
    else:
        check_dialable(config, (), "it")


def from_start(**origin):
    return {"init_lora_weights": True, "r": 4, "auto_mapping": {"lora_init": origin}}


BEGAN = "it began as {}, which changes or corrects the base: at strength 0 that is not your model. Convert it by"
HEAD = "it holds {}, trained whole, which has no strength: the rest would not fit it at another. Dial adapters"
NOT_DIALABLE = {
    **{
        key: ({key: {"any": 1}}, (), f"it has {key}, which has no strength that could be scaled alone. Use plain LoRA.")
        for key in ("use_dora", "lora_bias", "ensure_weight_tying", *OTHER_UPDATES)
    },
    **{task: ({"task_type": task}, (), HEAD.format("a head")) for task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")},
    "whole": ({"task_type": "CAUSAL_LM"}, ("lm_head.weight", "more"), HEAD.format("lm_head.weight")),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, (), BEGAN.format("pissa_niter_4")),
    "own": (from_start(method="olora", rank=4), (), BEGAN.format("olora")),
    "corrects": (from_start(method="x", corrects_base=True), (), BEGAN.format("x")),
    "quantized": (from_start(method="qera", error_size=0.5), (), BEGAN.format("qera")),
    "nothing": ({"task_type": "CAUSAL_LM", "use_dora": False, "arrow_config": None}, (), ""),
    "gaussian": ({"init_lora_weights": "gaussian"}, (), ""),
    "no change": (from_start(method="eva", rank=4), (), ""),
    "without a method": (from_start(), (), ""),
}


@pytest.mark.parametrize("kind", NOT_DIALABLE)
def test_an_adapter_that_is_more_than_a_factor_times_a_and_b_is_refused(kind):
    config, whole, words = NOT_DIALABLE[kind]
    if words:
        refused(f"^{re.escape(words)}", check_dialable, config, whole, "it")
    else:
        check_dialable(config, whole, "it")


@pytest.mark.parametrize(("n", "words"), [(0, "0 examples"), (1, "1 example"), (2, "2 examples"), (5, "5 examples")])
def test_too_few_examples_are_counted(n, words):
    check_enough(6, "keep")
    refused(f"^keep: {words}, and at least 6 are needed. Take 36 or more.$", check_enough, n, "keep")


@pytest.mark.parametrize(("n", "texts", "size"), [(6, 6, 2), (16, 8, 2), (40, 20, 4)])
def test_the_base_writes_half_as_many_texts_as_there_are_examples(n, texts, size, monkeypatch):
    model, (batch, *_) = trained_model()
    row, found = {key: value[:1] for key, value in batch.items()}, []

    def write(*arguments):
        found.append(arguments)
        return [row] * texts

    monkeypatch.setattr("lora_init.keep.dial.replayed", write)
    monkeypatch.setattr("lora_init.keep.dial._search", lambda model, *parts: Dial("", None, (), (), {}, {}, parts[:2]))
    dialed = choose_dial(model, Rule(strength=0.5), [row] * n, None, "a tokenizer", 7, print)
    assert found == [(model, "a tokenizer", texts, 7, size, print)]
    assert dialed.read == (n, texts) and dialed.examples == (
        ([], [row] * n, [row] * n),
        ([], [row] * texts, [row] * texts),
    )


def test_an_adapter_that_acts_in_one_layer_is_dialed():
    model, _ = trained_model()
    first, *others = (module for name, module in model.named_modules() if name.endswith("lora_B.default"))
    for module in others:
        module.weight.data.zero_()
    before = first.weight.clone()
    assert {*dial(model, strength=0.5).strengths.values()} == {0.5}
    assert torch.equal(first.weight, before / 2)


def test_the_gradient_of_a_strength_is_that_of_finite_differences():
    model, (batch, *_) = trained_model()
    model.eval()
    chosen = own_strengths(model)
    name = [*chosen][-1]
    value = torch.tensor(chosen[name], dtype=torch.float64, requires_grad=True)
    with strengths(model, chosen | {name: value}):
        (slope,) = torch.autograd.grad(mean(*label_losses(model, batch)), value)
    ends = []
    for shift in (-0.02, 0.02):
        with strengths(model, chosen | {name: chosen[name] + shift}), torch.no_grad():
            ends.append(float(mean(*label_losses(model, batch))))
    assert float(slope) == pytest.approx((ends[1] - ends[0]) / 0.04, rel=0.02)  # losses are float32


def test_strengths_are_taken_back_after_an_error():
    model, batches = trained_model()
    expected = example_losses(model, batches)
    with pytest.raises(RuntimeError, match="stop"), strengths(model, 0.3):
        assert not torch.equal(example_losses(model, batches), expected)
        raise RuntimeError("stop")
    assert torch.equal(example_losses(model, batches), expected)


def test_dial_works_in_place_and_what_is_saved_reloads_with_the_same_outputs(tmp_path, monkeypatch):
    model, batches = trained_model(dtype=torch.float32)
    expected = tiny_llama()
    expected.load_state_dict(model.get_base_model().state_dict(), strict=False)
    keep = batches_for("llama", n_batches=4, seed=1)
    refused("batches: 4 examples, and at least 6", dial, model, batches[:1], keep)
    refused("tokenizer=", dial, model, batches)
    refused("^keep= is text already: leave tokenizer= out, or keep=", dial, model, batches, batches, tokenizer=print)
    refused("100% of its texts are examples of the task", dial, model, batches, [*batches])
    with torch.no_grad():
        full = model.eval()(**batches[0]).logits
    report = dealt(model, batches, keep, monkeypatch)[0][2]
    found = dial(model, batches, keep, keep_within=10.0)
    assert found.chosen.task == min(point.task for point in (*found.curve[1:], *found.fitted))
    after = example_losses(model, batches)
    with torch.no_grad():
        assert (model(**batches[0]).logits - full).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    plain = model.unload()
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(example_losses(again, batches), after, atol=1e-5, rtol=1e-5)
    held_out = example_losses(again, report)
    assert found.task["chosen"].loss == pytest.approx(float(held_out[:, 0].sum() / held_out[:, 1].sum()), rel=1e-5)


class _DealtError(Exception):
    pass


def dealt(model, batches, keep, monkeypatch, **options):
    """Return the batches of the task, and of what to keep, to fit, to choose and to report by."""
    found = []

    def search(model, task, kept, *rest):
        found.extend([task, kept])
        raise _DealtError

    monkeypatch.setattr("lora_init.keep.dial._search", search)
    with pytest.raises(_DealtError):
        dial(model, batches, keep, **options)
    monkeypatch.undo()
    return found


def by_length(kind, seed=0):
    """24 examples of 4 to 27 tokens in batches of four, the shortest first, as sorting by length makes them."""
    generator, batches = torch.Generator().manual_seed(seed), []
    for first in range(4, 28, 4):
        lengths = torch.arange(first, first + 4)[:, None]
        mask = (torch.arange(first + 3) < lengths).long()
        ids = torch.randint(3, 64, mask.shape, generator=generator) * mask
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        if kind == "no mask":  # what is read of it has one length
            batch = {"input_ids": ids + 1 - mask, "labels": batch["labels"]}
        elif kind == "packed":
            batch = {"input_ids": ids + 1 - mask, "position_ids": torch.arange(first + 3).expand_as(ids) % 3,
                     "labels": batch["labels"]}  # fmt: skip
        elif kind == "encoder-decoder":
            batch["labels"] = batch["labels"][:, : first // 2].contiguous()
        elif kind == "embedded":
            batch = embedded(batch)
        elif kind == "half without labels":
            batch["labels"][::2] = -100
        batches.append(batch)
    return batches


def names_of(batches):
    """Return the examples by their labels, which no two share."""
    rows = [row[row != -100] for batch in batches for row in batch["labels"]]
    return [tuple(row.tolist()) for row in rows if len(row)]


@pytest.mark.parametrize("kind", ["padded", "no mask", "packed", "encoder-decoder", "embedded", "half without labels"])
def test_examples_are_dealt_at_random_whatever_their_length(kind, monkeypatch):
    model, _ = trained_model("encoder-decoder" if kind == "encoder-decoder" else "plain")
    given = by_length(kind), by_length(kind, seed=1)
    reported = Counter()
    for seed in range(36):
        for before, parts in zip(given, dealt(model, *given, monkeypatch, seed=seed), strict=True):
            assert sorted(names_of(chain(*parts))) == sorted(names_of(before))
            assert {len(names_of(part)) for part in parts} == {len(names_of(before)) // 3}
            reported.update(names_of(parts[2]))
    # A third of 36 deals, and 4.5 standard deviations.
    assert len(reported) == sum(len(names_of(before)) for before in given) and {*reported.values()} <= {*range(1, 25)}
    (again, _), (once, _) = (dealt(model, *given, monkeypatch, seed=35) for _ in range(2))
    assert names_of(again[2]) == names_of(once[2])
    if kind not in ("no mask", "packed"):  # which cannot be padded
        assert len(once[2]) == len(names_of(once[2])) / 4
    found, expected = (example_losses(model, batches) for batches in (chain(*once), given[0]))
    found, expected = (sorted(rows[rows[:, 1] > 0].tolist()) for rows in (found, expected))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=1e-5)  # float32 losses


def test_examples_are_dealt_in_batches_of_the_largest_size_that_was_given(monkeypatch):
    model, _ = trained_model()
    given = by_length("padded"), by_length("padded", seed=1)
    for batches in given:
        batches[-1] = {name: value[:1] for name, value in batches[-1].items()}
    for parts in dealt(model, *given, monkeypatch):
        assert [sorted(len(batch["labels"]) for batch in part) for part in parts] == [[3, 4]] * 3


def test_an_example_of_one_target_token_counts_where_labels_are_not_shifted():
    model, batches = trained_model("encoder-decoder")
    short = [{**batch, "labels": batch["labels"][:, :1]} for batch in batches]
    n = sum(len(batch["labels"]) for batch in batches)
    assert dial(model, short, batches, strength=0.5).read[0] == n


def test_positions_of_three_kinds_are_no_rows():
    ids = torch.ones(3, 4).long()
    assert is_of_rows({"input_ids": ids, "labels": ids})
    assert not is_of_rows({"input_ids": ids, "labels": ids, "position_ids": torch.ones(3, 3, 4).long()})


@pytest.mark.parametrize("more", [torch.ones(3), torch.ones(2, 4), [[1, 1, 1, 1]] * 3, None, torch.tensor(3)], ids=str)
def test_a_batch_is_made_of_rows_if_each_of_its_tensors_is(more):
    ids = torch.ones(3, 4).long()
    assert is_of_rows({"input_ids": ids, "labels": ids, "more": torch.ones(3, 1)})
    assert not is_of_rows({"input_ids": ids, "labels": ids, "more": more})


@pytest.mark.parametrize("masked", [True, False])
def test_only_what_is_masked_is_padded(masked):
    examples = []
    for length in (4, 6, 4, 6):
        ids = torch.ones(1, length).long()
        examples.append({"input_ids": ids, "labels": ids} | ({"attention_mask": ids} if masked else {}))
    lengths = [sorted({int(row.sum()) for row in batch["input_ids"]}) for batch in _batched(examples, 4, seed=0)]
    assert sorted(lengths) == ([[4, 6]] if masked else [[4], [6]])


def test_batches_that_are_not_made_of_rows_are_dealt_whole(monkeypatch):
    model, batches = trained_model()
    ids = [batch["input_ids"] for batch in by_length("no mask")]
    packed = [{"input_ids": one, "labels": one, "max_length_q": 3} for one in ids]
    parts, _ = dealt(model, packed, batches, monkeypatch)
    assert sorted(map(id, chain(*parts))) == sorted(map(id, packed)) and [*map(len, parts)] == [2, 2, 2]


def test_the_report_says_per_cent_and_where_a_limit_was_broken(monkeypatch):
    model, batches = trained_model(dtype=torch.float32)
    kept, seen, uniform = by_length("padded", seed=1), set(), dict(uniform=True)
    for seed in range(5):
        task, keep = (part[2] for part in dealt(model, batches, kept, monkeypatch, seed=seed))
        found = dial(copy.deepcopy(model), batches, kept, seed=seed, **uniform)
        best = min(found.curve[1:], key=lambda point: point.task)
        assert found.task["best"].loss == pytest.approx(ratio(model, task, best.strength))
        now, trained = ratio(model, task, found.chosen.strength), ratio(model, task)
        for text in (f"{now:.3f} ({now - trained:+.3f} ± ", f", {100 * (now / trained - 1):+.1f} %) now"):
            assert text in found.summary()["task"]
        limit = max((ratio(model, keep, best.strength) - ratio(model, keep, 0.0) + best.rise) / 2, 0.0)
        found = dial(copy.deepcopy(model), batches, kept, seed=seed, keep_within=limit, **uniform)
        rise = ratio(model, keep, found.chosen.strength) - ratio(model, keep, 0.0)
        if found.chosen.rise <= limit:
            assert (f"text to keep {rise:.3f} above" in "".join(found.notes)) == (rise > limit)
            seen.add(rise > limit)
    assert seen == {True, False}


@pytest.mark.parametrize(("asked", "chosen", "rise", "words"), [
    ({}, 2.05, 0.4, "2.5 % above the task's loss at the best strength, and 2 %"),
    ({}, 2.03, 0.4, ""),
    ({}, 2.04008, 0.4, ""),  # 2.004 %
    ({}, 2.0402, 0.4, "2.01 % above the task's loss at the best strength, and 2 %"),
    ({"keep_within": 0.4}, 9.0, 0.4003, ""),
    ({"lose": 0.01}, 2.03, 0.4, "1.5 % above the task's loss at the best strength, and 1 %"),
    ({"lose": 0.5}, 3.0, 0.4, ""),  # at the limit
    ({"keep_within": 0.1}, 9.0, 0.4, "text to keep 0.400 above the base's loss, and 0.1"),
    ({"keep_within": 0.4}, 9.0, 0.4, ""),
    ({"strength": 0.5}, 9.0, 0.4, ""),
])  # fmt: skip
def test_a_limit_is_broken_where_the_report_is_beyond_it(asked, chosen, rise, words):
    task = {name: Change(loss, 0.0, 0.0) for name, loss in (("best", 2.0), ("trained", 2.1), ("chosen", chosen))}
    said = Rule(**asked).broken(task, {"chosen": Change(3.0, rise, 0.0)})
    line = f"measured is {words} was the limit. Dial on more examples, or set a lower limit"
    assert said == [line] * bool(words)


def ratio(model, batches, strength=1.0):
    """Return the loss a label."""
    with strengths(model, strength):
        losses = example_losses(model, batches)
    return float(losses[:, 0].sum() / losses[:, 1].sum())


def test_the_interval_is_that_of_a_bootstrap_over_examples():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 30, (200,), generator=generator).double()
    losses = counts * (3 + torch.randn(200, generator=generator).double())
    shift = counts * (0.1 + 0.3 * torch.randn(200, generator=generator).double())
    found = change_of(torch.stack([losses + shift, counts], 1), torch.stack([losses, counts], 1))
    picks = torch.randint(0, 200, (4000, 200), generator=generator)
    drawn = shift[picks].sum(1) / counts[picks].sum(1)
    assert found.change == pytest.approx(float(shift.sum() / counts.sum()))
    assert found.error == pytest.approx(1.96 * float(drawn.std()), rel=0.05)  # 4000 draws: 1 %


def test_the_interval_of_few_examples_is_wider_and_of_one_is_none():
    """Two examples of 2 and 4 labels, whose losses differ by 1 and 5: 6 / 6 a label, so that -1 and 1 are left."""
    before, after = torch.tensor([[4.0, 2.0], [7.0, 4.0]]).double(), torch.tensor([[5.0, 2.0], [12.0, 4.0]]).double()
    assert change_of(after, before) == Change(17 / 6, pytest.approx(1.0), pytest.approx(1.96 * 2 / 6))
    assert change_of(after[:1], before[:1]) == Change(2.5, 0.5, 0.0)


def point(strength, task, rise):
    return Point(strength, task, rise, None, {})


def test_rules_choose_what_they_say():
    points = [point(0.5, 1.02, 0.0), point(0.7, 1.005, 0.05), point(1.0, 1.0, 0.3)]

    def chosen(*first, **asked):
        rule = Rule(**asked)
        return rule.choose(rule.limit(points), *first, points).strength

    assert chosen() == chosen(lose=0.02) == 0.5 and chosen(lose=0.01) == 0.7 and chosen(lose=0.0) == 1.0
    assert chosen(keep_within=0.1) == 0.7 and chosen(keep_within=0.0) == 0.5
    assert chosen([point(0.4, 9.0, 0.1)], keep_within=0.1) == 0.4  # at the limit is within it
    assert chosen([point(0.4, 1.0, 9.0)], lose=0.0) == 0.4
    assert Rule(keep_within=0.1).choose(9.0, points[2:]) == points[2]
    assert chosen(points[1:]) == 0.7 and chosen([point(0.6, 1.1, 0.0)]) == 0.5  # the first of them where one is
    with pytest.warns(UserWarning, match=r"strength=9: above 1\.5 the dial itself chooses none"):
        Rule(strength=9)
    with warnings.catch_warnings(action="error"):  # at the ends of what is allowed
        assert (Rule(strength=STRONGEST).strength, Rule(strength=0.001).strength) == (1.5, 0.001)
        assert (Rule(lose=1.0).lose, Rule(keep_within=9.0).keep_within) == (1.0, 9.0)
    for wrong, words in (
        (dict(lose=-0.1), "at least 0"),
        (dict(lose=2), "lose=2 is 200% more loss. Write 2 % as 0.02"),
        (dict(lose=1.01), "101% more loss"),
        (dict(strength=0.5, uniform=True), "strength=0.5 is one for all layers already. Leave uniform=True out"),
        (dict(keep_within=-0.1), "at least 0"),
        (dict(lose="2"), "lose='2', expected a number"),
        (dict(strength=True), "strength=True, expected a number"),
        (dict(strength=0.0), "at least 0.001"),
        (dict(strength=1e-31), "at least 0.001"),
        (dict(keep_within=float("nan")), "expected a number of at least 0"),
        (dict(lose=0.1, strength=1.0), "^lose= and strength= are both given. One of them says what is chosen"),
    ):
        refused(words, Rule, **wrong)


LEAST = "the least forgetting at most {} % above the task's loss at the best strength"


@pytest.mark.parametrize(("asked", "words", "limit"), [
    ({}, LEAST.format(2), 2.04),
    ({"lose": 0.125}, LEAST.format(12.5), 2.25),
    ({"lose": 0}, LEAST.format(0), 2.0),
    ({"keep_within": 0.25}, "the best task with text to keep at most 0.25 above the base's loss", math.inf),
    ({"keep_within": 0.0}, "the best task with text to keep at most 0 above the base's loss", math.inf),
    ({"strength": 0.125}, "strength 0.125, as asked", math.inf),
])  # fmt: skip
def test_a_rule_says_what_was_asked_limits_the_task_and_what_it_missed(asked, words, limit):
    rule = Rule(**asked)
    assert str(rule) == words and rule.limit([point(0.5, 2.5, 0.0), point(0.9, 2.0, 0.2)]) == pytest.approx(limit)
    missed = ["no strength keeps what was asked for; the one that forgets least was taken"]
    assert rule.missed(point(0.4, 9.0, 0.3)) == missed * ("keep_within" in asked)
    assert rule.missed(point(0.4, 9.0, asked.get("keep_within", 0.3))) == []  # at the limit


@pytest.mark.parametrize("base", [1.0, 9.0], ids=["worse than the base", "better"])
def test_the_best_strength_is_one_that_can_be_chosen(base, monkeypatch):
    """Strength 0 is none, however good the base is: what is within the rule is so by the adapter's own best."""

    def at(model, layers, task, kept):
        strength = next(iter(layers.values()))
        on_task = 1.5 - 0.1 * strength if strength else base
        return torch.tensor([[on_task, 1.0]]), torch.tensor([[1.0 + strength, 1.0]])

    monkeypatch.setattr("lora_init.keep.dial._losses_at", at)
    model, batches = trained_model()
    found = dial(model, batches, batches_for("llama", seed=1), uniform=True)
    best = min(point.task for point in found.curve[1:])
    within = [point for point in found.curve[1:] if point.task <= 1.02 * best]
    assert found.chosen == min(within, key=lambda point: point.rise) and 1 < len(within) < len(found.curve) - 1


@pytest.mark.parametrize(("asked", "rises", "tried"), [
    ({}, [0.9, 0.5, 0.2, 0.1, 0.05], [0.3, 1.0, 3.0, 10.0]),  # the task is lost at the fourth
    ({}, [0.9, 0.5, 0.495], [0.3, 1.0, 3.0]),  # the third gains nothing
    ({}, [0.9, 0.5, 0.485, 0.4], [0.3, 1.0, 3.0, 10.0]),  # and here more than a hundredth of the rise as trained
    ({"keep_within": 0.01}, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0.3, 1.0, 3.0, 10.0, 30.0, 100.0]),
    ({}, [0.9, 0.95], [0.3, 1.0]),
    ({"keep_within": 0.3}, [0.9, 0.5, 0.2], [0.3, 1.0, 3.0]),
    ({"keep_within": 0.9}, [0.9], [0.3]),
    ({}, [-0.1, -0.105, -0.104], [0.3, 1.0, 3.0]),  # where nothing was forgotten, any fall is a gain
])  # fmt: skip
def test_the_weight_of_text_to_keep_rises_until_the_rule_breaks_or_nothing_is_gained(asked, rises, tried, monkeypatch):
    model, _ = trained_model()
    starts, weights = [], []

    def fit(model, task, keep, weight, layers, *more):
        starts.append((layers, more))
        weights.append(weight)
        return dict.fromkeys(layers, 0.7 - 0.1 * len(weights))

    def measure(layers, weight):
        strength = next(iter(layers.values()))
        return Point(strength, 3.1 - strength, rises[len(weights) - 1], weight, layers)

    monkeypatch.setattr("lora_init.keep.dial.fit_strengths", fit)
    limit = 3.1 - 0.35 if not asked else float("inf")
    points = [*fits_of(model, [], [], Rule(**asked), limit, 1.0 if rises[0] > 0 else -0.1, measure)]
    assert weights == tried and [point.weight for point in points] == [one for one in tried for _ in range(2)]
    begun = [next(iter(layers.values())) for layers, _ in starts]
    assert begun == pytest.approx([0.7 - 0.1 * i for i in range(len(tried))])
    begun_at = starts[0][0]
    ends = [0.7 - 0.05 * i for i in range(1, 2 * len(tried) + 1)]  # half way first
    assert [value for one in points for value in one.layers.values()] == pytest.approx(
        [one for one in ends for _ in begun_at]
    )
    assert [more for _, more in starts] == [()] + [(16, 0.05)] * (len(tried) - 1)


def test_models_that_cannot_be_dialed_are_refused_by_what_they_are():
    model, batches = trained_model(dtype=torch.float32)
    keep = batches_for("llama", seed=1)
    refused("takes a PEFT model with one active adapter and got LlamaForCausalLM", dial, tiny_llama(), batches, keep)
    classes = [batch | {"labels": torch.zeros(4, dtype=torch.long)} for batch in batches]
    refused("batches: a batch has no labels", dial, model, classes, keep)
    model.merge_adapter()
    refused("unmerge_adapter", dial, model, batches, keep)
    attention = tiny_llama()
    attention.more = torch.nn.MultiheadAttention(8, 2)
    attention = get_peft_model(attention, LoraConfig(target_modules=["more", "q_proj"], init_lora_weights=False))
    refused(r"'more', an nn\.MultiheadAttention", dial, attention, batches, keep)
    for settings, words in (
        (dict(use_dora=True), "use_dora"),
        (dict(bias="all"), "trained whole"),
        ({}, "never trained"),
    ):
        fresh = get_peft_model(tiny_llama(attention_bias=True), LoraConfig(target_modules=["q_proj"], **settings))
        refused(words, dial, fresh, batches, keep)


def packed(batch):
    """Two documents in a row, whose positions begin anew."""
    n = batch["input_ids"].shape[1]
    positions = (torch.arange(n) % (n // 2)).expand_as(batch["input_ids"])
    return {"input_ids": batch["input_ids"], "position_ids": positions, "labels": batch["labels"]}


def positioned(batch):
    """All that a plain batch has, and positions that begin anew."""
    return batch | packed(batch)


def embedded(batch):
    embedding = tiny_llama().double().get_input_embeddings()
    return {key: batch[key] for key in ("attention_mask", "labels")} | {
        "inputs_embeds": embedding(batch["input_ids"]).detach()
    }


@pytest.mark.parametrize("change", [packed, positioned, embedded])
def test_the_loss_is_that_of_the_whole_batch(change):
    model, (batch, *_) = trained_model()
    batch = change(batch)
    with torch.no_grad():
        expected = float(model.eval()(**batch, use_cache=False).loss)  # as transformers' Trainer calls it
        assert float(mean(*label_losses(model, batch))) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(LoraInitError, match=r"with inputs_embeds beside tokens .* logits \[4, \d+\]"):
        label_losses(model, embedded(batches_for("llama")[0]) | {"labels": torch.ones(4, 3, dtype=torch.long)})
    with pytest.raises(LoraInitError, match=r"'pixel_values', which LlamaForCausalLM\.forward does not take"):
        label_losses(strict(model), batch | {"pixel_values": torch.ones(4, 3)})


def strict(model):
    """Let the forward pass take what it names, and no more."""
    plain = model.get_base_model()
    forward = plain.forward
    plain.forward = lambda input_ids=None, labels=None: forward(input_ids=input_ids, labels=labels)
    return model


def test_text_to_keep_is_compared_with_the_task_whatever_its_order():
    model, batches = trained_model(dtype=torch.float32)
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for batch in batches for i in range(4)]
    refused("keep: 100% of its texts are examples of the task", dial, model, rows, rows[::-1][:6])
    others = [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches_for("llama", seed=1, n_batches=8)
        for i in range(4)
    ]
    refused("keep: 50% of", dial, model, rows, rows[:6] + others[:6])
    refused("keep: 10% of", dial, model, rows, rows[:1] + others[:9])
    assert not dial(model, rows, others[:31] + rows[:1]).notes
    answers = [row | {"input_ids": 63 - row["input_ids"]} for row in rows[:6]]  # the same answers to other prompts
    assert not dial(model, rows, answers).notes


def test_one_strength_needs_no_data_and_with_data_reports_both_ends():
    model, batches = trained_model(dtype=torch.float32)
    with strengths(model, 0.8):
        expected = example_losses(model, batches)
    ends = {}
    for value in (0.0, 1.0):
        with strengths(model, value):
            ends[value] = example_losses(model, batches).sum(0)
    measured = dial(copy.deepcopy(model), batches, batches_for("llama", n_batches=4, seed=1), strength=0.8)
    assert [point.strength for point in measured.curve] == [0.0, 0.8, 1.0] and measured.examples == (16, 16)
    rises = [measured.keep[name].change for name in ("base", "chosen", "trained")]  # of the same examples
    assert [point.rise for point in measured.curve] == pytest.approx(rises, abs=1e-5) and abs(rises[1]) > 0.001
    for name, sums in (("base", ends[0.0]), ("trained", ends[1.0]), ("chosen", expected.sum(0))):
        assert measured.task[name].loss == pytest.approx(float(sums[0] / sums[1]))
    found = dial(model, strength=0.8)
    torch.testing.assert_close(example_losses(model, batches), expected)
    assert found.summary()["measured on"] == "nothing: no data were given"
    assert "task" not in found.to_dict()["chosen"] and {*found.strengths.values()} == {0.8}
    refused("needs batches of the task", dial, model)
    for more in (dict(keep=batches), dict(tokenizer=print)):
        said = "^strength=0.8 without batches measures nothing: leave keep= and tokenizer= out"
        refused(said, dial, model, strength=0.8, **more)
    for seed in ("x", 0.5, -(2**63) - 1):
        refused(f"^seed={seed!r}, expected a whole number", dial, model, batches, batches, seed=seed)
    assert dial(copy.deepcopy(model), batches, batches_for("llama", seed=1), strength=0.8, seed=-(2**63)).read == (
        16,
        16,
    )


def test_uniform_is_true_or_false():
    refused("uniform='no', expected True or False", dial, trained_model()[0], batches_for("llama"), uniform="no")


def test_a_list_is_read_whole_and_of_a_loader_the_first_batches():
    model, batches = trained_model(dtype=torch.float32)
    many, keep = [batch for batch in batches for _ in range(13)], batches_for("llama", n_batches=4, seed=1)
    found = dial(model, many, keep, strength=0.9)
    assert found.read == (4 * len(many), 16) and found.examples == found.read
    assert dial(model, iter(many), keep, strength=0.9).read == (4 * 48, 16)
    assert "of 192 and 16 that were read" in dial(model, iter(many), keep, uniform=True).summary()["measured on"]


def test_layers_that_share_a_tensor_are_refused():
    config = LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True)
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), config)
    refused("has ensure_weight_tying, which has no strength", dial, model, strength=0.8)


def test_one_adapter_that_is_on_is_dialed_whatever_others_there_are():
    model, batches = trained_model(dtype=torch.float32)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj", "q_proj"]))
    other = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".other." in name}
    keep = batches_for("llama", n_batches=4, seed=1)
    found = dial(model, batches, keep)
    assert {*found.strengths} == {*own_strengths(trained_model()[0])} and found.task["chosen"].loss > 0
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in other.items())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.base_model.set_adapter(["default", "other"])
    refused("adapters default, other are active", dial, model, batches, keep)
    model.set_adapter("default")
    with model.disable_adapter(), pytest.raises(LoraInitError, match="'default' is disabled"):
        dial(model, strength=0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_where_no_layer_is_fitted_two_thirds_choose():
    batches = batches_for("llama", n_batches=9)
    for batch in batches:
        batch["labels"] = batch["input_ids"]
    rows = [len(batch["labels"]) for batch in batches]
    each, uniform = (_thirds(batches, Rule(uniform=one), 0, True) for one in (False, True))
    n = [sum(len(batch["labels"]) for batch in part) for part in each]
    assert sum(n) == sum(rows) and max(n) - min(n) <= 1
    assert sum(len(batch["labels"]) for batch in uniform.choose) == n[0] + n[1]


def test_an_adapter_of_any_name_is_dialed():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, init_lora_weights=False), adapter_name="mine")
    assert {*dial(model, strength=0.5).strengths.values()} == {0.5}


class Searched:
    """A model of two layers whose losses are simple sums of its strengths, and what a search asks of it."""

    def __init__(self, monkeypatch, *fitted):
        self.asked, self.parts, self.lines, self.limits, self.best = [], [], [], None, 0.85
        self.task, self.kept = (
            _Thirds([f"{kind} fit"], [f"{kind} choose"], [f"{kind} report"]) for kind in ("task", "kept")
        )

        def losses(model, layers, task, kept):
            assert (task, kept) in ((self.task.choose, self.kept.choose), (self.task.report, self.kept.report))
            self.asked.append((task[0].split()[1], dict(layers)))
            a, b = layers.values()
            rows = [(2 + ((a + b) / 2 - self.best) ** 2, 2.0)] * 3, [(1 + a * a, 4.0)] * 5
            return tuple(torch.tensor([(loss * n, n) for loss, n in some], dtype=torch.float64) for some in rows)

        def fits(model, task, keep, rule, limit, trained, measure):
            assert (model, task, keep) == (self, self.task.fit, self.kept.fit)
            self.limits = limit, trained
            yield from (measure(dict(zip("ab", layers, strict=True)), weight) for layers, weight in fitted)

        def progress(parts, say):
            self.parts.append(parts)
            return SimpleNamespace(ended=lambda text, n=1.0: (self.lines.append(text), self.parts.append(n)))

        for name, function in (("_losses_at", losses), ("fits_of", fits), ("Progress", progress)):
            monkeypatch.setattr(f"lora_init.keep.dial.{name}", function)
        monkeypatch.setattr("lora_init.keep.dial._outputs", lambda model: dict.fromkeys("ab"))

    def search(self, **asked):
        return _search(self, self.task, self.kept, Rule(**asked), print)


def near(strength, task, rise, weight=None, layers=None):
    layers = layers or dict.fromkeys("ab", strength)
    return Point(pytest.approx(strength), pytest.approx(task), pytest.approx(rise), weight, layers)


ON_CURVE = [near(s, 2 + (s - 0.85) ** 2, s * s) for s in (0.0, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2)]
MISSED = "no strength keeps what was asked for; the one that forgets least was taken"
FITTED = ((0.25, 1.45), 0.3), ((0.0, 0.0), 1.0), ((0.2, 1.3), 3.0)


def test_a_search_fits_each_layer_and_reports_what_else_there_was(monkeypatch):
    """At one strength 0.7 is within 2 % of the best, 0.85; a fit whose strengths are zero is no choice."""
    model = Searched(monkeypatch, *FITTED)
    found = model.search()
    assert [*found.curve] == ON_CURVE and model.limits == pytest.approx((2.04, 1.0))
    first, last = (
        near(0.85, 2.0, 0.0625, 0.3, {"a": 0.25, "b": 1.45}),
        near(0.75, 2.01, 0.04, 3.0, {"a": 0.2, "b": 1.3}),
    )
    assert [*found.fitted] == [first, last] and found.chosen == last and found.rule == str(Rule())
    losses = {"base": 2.7225, "trained": 2.0225, "uniform": 2.0225, "best": 2.0, "chosen": 2.01}
    rises = {"base": 0.0, "trained": 1.0, "uniform": 0.49, "best": 0.7225, "chosen": 0.04}
    for name, change in found.task.items():
        assert change == Change(
            pytest.approx(losses[name]), pytest.approx(losses[name] - 2.0225), pytest.approx(0, abs=1e-6)
        )
        kept = found.keep[name]
        assert kept == Change(pytest.approx(1 + rises[name]), pytest.approx(rises[name]), pytest.approx(0, abs=1e-6))
    assert {*found.task} == {*found.keep} == {*losses} and (found.examples, found.notes) == ((3, 5), ())
    assert [part for part, _ in model.asked] == ["choose"] * 10 + ["report"] * 5
    # One pass at strength 0, six of the curve, four for the report; for six fits three a step, and two readings.
    assert model.parts == [1 + 6 + 4 + 6 * (2 + 3 * 24), *[1] * 7, *[1 + 3 * 24 / 2] * 3]
    assert model.lines[:2] == ["strength 0: task 2.723", "strength 0.4: task 2.203, text to keep +0.160"]
    assert model.lines[7] == "strength 0.85 on average, fitted with weight 0.3: task 2.000, text to keep +0.062"


def test_the_base_is_not_the_best_strength_even_if_it_loses_least(monkeypatch):
    """Then the first of the curve is, 0.4: an adapter of zeros is none."""
    model = Searched(monkeypatch)
    model.best = 0.1
    found = model.search()
    assert model.limits[0] == pytest.approx(2.09 * 1.02) and found.chosen.strength == 0.4
    assert found.task["best"].loss == pytest.approx(2.09) and found.task["base"].loss == pytest.approx(2.01)


@pytest.mark.parametrize(("asked", "fitted", "chosen", "names", "notes"), [
    (dict(uniform=True), (), 0.7, ["best"], []),
    (dict(uniform=True, lose=0.0), (), 0.85, ["best"], []),
    (dict(uniform=True, keep_within=0.5), (), 0.7, [], []),
    (dict(uniform=True, keep_within=0.1), (), 0.4, [], [MISSED]),
    (dict(keep_within=0.5), FITTED, 0.85, ["uniform"], []),
    (dict(keep_within=0.5), (((0.1, 0.1), 0.3),), 0.7, ["uniform"], []),  # the best of all, fitted or not
    (dict(keep_within=0.01), FITTED, 0.75, ["uniform"], [MISSED]),
    (dict(), (((0.1, 0.1), 0.3),), 0.7, ["uniform", "best"], []),
    (dict(strength=0.5), (), 0.5, [], []),
    (dict(strength=1.0), (), 1.0, [], []),
    (dict(strength=1.3), (), 1.3, [], []),
])  # fmt: skip
def test_a_search_chooses_by_the_rule(asked, fitted, chosen, names, notes, monkeypatch):
    model = Searched(monkeypatch, *fitted)
    found = model.search(**asked)
    assert found.chosen.strength == pytest.approx(chosen)
    assert {*found.task} == {"base", "trained", "chosen", *names}
    assert [*found.notes] == notes
    steps = sorted({0.0, chosen, 1.0}) if "strength" in asked else [point.strength for point in ON_CURVE]
    assert [point.strength for point in found.curve] == steps
    assert model.parts[0] == len(steps) + 4 + (0 if "strength" in asked or "uniform" in asked else 6 * 74)
    trained = next(layers for part, layers in model.asked[::-1] if layers == {"a": 1.0, "b": 1.0})
    assert trained and found.task["trained"].loss == pytest.approx(2.0225)


def test_what_is_no_batch_of_a_language_model_is_named():
    ids = torch.arange(8).reshape(2, 4)
    for batches, said in (
        (None, "^dial\\(\\) needs batches of the task, unless strength= says what to do"),
        ([[1, 2]], "^keep: a batch is a list, expected a mapping with input_ids"),
        ([{"input_ids": ids}], r"^keep: a batch has no labels \[batch, length\], as a language model takes them"),
        ([{"input_ids": ids, "labels": ids[0]}], "^keep: a batch has no labels"),
        ([{"input_ids": ids, "labels": ids.tolist()}], "^keep: a batch has no labels"),
        ([{"input_ids": ids, "labels": ids}] * 2, "^keep: 4 examples, and at least 6 are needed"),
    ):
        refused(said, _read, batches, "keep", True)
    first = torch.tensor([[5, -100, -100, -100]] * 6)  # which a model that shifts labels never predicts
    assert len(_read([{"input_ids": first, "labels": first}], "keep", False)) == 1
    refused("^keep: 0 examples, and at least 6", _read, [{"input_ids": first, "labels": first}], "keep", True)


def test_examples_are_told_by_their_tokens_and_labels_without_padding():
    ids, labels = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([[-100, 4, 5], [6, 7, -100]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    whole = {"input_ids": ids, "labels": labels}
    assert _sequences([whole | {"attention_mask": mask}]) == {(3, 4, 5, 4, 5), (6, 7, 6, 7)}
    assert _sequences([whole]) == {(3, 4, 5, 4, 5), (6, 7, 0, 6, 7)}
    assert _sequences([{"labels": labels}, whole]) == {
        (-100, 4, 5, 4, 5), (6, 7, -100, 6, 7), (3, 4, 5, 4, 5), (6, 7, 0, 6, 7),
    }  # fmt: skip


def test_what_a_model_cannot_read_is_named():
    model, batches = trained_model(dtype=torch.float32)
    keep = batches_for("llama", seed=1)
    refused(r"^dial\(\) got a dict for the batches", dial, model, batches[0], keep)
    strange = [{name: value.clone() for name, value in batch.items()} for batch in batches]
    strange[1]["input_ids"][0, 1] = 99
    refused("^a batch: .* Has it a token or a label that is not in", dial, model, strange, keep, strength=0.5)
    cut = {"input_ids": batches[0]["input_ids"], "labels": torch.ones(4, 3, dtype=torch.long)}
    said = (
        r"^a batch has labels \[4, 3\], and with nothing else beside tokens LlamaForCausalLM returns logits \[4, 12\]"
    )
    refused(said, label_losses, model, cut)


def test_examples_are_put_together_with_padding_that_does_not_count():
    rows = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)), "labels": torch.tensor([ids])}
        for ids in ([7, 8, 9], [6])
    ]
    batch = _pad(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[7, 8, 9], [6, -100, -100]]
