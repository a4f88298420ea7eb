"""How an error or a warning reaches whoever caused it."""

import inspect

import pytest

import lora_init
from lora_init.errors import LoraInitWarning
from tests.conftest import tiny_llama
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
