"""The whole way on the real 135M model and real data, cut to a few batches: in Python, and from the command line."""

import json
import math

import pytest
import torch

import lora_init
from tests import assets
from tests.commands import run

TEMPLATE = dict(template="{passage}\nQuestion: {question}?\nAnswer:", completion=" {label}")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, RHO, GATE = 8, 2.0, "model.layers.7.mlp.gate_proj"


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


@pytest.mark.slow
def test_python_and_the_command_line_make_the_same_adapter_and_it_learns(tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, data = assets.smollm2(), assets.boolq()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Every token counts, so the command keeps examples whose answer is cut off.
    batches = lora_init.load_batches(data, tokenizer, samples=8, max_length=64, needs_labels=False, **TEMPLATE)
    stats = lora_init.collect(model, batches, rank=RANK, rho=RHO, data=batches.description)
    assert [name.split(".")[-1] for name in stats][:7] == list(PROJECTIONS)
    assert len(stats) == 30 * 7
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert stats.provenance.n_samples == tokens  # padding is not counted
    assert stats.provenance.data.startswith("BoolQ/combined.jsonl: 8 of 15942 examples, seed 0, at most 64 tokens")
    ranks = lora_init.allocate_ranks(stats, rank=RANK, rho=RHO)
    assert sum(ranks.values()) == RANK * 210 and max(ranks.values()) <= RHO * RANK
    assert len(set(ranks.values())) > 3  # real layers differ
    init = lora_init.build_adapter(stats, ranks, method="eva")

    words = ["--template", r"{passage}\nQuestion: {question}?\nAnswer:", "--completion", TEMPLATE["completion"]]
    words += ["--rank", RANK, "--rho", RHO, "--samples", 8, "--max-length", 64, "--method", "eva", "--json"]
    done = run("init", folder, data, "-o", tmp_path / "adapter", *words)
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["stop_reason"] == "exhausted" and summary["ranks"] == dict(ranks)
    rows = load_file(tmp_path / "adapter/adapter_model.safetensors")[f"base_model.model.{GATE}.lora_A.weight"]
    # The first four directions are far apart in variance, so another thread count turns them by rounding only.
    assert float(lora_init.principal_angles(init.weights[GATE].a[:4], rows[:4]).max()) < 1e-3 * math.pi

    labelled = lora_init.load_batches(data, tokenizer, samples=2, max_length=64, **TEMPLATE)[0]
    plain = logits(model, labelled)
    peft_model = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    assert torch.equal(logits(peft_model, labelled), plain)  # B is zero: nothing changes before training
    assert peft_model.get_nb_trainable_parameters()[0] == init.n_parameters()
    before, after = train_one_step(peft_model, labelled)
    assert after < before
