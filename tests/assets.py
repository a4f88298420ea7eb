"""The real model and data that some tests run on, from the cache or, once, from the package index."""

import json
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo_assets  # noqa: E402


def smollm2():
    return _asset("smollm2")


def minilm():
    return _asset("minilm")


def boolq(file="combined.jsonl"):
    return _asset("dataset", "BoolQ", file)


def part_of_minilm(folder, n_layers=2):
    """Write the first layers of MiniLM and its files for sentence-transformers into a folder."""
    from transformers import AutoModel

    shutil.copytree(minilm(), folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.bin", "*.safetensors"))
    AutoModel.from_pretrained(minilm(), num_hidden_layers=n_layers).save_pretrained(folder)
    return folder


def siqa():
    return _asset("dataset", "SIQA", "test.jsonl")


def part_of_smollm2(folder, n_layers=2, n_tokens=4096):
    """Write the first layers of SmolLM2 and the tokens that are merged first, a tenth of the model, into a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2(), num_hidden_layers=n_layers, dtype="float32")
    model.resize_token_embeddings(n_tokens)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2()).save_pretrained(folder)
    file = folder / "tokenizer.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    core = said["model"]
    core["vocab"] = {token: number for token, number in core["vocab"].items() if number < n_tokens}
    core["merges"] = [pair for pair in core["merges"] if "".join(pair) in core["vocab"]]
    file.write_text(json.dumps(said), encoding="utf-8")
    return folder


@cache
def _fetched(function, *arguments):
    try:
        return getattr(demo_assets, function)(*arguments)
    except demo_assets.UnreachableError as error:
        return error


def _asset(function, *arguments):
    """Return the path, or skip the test: only if the cache hasn't got it and the index cannot be reached."""
    result = _fetched(function, *arguments)
    if isinstance(result, demo_assets.UnreachableError):
        pytest.skip(str(result))
    return result
