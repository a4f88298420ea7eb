"""Tiny models of sentence-transformers, and their trainers."""

import sentence_transformers as library
import torch
from datasets import Dataset
from sentence_transformers.sentence_transformer import losses

from tests.conftest import tiny_bert
from tests.loading.made import bert_tokenizer

TEXTS = [" ".join("abcdefghij"[(i * k + k) % 10] for k in range(1, 3 + i % 5)) for i in range(24)]
PAIRS = {"anchor": TEXTS, "positive": [text[::-1] + " a b" for text in TEXTS]}
SCORED = PAIRS | {"score": [i / 24 for i in range(24)]}
LOSSES = {
    "MultipleNegativesRankingLoss": PAIRS, "CachedMultipleNegativesRankingLoss": PAIRS, "CoSENTLoss": SCORED,
    "CosineSimilarityLoss": SCORED,
}  # fmt: skip


def encoder(folder, kind="SentenceTransformer", **more):
    torch.manual_seed(0)
    if not (folder / "base").exists():
        tiny_bert(None).save_pretrained(folder / "base")
        bert_tokenizer().save_pretrained(folder / "base")
    return getattr(library, kind)(str(folder / "base"), device="cpu", **more)


def trainer_of(folder, loss="MultipleNegativesRankingLoss", model=None, **more):
    model, more = model or encoder(folder), {"max_steps": 3, "prompts": {"anchor": "j i: "}} | more
    return made(library.SentenceTransformerTrainer, model, folder, LOSSES[loss], getattr(losses, loss)(model), **more)


def reranker_trainer(folder, label=True, **more):
    model = encoder(folder, "CrossEncoder", num_labels=1)
    columns = PAIRS | ({"label": [float(i % 2) for i in range(24)]} if label else {})
    kinds = library.cross_encoder.losses
    loss = (kinds.BinaryCrossEntropyLoss if label else kinds.MultipleNegativesRankingLoss)(model)
    return made(library.CrossEncoderTrainer, model, folder, columns, loss, **{"max_steps": 3} | more)


def made(kind, model, folder, columns, loss, **more):
    settings = dict(per_device_train_batch_size=6, learning_rate=1e-2, report_to="none", save_strategy="no")
    settings |= dict(use_cpu=True, disable_tqdm=True, logging_steps=1, output_dir=str(folder / "out"))
    args = getattr(library, kind.__name__.removesuffix("er") + "ingArguments")(**settings | more)
    return kind(model, args, Dataset.from_dict(columns), loss=loss)
