"""The steps from a model and data to an adapter stand once, and keywords are sorted once."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_init import LoraInitError, collect, initialize, load_batches
from lora_init.adapters.directory import carried
from lora_init.adapters.init_config import InitConfig
from lora_init.building import pipeline
from lora_init.building.pipeline import Examples, build, check, choose, collect_for, fit_to, read, split, take
from lora_init.collection.processes import Processes
from lora_init.layers.targets import find_targets
from lora_init.loading.batches import Batches
from tests.collection.made import labelled
from tests.conftest import refused, tiny_bert, tiny_llama, tiny_vit
from tests.loading.made import byte_tokenizer


@pytest.mark.parametrize(("wrong", "right"), [("exclude_module", "exclude_modules"), ("lora_alfa", "lora_alpha")])
def test_a_misspelt_keyword_is_refused_before_anything_is_read(wrong, right):
    def never():
        raise AssertionError("a batch was read")
        yield

    with pytest.raises(LoraInitError, match=rf"^initialize\(\) has no argument {wrong}=. Did you mean {right}\?"):
        initialize(tiny_llama(), never(), **{wrong: ["lm_head"]})


@pytest.mark.parametrize(("n", "left"), [(257, 241), (300, 256)])
def test_what_a_step_is_measured_on_is_no_part_of_the_statistics(n, left):
    rows = [{"text": f"row {i}"} for i in range(n)]
    config = choose(InitConfig.from_arguments("test", "lora-one", samples=256, batch_size=4), classifies=False)
    batches, beyond = read(rows, byte_tokenizer(), config, seq2seq=False, known=())
    found = split(batches, beyond)
    assert [sum(len(b["input_ids"]) for b in part) for part in (found.held_out, found.batches)] == [16, left]
    if left < 256:  # a statistics file of the whole sample is another one
        assert found.batches.settings["set aside"] == 16 and found.data == f"{batches.description}, 16 set aside"
    else:
        assert found.data == batches.description and "set aside" not in found.batches.settings


@pytest.mark.parametrize("offset", [0, 40])
def test_examples_to_measure_on_come_right_after_those_to_learn_from(offset):
    """Both together are what one reading of as many gives; nothing that was to be passed over is among them."""
    rows, options = [{"text": f"row {i}"} for i in range(99)], dict(offset=offset, batch_size=4)
    config = choose(InitConfig.from_arguments("test", "lora-one", samples=20, **options), classifies=False)
    batches, beyond = read(rows, byte_tokenizer(), config, seq2seq=False, known=())
    n = sum(len(batch["input_ids"]) for batch in beyond)
    assert n > 0
    whole = load_batches(rows, byte_tokenizer(), samples=20 + n, needs_labels=True, **options)
    assert texts_of(batches) | texts_of(beyond) == texts_of(whole) and not texts_of(batches) & texts_of(beyond)


def texts_of(batches):
    rows = [row for one in batches for row in zip(one["input_ids"], one["attention_mask"], strict=True)]
    return {tuple(ids[mask.bool()].tolist()) for ids, mask in rows}


def test_all_processes_decide_by_the_mean_of_their_losses(monkeypatch):
    """Each has held-out examples of its own. Another process stands for all others here: it measures 2 more."""
    model, batches = tiny_llama(), labelled("llama")
    config = choose(InitConfig.from_arguments("test", "lora-one", gamma=64.0), classifies=False)
    stats = collect(model, batches[:3], rank=2, gradients=True)
    alone = build(model, stats, 2, config, batches[3:])
    monkeypatch.setattr(Processes, "gather", lambda self, loss: [loss, loss + 2.0])
    found = build(model, stats, 2, config, batches[3:])
    assert found.losses == pytest.approx([loss + 1.0 for loss in alone.losses])


class OfClasses(list):
    classes = ("a", "b", "c")  # as `load_batches` says of labelled data


def test_a_recommended_start_without_its_gradients_becomes_the_usual_one():
    """Convolutions have no gradients here. One that was asked for is not exchanged."""
    (conv,) = (name for name, module in tiny_vit().named_modules() if isinstance(module, nn.Conv2d))
    linear = next(iter(find_targets(tiny_vit()).layers))
    layers, batches = [linear, conv], OfClasses(labelled("vit"))
    with pytest.warns(UserWarning, match="collect without gradients. So the start is eva, from what the layers read.$"):
        adapted = initialize(tiny_vit(), batches, rank=2, target_modules=layers, gradients=True)
    assert carried(adapted.peft_config["default"].to_dict())["method"] == "eva"
    refused(conv, initialize, tiny_vit(), batches, rank=2, target_modules=layers, method="natural-gradient")
    adapted = initialize(tiny_vit(), batches, rank=2, target_modules=[linear])
    assert carried(adapted.peft_config["default"].to_dict())["method"] == "natural-gradient"


def options(method="eva", classifies=False, **given):
    return choose(InitConfig.from_arguments("test", method, **given), classifies)


@pytest.mark.parametrize(("method", "classifies", "start"), [
    (None, False, "eva"), (None, True, "natural-gradient"), ("eva", True, "eva"), ("random", False, "random"),
])  # fmt: skip
def test_the_start_is_the_one_that_was_asked_for_or_the_one_for_the_task(method, classifies, start):
    assert options(method, classifies).start.name == start


@pytest.mark.parametrize(("method", "given", "words"), [
    ("eva", dict(weights="float"), "weights='float' is for the start qera. Leave it out."),
    ("eva", dict(unchecked=True), "unchecked=True is for the start qera. Leave it out."),
    ("lora-ga", dict(rank=2, rho=1.5), "method='lora-ga' with rho=1.5: it gives all layers one rank. Leave rho out."),
    ("eva", dict(gamma=2.0), "gamma=2.0 with method='eva': it is a positive number, for 'natural-gradient-step', "),
    ("qera", dict(weights="float", unchecked=True), None),
    ("lora-ga", dict(rank=2, rho=1.2), None),  # which rounds to the rank
    ("eva", dict(rank=2, rho=4.0, unchecked=False), None),
])  # fmt: skip
def test_options_that_do_not_belong_to_a_start_are_refused_before_anything_else(method, given, words):
    config = options(method, **given)
    if words is None:
        check(config)
    else:
        assert refused(".", check, config).startswith(words)


def test_an_occupied_place_is_refused_before_anything_else(tmp_path):
    (tmp_path / "thesis.tex").touch()
    refused("exists and is not empty", check, options(), output=tmp_path)
    check(options(), output=tmp_path / "new", overwrite=True)


@pytest.mark.parametrize(("make", "given", "classes", "task", "whole"), [
    (tiny_llama, {}, (), None, []),
    (tiny_llama, dict(modules_to_save=["lm_head"]), (), None, ["lm_head"]),
    (tiny_llama, dict(task_type="CAUSAL_LM"), (), "CAUSAL_LM", []),
    (tiny_bert, {}, (), "SEQ_CLS", []),
    (tiny_bert, dict(task_type="FEATURE_EXTRACTION"), (), "FEATURE_EXTRACTION", ["classifier"]),
    (tiny_bert, dict(task_type="FEATURE_EXTRACTION", modules_to_save=["classifier"]), (), "FEATURE_EXTRACTION",
     ["classifier"]),
    (tiny_bert, {}, ("a", "b"), "SEQ_CLS", []),
    (lambda: tiny_bert("TokenClassification"), {}, (), "TOKEN_CLS", []),
    (tiny_vit, {}, (), None, ["classifier"]),
    (lambda: nn.Sequential(nn.Linear(2, 2)), {}, ("a",), "SEQ_CLS", []),
])  # fmt: skip
def test_a_head_is_trained_by_its_task_or_by_its_name(make, given, classes, task, whole):
    fitted = fit_to(make(), options(**given), classes)
    assert (fitted.layers.task_type, fitted.shape.modules_to_save) == (task, whole)


def test_a_model_whose_head_counts_other_classes_is_refused():
    model = tiny_bert()
    model.config.id2label = {0: "no", 1: "yes"}
    for classes in (("no", "yes"), ("LABEL_0", "LABEL_1")):
        fit_to(model, options(), classes)
    for classes, words in (
        (("yes", "no"),
         "the data count the classes as yes, no, the model's head as no, yes. Pass "
         "known_classes=tuple(model.config.id2label.values()) to load_batches."),
        (("a", "b", "c"),
         "the data have 3 classes, the model's head 2. Load the model by AutoModelForSequenceClassification with "
         "num_labels=3."),
    ):  # fmt: skip
        assert refused(".", fit_to, model, options(), classes) == words
    refused("^the data have 2 classes, the model's head 0. ", fit_to, tiny_llama(), options(), ("a", "b"))
    drawn = ["bert.pooler.dense.weight"]
    refused("^the weights of bert.pooler.dense are new and random", fit_to, model, options(), (), drawn)


def loaded_with(monkeypatch, config, n=64, beyond=8, **given):
    """Read through a `load_batches` that notes what it is asked for."""
    asked = []

    def load(*arguments, **named):
        asked.append((arguments, named))
        size = n if len(asked) == 1 else beyond
        if not size:
            raise LoraInitError("there are none")
        return Batches([dict.fromkeys(("input_ids", "labels"), torch.arange(size)[:, None])])

    monkeypatch.setattr(pipeline, "load_batches", load)
    return asked, read("source", "tokenizer", config, **{"seq2seq": False, "known": ("a", "b")} | given)


USUAL = dict(
    template=None, completion=None, format=None, subset=None, split="train", seed=0, label=None, samples=256,
    batch_size=4, max_length=512, offset=0, seq2seq=False, needs_labels=False, known_classes=(),
)  # fmt: skip


@pytest.mark.parametrize(("given", "seq2seq", "changes"), [
    ({}, False, {}),
    (dict(template="{a}", split="test", seed=3, samples=5, offset=2), False,
     dict(template="{a}", split="test", seed=3, samples=5, offset=2)),
    ({}, True, dict(seq2seq=True)),
    (dict(label="kind"), True, dict(label="kind", known_classes=("a", "b"))),
    (dict(label="kind", known_classes=("b", "a")), False, dict(label="kind", known_classes=("b", "a"))),
    (dict(seq2seq=False, needs_labels=True), True, dict(needs_labels=True)),
    (dict(gradients=True), False, dict(needs_labels=True)),
    (dict(token_mask="labels"), False, dict(needs_labels=True)),
    (dict(token_mask="labels", needs_labels=False), False, {}),
])  # fmt: skip
def test_what_was_left_open_is_read_as_it_fits_the_model_and_the_pass(given, seq2seq, changes, monkeypatch):
    config = options(**{"batch_size": 4, "samples": 256, "max_length": 512} | given)
    asked, (batches, more) = loaded_with(monkeypatch, config, seq2seq=seq2seq)
    assert asked == [(("source", "tokenizer"), USUAL | changes)]
    assert batches.n == 64 and more == ()


def test_examples_beyond_the_sample_are_read_where_a_loss_is_measured(monkeypatch):
    config = options("lora-one", batch_size=8, samples=20, offset=3)
    asked, (_, more) = loaded_with(monkeypatch, config)
    first, second = (named for _, named in asked)
    assert (first["offset"], first["samples"]) == (3, 20)
    assert second == first | dict(offset=23, samples=32) and more.n == 8
    assert loaded_with(monkeypatch, config, beyond=0)[1][1] == ()  # there are none
    for given in (dict(samples=None), dict(gamma=2.0)):
        assert len(loaded_with(monkeypatch, options("lora-one", **given))[0]) == 1


@pytest.mark.parametrize(("n", "words"), [(1, "1 example, and"), (15, "15 examples, and"), (16, None)])
def test_a_few_examples_are_told_of(n, words, monkeypatch, recwarn):
    loaded_with(monkeypatch, options(), n=n)
    said = f"{words} fewer than 16 say little about the data. Give more."
    assert [str(one.message) for one in recwarn] == ([said] if words else [])


@pytest.mark.parametrize(("given", "columns"), [
    ([{"a": "text", "b": 3}], " with the columns a, b"),
    (["text"], ""),
    ([{"messages": [{"role": "user", "content": "x"}]}], " with the columns messages"),
    ([[{"role": "user"}]], ""),
])  # fmt: skip
def test_texts_in_place_of_batches_are_refused(given, columns):
    words = f"batches are rows of text{columns}, and tokens are needed. Pass tokenizer=, the model's."
    assert refused(".", take, given, tiny_llama(), options(), None) == words


@pytest.mark.parametrize("given", [
    [{"input_ids": torch.ones(1, 2), "text": "a"}], [torch.ones(2, 3)], [[{"x": torch.ones(1), "text": "a"}]], [[]],
    [], (), [{}],
])  # fmt: skip
def test_batches_are_taken_as_they_are(given):
    found = take(given, nn.Sequential(nn.Linear(2, 2)), options(), None)
    assert [*found.batches] == [*given] and (found.held_out, found.classes, found.data) == ((), (), "")


def test_options_of_reading_are_refused_beside_batches():
    words = "template, samples: only texts are read like that. Pass tokenizer=, or leave it out."
    assert refused(".", take, [], tiny_llama(), options(samples=4, template="x", rank=2), None) == words


def test_what_the_data_say_of_themselves_goes_along():
    batches = OfClasses(labelled("llama", n_batches=20))
    batches.description = "my rows"
    for measured in (True, False):
        found = split(batches, measured=measured)
        assert (found.classes, found.data) == (("a", "b", "c"), "my rows")
        assert len(found.held_out) == (4 if measured else 0)
    assert (found.batches, found.held_out) == (batches, ())


def test_a_pass_is_asked_for_what_the_options_say_and_for_spare_ranks(monkeypatch):
    asked = []
    monkeypatch.setattr(pipeline, "collect", lambda *given, **named: asked.append((given, named)))
    model, examples = tiny_llama(), Examples("batches", data="in words")
    config = options(rank=3, target_modules=["q_proj"], seed=2, tolerance=0.5, max_batches=7)
    assert collect_for(model, examples, config)[1] is config
    named = dict(
        target_modules=["q_proj"], exclude_modules=None, target_parameters=None, task_type=None, gradients=False,
        center=True, token_mask="attention", max_batches=7, skip_bad_batches=0, seed=2, tolerance=0.5, data="in words",
        overwrite=False, rank=3, rho=pipeline.SPARE,
    )  # fmt: skip
    assert asked == [((model, "batches"), named)]
    collect_for(model, examples, options("grad-a", data="mine", rho=1.5), rho=5.0)
    assert {name: asked[1][1][name] for name in ("data", "gradients", "rho")} == dict(
        data="mine", gradients=True, rho=5.0
    )
    collect_for(model, examples, options(rho=4.0))
    assert asked[2][1]["rho"] == 4.0


def test_a_loss_decides_by_the_batches_that_were_held_out_and_the_functions_that_were_given(monkeypatch):
    """`find_step_size` measures by the mean loss of these batches, and a gamma that was given is measured alone."""
    model, asked = tiny_llama(), []
    monkeypatch.setattr(pipeline, "mean_loss", lambda model, **named: asked.append(named) or 2.5)
    monkeypatch.setattr(
        pipeline, "find_step_size", lambda model, build, loss_of, gamma: (model, build, loss_of(model), gamma)
    )
    given = dict(forward=lambda model, batch: None, loss=lambda output, batch: None)
    config = options("lora-one", gamma=2.0, **given)
    found = build(model, "stats", 2, config, ["held out"])
    assert (found[0], found[2], found[3]) == (model, 2.5, 2.0) and asked == [dict(batches=["held out"], **given)]
    built = []
    monkeypatch.setattr(pipeline, "build_from", lambda context, ranks: built.append((context, ranks)))
    found[1](), found[1](8.0)
    assert [(context.shape.gamma, context.start, context.stats, ranks) for context, ranks in built] == [
        (gamma, config.start, "stats", 2) for gamma in (2.0, 8.0)
    ]
    for method, held_out in (("lora-one", ()), ("eva", ["held out"])):
        build(model, "stats", 3, options(method, seed=6), held_out)
        assert built[-1][0].seed == 6 and built[-1][0].model is model
    assert len(asked) == 1


def test_a_correction_is_checked_by_the_loss_of_what_was_held_out(monkeypatch):
    asked = []
    monkeypatch.setattr(pipeline, "QuantizationErrors", lambda *given: ("errors of", *given))
    monkeypatch.setattr(pipeline, "build_from", lambda context, ranks: context)
    monkeypatch.setattr(
        pipeline, "loss_or_distance", lambda *given, **named: asked.append((given, named)) or (lambda m: 1.5)
    )
    monkeypatch.setattr(
        pipeline,
        "with_losses",
        lambda model, init, errors, loss_of, unchecked: (init, errors, loss_of(model), unchecked),
    )
    model, stats = tiny_llama(), SimpleNamespace(targets="targets")
    errors = ("errors of", model, "targets", "float")
    config = options("qera", weights="float", unchecked=True)
    init, used, loss, unchecked = build(model, stats, 2, config, ["held out"])
    assert (init.errors, used, loss, unchecked) == (errors, errors, 1.5, True)
    assert asked == [((model, errors), dict(batches=["held out"], forward=None, loss=None))]
    assert build(model, stats, 2, config).errors == errors  # not measured
    assert build(model, stats, 2, config, errors=("there",)).errors == ("there",)
