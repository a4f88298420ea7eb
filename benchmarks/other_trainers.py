"""Adapters that start inside other tools: `python -m benchmarks.other_trainers TOOL PYTHON DIRECTORY`.

TOOL is axolotl, ms_swift or llama_factory, PYTHON the interpreter of an environment that has it and what lora_init
needs. The files are those of examples/in_trainers, on 64 chats, SmolLM2-135M and 8 steps. Printed is how much of the
space of A `lora-init init` on the same rows shares with what the tool saved after 8 steps at rate 0, and whether a run
that was resumed after step 4 was left alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import demo_assets  # noqa: E402

TRIED = {"axolotl": "axolotl 0.19.0", "ms_swift": "ms-swift 4.6.0", "llama_factory": "LLaMA-Factory 0.9.5"}
COMMANDS = {
    "axolotl": ["-m", "axolotl.cli.train", "axolotl.yaml"],
    "ms_swift": ["-m", "swift.cli.main", "sft", "ms_swift.yaml"],
    "llama_factory": ["start.py", "llama_factory.yaml"],
}
MODEL_KEYS = {"axolotl": "base_model", "ms_swift": "model", "llama_factory": "model_name_or_path"}
COMMON = {"learning_rate": 0.0, "max_steps": 8, "save_steps": 4, "output_dir": "trained"}
MORE = {
    "axolotl": {"bf16": False, "dataset_num_proc": 1},
    "ms_swift": {"split_dataset_ratio": 0, "add_version": False},
    "llama_factory": {"report_to": "none", "use_cpu": True},
}
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def main(tool: str, python: str, directory: Path) -> None:
    """Write the files, train, resume, and compare."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a in range(16) for b in range(4)]
    chats = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in rows]
    (directory / "chat.jsonl").write_text("\n".join(map(json.dumps, chats)))
    info = {"file_name": "chat.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": TAGS}
    (directory / "dataset_info.json").write_text(json.dumps({"chat": info}))
    model = demo_assets.smollm2()
    for file in (ROOT / "examples" / "in_trainers").iterdir():
        (directory / file.name).write_text(file.read_text().replace('512, learning_rate="measured"', "64"))
    settings: dict[str, Any] = yaml.safe_load((directory / f"{tool}.yaml").read_text())
    settings |= {MODEL_KEYS[tool]: str(model), **COMMON, **MORE[tool]}
    if "lora_init" in settings:
        settings["lora_init"] = {"method": "eva", "samples": 64}
    said = run(tool, python, directory, settings)
    print(*(line for line in said.splitlines() if "lora_init:" in line))
    saved = directory / "trained"
    steps = [path.parent for path in sorted(saved.rglob("adapter_model.safetensors")) if "checkpoint-8" in str(path)]
    data = directory / "chat.jsonl"
    if tool != "axolotl":  # which takes the tokenizer's own template, and these the plain ChatML of their file
        turn = "<|im_start|>{}\n{}<|im_end|>\n".format
        texts = [{"text": turn("user", question) + turn("assistant", answer)} for question, answer in rows]
        data = directory / "text.jsonl"
        data.write_text("\n".join(map(json.dumps, texts)))
    init = [sys.executable, "-m", "lora_init", "init", str(model), str(data), "--rank", "8"]
    subprocess.run([*init, "-o", str(directory / "ours"), "--method", "eva", "--overwrite"], check=True)
    print(f"{tool}: A shares {shared(steps[0], directory / 'ours'):.4f} of its space with that of init")
    resumed = settings | {"resume_from_checkpoint": str(steps[0].with_name("checkpoint-4"))}
    print(*(line for line in run(tool, python, directory, resumed).splitlines() if "is resumed" in line))


def run(tool: str, python: str, directory: Path, settings: dict[str, Any]) -> str:
    """Train by the tool; where it cannot be imported, say which version was tried."""
    (directory / f"{tool}.yaml").write_text(yaml.safe_dump(settings))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [python, *COMMANDS[tool]]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tool} failed, and {TRIED[tool]} was tried:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def shared(one: Path, other: Path) -> float:
    """Compute the mean share of one A's rows that lies in the space of the other's."""
    both = [load_file(path / "adapter_model.safetensors") for path in (one, other)]
    shares = []
    for key in (key for key in both[0] if ".lora_A" in key):
        first, second = (torch.linalg.qr(found[key].float().T)[0] for found in both)
        shares.append(float((first.T @ second).square().sum() / first.shape[1]))
    return sum(shares) / len(shares)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]).resolve())
