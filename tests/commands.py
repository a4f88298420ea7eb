"""What tests of commands share: a model and data on disk, a run in this process, and what an error looks like."""

import json
from functools import cache

import typer.testing
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from lora_init.cli import app as cli
from tests.conftest import assert_options_are_written

# The command is made of its declarations once, not for each call.
typer.testing._get_command = cache(typer.testing._get_command)

WORDS = "the cat sat on a mat and saw one dog run to two red hats in my green house".split()  # noqa: SIM905


def tokenizer_of(words, **more):
    """Make a tokenizer of whole words."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=core, **special, **more)


def save_model(model, directory):
    """Write a model with a tokenizer of whole words, as a user would have it on disk."""
    model.save_pretrained(directory)
    tokenizer_of(WORDS).save_pretrained(directory)
    return directory


def write_data(directory):
    rows = [{"passage": " ".join(WORDS[i % 19 :] + WORDS[: i % 7]), "question": WORDS[i % 19]} for i in range(48)]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (directory / "text.txt").write_text("\n".join(row["passage"] for row in rows))


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def assert_one_line_error(result, *parts, code=1):
    assert result.exit_code == code
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("data: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert result.stdout == ""
    for part in parts:
        assert part in lines[0], lines[0]
    assert_options_are_written(lines[0])
