"""Releases of PEFT differ in which width of experts A reads: a start and an export are as they read it, or refused.

These run with every release; the others on experts are skipped where PEFT exchanges A and B.
"""

import json
from importlib.metadata import version

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_init import LoraInitError, build_adapter, collect, export_adapter, learning_rate
from lora_init.adapters.peft_model import adapter_layers
from lora_init.layers.rows import check_peft
from tests.commands import run
from tests.layers.made import BOTH, MODELS
from tests.versions import older

OWN = version("peft")
# Whether experts [experts, in, out], as of GPT-OSS, and [experts, out, in], as of the others, have A on the input.
READ = {"0.17.1": (True, False), "0.18.1": (True, False), "0.19.0": (False, False), "0.19.1": (True, True),
        "0.19.2.dev0": (True, True), "0.20.0": (True, True), "0.21.2": (True, True), "1.0.0": (True, True)}  # fmt: skip
IS_READ = {
    "gpt_oss": older("peft", "0.19") or not older("peft", "0.19.1"),
    "mixtral": not older("peft", "0.19.1"),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.parametrize("name", IS_READ),
]
SAID = (
    r"experts.(gate_up|down)_proj': PEFT {} exchanges the widths of A and B of these experts. Train by 0.19.1 or newer."
)


def batches():
    torch.manual_seed(0)
    return [{"input_ids": (ids := torch.randint(3, 64, (8, 12))), "labels": ids} for _ in range(6)]


def trained(name, directory=None, std=0.2):
    """Make an adapter with random numbers as PEFT makes it."""
    torch.manual_seed(0)
    model = MODELS[name]()
    if directory is not None:
        model.save_pretrained(directory / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_parameters=BOTH, target_modules=["q_proj"]))
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.2 if "lora_A" in key else std)
    if directory is not None:
        adapted.peft_config["default"].base_model_name_or_path = str(directory / "base")
        adapted.save_pretrained(directory / "trained")
    return adapted


def refused(release, function, *arguments, **options):
    with pytest.raises(LoraInitError, match=SAID.format(release)) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("release", READ)
def test_a_release_is_known_by_what_it_takes_for_the_input(name, release):
    module = MODELS[name]().model.layers[0].mlp.experts
    if READ[release][name == "mixtral"]:
        check_peft("experts.gate_up_proj", module, release)
    else:
        refused(release, check_peft, "experts.gate_up_proj", module, release)


def test_the_installed_release_is_among_them(name):
    layers = adapter_layers(trained(name))
    (one,) = (layer for key, layer in layers.items() if key.endswith("layers.0.mlp.experts.gate_up_proj"))
    reads_input = one.lora_A["default"].in_features == 32  # hidden_size; what it writes has 48
    assert reads_input == IS_READ[name]


def test_a_start_is_what_peft_reads(name):
    model = MODELS[name]()
    if not IS_READ[name]:
        refused(OWN, collect, model, batches(), rank=2, target_parameters=BOTH)
        refused(OWN, learning_rate, trained(name, std=0.0), batches(), steps=48)
        return
    stats = collect(model, batches(), ["q_proj"], rank=2, target_parameters=BOTH)
    layers = adapter_layers(build_adapter(stats, 2).apply(model))
    for key, layer in layers.items():
        if "experts" in key:
            nn.init.normal_(layer.lora_B["default"].weight)
            delta = layer.get_delta_weight("default").detach()
            delta = delta.mT if name == "gpt_oss" else delta  # [experts, d_out, d_in]
            for own, change in zip(stats.of_experts(key), delta, strict=True):
                directions = own.components[:2]  # of what this expert reads, which the change is made of
                torch.testing.assert_close(change @ directions.T @ directions, change, atol=1e-5, rtol=1e-4)


def test_an_export_does_what_peft_does(name, tmp_path):
    model = trained(name, tmp_path).eval()
    if not IS_READ[name]:
        refused(OWN, export_adapter, tmp_path / "trained", tmp_path / "served")
        return
    from peft import PeftModel

    export_adapter(tmp_path / "trained", tmp_path / "served")
    ids = batches()[0]["input_ids"]
    again = PeftModel.from_pretrained(
        type(model.get_base_model()).from_pretrained(tmp_path / "base"), tmp_path / "served"
    )
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("release", ["0.18.1", "0.19.0"])
def test_an_adapter_says_which_release_made_it(name, release, tmp_path):
    """Where an expert is as wide as it is high, no shape tells."""
    trained(name, tmp_path)
    path = tmp_path / "trained/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_version": release}))
    if not IS_READ[name]:
        refused(OWN, export_adapter, tmp_path / "trained", tmp_path / "served")
    elif READ[release][name == "mixtral"]:
        export_adapter(tmp_path / "trained", tmp_path / "served")
    else:
        for options in (dict(), dict(engine="vllm"), dict(merge_into=str(tmp_path / "base"))):
            refused(release, export_adapter, tmp_path / "trained", tmp_path / "served", **options)
        found = run("inspect", tmp_path / "trained", "--base", tmp_path / "base")
        assert found.exit_code == 1 and found.stdout.endswith("Next: pip install 'peft>=0.19.1', and train it again\n")
