"""Models, adapters and helpers that several tests of serving need."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lora_init import LoraInitError, export_adapter
from tests.conftest import assert_options_are_written

IDS = torch.arange(3, 23).reshape(2, 10)


def load(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()


def train(base, directory, **settings):
    """Make an adapter as PEFT saves it, with random numbers in place of training."""
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8} | settings))
    randomise(model)
    model.save_pretrained(directory)
    return directory


def randomise(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name or "embedding_B" in name:
            parameter.data.normal_(std=0.3)
        if "magnitude" in name or "modules_to_save" in name:
            parameter.data.mul_(1.5)


@torch.no_grad()
def logits(model, adapter=None):
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()
    return model(IDS).logits


def config_of(directory):
    return json.loads((directory / "adapter_config.json").read_text())


ADAPTERS = {
    "plain": dict(target_modules=["q_proj", "down_proj"]),
    "ranks, first match wins": dict(
        target_modules=["q_proj", "k_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 9, r"layers\.\d+\.self_attn\.q_proj": 2, "q_proj": 7},
    ),
    "rsLoRA with ranks": dict(
        target_modules=["q_proj", "v_proj"], use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 5}
    ),
    "alphas": dict(target_modules=["q_proj", "v_proj", "o_proj"], alpha_pattern={"layers.[01].self_attn.v_proj": 3}),
    "some layers": dict(target_modules=r".*layers\.[02]\.mlp\.(up|down)_proj"),
    "DoRA": dict(target_modules=["q_proj", "down_proj"], use_dora=True, rank_pattern={"q_proj": 2}),
    "whole head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embedding": dict(target_modules=["embed_tokens", "q_proj"], rank_pattern={"embed_tokens": 2}),
}


def refused(message, *arguments, **options):
    with pytest.raises(LoraInitError, match=message) as caught:
        export_adapter(*arguments, **options)
    assert_options_are_written(str(caught.value))
    output = Path(arguments[1])
    assert not output.exists() and not [path for path in output.parent.iterdir() if path.name.startswith(".")]
