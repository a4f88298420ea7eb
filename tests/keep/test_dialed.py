"""An adapter that is written at its strengths does what PEFT does at them, whatever patterns it has."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_init.keep.dial import strengths
from lora_init.keep.dialed import Change, Dial, Point, write_dialed
from lora_init.serving.base import read_base
from lora_init.serving.trained import read_trained, with_parameters
from tests.conftest import tiny_llama
from tests.layers.made import mixtral
from tests.versions import NO_FUSED_EXPERTS

IDS = torch.arange(3, 23).reshape(2, 10)
KINDS = {
    "ranks": dict(target_modules=["q_proj", "k_proj"], rank_pattern={"layers.0.self_attn.q_proj": 9, "k_proj": 2}),
    "rsLoRA": dict(target_modules=["q_proj", "v_proj"], use_rslora=True, alpha_pattern={"v_proj": 5}),
    "embedding": dict(target_modules=["embed_tokens", "q_proj"], rank_pattern={"embed_tokens": 2}),
    "experts": dict(target_modules=["q_proj"], target_parameters=["experts.down_proj"]),
}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto").eval()


def found(layers, weight):
    chosen = Point(sum(layers.values()) / len(layers), 1.0, 0.0, weight, layers)
    report = dict.fromkeys(("base", "trained", "chosen"), Change(1.0, 0.0, 0.1))
    return Dial("a rule", chosen, (chosen, chosen), (), report, report, (4, 4))


@pytest.mark.parametrize("form", ["uniform", "in B", "in alpha_pattern"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_written_does_what_peft_does_at_these_strengths(kind, form, tmp_path):
    if kind == "experts" and NO_FUSED_EXPERTS:
        pytest.skip("fused experts: transformers 5.0 and PEFT 0.19.1")
    (mixtral() if kind == "experts" else tiny_llama()).save_pretrained(tmp_path / "base")
    model = get_peft_model(load(tmp_path), LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8} | KINDS[kind]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "trained")
    trained = read_trained(tmp_path / "trained")
    base = read_base(trained.base, trained)
    trained = with_parameters(trained, base.parameters)
    layers = {name: 0.6 if form == "uniform" else 0.4 * i for i, name in enumerate(trained.layers)}
    with strengths(model.eval(), layers):
        expected = model(IDS).logits
    weight = None if form == "uniform" else 1.0
    in_pattern = form == "in alpha_pattern"
    path = write_dialed(tmp_path / "out", trained, base, found(layers, weight), alpha_pattern=in_pattern)
    written = PeftModel.from_pretrained(load(tmp_path), path).eval()
    torch.testing.assert_close(written(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    tensors = load_file(path / "adapter_model.safetensors")
    assert sum("lora_" in key and "A" in key for key in tensors) == sum(map(bool, layers.values()))
    if in_pattern:  # weights are as trained
        before = load_file(tmp_path / "trained/adapter_model.safetensors")
        assert all(torch.equal(before[key], tensor) for key, tensor in tensors.items())
    assert "a rule" in (path / "README.md").read_text() and (path / "dial.png").stat().st_size > 1000
