"""The folder in which the blocks of the pages run."""

import json

import pytest
from typer.testing import CliRunner

from lora_init.cli import app as cli
from tests.commands import tokenizer_of
from tests.conftest import tiny_bert, tiny_llama

MODEL, DATA = "HuggingFaceTB/SmolLM2-135M-Instruct", "boolq.jsonl"
LARGE = "Qwen/Qwen2.5-7B-Instruct"  # here with the least widths that bitsandbytes' kernels take
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
TEMPLATE = "{passage}\nQuestion: {question}?"
WORDS = "the cat sat on a mat and saw one dog run to two red hats in my green house plus is".split()  # noqa: SIM905
CHAT = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model whose tokenizer knows some words and numbers, with data, and with statistics of both."""
    home = tmp_path_factory.mktemp("docs")
    tokenizer = tokenizer_of([*WORDS, *map(str, range(39))], chat_template=CHAT)
    for name, widths in ((MODEL, {}), (LARGE, dict(hidden_size=64, intermediate_size=128))):
        tokenizer.save_pretrained(home / name)
        tiny_llama(**widths).save_pretrained(home / name)
    tokenizer.save_pretrained(home / ENCODER)
    tiny_bert(task=None).save_pretrained(home / ENCODER)
    rows = [
        {"passage": " ".join(WORDS[i % 19 :] + WORDS[: i % 7]), "question": WORDS[i % 19], "label": i % 2 == 0}
        for i in range(48)
    ]
    (home / DATA).write_text("\n".join(map(json.dumps, rows)))
    made = f"init {home / MODEL} {home / DATA} --gradients --statistics {home / 'stats.safetensors'} -o {home / 'out'}"
    result = CliRunner().invoke(cli.app, [*made.split(), "--template", TEMPLATE])
    assert result.exit_code == 0, result.stderr
    return home
