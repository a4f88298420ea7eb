"""Commands as they are typed, one of each kind and of what it makes, and the files that the first of them need."""

import torch
from peft import LoraConfig, get_peft_model

from tests.commands import run, save_model, write_data
from tests.conftest import tiny_llama

# By what is asked for, in an order in which what one command writes is there for the next. {0} is the folder.
COMMANDS = {
    "init --dry-run": "init {0}/model {0}/text.txt --rank 2 --dry-run -o {0}/none",
    "init": "init {0}/model {0}/text.txt --rank 2 --statistics {0}/s.safetensors -o {0}/start",
    "init of a step": "init {0}/model {0}/text.txt --rank 2 --method lora-one --samples 16 -o {0}/stepped",
    "init of a plan": "init {0}/model --statistics {0}/s.safetensors --rank 2 -o {0}/planned",
    "merge": "merge {0}/s.safetensors {0}/other.safetensors -o {0}/both.safetensors",
    "ranks": "ranks {0}/s.safetensors --rank 2 -o {0}/plan.json",
    "ranks --compare": "ranks {0}/s.safetensors --rank 2 --compare uniform",
    "rate": "rate {0}/trained-not {0}/text.txt --base {0}/model --steps 100",
    "inspect of statistics": "inspect {0}/s.safetensors",
    "inspect of a plan": "inspect {0}/plan.json",
    "inspect of a start": "inspect {0}/start",
    "inspect of a trained adapter": "inspect {0}/trained --base {0}/model --engine vllm --intruders",
    "inspect of several": "inspect {0}/start {0}/plan.json",
    "export": "export {0}/trained --engine vllm -o {0}/served",
    "export of several": "export {0}/trained {0}/start --engine vllm -o {0}/served-both",
    "dial --strength": "dial {0}/trained --strength 0.5 -o {0}/weaker",
    "dial": "dial {0}/trained {0}/text.txt --keep {0}/keep.txt --uniform --samples 36 -o {0}/dialed",
    "replay": "replay {0}/model --n 4 --length 8 -o {0}/replay.jsonl",
    "compare --dry-run": "compare {0}/model {0}/text.txt --steps 4 --batch-size 2 --seeds 1 --starts random --dry-run"
    " -o {0}/runs",
}  # fmt: skip


def prepare(folder):
    torch.manual_seed(0)
    save_model(tiny_llama(), folder / "model")
    write_data(folder)
    (folder / "keep.txt").write_text(
        "\n".join(f"red hats in my {word} house" for word in ["green", "mat", "dog", "two"] * 4)
    )
    run("init", folder / "model", folder / "keep.txt", "--rank", 2, "--statistics", folder / "other.safetensors",
        "-o", folder / "other")  # fmt: skip
    for name, trained in (("trained", True), ("trained-not", False)):
        settings = dict(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny_llama(), LoraConfig(**settings, init_lora_weights=not trained))
        model.peft_config["default"].base_model_name_or_path = str(folder / "model")
        model.save_pretrained(folder / name)
