"""How long a plan takes: `python -m benchmarks.ranks`. 80 blocks x 7 layers x 128 components, every budget and policy.

Prints Markdown; writes JSON next to this file. The claim is under 50 ms of processor time for each plan.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import lora_init
from lora_init.layers.targets import Target
from lora_init.statistics.spectrum import Spectrum

# Of a 70B Llama: rows that share an input, with (d_in, d_out) of each layer.
_WIDTH, _MLP, _KV = 8192, 28672, 1024
_GROUPS = (
    {"self_attn.q_proj": (_WIDTH, _WIDTH), "self_attn.k_proj": (_WIDTH, _KV), "self_attn.v_proj": (_WIDTH, _KV)},
    {"self_attn.o_proj": (_WIDTH, _WIDTH)},
    {"mlp.gate_proj": (_WIDTH, _MLP), "mlp.up_proj": (_WIDTH, _MLP)},
    {"mlp.down_proj": (_MLP, _WIDTH)},
)
_QKV = ("q_proj", "k_proj", "v_proj")
PLANS: dict[str, dict[str, Any]] = {
    "eva, rank 64": {"rank": 64},
    "uniform, rank 64": {"rank": 64, "policy": "uniform"},
    "cost-aware, 300M parameters": {"parameters": "300M", "policy": "cost-aware"},
    "proportional, 300M parameters": {"parameters": "300M", "policy": "proportional"},
    "eva, 0.5 % of the model": {"fraction": 0.005},
    "eva, 500 MB": {"megabytes": 500},
    "60 % of the variance in every layer": {"variance": 0.6},
    "60 % of the variance in total": {"variance": 0.6, "coverage": "total"},
    "multiples of 8, q k v tied": {"rank": 32, "multiple_of": 8, "tie": _QKV},
    "one of 8, 16, 32, 64, down_proj at most 16": {
        "rank": 32, "rho": 4.0, "allowed_ranks": (8, 16, 32, 64), "overrides": {"*.down_proj": {"max_rank": 16}},
    },
}  # fmt: skip


def make_statistics(n_blocks: int, n_components: int) -> lora_init.Statistics:
    """Power-law spectra with exponents that differ by layer; planning reads no components, so there are none."""
    generator = torch.Generator().manual_seed(0)
    groups, group_of, targets = {}, {}, {}
    for block in range(n_blocks):
        for kinds in _GROUPS:
            names = {f"model.layers.{block}.{kind}": width for kind, width in kinds.items()}
            leader = next(iter(names))
            exponent = 0.6 + 0.8 * torch.rand((), generator=generator, dtype=torch.float64)
            variances = torch.arange(1, n_components + 1, dtype=torch.float64) ** -exponent
            total = 1.3 * float(variances.sum())
            groups[leader] = Spectrum(torch.empty(n_components, 0), variances, total, torch.empty(0), 10**6)
            for name, width in names.items():
                group_of[name], targets[name] = leader, Target(name, "Linear", *width)
    made = lora_init.Provenance("made up", "LlamaForCausalLM", "", "all-linear", n_parameters=70 * 10**9)
    return lora_init.Statistics(groups, group_of, targets, made)


def measure(stats: lora_init.Statistics, repeats: int) -> dict[str, dict[str, float]]:
    """Time each plan: the first one, and the median and the worst of the rest, in ms of processor time."""
    found = {}
    for label, arguments in PLANS.items():
        times = []
        for _ in range(repeats + 1):
            start = time.process_time()
            lora_init.allocate_ranks(stats, **arguments)
            times.append(1e3 * (time.process_time() - start))
        found[label] = {"first": times[0], "median": statistics.median(times[1:]), "worst": max(times[1:])}
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--components", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stats = make_statistics(arguments.blocks, arguments.components)
    found = measure(stats, arguments.repeats)
    lines = ["| plan | first, ms | median, ms | worst, ms |", "|---|---:|---:|---:|"]
    lines += [f"| {label} | {t['first']:.1f} | {t['median']:.1f} | {t['worst']:.1f} |" for label, t in found.items()]
    print(f"{len(stats)} layers, {arguments.components} components each, one thread\n")
    print("\n".join(lines))
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    content = {**vars(arguments), "machine": platform.machine(), "python": platform.python_version(), "ms": found}
    (folder / "ranks.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
