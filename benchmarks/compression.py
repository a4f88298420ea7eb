"""What a cut to a quarter of the rank costs, by weights and by data: `python -m benchmarks.compression CACHE`.

The trained adapters of `benchmarks.dial`, of rank 8 on average, are cut to rank 2 in each layer: to the closest B A
(`weights`, which is what `export --rank` does), or to the one whose outputs are closest on the training data (`data`:
the same in the norm of the second moment of 16 batches of 8). They are read on the examples to report and on passages.
Resumable; `results/compression/runs.jsonl` has a line for each reading: the sum over the labels of each example.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks.dial import Bench, mean, rows
from lora_init import Statistics, collect
from lora_init.adapters.peft_model import adapter_layers
from lora_init.collection.losses import sequence_losses
from lora_init.statistics.gradient_spectrum import product_svd
from lora_init.statistics.second_moment import SecondMoment

RUNS = Path(__file__).parent / "results" / "compression" / "runs.jsonl"
ADAPTERS = [("random 3e-3", 0), ("eva", 0), ("natural-gradient", 0)]
RANK = 2


@torch.no_grad()
def cut(model: nn.Module, statistics: Statistics | None) -> None:
    """Cut the adapter on a model to U U^T B A, U the first left singular vectors of B A S^1/2; S = 1 without data."""
    for name, layer in adapter_layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        right = a.double()
        if statistics is not None:
            right = SecondMoment.of(statistics[name]).times(right, 0.5)
        left = product_svd(b, right, RANK)[0]
        product = left.T @ b.double() @ a.double()
        a.zero_(), b.zero_()
        a[: len(product)], b[:, : len(product)] = product.to(a), left.to(b)


def run(cache: Path) -> None:
    """Read what is left."""
    bench = Bench(cache)
    RUNS.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["task"], row["arm"], row["way"]) for row in rows(RUNS)}
    for arm, seed in ADAPTERS:
        for name, task in bench.tasks.items():
            kept = cache / f"{name}.safetensors"
            if not kept.exists():
                batches = [task.batch(items) for items in task.order(0, 16, 8)]
                collect(bench.model, batches, rank=8, rho=2.0, center=False, progress=False).save(kept)
            for way in [way for way in ("full", "weights", "data") if (name, arm, way) not in done]:
                model = bench.adapter(name, arm, seed)
                if way != "full":
                    cut(model, Statistics.load(kept) if way == "data" else None)
                read = sequence_losses(model, [item.tokens for item in task.report], bench.padding)
                seen = sequence_losses(model, bench.seen, bench.padding)
                model.unload()
                row = {"task": name, "arm": arm, "seed": seed, "way": way, "seen": round(mean(seen), 4)}
                row |= {"labels": [count for _, count in read], "sums": [round(loss, 3) for loss, _ in read]}
                with RUNS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(name, arm, way, round(mean(read), 4), row["seen"], flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
