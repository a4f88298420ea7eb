"""Peak memory of one phase in a process of its own: `python -m benchmarks.memory forward|collect|peft SETTING`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

from benchmarks import peft_eva, settings
from lora_init.comparison.training import peak_bytes, reset_peak

PHASES = ("forward", "collect", "peft")
_N_BATCHES = 6


def peaks(setting: str, rank: int, rho: float) -> dict[str, float]:
    """Peak memory of each phase in MiB, each measured in a fresh process (on a GPU: memory allocated on it)."""
    return {phase: in_fresh_process("benchmarks.memory", phase, setting, rank, rho) / 2**20 for phase in PHASES}


def in_fresh_process(module: str, *arguments: object) -> Any:
    """Run a module that prints what it measured, as JSON in its last line; return that."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(phase: str, name: str, rank: int, rho: float) -> None:
    """Run one phase over a few batches and print its peak."""
    import lora_init

    torch.set_num_threads(2)
    setting = getattr(settings, name)(_N_BATCHES, 0)
    targets = list(lora_init.find_targets(setting.model).layers)
    with torch.no_grad():
        setting.body(**{key: value for key, value in setting.seen[0].items() if key != "labels"})
    reset_peak()  # loading a model has a peak of its own
    if phase == "collect":
        lora_init.collect(setting.model, setting.seen, targets, rank=rank, rho=rho, tolerance=0.0)
    elif phase == "peft":
        peft_settings = peft_eva.config(rank, rho, targets, setting.task_type)
        peft_eva.run(setting.model, setting.seen, peft_settings, max_passes=_N_BATCHES)
    else:
        for batch in setting.seen:
            with torch.no_grad():
                setting.body(**{key: value for key, value in batch.items() if key != "labels"})
    print(json.dumps(peak_bytes()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
