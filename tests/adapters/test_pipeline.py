"""The steps from a model and data to an adapter stand once, and keywords are sorted once."""

import sys

import pytest
import torch

from lora_init import LoraInitError, initialize
from lora_init.adapters.asked import Asked
from lora_init.adapters.pipeline import choose, read, split
from tests.commands import run, save_model, write_data
from tests.conftest import tiny_llama
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
    asked = choose(Asked.by("test", "lora-one", samples=256, batch_size=4), classifies=False)
    batches, beyond = read(rows, byte_tokenizer(), asked, seq2seq=False, known=())
    found = split(batches, beyond)
    assert [sum(len(b["input_ids"]) for b in part) for part in (found.aside, found.batches)] == [16, left]
    if left < 256:  # a statistics file of the whole sample is another one
        assert found.batches.settings["set aside"] == 16 and found.data == f"{batches.description}, 16 set aside"
    else:
        assert found.data == batches.description and "set aside" not in found.batches.settings


def receivers(value, call):
    """Name the functions of the package that receive a value as an argument of its own while something is called."""
    found = set()

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and frame.f_globals.get("__name__", "").startswith("lora_init."):
            arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if any(type(frame.f_locals.get(name)) is float and frame.f_locals[name] == value for name in arguments):
                found.add(f"{frame.f_globals['__name__']}.{code.co_qualname}")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def test_what_was_asked_for_travels_inside_of_one_object(tmp_path):
    model, alpha = tiny_llama(), 37.25
    save_model(model, tmp_path / "model")
    write_data(tmp_path)
    options = ["--rank", "2", "--lora-alpha", alpha, "--output", tmp_path / "adapter"]
    by_command = receivers(alpha, lambda: run("init", tmp_path / "model", tmp_path / "text.txt", *options))
    assert (tmp_path / "adapter/adapter_config.json").exists() and 0 < len(by_command) <= 25, by_command
    batches = [{"input_ids": torch.tensor([[1, 2, 3]])}]
    by_function = receivers(alpha, lambda: initialize(model, batches, rank=2, lora_alpha=alpha))
    assert 0 < len(by_function) <= 12, by_function
