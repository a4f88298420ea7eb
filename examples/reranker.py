"""Train a reranker with sentence-transformers: pairs of a question and a passage, right or not.

pip install sentence-transformers
python examples/reranker.py --output reranker
"""

import argparse
import json

import demo_assets
from datasets import Dataset
from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments

import lora_init

parser = argparse.ArgumentParser()
parser.add_argument("--output", default="reranker")
parser.add_argument("--steps", type=int, default=50)
options = parser.parse_args()

rows = [json.loads(line) for line in demo_assets.dataset("BoolQ", "dev.jsonl").read_text().splitlines()]
pairs = [{"question": row["question"], "passage": row["passage"], "label": 1.0} for row in rows]
wrong = [one | {"passage": other["passage"], "label": 0.0} for one, other in zip(pairs, pairs[97:], strict=False)]
model = CrossEncoder(str(demo_assets.minilm()), num_labels=1, max_length=96)  # or a hub id
args = CrossEncoderTrainingArguments(
    output_dir=options.output, max_steps=options.steps, per_device_train_batch_size=16, learning_rate=3e-4,
    warmup_steps=3, save_strategy="no", report_to="none",
)  # fmt: skip
trainer = CrossEncoderTrainer(model, args, Dataset.from_list(pairs + wrong).shuffle(0).take(16 * options.steps))
lora_init.initialize(trainer, rank=8)  # the one line; the new head is trained whole and saved
trainer.train()

model.save_pretrained(options.output)
asked = [(row["question"], row["passage"]) for row in pairs[:8]]
before, after = (one.predict(asked) for one in (model, CrossEncoder(options.output)))
print(f"saved in {options.output}; loaded again, scores differ by {abs(before - after).max():.1g}")
