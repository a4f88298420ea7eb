"""`lora-init init --quantize`, for every start and for the one that corrects the quantized base."""

import json

import pytest
import torch
from peft import PeftModel

from tests.commands import run, save_model, write_data
from tests.conftest import tiny_llama


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose widths bitsandbytes' kernels take, beside the same data."""
    home = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    save_model(tiny_llama(hidden_size=64, intermediate_size=128), home / "model")
    write_data(home)
    return home


@pytest.fixture
def command(wide, tmp_path):
    return ["init", wide / "model", wide / "text.txt", "-o", tmp_path / "out", "--rank", 4, "--rho", 1]


def test_it_corrects_a_base_that_it_quantizes(command, wide, tmp_path, monkeypatch):
    file = tmp_path / "statistics"
    command += ["--quantize", "nf4", "--method", "qera", "--unchecked", "--statistics", file]  # weights are random
    made = run(*command, "--json")
    assert made.exit_code == 0, made.output
    again = run(*command, "--overwrite")
    assert again.exit_code == 0 and "used as it is" in again.stderr, again.output
    said = json.loads(made.stdout)
    assert set(said["correction"]["losses"]) == {"float", "quantised", "corrected"}
    assert all(after < before for before, after in said["correction"]["errors"].values())
    assert said["quantisation"]["bnb_4bit_quant_type"] == "nf4"
    assert any("bitsandbytes nf4" in note and "on the same" in note for note in said["notes"])
    shown = " ".join(run("inspect", tmp_path / "out").stdout.split())
    assert "quantized: bitsandbytes nf4" in shown and "corrected: " in shown and "at least (model.layers." in shown
    card = (tmp_path / "out" / "README.md").read_text()
    scope = {}
    monkeypatch.chdir(tmp_path)
    exec(card.split("```python\n")[1].split("```")[0], scope)
    assert isinstance(scope["model"], PeftModel)
    assert "Linear4bit" in str(type(scope["base_model"].model.layers[0].mlp.up_proj.base_layer))


@pytest.mark.parametrize(("options", "parts"), [
    (["--method", "qera"], ["is not quantized", "Pass --quantize nf4"]),
    (["--weights", "there"], ["--weights there is for the start qera"]),
    (["--quantize", "nf4", "--unchecked"], ["--unchecked is for the start qera"]),
    (["--quantize", "nf4", "--method", "qera", "--weights", "./nothing"], ["float weights", "cannot be read"]),
    (["--quantize", "nf4", "--method", "qera", "--use-dora"], ["DoRA"]),
    (["--quantize", "nf4", "--method", "qera", "--gamma", "3"], ["--gamma 3 "]),
])  # fmt: skip
def test_what_cannot_be_is_refused(command, tmp_path, options, parts):
    refused = run(*command, *options)
    assert refused.exit_code == 1 and not (tmp_path / "out").exists()
    assert all(part in refused.stderr.splitlines()[-1] for part in parts), refused.stderr
