"""A retriever from MiniLM: `eva`, the start that is recommended, and `random`: `python -m benchmarks.embeddings FILE`.

Situations of SIQA with their questions, and the right answers. 384 pairs train a SentenceTransformerTrainer with
MultipleNegativesRankingLoss, in 24 steps of 16; of 400 other pairs, one half chooses the rate and the other reports
nDCG@10 among all 400 answers. `other` is BoolQ, not trained on: 200 questions, and their passages up to 32 tokens.
MiniLM is near 1 there, so it shows what is lost. Needs sentence-transformers. Runs are appended to FILE, so it can be
stopped and called again.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import lora_init
from benchmarks.settings import table

SEEDS, STEPS, BATCH, RANK, LENGTH = 4, 24, 16, 8, 32
RATES = {"eva": (1e-4, 3e-4, 1e-3), "random": (3e-4, 1e-3, 3e-3)}


def pairs(n: int) -> list[tuple[str, str]]:
    """Read questions of BoolQ and their passages, each passage once."""
    import demo_assets

    found: dict[str, str] = {}
    for line in demo_assets.dataset("BoolQ", "combined.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["passage"], row["question"])
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    every = list(found.items())
    return [(every[i][1], every[i][0]) for i in order[:n]]


def situations(n: int) -> list[tuple[str, str]]:
    """Read situations of SIQA with their questions, and the right answers, each answer once."""
    import demo_assets

    found: dict[str, str] = {}
    for line in demo_assets.dataset("SIQA", "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["answer"].partition(". ")[2], f"{row['passage']} {row['question']}")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    every = list(found.items())
    return [(every[i][1], every[i][0]) for i in order[:n]]


def gains(model: Any, held_out: list[tuple[str, str]]) -> list[float]:
    """Compute nDCG@10 of each question: 1 / log2(1 + place) of its own passage among all, 0 beyond the tenth."""
    questions, passages = (model.encode(list(texts), convert_to_tensor=True) for texts in zip(*held_out, strict=True))
    scores = questions @ passages.T
    places = (scores > scores.diagonal()[:, None]).sum(1) + 1
    return [1 / math.log2(1 + place) if place <= 10 else 0.0 for place in places.tolist()]


def encoder() -> Any:
    """Load MiniLM as a SentenceTransformer."""
    import demo_assets
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    transformer = Transformer(str(demo_assets.minilm()), max_seq_length=LENGTH)
    return SentenceTransformer(modules=[transformer, Pooling(384, "mean"), Normalize()], device="cpu")


def run(start: str, rate: float, seed: int, train: list[Any], measure: Any) -> dict[str, Any]:
    """Train one adapter."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model, began = encoder(), time.process_time()
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = Dataset.from_list([{"question": train[i][0], "passage": train[i][1]} for i in drawn])
    args = SentenceTransformerTrainingArguments(
        output_dir="unused", max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=rate, warmup_steps=3,
        lr_scheduler_type="cosine", seed=seed, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        logging_steps=STEPS,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model, args, rows, loss=MultipleNegativesRankingLoss(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora_init.initialize(trainer, rank=RANK, method=start, seed=seed, max_batches=16)
        trainer.train()
    return {"start": start, "rate": rate, "seed": seed} | measure(model) | {"seconds": time.process_time() - began}


def summary(runs: list[dict[str, Any]]) -> str:
    """Return a table of each start at each rate, in the mean over seeds."""
    rows = []
    for start, rate in dict.fromkeys((one["start"], one["rate"]) for one in runs):
        own = [one for one in runs if (one["start"], one["rate"]) == (start, rate)]
        cells = [[one[name] for one in own] for name in ("choice", "report", "other")]
        spread = statistics.stdev(cells[1]) if len(own) > 1 else math.nan
        rows.append(
            [start, f"{rate:g}", len(own), *(f"{statistics.fmean(cell):.4f}" for cell in cells), f"{spread:.4f}"]
        )
    return table(["start", "rate", "seeds", "choice", "report", "other", "deviation of report"], rows)


def main(file: Path) -> None:
    """Make the runs that FILE lacks, seed after seed, and print the table."""
    data, other = situations(784), pairs(200)
    held_out, train = data[:400], data[400:]

    def measure(model: Any) -> dict[str, float]:
        found = gains(model, held_out)
        return {
            "choice": statistics.fmean(found[:200]), "report": statistics.fmean(found[200:]),
            "other": statistics.fmean(gains(model, other)),
        }  # fmt: skip

    runs = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    asked = [("before", 0.0, 0)]
    asked += [(start, RATES[start][i], seed) for seed in range(SEEDS) for i in range(3) for start in RATES]
    for start, rate, seed in asked:
        if (start, rate, seed) in {(one["start"], one["rate"], one["seed"]) for one in runs}:
            continue
        if start == "before":
            done = {"start": start, "rate": rate, "seed": seed} | measure(encoder()) | {"seconds": 0.0}
        else:
            done = run(start, rate, seed, train, measure)
        runs.append(done)
        with file.open("a") as out:
            out.write(json.dumps(done) + "\n")
        print(done, file=sys.stderr, flush=True)
    print(summary(runs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
