"""Peak memory of one phase in a process of its own: `python -m benchmarks.memory forward|collect|peft SETTING`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import peft_eva, settings

PHASES = ("forward", "collect", "peft")
_N_BATCHES = 6


def peaks(setting: str, rank: int, rho: float) -> dict[str, float]:
    """Peak memory of each phase in MiB, each measured in a fresh process (on a GPU: memory allocated on it)."""
    found = {}
    for phase in PHASES:
        command = [sys.executable, "-m", "benchmarks.memory", phase, setting, str(rank), str(rho)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[phase] = json.loads(done.stdout.splitlines()[-1])
    return found


def _reset() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: loading a model has its own


def _peak() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def main(phase: str, name: str, rank: int, rho: float) -> None:
    """Run one phase over a few batches and print its peak."""
    import lora_init

    torch.set_num_threads(2)
    setting = getattr(settings, name)(_N_BATCHES, 0)
    targets = list(lora_init.find_targets(setting.model).layers)
    with torch.no_grad():
        setting.body(**{key: value for key, value in setting.seen[0].items() if key != "labels"})
    _reset()
    if phase == "collect":
        lora_init.collect(setting.model, setting.seen, targets, rank=rank, rho=rho, tolerance=0.0)
    elif phase == "peft":
        peft_settings = peft_eva.config(rank, rho, targets, setting.task_type)
        peft_eva.run(setting.model, setting.seen, peft_settings, max_passes=_N_BATCHES)
    else:
        for batch in setting.seen:
            with torch.no_grad():
                setting.body(**{key: value for key, value in batch.items() if key != "labels"})
    print(json.dumps(_peak()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
