"""The whole way on the real 135M model and real data, cut to a few batches: in Python, and from the command line."""

import json
import math
import subprocess
import sys

import pytest
import torch

import lora_init
from tests import assets

TEMPLATE = dict(template="{passage}\nQuestion: {question}?\nAnswer:", completion=" {label}")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, RHO = 8, 2.0


@pytest.fixture(scope="module")
def material():
    """Return what loads the model, the tokenizer and the data file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, data = assets.smollm2(), assets.boolq()
    return (
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
        data,
    )


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path, monkeypatch):
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def train_one_step(peft_model, batch):
    """Take a step on the batch; return the loss before and after."""
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=2e-4)
    before = peft_model(**batch).loss
    before.backward()
    optimizer.step()
    with torch.no_grad():
        return float(before), float(peft_model(**batch).loss)


def test_collect_to_trained_adapter_in_python(material, tmp_path):
    from peft import PeftModel

    load_model, tokenizer, data = material
    batches = lora_init.load_batches(data, tokenizer, samples=12, batch_size=4, max_length=64, **TEMPLATE)
    model = load_model().eval()
    plain = logits(model, batches[0])

    stats = lora_init.collect(model, batches, rank=RANK, rho=RHO, data=batches.description)
    assert [name.split(".")[-1] for name in stats][:7] == list(PROJECTIONS)
    assert len(stats) == 30 * 7
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert stats.provenance.n_samples == tokens  # padding is not counted
    assert stats.provenance.data.startswith("BoolQ/combined.jsonl: 12 of 15942 examples, seed 0, at most 64 tokens")
    assert all(0.0 < share < 1.0 for share in stats.held_out.values())

    ranks = lora_init.allocate_ranks(stats, rank=RANK, rho=RHO)
    assert sum(ranks.values()) == RANK * 210 and max(ranks.values()) <= RHO * RANK
    assert len(set(ranks.values())) > 3  # real layers differ
    init = lora_init.build_adapter(stats, ranks, method="eva")
    init.save_pretrained(tmp_path / "adapter")

    peft_model = PeftModel.from_pretrained(load_model(), tmp_path / "adapter", is_trainable=True)
    assert torch.equal(logits(peft_model, batches[0]), plain)  # B is zero: nothing changes before training
    assert peft_model.get_nb_trainable_parameters()[0] == init.n_parameters()
    before, after = train_one_step(peft_model, batches[0])
    assert after < before
    assert not torch.equal(logits(peft_model, batches[0]), plain)


def test_init_on_the_command_line_writes_the_same_adapter(material, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file

    load_model, tokenizer, data = material
    command = ["init", str(assets.smollm2()), str(data), "--template", r"{passage}\nQuestion: {question}?\nAnswer:"]
    command += ["--completion", TEMPLATE["completion"], "--rank", str(RANK), "--rho", str(RHO), "--samples", "8"]
    command += ["--max-length", "64", "--output", str(tmp_path / "adapter"), "--json"]
    done = subprocess.run([sys.executable, "-m", "lora_init", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["stop_reason"] == "exhausted" and sum(summary["ranks"].values()) == RANK * 210

    # Every token counts, so the command keeps examples whose answer is cut off.
    batches = lora_init.load_batches(data, tokenizer, samples=8, max_length=64, needs_labels=False, **TEMPLATE)
    model = load_model().eval()
    stats = lora_init.collect(model, batches, rank=RANK, rho=RHO)
    assert dict(lora_init.allocate_ranks(stats, rank=RANK, rho=RHO)) == summary["ranks"]
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    name = "model.layers.7.mlp.gate_proj"
    rows = tensors[f"base_model.model.{name}.lora_A.weight"]
    # The first four directions are far apart in variance, so another thread count turns them by rounding only.
    assert float(lora_init.principal_angles(stats[name].components[:4], rows[:4]).max()) < 1e-3 * math.pi

    peft_model = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    labelled = lora_init.load_batches(data, tokenizer, samples=4, max_length=64, **TEMPLATE)
    before, after = train_one_step(peft_model, labelled[0])
    assert after < before
