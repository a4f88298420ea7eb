"""The options of an initialization: how their texts are read, what is refused, and which part each one is in."""

import json
from dataclasses import fields
from fractions import Fraction
from inspect import Parameter, signature
from pathlib import Path

import numpy as np
import pytest
from peft import TaskType

from lora_init.adapters.init_config import (
    Correction,
    InitConfig,
    Layers,
    Options,
    PassOptions,
    Ranks,
    Reading,
    Sample,
    Shape,
    read_modules,
    read_names,
    takes,
    unescape,
)
from lora_init.comparison.tasks import LoadingOptions
from lora_init.starts.starts import find_start
from tests.conftest import refused


@pytest.mark.parametrize(("text", "modules"), [
    (None, None),
    ("", None),
    ("all-linear", "all-linear"),
    ("All_Linear", "All_Linear"),
    ("attention", "attention"),
    ("cross_attention", "cross_attention"),
    ("q_proj", ["q_proj"]),
    (" q_proj, 0.mlp.up-proj ,", ["q_proj", "0.mlp.up-proj"]),
    ("q_proj|k_proj", "q_proj|k_proj"),
    (r".*\.q_proj", r".*\.q_proj"),
])  # fmt: skip
def test_names_with_commas_are_a_list_and_all_else_is_a_word_or_an_expression(text, modules):
    assert read_modules(text) == modules


def test_words_of_a_shell_are_read_as_they_are_meant():
    assert [read_names(text) for text in (None, "", " a ,b,, c, ")] == [[], [], ["a", "b", "c"]]
    assert [unescape(text) for text in (None, r"{a}\n\t{b}\x", "{a}")] == [None, "{a}\n\t{b}\\x", "{a}"]


@pytest.mark.parametrize(("part", "given", "words"), [
    (Ranks, dict(rank=0), "rank=0, expected a whole number of at least 1."),
    (Ranks, dict(rank=1.5), "rank=1.5, expected a whole number of at least 1."),
    (Ranks, dict(rho=0.5), "rho=0.5, expected a number of at least 1."),
    (Sample, dict(samples=0), "samples=0, expected a whole number of at least 1."),
    (Sample, dict(batch_size=0), "batch_size=0, expected a whole number of at least 1."),
    (Sample, dict(max_length=1), "max_length=1, expected a whole number of at least 2."),
    (PassOptions, dict(max_batches=0), "max_batches=0, expected a whole number of at least 1."),
    (PassOptions, dict(skip_bad_batches=-1), "skip_bad_batches=-1, expected a whole number of at least 0."),
    (PassOptions, dict(seed=-1), "seed=-1, expected a whole number of at least 0."),
    (PassOptions, dict(center="no"), "center='no', expected True or False."),
    (PassOptions, dict(overwrite=1), "overwrite=1, expected True or False."),
    (Shape, dict(use_dora=None), "use_dora=None, expected True or False."),
    (Correction, dict(unchecked="yes"), "unchecked='yes', expected True or False."),
    (Reading, dict(template=3), "template=3, expected a text."),
    (Reading, dict(format=["text"]), "format=['text'], expected a text."),
    (Reading, dict(split=None), "split=None, expected a text."),
    (Sample, dict(known_classes="a"), "known_classes='a', expected a list of texts."),
    (Sample, dict(offset=0.5), "offset=0.5, expected a whole number."),
    (Sample, dict(seq2seq="no"), "seq2seq='no', expected True or False."),
    (Sample, dict(label=np.array(["a", "b"])), "label=array(['a', 'b'], dtype='<U1'), expected a text."),
    (Layers, dict(target_modules=np.ones(1)), "target_modules=array([1.]), expected a text or a list of texts."),
    (Layers, dict(exclude_modules=0), "exclude_modules=0, expected a text or a list of texts."),
    (Layers, dict(target_parameters="up"), "target_parameters='up', expected a list of texts."),
    (Layers, dict(task_type=["CAUSAL_LM"]), "task_type=['CAUSAL_LM'], expected a text."),
    (Shape, dict(lora_dropout="0.1"), "lora_dropout='0.1', expected a number."),
    (Shape, dict(lora_alpha=True), "lora_alpha=True, expected a number."),
    (Shape, dict(modules_to_save=3), "modules_to_save=3, expected a list of texts."),
    (Shape, dict(modules_to_save=["score", 3]), "modules_to_save=['score', 3], expected a list of texts."),
    (Correction, dict(weights=3), "weights=3, expected a text or a path."),
    (PassOptions, dict(loss="mean"), "loss='mean', expected a function."),
    (PassOptions, dict(data=3), "data=3, expected a text."),
    (PassOptions, dict(statistics=0), "statistics=0, expected a text or a path."),
])  # fmt: skip
def test_a_number_below_the_least_and_a_value_of_another_kind_are_refused(part, given, words):
    assert refused(".", part, **given) == words


def test_the_least_numbers_are_taken_and_so_is_none_for_what_is_found_later():
    assert (Ranks(1, 1).rank, Ranks(1, 1.5).rho, Sample(samples=None).samples) == (1, 1.5, None)
    assert Sample(samples=1, batch_size=1, max_length=2).max_length == 2
    assert PassOptions(max_batches=1, skip_bad_batches=0, seed=0, tolerance=0.0).tolerance == 0.0


class Place:
    """A path of another library, as `tmpdir` of pytest is one."""

    def __fspath__(self):
        return "a"


def test_lists_and_paths_of_every_kind_are_taken_and_numbers_of_numpy():
    assert isinstance(PassOptions(statistics=Place()).statistics, Place)
    for names in (["up"], ("up",), {"up"}, {"up": 1}.keys()):
        assert Layers(target_modules=names).target_modules == names
    assert Layers(target_parameters=["a"], exclude_modules=None).exclude_modules is None
    assert Layers(task_type=TaskType.CAUSAL_LM).task_type == "CAUSAL_LM" and PassOptions(data=None).data is None
    assert Shape(modules_to_save=None, lora_alpha=np.float32(2)).lora_alpha == 2
    small = Shape(lora_alpha=np.float16(8)).lora_alpha  # its square times 1e-4 would be 0 in 16 bits
    assert small == 8 and type(small) is float
    assert json.dumps(Shape(lora_dropout=Fraction(1, 8)).lora_dropout) == "0.125"
    assert type(LoadingOptions(data_seed=np.int64(3)).data_seed) is int
    assert PassOptions(statistics=Path("a"), loss=len, tolerance=1, seed=np.int64(3)).seed == 3


def test_each_option_goes_into_the_part_that_has_it():
    given = dict(rank=3, split="test", samples=5, task_type="CAUSAL_LM", use_dora=True, unchecked=True, seed=7)
    config = InitConfig.from_arguments("taker()", "random", **given)
    assert config == InitConfig(
        "random", ranks=Ranks(3), reading=Reading(split="test"), sample=Sample(samples=5),
        layers=Layers(task_type="CAUSAL_LM"), shape=Shape(use_dora=True), correction=Correction(unchecked=True),
        run=PassOptions(seed=7), given=given,
    )  # fmt: skip
    changed = config.with_options(rank=4, seed=8)
    assert changed == InitConfig(**vars(config) | dict(ranks=Ranks(4), run=PassOptions(seed=8)))
    assert config.with_options() == config
    parts = [option.name for _, part in config._parts() for option in fields(part)]
    assert sorted(parts) == sorted({*parts}) == sorted(option.name for option in fields(Options))


def test_an_argument_that_there_is_not_is_refused_with_the_nearest_of_all_that_there_are():
    for wrong, right in (
        ("rnk", "rank"),
        ("tokeniser", "tokenizer"),
        ("learning_rat", "learning_rate"),
        ("confg", "config"),
        ("adapter_nam", "adapter_name"),
    ):
        words = f"^taker.. has no argument {wrong}=. Did you mean {right}[?]"
        refused(words, InitConfig.from_arguments, "taker()", **{wrong: 1})


@pytest.mark.parametrize(("method", "given", "gradient", "measures"), [
    ("eva", {}, False, False),
    ("eva", dict(gradients=True), True, False),
    ("grad-a", {}, True, False),
    ("lora-one", {}, True, True),
    ("lora-one", dict(gamma=2.0), True, False),
    ("qera", dict(gamma=2.0), False, True),
])  # fmt: skip
def test_a_start_says_whether_the_pass_runs_backward_and_a_loss_is_measured(method, given, gradient, measures):
    config = InitConfig(start=find_start(method)).with_options(**given)
    assert (config.needs_gradient, config.measures) == (gradient, measures)


def test_what_takes_options_shows_them_without_what_the_command_line_needs():
    def function(*args, **options) -> int:
        return len(args) + len(options)

    shown = takes(Options)(function)
    assert shown is function and shown(1, rank=2) == 2
    parameters, declared = signature(function).parameters, signature(Options).parameters
    assert [*parameters] == [*declared] and signature(function).return_annotation is int
    assert [(one.kind, one.default) for one in parameters.values()] == [
        (one.kind, one.default) for one in declared.values()
    ]
    assert parameters["rank"].annotation is int and parameters["samples"].annotation == int | None
    assert [name for name, one in parameters.items() if one.kind is Parameter.POSITIONAL_OR_KEYWORD] == ["rank", "rho"]


def test_a_parameter_that_is_no_option_keeps_its_annotation():
    def declared(own: complex, rank: int = 3) -> None: ...

    @takes(declared)
    def function(*args, **options) -> str:
        return ""

    own, rank = signature(function).parameters.values()
    assert (own.annotation, rank.annotation, rank.default) == (declared.__annotations__["own"], int, 3)


def test_what_is_given_does_not_change_afterwards():
    config = InitConfig.from_arguments("taker()", rank=3)
    with pytest.raises(AttributeError):
        config.method = "eva"
    assert InitConfig().given == {}
