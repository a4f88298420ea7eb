"""What a pass by several processes sends, how long it takes, and what it would send with more of them.

python -m benchmarks.processes                    # SmolLM2-135M: 1 and 2 processes, a meeting of an 8B model, a table
python -m benchmarks.processes --only table       # computed from sizes alone
"""

from __future__ import annotations

import argparse
import json
import os
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
from lora_init.collection.processes import Exchange, Team, batches_of_a_round, children_of
from lora_init.collection.state import Collected, GroupRecord
from lora_init.comparison.training import peak_bytes, reset_peak

# Inputs of one block, q/k/v, o, gate/up and down, and the number of blocks.
SHAPES = {"8B": ((4096, 4096, 4096, 14336), 32), "70B": ((8192, 8192, 8192, 28672), 80)}
COMPONENTS = 32
# Memory of a meeting over the size of the state, as a meeting of two processes has it.
MEMORY = 4.2
RESULTS = Path(__file__).parent / "results" / "processes"


def state_bytes(shape: str, blocks: int | None = None) -> int:
    """Count the bytes of the states of all inputs, of decompositions that have seen rows."""
    widths, all_blocks = SHAPES[shape]
    in_one = 0
    for width in widths:
        svd = IncrementalSVD(COMPONENTS).partial_fit(torch.randn(2 * COMPONENTS, width))
        in_one += sum(tensor.numel() * tensor.element_size() for tensor in svd.state_dict().values())
    return in_one * (all_blocks if blocks is None else blocks)


def meetings(size: int, max_batches: int) -> int:
    """Count the meetings of a pass that goes on to `max_batches`."""
    done = count = 0
    while done < max_batches:
        done += sum(batches_of_a_round(done, max_batches, rank, size) for rank in range(size))
        count += 1
    return count


def projected() -> list[dict[str, Any]]:
    """Compute what 8, 64 and 512 processes would send, each with eight batches."""
    found = []
    for shape in SHAPES:
        state = state_bytes(shape)
        for size in (8, 64, 512):
            sent = [state * (len(children_of(rank, size)) + (rank > 0)) for rank in range(size)]
            found.append(
                {
                    "shape": shape,
                    "processes": size,
                    "state": state,
                    "meetings": meetings(size, 8 * size),
                    "steps": 2 * (size - 1).bit_length(),
                    "sent_most": max(sent),
                    "sent_median": statistics.median(sent),
                    "memory": int(MEMORY * state),
                    "rows": _row_bytes(shape),
                }
            )
    return found


def _row_bytes(shape: str) -> int:
    """Count what PEFT's EVA gathers for one batch of 4 x 512 tokens: the rows of each input, in bfloat16."""
    widths, blocks = SHAPES[shape]
    return 2 * 2048 * sum(widths) * blocks


def pass_of_one(arguments: argparse.Namespace, folder: Path) -> None:
    """Collect as one of several processes; write what was sent and how long it took."""
    setting = getattr(settings, arguments.setting)(arguments.batches, 0)
    with Team() as team:
        start = time.perf_counter()
        stats = collect(
            setting.model, setting.seen, rank=16, max_batches=arguments.batches, tolerance=0.0, progress=False,
            task_type=setting.task_type,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        found = {"seconds": seconds, "sent": team.bytes_sent, "parts": stats.provenance.seconds}
    (folder / f"{team.rank}.json").write_text(json.dumps(found))
    if team.rank == 0:
        stats.save(folder / "stats")


def meeting_of_one(folder: Path) -> None:
    """Merge states of the shape of an 8B model's, as one of several processes; write time and memory."""
    widths, blocks = SHAPES["8B"]
    found = Collected()
    for block in range(blocks):
        for position, width in enumerate(widths):
            record = GroupRecord(IncrementalSVD(COMPONENTS))
            record.svd.partial_fit(torch.randn(2 * COMPONENTS, width))
            name = f"{block}.{position}"
            found.groups[name], found.group_of[name] = record, name
    with Team() as team:
        exchange = Exchange(team, lambda _: IncrementalSVD(COMPONENTS), 0.0)
        team.meet(None)
        reset_peak()
        before, start = peak_bytes(), time.perf_counter()
        whole = exchange.bring_together(found)
        exchange.hand_out(whole, found)
        seconds = time.perf_counter() - start
        content = {"seconds": seconds, "sent": team.bytes_sent, "memory": peak_bytes() - before}
    (folder / f"{team.rank}.json").write_text(json.dumps(content))


def start(part: str, size: int, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run one part in `size` processes; return what each wrote."""
    command = [sys.executable, "-m", "benchmarks.processes", "--setting", arguments.setting, "--as", part]
    command += ["--batches", str(arguments.batches), "--folder", str(folder)]
    (folder / "meet").unlink(missing_ok=True)
    running = [
        subprocess.Popen(
            [*command, "--rank", str(rank), "--size", str(size)], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        for rank in range(size)
    ]
    if any(process.wait() for process in running):
        raise SystemExit(f"a process of {part} failed")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure passes of one and two processes with a thread each, and a meeting."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, captured = Path(temporary), {}
        for size in (1, 2):
            ranks = start("pass", size, arguments, folder)
            stats = Statistics.load(folder / "stats")
            captured[size] = {name: float(stats.explained_variance(name)[:16].sum()) for name in stats}
            slowest = max(ranks, key=lambda one: one["seconds"])
            found[f"{size}"] = {**slowest, "sent": max(one["sent"] for one in ranks), "meetings": 0}
            found[f"{size}"]["held_out"] = settings.median([*stats.held_out.values()])
        found["2"]["meetings"] = meetings(2, arguments.batches)
        ratios = sorted(captured[2][name] / captured[1][name] for name in captured[1])
        found["captured"] = {"min": ratios[0], "median": statistics.median(ratios), "max": ratios[-1]}
        found["meeting"] = max(start("meeting", 2, arguments, folder), key=lambda one: one["seconds"])
    return found


def report(content: dict[str, Any]) -> str:
    """Tables of what there is."""
    lines = []
    if "measured" in content:
        found = content["measured"]
        rows = []
        for size in ("1", "2"):
            one = found[size]
            parts = [f"{one['parts'][part]:.1f} s" for part in ("forward", "decomposition")]
            rows.append([size, f"{one['seconds']:.1f} s", *parts, one["meetings"], f"{one['sent'] / 2**20:.1f} MiB",
                         f"{one['held_out']:.4f}"])  # fmt: skip
        header = [
            "processes, a thread each",
            "pass",
            "forward",
            "decomposition",
            "meetings",
            "sent by one, at most",
            "held out",
        ]
        lines += [f"{content['setting']}, {content['batches']} batches\n", settings.table(header, rows), ""]
        ratio, meeting = found["captured"], found["meeting"]
        lines += [
            f"Variance that 16 components say they capture, 2 processes over 1: {ratio['min']:.4f} at least, "
            f"{ratio['median']:.4f} in the median, {ratio['max']:.4f} at most.",
            f"A meeting of 2 processes with the states of an 8B model: {meeting['seconds']:.1f} s, "
            f"{meeting['sent'] / 2**20:.0f} MiB sent by one, {meeting['memory'] / 2**20:.0f} MiB of memory meanwhile.",
            "",
        ]
    header = ["model", "processes", "state", "meetings", "sent by rank 0", "in the median", "steps of the tree"]
    header += ["memory meanwhile", "rows of one batch"]
    rows = []
    for one in content["projected"]:
        sizes = [f"{one[part] / 2**20:.0f} MiB" for part in ("state", "sent_most", "sent_median", "memory", "rows")]
        rows.append([one["shape"], one["processes"], sizes[0], one["meetings"], *sizes[1:3], one["steps"], *sizes[3:]])
    lines += [
        "Computed from sizes: a pass of eight batches for each process; what is sent, and the memory, are those of one",
        "meeting. Last column: what a process would send of a batch of 4 x 512 tokens if rows travelled, in bfloat16.",
        "",
        settings.table(header, rows),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write; or be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=["smollm2", "minilm"], default="smollm2")
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--only", choices=["table"])
    for name, kind in (("--as", str), ("--rank", int), ("--size", int), ("--folder", Path)):
        parser.add_argument(name, type=kind, dest=name.strip("-").replace("as", "part"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        torch.set_num_threads(1)
        meet = f"file://{arguments.folder}/meet"
        torch.distributed.init_process_group("gloo", init_method=meet, rank=arguments.rank, world_size=arguments.size)
        if arguments.part == "pass":
            pass_of_one(arguments, arguments.folder)
        else:
            meeting_of_one(arguments.folder)
        torch.distributed.destroy_process_group()
        return
    content = {"setting": arguments.setting, "batches": arguments.batches, "machine": settings.machine()}
    if arguments.only is None:
        content["measured"] = measured(arguments)
    content["projected"] = projected()
    text = report(content)
    print(text)
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = arguments.only or arguments.setting
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
