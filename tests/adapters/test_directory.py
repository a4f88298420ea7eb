"""What an adapter directory says of itself."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from lora_init import build_adapter
from lora_init.adapters.directory import AdapterDirectory, is_zero_update, start_digest
from lora_init.starts.weights import LoraWeights
from tests.adapters.made import made_up_statistics
from tests.conftest import refused, tiny_llama


def test_the_digest_of_a_start_is_of_all_its_numbers_in_bfloat16():
    a, b = torch.randn(4, 8), torch.zeros(6, 4)
    one = start_digest({"q": LoraWeights(a, b)})
    assert start_digest({"q": LoraWeights(a.bfloat16().float(), b)}) == one
    a[3, 7] += 1.0
    assert len({one, start_digest({"q": LoraWeights(a, b)}), start_digest({"k": LoraWeights(a, b)})}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_update_is_zero_to_the_rounding_that_its_numbers_have(dtype):
    """Columns of one orthogonal matrix, as in PEFT's "orthogonal", made in a type and saved in float32."""
    q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    full = q[:, :4] @ torch.randn(4, 16, dtype=torch.float64), torch.randn(16, 4, dtype=torch.float64) @ q[:, 4:].T
    a, b = (part.to(dtype).float() for part in full)
    assert is_zero_update(a, b)
    assert not is_zero_update(a, b + 0.01 * a.T)
    assert not is_zero_update(torch.randn(8, 16), torch.randn(16, 8))


def test_what_is_no_adapter_is_named_by_the_first_file_that_tells(tmp_path):
    """A file without tensors tells nothing, so the next one is read."""
    (tmp_path / "notes.txt").write_text("a text")
    refused("notes.txt has no adapter_config.json and is a file, so it", AdapterDirectory, tmp_path / "notes.txt")
    save_file({}, tmp_path / "a.safetensors")
    refused("adapter_config.json and is a file, so it", AdapterDirectory, tmp_path / "a.safetensors")
    refused("has no adapter_config.json, so it is not", AdapterDirectory, tmp_path)
    save_file({"lora_te_0.lora_down.weight": torch.ones(2)}, tmp_path / "b.safetensors")
    save_file({"model.layers.0.weight": torch.ones(2)}, tmp_path / "c.safetensors")
    refused("and holds an adapter in kohya's form", AdapterDirectory, tmp_path)


def test_a_converted_adapter_corrects_no_error_any_more(tmp_path):
    """Converting doubles the rank, by which it is known: the record of the start tells the rank of the start."""
    init = replace(
        build_adapter(made_up_statistics(tiny_llama(), ["q_proj"]), 2), errors={"q": (3.0, 1.0)}, error_size=2.5
    )
    init.save_pretrained(tmp_path / "start")
    assert AdapterDirectory(tmp_path / "start").error_size == 2.5
    path = tmp_path / "start" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 4}))
    assert AdapterDirectory(tmp_path / "start").error_size == 0.0
