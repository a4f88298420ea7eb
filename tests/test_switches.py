"""A text such as "no" would count as true: every switch of every public function refuses what is no True or False.

Switches are found in the signatures, so that a new one enters by itself.
"""

import inspect

import pytest

import lora_init
from tests.collection.made import labelled
from tests.conftest import refused, tiny_llama

# What holds results or describes something, by fields that nobody types; and what has PEFT's own arguments.
RECORDS = {"AdapterInit", "LearningRate", "Policy", "Provenance", "Start"}
OF_PEFT = {"get_eva_state_dict", "initialize_lora_eva_weights"}
ALGORITHMS = {"ExactPCA", "IncrementalSVD"}


@pytest.fixture(scope="module")
def stats():
    return lora_init.collect(tiny_llama(), labelled("llama")[:2], rank=2)


# How each is called, for what is looked at before the switch.
CALLS = {
    "allocate_ranks": lambda stats: [stats],
    "build_adapter": lambda stats: [stats, 2],
    "check_fit": lambda stats: ["trained"],
    "collect": lambda stats: [tiny_llama(), labelled("llama")],
    "compare": lambda stats: ["model", "data", "output"],
    "dial": lambda stats: [tiny_llama()],
    "export_adapter": lambda stats: ["trained", "output"],
    "initialize": lambda stats: [tiny_llama(), labelled("llama")],
    "learning_rate": lambda stats: [tiny_llama(), labelled("llama")],
    "load_batches": lambda stats: [["a text"], None],
    "replay": lambda stats: [tiny_llama(), None],
    "StartCallback": lambda stats: [],
}


def switches(function):
    return [one.name for one in inspect.signature(function).parameters.values() if isinstance(one.default, bool)]


EVERY = {name: switches(getattr(lora_init, name)) for name in lora_init.__all__ if callable(getattr(lora_init, name))}


def test_every_function_with_a_switch_is_called_below():
    with_switches = {name for name, found in EVERY.items() if found}
    assert with_switches - RECORDS - OF_PEFT - ALGORITHMS == {*CALLS, "ServingCallback"}


@pytest.mark.parametrize(("name", "switch"), [(name, switch) for name in CALLS for switch in EVERY[name]])
@pytest.mark.parametrize("value", ["no", 1, None])
def test_what_is_neither_true_nor_false_is_refused(name, switch, value, stats):
    refused(f"{switch}={value!r}", getattr(lora_init, name), *CALLS[name](stats), **{switch: value})


def test_methods_refuse_it_too(stats, tmp_path):
    made = lora_init.build_adapter(stats, 2)
    refused("overwrite='no', expected True or False", made.save_pretrained, tmp_path / "a", overwrite="no")
    refused("correct_base='no', expected True or False", made.apply, tiny_llama(), correct_base="no")
