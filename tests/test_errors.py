"""How an error or a warning reaches whoever caused it."""

import inspect
import math
from pathlib import Path

import numpy as np
import pytest

import lora_init
from lora_init import errors
from lora_init.errors import (
    LoraInitError,
    LoraInitWarning,
    check_number,
    check_switches,
    did_you_mean,
    explain,
    first_line,
    in_one_line,
    in_python,
    is_number,
    is_out_of_memory,
    require,
    require_version,
    warn,
)
from tests.conftest import refused, tiny_llama
from tests.loading.made import byte_tokenizer

# Calls of very different depth, with what they warn of.
CALLS = {
    "targets": (lambda: lora_init.find_targets(tiny_llama(), exclude_modules=["no_proj"]), "matches no layer"),
    "a few examples": (
        lambda: lora_init.initialize(
            tiny_llama(vocab_size=300), [{"text": f"row {'abc' * n}"} for n in range(3)], rank=2,
            tokenizer=byte_tokenizer(),
        ),
        "say little about the data",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_warning_names_the_line_that_called(case):
    call, said = CALLS[case]
    with pytest.warns(LoraInitWarning, match=said) as warned:
        call()
    found = next(one for one in warned if said in str(one.message))
    first, lines = inspect.getsourcelines(call)[1], len(inspect.getsourcelines(call)[0])
    assert found.filename == __file__ and first <= found.lineno <= first + lines


def test_a_warning_of_a_hook_that_a_library_calls_names_the_line_of_the_user():
    ours, theirs = {"__name__": "lora_init.ours", "warn": warn}, {"__name__": "theirs"}
    exec("def begin(library): library(hook)\ndef hook(): warn('few rows')", ours)
    exec("def library(hook): hook()", theirs)
    with pytest.warns(LoraInitWarning, match="few rows") as warned:
        ours["begin"](theirs["library"])
    assert warned[0].filename == __file__


@pytest.mark.parametrize(("error", "line"), [
    (ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.pyplot"),
     "this needs matplotlib, which is not installed. Install it: pip install 'lora-init[plots]'"),
    (ImportError("cannot import name 'f'", name="sklearn"),
     "this needs sklearn, which is not installed. Install it: pip install 'lora-init[compare]'"),
    (ModuleNotFoundError("No module named 'mine'\nand more", name="mine"),
     "unexpected ModuleNotFoundError: No module named 'mine'. LORA_INIT_DEBUG=1 shows where."),
    (ImportError("of no module"), "unexpected ImportError: of no module. LORA_INIT_DEBUG=1 shows where."),
    (FileNotFoundError(2, "No such file or directory", "a.json"), "a.json: No such file or directory."),
    (OSError("x is not a local folder"), "x is not a local folder."),
    (OSError(28, "No space left on device"), "[Errno 28] No space left on device."),
    (OSError(5, "", "a.json"), "[Errno 5] : 'a.json'."),
    (MemoryError(), "out of memory. Try a smaller --batch-size or --max-length, or --dtype bfloat16."),
])  # fmt: skip
def test_what_others_raise_is_one_line(error, line):
    assert explain(error) == line


@pytest.mark.parametrize(("installed", "enough"), [
    ("0.19.0", True), ("0.19.0.dev0", True), ("0.20", True), ("1.0.rc1", True), ("0.18.9", False), ("0.9.1", False),
])  # fmt: skip
def test_releases_are_compared_as_numbers(installed, enough, monkeypatch):
    monkeypatch.setattr(errors, "version", {"peft": installed}.__getitem__)
    if enough:
        require_version("peft", "0.19", "this start")
    else:
        said = f"^this start needs peft 0.19 or newer, and {installed} is installed.$"
        refused(said, require_version, "peft", "0.19", "this start")


def test_an_error_that_gets_a_place_and_a_remedy_keeps_its_options():
    error = LoraInitError("{rank} is too much.", rank=8).within("layer 'q'", "Take {rho}.", rho=2)
    assert str(error) == "layer 'q': rank=8 is too much. Take rho=2."


def test_an_error_may_get_a_place_or_a_remedy_alone():
    error = LoraInitError("{rank} is too much.", rank=8)
    assert str(error.within("layer 'q'")) == "layer 'q': rank=8 is too much."
    assert str(error.within(remedy="Take {rank}.", rank=2)) == "rank=2 is too much. Take rank=2."


def test_a_path_and_an_option_without_its_value_are_written_as_they_are_typed():
    assert [in_python("output", value) for value in (Path("a b"), "a b", ..., None)] == [
        "output=a b", "output='a b'", "output=", "output=None",
    ]  # fmt: skip


def test_what_is_warned_of_is_returned_for_a_note():
    with pytest.warns(LoraInitWarning, match=r"^rank=8 is large\.$"):
        assert warn("{rank} is\nlarge.", rank=8) == "rank=8 is large."


@pytest.mark.parametrize(("missing", "line"), [
    (["scipy", "matplotlib"], "scipy, matplotlib, which are not installed. Install them: {}compare]'"),
    (["httpx2", "gguf"], "httpx2, gguf, which are not installed. Install them: {}serving,verify]'"),
    (["matplotlib"], "matplotlib, which is not installed. Install it: {}plots]'"),
])  # fmt: skip
def test_all_that_is_missing_is_installed_by_one_command(missing, line, monkeypatch):
    """Of several libraries only those are named that are missing, and no extra that another one has in it."""
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name in missing else True)
    with pytest.raises(LoraInitError) as caught:
        require("ray", *missing)
    assert str(caught.value) == "this needs " + line.format("pip install 'lora-init[")


@pytest.mark.parametrize(("word", "said"), [
    ("Seq_Clss", "Did you mean SEQ_CLS? Choose from SEQ_CLS, eva."), (3, "Choose from SEQ_CLS, eva."),
])  # fmt: skip
def test_the_closest_choice_is_found_whatever_its_case(word, said):
    assert did_you_mean(word, ["SEQ_CLS", "eva"]) == said


@pytest.mark.parametrize(("text", "first", "whole"), [
    (" \n one\ttwo \nthree", "one\ttwo.", "one two three."), ("ends!", "ends!", "ends!"), ("why?\n", "why?", "why?"),
    ("x.", "x.", "x."), ("", "KeyError.", "KeyError."), (" \n ", "KeyError.", "KeyError."),
    ("y" * 300, f"{'y' * 300}.", f"{'y' * 300}."), ("y" * 301, f"{'y' * 297}...", f"{'y' * 297}..."),
])  # fmt: skip
def test_the_text_of_others_is_one_sentence_of_bounded_length(text, first, whole):
    error = type("KeyError", (ValueError,), {})(text)
    assert (first_line(error), in_one_line(error)) == (first, whole)


@pytest.mark.parametrize(("value", "number"), [
    (1, True), (1.5, True), (np.float32(1.5), True), (np.int64(1), True), (True, False), ("1", False), (1j, False),
    (None, False),
])  # fmt: skip
def test_a_number_is_one_of_python_or_numpy_and_no_truth_value(value, number):
    assert is_number(value) is number


@pytest.mark.parametrize(("value", "how", "expected"), [
    (0, {}, None), (-0.5, {}, "number of at least 0."), (0, {"above": True}, "number above 0."),
    (0.1, {"above": True}, None), (2, {"least": 2}, None), (1.5, {"least": 2.5}, "number of at least 2.5."),
    (2.0, {"whole": True}, "whole number of at least 0."), (np.int64(2), {"whole": True}, None), (2.5, {}, None),
    (1, {"whole": True, "above": True, "least": 1, "hint": " So."}, "whole number above 1. So."),
    (2**63 - 1, {"whole": True}, None), (2**63, {}, "number of at least 0."), (math.nan, {}, "number of at least 0."),
    (math.inf, {}, "number of at least 0."), (True, {}, "number of at least 0."), ("8", {}, "number of at least 0."),
])  # fmt: skip
def test_a_number_is_checked_for_its_kind_and_its_bound(value, how, expected):
    if expected is None:
        check_number("rho", value, **how)
    else:
        with pytest.raises(LoraInitError) as caught:
            check_number("rho", value, **how)
        assert str(caught.value) == f"rho={value!r}, expected a {expected}"


def test_a_switch_is_true_or_false_and_nothing_else():
    check_switches(center=True, whiten=False)
    for odd in (1, "no", None):
        refused(f"^whiten={odd!r}, expected True or False.$", check_switches, center=True, whiten=odd)


@pytest.mark.parametrize(("error", "full"), [
    (RuntimeError("CUDA Out Of Memory"), True), (RuntimeError("you can't allocate memory"), True),
    (OSError(12, "Cannot allocate memory"), True), (RuntimeError("not enough memory: you tried"), True),
    (MemoryError("x"), True), (type("OutOfMemoryError", (RuntimeError,), {})("x"), True),
    (RuntimeError("memory"), False), (ValueError("out of range"), False),
])  # fmt: skip
def test_an_end_of_memory_is_known_by_its_class_or_its_words(error, full):
    assert is_out_of_memory(error) is full
