"""Files of tensors with a header: what comes back, and each way in which one is not what was written."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_init.errors import LoraInitError
from lora_init.statistics.tensorfile import TensorFile, write_tensors
from tests.conftest import refused

TENSORS = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.zeros(0, 3)}


@pytest.fixture
def path(tmp_path):
    return write_tensors(str(tmp_path / "new" / "place" / "file.st"), "kind", 3, {"x": [1, "ä"]}, TENSORS)


def again(path, **metadata):
    """Write the file anew with other metadata."""
    with safe_open(path, "pt") as file:
        save_file(load_file(path), path, file.metadata() | metadata)


def with_header(path, text):
    again(path, header=text, sha256=hashlib.sha256(text.encode()).hexdigest())


def test_tensors_and_header_come_back(path):
    file = TensorFile(path, "kind", 3)
    assert file.path == path and file.header.pop("digests").keys() == TENSORS.keys() and file.header == {"x": [1, "ä"]}
    for name, tensor in TENSORS.items():
        assert torch.equal(file.tensor(name), tensor) and file.tensor(name).dtype == tensor.dtype
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    assert metadata.keys() == {"format", "version", "header", "sha256"}
    assert (metadata["format"], metadata["version"]) == ("kind", "3")


def test_another_file_is_refused_by_what_it_is(path, tmp_path):
    other = " is of format 'kind', expected 'other'. Give another file.$"
    refused(other, TensorFile, path, "other", 3)
    newer = " has version '3' of its format, this lora_init reads 2. Update lora_init, or make the file again.$"
    refused(newer, TensorFile, path, "kind", 2)
    refused("nowhere is not a file. Give the path of a kind file.$", TensorFile, tmp_path / "nowhere", "kind", 3)
    (tmp_path / "text").write_text("text")
    words = r"text is not a whole safetensors file \(.*\). Make it again.$"
    refused(words, TensorFile, tmp_path / "text", "kind", 3)
    save_file({"a": torch.ones(1)}, tmp_path / "plain")
    refused("plain is of format None, expected 'kind'", TensorFile, tmp_path / "plain", "kind", 3)


@pytest.mark.parametrize(("change", "what"), [
    (lambda path: again(path, header="{}"), "its header is"),
    (lambda path: again(path, sha256="0"), "its header is"),
    (lambda path: save_file(load_file(path), path, {"format": "kind", "version": "3"}), "its header is"),
    (lambda path: with_header(path, "{"), r"its header \(.*\) is"),
    (lambda path: with_header(path, "[]"), r"its header \(.*\) is"),
    (lambda path: with_header(path, json.dumps({"digests": 3})), r"its header \(.*\) is"),
    (lambda path: with_header(path, "{}"), r"its header \('digests'\.\) is"),
])  # fmt: skip
def test_a_changed_header_is_refused(change, what, path):
    change(path)
    words = rf"file.st: {what} not what was written. The file was changed; make it again.$"
    refused(words, TensorFile, path, "kind", 3)


@pytest.mark.parametrize("other", [TENSORS["a"] + 1, TENSORS["a"].flatten(), TENSORS["a"].int(), None])
def test_a_changed_tensor_is_refused_as_it_is_read(other, path):
    """Also one of another shape or type, though it may have the same bytes."""
    tensors = {name: tensor.contiguous() for name, tensor in (TENSORS | {"a": other}).items() if tensor is not None}
    with safe_open(path, "pt") as file:
        save_file(tensors, path, file.metadata())
    found = TensorFile(path, "kind", 3)
    refused("file.st: tensor 'a' is not what was written. The file was changed; make it again.$", found.tensor, "a")
    assert torch.equal(found.tensor("b"), TENSORS["b"])


@pytest.mark.parametrize(
    "error", [KeyError("x"), IndexError("x"), TypeError("x"), ValueError("x"), AttributeError("x"), RuntimeError("x")]
)
def test_errors_of_reading_are_one_line(error, path):
    file = TensorFile(path, "kind", 3)
    words = r"file.st: a part \('?x'?\.\) is not what was written"
    with pytest.raises(LoraInitError, match=words), file.checking("a part"):
        raise error
    with pytest.raises(LoraInitError, match=r"^our own words$"), file.checking("a part"):
        raise LoraInitError("our own words")
