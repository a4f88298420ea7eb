"""The steps from a model and data to an adapter stand once, and keywords are sorted once."""

import ast
import inspect
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest

import lora_init
from lora_init import LoraInitError, build_adapter, collect, initialize, load_batches
from lora_init.adapters.asked import Asked, Layers, Pass, Ranks, Reading, Sample, Shape
from lora_init.adapters.pipeline import read, split
from lora_init.adapters.starts import find_start
from tests.conftest import tiny_llama
from tests.loading.made import byte_tokenizer

PARTS = (Reading, Sample, Ranks, Layers, Shape, Pass)


def test_each_step_has_one_caller():
    """Whoever needs one calls the pipeline."""
    calls = Counter()
    for file in Path(lora_init.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                calls[node.func.id] += 1
    assert {name: calls[name] for name in ("set_aside", "with_losses")} == {"set_aside": 1, "with_losses": 1}


def test_no_name_is_in_two_parts():
    names = Counter(one.name for part in PARTS for one in fields(part))
    assert max(names.values()) == 1


@pytest.mark.parametrize("function", [collect, load_batches, build_adapter])
def test_every_keyword_of_a_step_has_a_place(function):
    """With the same default, unless that depends on more, None then; `collect` keeps components to spare (`SPARE`)."""
    known = {one.name: one.default for part in PARTS for one in fields(part)}
    beside = {"model", "batches", "source", "tokenizer", "stats", "ranks", "method", "errors", "config"}
    beside |= {"rho"}  # collect keeps twice the components, so that ranks can be planned from them
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in beside:
            default = getattr(parameter.default, "value", parameter.default)
            assert known[name] == default or None in (known[name], default) or name == "rho", name


def test_the_signature_shows_every_keyword():
    shown = inspect.signature(initialize).parameters
    assert {one.name for part in PARTS for one in fields(part)} <= shown.keys() and "options" not in shown


@pytest.mark.parametrize(("wrong", "right"), [("exclude_module", "exclude_modules"), ("lora_alfa", "lora_alpha")])
def test_a_misspelt_keyword_is_refused_before_anything_is_read(wrong, right):
    def never():
        raise AssertionError("a batch was read")
        yield

    with pytest.raises(LoraInitError, match=rf"^initialize\(\) has no argument {wrong}=. Did you mean {right}\?"):
        initialize(tiny_llama(), never(), **{wrong: ["lm_head"]})


def test_reading_without_a_tokenizer_is_refused():
    with pytest.raises(LoraInitError, match=r"^template, label: only texts are read like that. Pass tokenizer="):
        initialize(tiny_llama(), [], template="{text}", label="kind")


def test_few_examples_are_warned_of():
    with pytest.warns(UserWarning, match="^3 examples, and fewer than 16 say little"):
        initialize(tiny_llama(vocab_size=300), [{"text": "some text"}] * 3, 1, tokenizer=byte_tokenizer())


@pytest.mark.parametrize(("n", "left"), [(257, 241), (300, 256)])
def test_what_a_step_is_measured_on_is_no_part_of_the_statistics(n, left):
    rows, start = [{"text": f"row {i}"} for i in range(n)], find_start("lora-one")
    asked = Asked.by("test", samples=256, batch_size=4)
    batches, beyond = read(rows, byte_tokenizer(), asked, start, seq2seq=False, known=())
    found = split(batches, beyond)
    assert [sum(len(b["input_ids"]) for b in part) for part in (found.aside, found.batches)] == [16, left]
    if left < 256:  # a statistics file of the whole sample is another one
        assert found.batches.settings["set aside"] == 16 and found.data == f"{batches.description}, 16 set aside"
    else:
        assert found.data == batches.description and "set aside" not in found.batches.settings
