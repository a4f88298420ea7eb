"""Reinforcement learning with TRL's GRPOTrainer: the start is from prompts and the model's own answers to them.

    python examples/grpo_trl.py --output grpo-adapter

The model is tiny and random, and so are its answers at first; it is rewarded for the number 7. Offline, in seconds.
"""

import argparse
import tempfile

from datasets import Dataset
from peft import LoraConfig
from sft_trl import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import lora_init

parser = argparse.ArgumentParser()
parser.add_argument("--output", default="grpo-adapter")
parser.add_argument("--steps", type=int, default=30)
options = parser.parse_args()


def reward(completions, **others):
    return [one.split().count("7") / 4 for one in completions]


with tempfile.TemporaryDirectory() as folder:
    source = make_tiny_model(f"{folder}/model")
    args = GRPOConfig(
        f"{folder}/trainer", max_steps=options.steps, per_device_train_batch_size=16, num_generations=8, bf16=False,
        max_completion_length=4, learning_rate=1e-2, report_to="none", save_strategy="no", logging_steps=5,
    )  # fmt: skip
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(source), reward, args=args,
        processing_class=AutoTokenizer.from_pretrained(source),
        train_dataset=Dataset.from_list([{"prompt": f"{a} + {b} ="} for a in range(10) for b in range(10)]),
        peft_config=LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"),  # its reference: without the adapter
    )  # fmt: skip
    adapted = lora_init.initialize(trainer)  # B is zero and the base as it was, so the reference is the start
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    adapted.save_pretrained(options.output)
    print(f"reward {rewards[0]:.2f} -> {rewards[-1]:.2f}; adapter saved in {options.output}")
