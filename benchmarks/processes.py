"""How long a pass takes by one and by two processes, how much they capture, and what travels at its end.

    python -m benchmarks.processes

Each process has one thread. The states that travel are also computed for larger models, from their shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import settings
from lora_init import IncrementalSVD, Statistics, collect
from lora_init.collection.processes import Processes

# Inputs of one block, q/k/v, o, gate/up and down, and the number of blocks.
SHAPES = {"8B": ((4096, 4096, 4096, 14336), 32), "70B": ((8192, 8192, 8192, 28672), 80)}
COMPONENTS = 32
RESULTS = Path(__file__).parent / "results" / "processes"


def state_bytes(shape: str) -> int:
    """Count the bytes of the states of all inputs, of decompositions that have seen rows."""
    widths, blocks = SHAPES[shape]
    in_one = 0
    for width in widths:
        svd = IncrementalSVD(COMPONENTS).partial_fit(torch.randn(2 * COMPONENTS, width))
        in_one += len(pickle.dumps(svd))
    return in_one * blocks


def pass_of_one(arguments: argparse.Namespace) -> None:
    """Collect as one of several processes; write how long it took and how much was sent."""
    setting = getattr(settings, arguments.setting)(arguments.batches, 0)
    sent: list[int] = []
    send = Processes._send
    Processes._send = lambda self, content, to: (sent.append(len(content)), send(self, content, to))[1]  # type: ignore[assignment,method-assign]
    start = time.perf_counter()
    stats = collect(
        setting.model, setting.seen, rank=16, max_batches=arguments.batches, tolerance=0.0, progress=False,
        task_type=setting.task_type,
    )  # fmt: skip
    found = {"seconds": time.perf_counter() - start, "sent": sum(sent), "parts": stats.provenance.seconds}
    (arguments.folder / f"{arguments.rank}.json").write_text(json.dumps(found))
    if arguments.rank == 0:
        stats.save(arguments.folder / "stats")


def start(size: int, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run the pass in `size` processes; return what each wrote."""
    command = [sys.executable, "-m", "benchmarks.processes", "--setting", arguments.setting, "--size", str(size)]
    command += ["--batches", str(arguments.batches), "--folder", str(folder)]
    (folder / "meet").unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(size)]
    if any(process.wait() for process in running):
        raise SystemExit("a process failed")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure passes of one and two processes."""
    found: dict[str, Any] = {}
    captured = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for size in (1, 2):
            ranks = start(size, arguments, folder)
            stats = Statistics.load(folder / "stats")
            captured[size] = {name: float(stats.explained_variance(name)[:16].sum()) for name in stats}
            slowest = max(ranks, key=lambda one: one["seconds"])
            found[f"{size}"] = {**slowest, "sent": max(one["sent"] for one in ranks)}
    ratios = sorted(captured[2][name] / captured[1][name] for name in captured[1])
    found["captured"] = {"min": ratios[0], "median": statistics.median(ratios), "max": ratios[-1]}
    return found


def report(content: dict[str, Any]) -> str:
    """Tables of what was measured and computed."""
    found, rows = content["measured"], []
    for size in ("1", "2"):
        one = found[size]
        parts = [f"{one['parts'][part]:.1f} s" for part in ("forward", "decomposition")]
        rows.append([size, f"{one['seconds']:.1f} s", *parts, f"{one['sent'] / 2**20:.1f} MiB"])
    ratio = found["captured"]
    states = [[shape, f"{size / 2**20:.0f} MiB"] for shape, size in content["states"].items()]
    lines = [
        f"{content['setting']}, {content['batches']} batches\n",
        settings.table(["processes, a thread each", "pass", "forward", "decomposition", "sent by rank 1"], rows),
        "",
        f"Variance that 16 components say they capture, 2 processes over 1: {ratio['min']:.4f} at least, "
        f"{ratio['median']:.4f} in the median, {ratio['max']:.4f} at most.",
        "",
        settings.table(["model", "state that each process sends once"], states),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write; or be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=["smollm2", "minilm"], default="smollm2")
    parser.add_argument("--batches", type=int, default=32)
    for name, kind in (("--rank", int), ("--size", int), ("--folder", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        torch.set_num_threads(1)
        meet = f"file://{arguments.folder}/meet"
        torch.distributed.init_process_group("gloo", init_method=meet, rank=arguments.rank, world_size=arguments.size)
        pass_of_one(arguments)
        torch.distributed.destroy_process_group()
        return
    content = {"setting": arguments.setting, "batches": arguments.batches, "machine": settings.machine()}
    content["measured"] = measured(arguments)
    content["states"] = {shape: state_bytes(shape) for shape in SHAPES}
    text = report(content)
    print(text)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{arguments.setting}.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / f"{arguments.setting}.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
