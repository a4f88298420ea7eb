"""The tensors of a checkpoint are found by the names that a model has, whatever form the files have them in."""

import json
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from lora_init.loading import checkpoint
from lora_init.loading.checkpoint import (
    INDEX_FILE,
    Stored,
    _directory_of,
    checkpoint_of,
    find_parameter,
    find_tensors,
    read_header,
    read_parameter,
)
from tests.conftest import refused


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_the_tensors_of_all_files_are_found_with_their_shapes(folder):
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(weights, folder / "model.safetensors")
    found = find_tensors(str(folder))
    assert found == {name: Stored(folder / "model.safetensors", name, tuple(w.shape)) for name, w in weights.items()}
    assert all(torch.equal(found[name].read(), weight) for name, weight in weights.items())
    assert read_header(folder / "model.safetensors") == {"a": ([2, 3], "F32"), "b": ([4], "BF16")}
    for name, weight in weights.items():
        save_file({name: weight}, folder / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in weights}}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert {name: one.file.name for name, one in find_tensors(str(folder)).items()} == index["weight_map"]


def test_of_a_hub_no_weights_of_other_formats_are_fetched(folder, monkeypatch):
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    names = ["config.json", INDEX_FILE, "model-00001-of-00002.safetensors", "pytorch_model.bin", "consolidated.00.pth",
             "model.Q4.gguf", "tf_model.h5", "original/model.safetensors", "onnx/config.json"]  # fmt: skip
    fetched = []

    def fetch(source, ignore_patterns):
        fetched.extend([source, *filter_repo_objects(names, ignore_patterns=ignore_patterns)])
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert [*find_tensors("owner/name")] == ["a"] and fetched == ["owner/name", *names[:3]]


def test_a_checkpoint_without_its_files_is_refused(folder):
    said = f"^'{folder}' has no model.safetensors. Only whole safetensors checkpoints are read.$"
    refused(said, find_tensors, str(folder))
    save_file({"a": torch.ones(1)}, folder / "a.safetensors")
    names = {"a": "a.safetensors", "b": "b.safetensors"}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    refused("has no b.safetensors. Only whole", find_tensors, str(folder))


def test_the_directory_of_a_base_is_its_own_or_one_in_the_hubs_cache(folder, monkeypatch):
    asked, cached = [], [str(folder / "config.json"), None, object(), ValueError()]

    def look(source, name, revision):
        asked.append((source, name, revision))
        if isinstance(answer := cached.pop(0), ValueError):
            raise answer
        return answer

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", look)
    found = [_directory_of("some/llama", revision) for revision in (None, "", "main", 7)]
    assert found == [folder, None, None, None]
    assert asked == [("some/llama", "config.json", revision) for revision in (None, None, "main", "7")]
    assert _directory_of(str(folder), None) == folder and not cached


def test_tensors_of_a_base_are_those_of_float_weights_in_safetensors(folder):
    assert checkpoint_of(str(folder / "gone")) == (None, {})
    assert checkpoint_of(str(folder)) == (folder, {})
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    whole = find_tensors(str(folder))
    assert checkpoint_of(str(folder)) == (folder, whole) and whole
    (folder / "config.json").write_text('{"quantization_config": {}}')
    assert checkpoint_of(str(folder)) == (folder, {})
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / INDEX_FILE).write_text('{"weight_map": {"a": "a.safetensors"}}')
    assert [*checkpoint_of(str(folder))[1]] == ["a"]
    (folder / INDEX_FILE).unlink()
    (folder / "model.safetensors").symlink_to("blob")
    refused("has no model.safetensors", checkpoint_of, str(folder))


@pytest.mark.parametrize(("content", "said"), [
    (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS and not the file: run git lfs pull.$"),
    (b"vversion http", "is damaged: .*"), (b"short", "is damaged: .*"),
])  # fmt: skip
def test_a_file_that_is_none_says_whether_it_is_a_pointer(content, said, tmp_path):
    (tmp_path / "a").write_bytes(content)
    refused(f"^{tmp_path / 'a'} {said}", read_header, tmp_path / "a")


SHAPE = (2, 3)
MODEL = SimpleNamespace(base_model_prefix="model", all_tied_weights_keys={"head": "model.embed"})


@pytest.mark.parametrize(("stored", "name"), [
    ("a.weight", "a.weight"), ("model.a.weight", "a.weight"), ("a.weight", "model.a.weight"), ("model.embed", "head"),
])  # fmt: skip
@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1]])
def test_a_parameter_is_found_with_and_without_the_prefix_and_as_what_it_is_tied_to(stored, name, shape, tmp_path):
    weight = torch.arange(6, dtype=torch.bfloat16).reshape(shape)
    save_file({stored: weight}, tmp_path / "a")
    one = Stored(tmp_path / "a", stored, shape)
    other = Stored(tmp_path / "a", "other", shape)
    found = find_parameter({"other": other, stored: one}, MODEL, name, SHAPE)
    assert found == {one: None}
    read = read_parameter(found, SHAPE)
    assert read.dtype == torch.float32 and torch.equal(read, weight.float())


def test_its_own_name_comes_before_the_others():
    named = {name: Stored(None, name, SHAPE) for name in ("model.a", "a")}
    assert find_parameter(named, MODEL, "a", SHAPE) == {named["a"]: None}


@pytest.mark.parametrize("error", [AttributeError, KeyError, ValueError, RuntimeError, NotImplementedError])
def test_what_no_conversion_finds_is_not_there(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoint, "as_saved", fail)
    assert find_parameter({"a": Stored(None, "a", (9, 9))}, MODEL, "a", SHAPE) == {}
    assert find_parameter({}, SimpleNamespace(), "a", SHAPE) == {}
