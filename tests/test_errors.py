"""How an error or a warning reaches whoever caused it."""

import inspect

import pytest

import lora_init
from lora_init import errors
from lora_init.errors import LoraInitError, LoraInitWarning, explain, require_version
from tests.conftest import refused, tiny_llama
from tests.loading.made import byte_tokenizer

# Calls of very different depth, with what they warn of.
CALLS = {
    "targets": (lambda: lora_init.find_targets(tiny_llama(), exclude_modules=["no_proj"]), "matches nothing"),
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
