"""Teach a vision transformer turned digits: an image processor, Trainer, and an adapter that starts from its batches.

    python examples/finetune_vit.py

A small ViT first learns scikit-learn's 8 x 8 digits. Then every image is turned by a quarter, and an adapter of rank 4
learns to read them again: from the default start and from `random`. Offline; under two minutes on 2 CPU cores.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

import lora_init

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", default="finetuned-vit", help="directory for the trained adapter")
parser.add_argument("--steps", type=int, default=400, help="steps of the base model's training; an eighth for adapters")
args = parser.parse_args()

set_seed(0)
digits = load_digits()
processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], rescale_factor=1 / 16)
pixels = processor([*digits.images[..., None]], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
upright = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, digits.target, strict=True)]
turned = [row | {"pixel_values": row["pixel_values"].rot90(dims=(1, 2))} for row in upright]
shape = dict(image_size=8, patch_size=2, num_channels=1, num_labels=10, intermediate_size=128)
model = ViTForImageClassification(ViTConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, **shape))


def trainer_of(model, rows, rate, steps):
    settings = dict(learning_rate=rate, max_steps=steps, per_device_train_batch_size=64, report_to="none")
    return Trainer(model, TrainingArguments(args.output, save_strategy="no", **settings), train_dataset=rows[:1400])


@torch.no_grad()
def accuracy(model):
    logits = model.eval()(torch.stack([row["pixel_values"] for row in turned[1400:]])).logits
    return float((logits.argmax(-1) == torch.tensor(digits.target[1400:])).double().mean())


trainer_of(model, upright, 2e-3, args.steps).train()
model.save_pretrained(args.output + "-base")
print(f"the base model: accuracy {accuracy(model):.3f} on turned digits")
for method, rate in ((None, 3e-3), ("random", 1e-2)):  # None: natural-gradient, since Trainer trains a classifier
    base = ViTForImageClassification.from_pretrained(args.output + "-base")
    trainer = trainer_of(base, turned, rate, args.steps // 8)  # the best of four or five rates after 40 steps
    adapted = lora_init.initialize(trainer, rank=4, method=method, data="scikit-learn's digits, turned")
    trainer.train()
    print(f"from {method or 'the default start'}: accuracy {accuracy(adapted):.3f} on turned digits")
    adapted.save_pretrained(f"{args.output}/{method or 'default'}")  # with the head
