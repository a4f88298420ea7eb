"""Train a retriever with sentence-transformers, by an adapter that starts from what the trainer is about to read.

pip install sentence-transformers
python examples/embeddings.py --output retriever
"""

import argparse
import json

import demo_assets
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import lora_init

parser = argparse.ArgumentParser()
parser.add_argument("--output", default="retriever")
parser.add_argument("--steps", type=int, default=50)
options = parser.parse_args()

lines = demo_assets.dataset("BoolQ", "dev.jsonl").read_text().splitlines()[: 16 * options.steps]
rows = Dataset.from_list([json.loads(line) for line in lines]).select_columns(["question", "passage"])
model = SentenceTransformer(str(demo_assets.minilm()))  # or a hub id
model.max_seq_length = 64
args = SentenceTransformerTrainingArguments(
    output_dir=options.output, max_steps=options.steps, per_device_train_batch_size=16, learning_rate=3e-4,
    warmup_steps=3, save_strategy="no", report_to="none", prompts={"question": "question: "},
)  # fmt: skip
trainer = SentenceTransformerTrainer(model, args, rows, loss=MultipleNegativesRankingLoss(model))
lora_init.initialize(trainer, rank=8)  # the one line; without a trainer: initialize(model, texts, rank=8)
trainer.train()

model.save_pretrained(options.output)  # adapter, pooling and the name of the base
loaded = SentenceTransformer(options.output)
before, after = (one.encode(rows["passage"][:8], convert_to_tensor=True) for one in (model, loaded))
print(f"saved in {options.output}; loaded again, embeddings differ by {float((before - after).abs().max()):.1g}")
