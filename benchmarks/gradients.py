"""Cost, memory and accuracy of gradient statistics, next to a bare forward and backward pass without weight gradients.

    python -m benchmarks.gradients                       # SmolLM2-135M on the CPU; on a GPU, a Llama of 1B
    python -m benchmarks.gradients --batches 3           # a quick look
    python -m benchmarks.gradients --only memory         # one part: cost, memory or accuracy

What is compared is run in turn on each batch. The bare pass is transformers' own, with its loss, from the input
embeddings back to them. Prints Markdown; writes JSON under results/gradients/.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_init
from benchmarks import memory, settings
from benchmarks.settings import Setting, table
from lora_init.collection.losses import count_labels
from lora_init.comparison.training import peak_bytes, reset_peak

RANK, RHO = 16, 2.0
_MEMORY_BATCHES = 4
_ANSWER = 4
_EXACT_EVERY = 8  # layers whose gradient is computed in full: of all kinds, since a Llama's block has 7


def bare(model: nn.Module, batch: dict[str, Any]) -> None:
    """One forward and backward pass to the input embeddings, no weight's gradient."""
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()  # type: ignore[operator]
    rest = {key: value for key, value in batch.items() if key != "input_ids"}
    model(inputs_embeds=embedded, use_cache=False, **rest).loss.backward()


def labelled(setting: Setting, last: int | None = None) -> list[dict[str, torch.Tensor]]:
    """Batches with a label on every token but padding, or on the last ones of each text, as an answer has them."""
    batches = []
    for batch in setting.seen:
        mask = batch["attention_mask"]
        left = mask.flip(1).cumsum(1).flip(1)  # tokens from here to the end
        counts = (mask == 1) & (left <= (last or mask.shape[1]))
        batches.append({**batch, "labels": batch["input_ids"].where(counts, -100)})
    return batches


def costs(setting: Setting, last: int | None = None) -> dict[str, Any]:
    """Time the bare passes and a step of ours on each batch in turn: wall seconds and seconds of processor time."""
    plain = copy.deepcopy(setting.model).requires_grad_(False)
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {clock: {} for clock in clocks}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        before = {clock: read() for clock, read in clocks.items()}
        yield
        settings.synchronise()
        for clock, read in clocks.items():
            seconds[clock].setdefault(what, []).append(read() - before[clock])

    def stream() -> Iterator[Any]:
        for batch in labelled(setting, last):
            with timed("bare"):
                bare(plain, batch)
            with timed("step"):  # until the next batch is asked for
                yield batch

    bare(plain, labelled(setting)[0])
    stats = lora_init.collect(
        setting.model, stream(), rank=RANK, rho=RHO, gradients=True, tolerance=0.0,
        max_batches=len(setting.seen) + 1,  # so that it asks for one more, which ends the last step
    )  # fmt: skip
    found: dict[str, Any] = {"parts": stats.provenance.seconds, "batches": len(setting.seen)}
    for clock, by_part in seconds.items():
        later = {part: sum(values[1:]) for part, values in by_part.items()}
        found[clock] = {part: value / (len(setting.seen) - 1) for part, value in later.items()}
        found[clock]["step / bare"] = later["step"] / later["bare"]
        found[clock]["first step / bare"] = by_part["step"][0] / found[clock]["bare"]
    return found


def accuracy(setting: Setting) -> dict[str, Any]:
    """Hold the triplets of every 8th layer against the exact gradient, from a pass for each of two ranks.

    Of the energy that any r directions capture of it, how much the leading r do on either side; and how much of the
    left vectors r to 2 r, where `lora-ga` starts B, lies within the exact ones.
    """
    batches = labelled(setting)
    names = list(lora_init.find_targets(setting.model).layers)[::_EXACT_EVERY]
    weights = {name: setting.model.get_submodule(name).weight for name in names}
    for parameter in setting.model.parameters():
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in batches:
        loss = setting.model(**batch, use_cache=False).loss
        (loss * count_labels(setting.model, batch)).backward()
    exact = {}
    for name, weight in weights.items():
        u, s, v = torch.linalg.svd(weight.grad.double(), full_matrices=False)
        exact[name] = (u.T, s, v)
        weight.grad = None
    found: dict[str, Any] = {"layers": len(names), "batches": len(batches)}
    for r in (RANK // 2, RANK):
        stats = lora_init.collect(
            setting.model, batches, rank=r, rho=RHO, gradients=True, tolerance=0.0, max_batches=len(batches)
        )
        shares: dict[str, list[float]] = {"left": [], "right": [], "left[r:2r]": []}
        for name, (left, values, right) in exact.items():
            gradient, best = stats.gradient(name), values[:r].square().sum()
            for side, ours, theirs in (("left", gradient.left, left), ("right", gradient.right, right)):
                along = (theirs @ ours[:r].double().T) * values[:, None]
                shares[side].append(float(along.square().sum() / best))
            later = gradient.left[r : 2 * r].double() @ left[r : 2 * r].T
            shares["left[r:2r]"].append(float(later.square().sum() / r))
        for what, values in shares.items():
            found[f"r={r}, {what}"] = {
                "min": min(values), "median": settings.median(values), "mean": sum(values) / len(values)
            }  # fmt: skip
    return found


def peaks(name: str) -> dict[str, float]:
    """Peak memory of each phase in MiB, each in a process of its own."""
    return {
        phase: memory.in_fresh_process("benchmarks.gradients", "--setting", name, "--phase", phase) / 2**20
        for phase in ("bare", "collect")
    }


def one_phase(name: str, phase: str) -> int:
    """Run one phase over a few batches and return its peak in bytes."""
    setting = getattr(settings, name)(_MEMORY_BATCHES, 0)
    batches = labelled(setting)
    setting.model.requires_grad_(False)
    reset_peak()
    if phase == "collect":
        lora_init.collect(setting.model, batches, rank=RANK, rho=RHO, gradients=True, tolerance=0.0)
    else:
        for batch in batches:
            bare(setting.model, batch)
    return peak_bytes()


def report(found: dict[str, Any]) -> str:
    """Markdown."""
    parts = [f"## {found['setting']}"]
    for key, labels in (("cost", "every token"), ("cost of answers", f"the last {_ANSWER} tokens of each text")):
        if key not in found:
            continue
        cost = found[key]
        rows = [
            [
                part,
                *(f"{cost[clock][part]:.3f} s" for clock in ("wall", "processor")),
                *(f"{cost[clock][part] / cost[clock]['bare']:.3f}" for clock in ("wall", "processor")),
            ]
            for part in ("bare", "step")
        ]
        parts.append(
            table([f"per batch, labels on {labels}", "wall", "processor", "wall / bare", "processor / bare"], rows)
        )
        parts.append(
            f"The first batch costs {cost['wall']['first step / bare']:.2f} bare passes. {cost['batches']} batches."
        )
    if "memory" in found:
        peak = found["memory"]
        rows = [[phase, f"{value:,.0f} MiB", f"{value / peak['bare']:.3f}"] for phase, value in peak.items()]
        parts.append(table(["peak memory", "", "/ bare"], rows))
    if "accuracy" in found:
        shares = {key: value for key, value in found["accuracy"].items() if key.startswith("r=")}
        rows = [[key, *(f"{value:.4f}" for value in one.values())] for key, one in shares.items()]
        parts.append(
            table([f"share of the exact, {found['accuracy']['layers']} layers", "min", "median", "mean"], rows)
        )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", default="llama_1b" if torch.cuda.is_available() else "smollm2")
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--only", choices=["cost", "memory", "accuracy"])
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        print(json.dumps(one_phase(arguments.setting, arguments.phase)))
        return
    file = Path(__file__).parent / "results" / "gradients" / f"{arguments.setting}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if arguments.only and file.exists() else {}
    setting = getattr(settings, arguments.setting)(arguments.batches, 0)
    found |= {"setting": setting.name, "machine": settings.machine()}
    for part, measure in (
        ("cost", lambda: costs(setting)),
        ("cost of answers", lambda: costs(setting, _ANSWER)),
        ("memory", lambda: peaks(arguments.setting)),
        ("accuracy", lambda: accuracy(setting)),
    ):
        if arguments.only in (None, part.partition(" ")[0]):
            print(f"measuring: {part}", file=sys.stderr)
            found[part] = measure()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=1) + "\n")  # what is done stays done
    text = report(found)
    print(text)
    file.with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
