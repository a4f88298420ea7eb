"""A pass over a model that does not fit into memory: `python -m benchmarks.big_models DIRECTORY`, one thread.

DIRECTORY gets a random Llama of 3.0B parameters, 6.0 GB, if it is not there. Each line is a new process, with a limit
of the operating system where one is named: RLIMIT_AS, as `ulimit -v` sets it. Seconds are those of the processor.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.scaling import MODELS
from benchmarks.settings import table
from lora_init.cli.dry_run import estimate
from lora_init.loading.batches import Batches

LIMIT, KEPT = 4.0, "1GB"  # GB of address space, and of weights that stay in memory
EXAMPLES, LENGTH = 32, 32
# Rows of a batch, and whether weights stay on disk.
RUNS = ((16, False), (4, True), (16, True), (32, True))


def main(directory: Path) -> None:
    """Make the model, run each setting in a process of its own, and print what they took and what follows."""
    make(directory)
    command = [sys.executable, "-m", "benchmarks.big_models", str(directory)]
    refused = subprocess.run([*command, "16", "memory", "limited"], capture_output=True, text=True, check=False)
    print(f"in memory, limit {LIMIT:g} GB: exit {refused.returncode}, {refused.stderr.strip().splitlines()[-1]}")
    found = []
    for rows, offloads in RUNS:
        arguments = [str(rows), "offload" if offloads else "memory", "limited" if offloads else "unlimited"]
        done = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(found[-1]), flush=True)
    columns = [
        "weights", "batches x rows", "peak memory, GB", "read from the disk, GB",
        "seconds of the processor",
    ]  # fmt: skip
    print(table(columns, [list(one.values())[: len(columns)] for one in found]))
    columns = [
        "Llama of", "weights, GB", "statistics, GB at most", "read if offloaded, GB", "TFLOP in products", "hours here",
    ]  # fmt: skip
    print(table(columns, per_model(found[0]["over_products"], found[0]["gflops"])))


def per_model(over_products: float, gflops: float) -> list[list[str]]:
    """Say what --dry-run says of larger models, 8 batches of 64 examples of 128 tokens in bfloat16, at this speed."""
    from transformers import LlamaConfig

    settings = {
        "rank": 16, "rho": 2, "gradients": False, "max_batches": 8, "freeze_a": False, "use_dora": False,
        "dtype": "bfloat16", "device": "cpu", "quantize": None,
    }  # fmt: skip
    data = Batches([{"input_ids": torch.zeros(64, 128)}] * 8)
    rows = []
    for name, (d_model, d_mlp, layers, _) in MODELS.items():
        shape = LlamaConfig(
            vocab_size=128256, hidden_size=d_model, intermediate_size=d_mlp, num_hidden_layers=layers,
            num_attention_heads=d_model // (64 if name == "1B" else 128), num_key_value_heads=8,
            tie_word_embeddings=name == "1B",
        )  # fmt: skip
        source: Any = SimpleNamespace(
            config=shape, auto_class="AutoModelForCausalLM", options={"trust_remote_code": False}
        )
        said = estimate(source, data, {"target_modules": "all-linear"}, settings)
        rows.append([
            name, f"{said['weights_bytes'] / 1e9:.1f}", f"{said['statistics_bytes'] / 1e9:.1f}",
            f"{said['offloaded_bytes_read'] / 1e9:.0f}", f"{said['operations'] / 1e12:,.0f}",
            f"{said['operations'] * over_products / (gflops * 1e9) / 3600:.1f}",
        ])  # fmt: skip
    return rows


def config() -> Any:
    """Return the shape: Llama 3.2 3B with a vocabulary of 32,000."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32000, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip


def make(directory: Path) -> None:
    """Write random weights a layer at a time, a file for each: the model is never whole in memory."""
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    index = directory / "model.safetensors.index.json"
    if index.exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    config().save_pretrained(directory)
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config()).state_dict()
    files: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        files.setdefault(f"{parts[2] if parts[1] == 'layers' else 'rest'}.safetensors", []).append(name)
    torch.manual_seed(0)
    for file, names in files.items():
        tensors = {
            n: torch.empty(shapes[n].shape, dtype=torch.bfloat16).normal_(0, 0.02)
            if shapes[n].dim() > 1
            else torch.ones(shapes[n].shape, dtype=torch.bfloat16)
            for n in names
        }
        save_file(tensors, directory / file, {"format": "pt"})
    index.write_text(json.dumps({"metadata": {}, "weight_map": {n: f for f, names in files.items() for n in names}}))


def measure(directory: Path, rows: int, offloads: bool, limited: bool) -> None:
    """Run one pass and print what it took."""
    from transformers import AutoModelForCausalLM

    import lora_init
    from lora_init.comparison.training import peak_bytes

    torch.set_num_threads(1)
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if offloads:
        options |= {
            "device_map": "auto", "max_memory": {"cpu": KEPT}, "offload_folder": directory / "offload",
        }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(directory, **options)
    n_batches = EXAMPLES // rows
    if limited:  # not before: from_pretrained maps all files for a moment, also those of weights that stay on disk
        resource.setrlimit(resource.RLIMIT_AS, (int(LIMIT * 1e9), int(LIMIT * 1e9)))
    if not offloads:  # weights are read when they are first used
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long))
    gflops = speed()
    start, from_disk = time.process_time(), disk_bytes()
    settings = {"rank": 16, "tolerance": 0.0, "max_batches": n_batches}
    stats = lora_init.collect(model, batches(directory if offloads else None, rows), **settings)
    seconds = time.process_time() - start
    assert stats.provenance is not None and stats.provenance.n_batches == n_batches
    products = 2 * sum(
        p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n and "head" not in n
    )
    over = seconds * gflops * 1e9 / (products * n_batches * rows * LENGTH)
    print(
        json.dumps(
            {
                "weights": "on disk" if offloads else "in memory", "batches": f"{n_batches} x {rows}",
                "peak": f"{peak_bytes() / 1e9:.2f}",
                "disk": f"{(disk_bytes() - from_disk) / 1e9:.1f}", "seconds": f"{seconds:.0f}",
                "gflops": gflops, "over_products": over, "tokens": n_batches * rows * LENGTH,
            }
        )
    )  # fmt: skip


def batches(directory: Path | None, rows: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield random tokens, the same in each setting, after dropping the weights in a directory from the page cache.

    That is how it is where memory has no room for them.
    """
    tokens = torch.randint(32000, (EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    for batch in tokens.split(rows):
        for file in directory.glob("*.safetensors") if directory else ():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield {"input_ids": batch, "attention_mask": torch.ones_like(batch)}


def disk_bytes() -> int:
    """Bytes that this process has had read from the disk."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def speed() -> float:
    """GFLOP a second of processor time, of a product of bfloat16 matrices."""
    a = torch.ones(1024, 1024, dtype=torch.bfloat16)
    a @ a
    start = time.process_time()
    for _ in range(20):
        a @ a
    return 20 * 2 * 1.024**3 / (time.process_time() - start)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        _, place, n_rows, where, limit = sys.argv
        measure(Path(place), int(n_rows), where == "offload", limit == "limited")
