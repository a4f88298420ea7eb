"""Start TRL's DPOTrainer from your data.

    python examples/dpo_trl.py MODEL DATA.jsonl --output adapter/

MODEL is a directory or a hub id, DATA a JSONL file whose rows have `prompt`, `chosen` and `rejected`. Without arguments
it runs on a tiny random model and sums made here, right ones against 0, so that it can be tried offline.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from sft_trl import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import lora_init


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="directory or hub id; default: a tiny random one")
    parser.add_argument("data", nargs="?", help="JSONL file with prompt, chosen and rejected; default: sums")
    parser.add_argument("--output", default=None, help="where the trained adapter goes; default: nowhere")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="none was measured for DPO: tune it")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        source = arguments.model or make_tiny_model(Path(folder) / "model")
        data = arguments.data or make_pairs(Path(folder) / "pairs.jsonl")
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(source),
            train_dataset=load_dataset("json", data_files=str(data), split="train"),
            args=DPOConfig(
                output_dir=str(Path(folder) / "trainer"),
                max_steps=arguments.steps,
                learning_rate=arguments.learning_rate,
                per_device_train_batch_size=8,
                max_length=512,
                logging_steps=max(1, arguments.steps // 4),
                save_strategy="no",
                report_to=[],
                bf16=torch.cuda.is_available(),
            ),
            # With a peft_config the reference is this model without its adapter, and not a second one.
            peft_config=LoraConfig(
                r=arguments.rank, lora_alpha=4 * arguments.rank, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        model = lora_init.initialize(trainer)  # from both answers, chosen and rejected
        model.print_trainable_parameters()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        if arguments.output:
            model.save_pretrained(arguments.output)


def make_pairs(path: Path) -> Path:
    sums = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    rows = [{"prompt": f"{a} + {b} =", "chosen": f" {a + b}", "rejected": " 0"} for a, b in sums]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
