"""Fine-tune a language model with an adapter that starts from the data, in transformers.Trainer.

    python examples/finetune_llm.py
    python examples/finetune_llm.py --model MODEL --data my.jsonl --template "{question}" --completion " {answer}"

Without --model and --data it takes the demo model and BoolQ. On 2 CPU cores 30 steps take about three minutes.
"""

import argparse

import demo_assets
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import lora_init

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="model directory or hub id")
parser.add_argument("--data", help="file, folder or hub id")
parser.add_argument("--template", default="{passage}\nQuestion: {question}?\nAnswer:", help="the prompt")
parser.add_argument("--completion", default=" {label}", help="what the model should answer")
parser.add_argument("--output", default="finetuned-adapter", help="directory for the trained adapter")
parser.add_argument("--samples", type=int, default=256, help="training examples")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--freeze-a", action="store_true", help="train B alone, which takes less memory")
args = parser.parse_args()

name = args.model or demo_assets.smollm2()
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")

# Two samples that share no example. Labels are on the completion only, so the loss is that of the answer.
settings = dict(template=args.template, completion=args.completion, max_length=256)
data = args.data or demo_assets.dataset("BoolQ", "combined.jsonl")
batches = lora_init.load_batches(data, tokenizer, samples=args.samples, **settings)
held_out = lora_init.load_batches(data, tokenizer, samples=max(args.samples // 8, 4), offset=args.samples, **settings)
print(f"train on {batches.description}")

# The batches are made already: Trainer takes them one at a time.
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    ),
    train_dataset=batches,
    eval_dataset=held_out,
    data_collator=lambda items: items[0],
)

# What the trainer is about to train on decides where its adapter starts and how much rank each layer gets.
peft_model = lora_init.initialize(trainer, rank=16, freeze_a=args.freeze_a, learning_rate="measured")
peft_model.print_trainable_parameters()

before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"held-out loss of the answer: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")
peft_model.save_pretrained(args.output)
print(f"adapter saved in {args.output}")
