"""Fine-tune a sentence encoder to answer yes or no, with an adapter that starts from the data.

    python examples/finetune_classifier.py

MiniLM (BERT, 22M) reads BoolQ's question and passage. The classification head is new and trained whole, which PEFT
does by itself for task_type="SEQ_CLS"; lora_init leaves it alone. 60 steps take about two minutes on 2 CPU cores:
enough to see it run, not enough to beat the most frequent answer.
"""

import argparse

import demo_assets
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import lora_init

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", default="finetuned-classifier", help="directory for the trained adapter")
parser.add_argument("--samples", type=int, default=1280, help="examples in all; a fifth is held out")
parser.add_argument("--steps", type=int, default=60)
args = parser.parse_args()

set_seed(0)  # the new head is random
name = demo_assets.minilm()
tokenizer = AutoTokenizer.from_pretrained(name)

rows = load_dataset("json", data_files=str(demo_assets.dataset("BoolQ", "dev.jsonl")), split="train")
rows = rows.shuffle(seed=0).select(range(min(args.samples, len(rows))))
# The classes as lora_init counts them, without rows that have none.
classes = lora_init.load_batches(rows, tokenizer, template="{question}", label="answer", samples=None).classes
rows = rows.filter(lambda row: str(row["answer"]) in classes)
model = AutoModelForSequenceClassification.from_pretrained(name, id2label=dict(enumerate(classes)))


def encode(row):
    tokens = tokenizer(row["question"], row["passage"], truncation=True, max_length=192)
    return {**tokens, "labels": classes.index(str(row["answer"]))}


parts = rows.map(encode, remove_columns=rows.column_names).train_test_split(test_size=0.2, seed=0)
collate = DataCollatorWithPadding(tokenizer)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        per_device_train_batch_size=16,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=parts["train"],
    eval_dataset=parts["test"],
    data_collator=collate,
    compute_metrics=accuracy,
)

# What the trainer is about to train on decides where its adapter starts: for classes by the gradient.
peft_model = lora_init.initialize(trainer, rank=8, learning_rate="measured")
peft_model.print_trainable_parameters()

before = trainer.evaluate()
trainer.train()
after = trainer.evaluate()
labels = parts["test"]["labels"]
most_frequent = max(map(labels.count, set(labels))) / len(labels)
print(f"held-out loss {before['eval_loss']:.3f} before, {after['eval_loss']:.3f} after")
print(f"held-out accuracy {before['eval_accuracy']:.2f} before, {after['eval_accuracy']:.2f} after", end="; ")
print(f"always the most frequent answer: {most_frequent:.2f}")
peft_model.save_pretrained(args.output)
print(f"adapter saved in {args.output}")
