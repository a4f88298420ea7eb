"""What a frozen A saves at equal trainable parameters, in memory and time of training: `python -m benchmarks.frozen_a`.

SmolLM2-135M in float32, batches of 4 x up to 256 tokens, all linear layers, AdamW. Each row is from a process of its
own: the peak of its memory in six training steps after the model was loaded, and the mean time of the last five.
"""

from __future__ import annotations

import json
import statistics
import sys
from functools import partial
from typing import Any

import torch

from benchmarks import settings
from benchmarks.memory import in_fresh_process
from lora_init.adapters.peft_model import adapter_layers
from lora_init.building.build import rank_with_frozen_a
from lora_init.comparison.training import peak_bytes, reset_peak
from lora_init.layers.targets import find_targets

RANKS = (8, 32)
_N_STEPS = 6


def measure(rank: int, frozen: bool) -> dict[str, Any]:
    """Train a few steps with a random adapter, of which A may be frozen and B as large as both were."""
    setting = settings.smollm2(_N_STEPS, 0)
    if frozen:
        targets = find_targets(setting.model, "all-linear", task_type="CAUSAL_LM").layers
        rank = rank_with_frozen_a(targets.values(), rank)
    model = settings.random_adapter("all-linear", rank, "CAUSAL_LM", setting.model, 0).train()
    if frozen:
        for layer in adapter_layers(model).values():
            layer.lora_A.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)

    def step(batch: dict[str, torch.Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()

    reset_peak()
    seconds = [settings.timed(partial(step, batch)) for batch in setting.seen]
    return {
        "rank": rank,
        "parameters": sum(parameter.numel() for parameter in trained),
        "bytes": peak_bytes(),
        "seconds": statistics.fmean(seconds[1:]),
    }


def main() -> None:
    """Measure each in a fresh process, and print the table."""
    rows = []
    for rank in RANKS:
        for frozen in (False, True):
            found = in_fresh_process("benchmarks.frozen_a", rank, int(frozen))
            peak, seconds = f"{found['bytes'] / 2**20:,.0f} MiB", f"{found['seconds']:.2f} s"
            rows.append(["frozen" if frozen else "trained", found["rank"], f"{found['parameters']:,}", peak, seconds])
    print(settings.table(["A", "rank", "trainable parameters", "peak memory", "a step"], rows))


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measure(int(sys.argv[1]), sys.argv[2] == "1")))
    else:
        main()
