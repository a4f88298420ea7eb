"""Cost, accuracy and memory of the statistics, next to a bare forward pass and to PEFT's EVA.

    python -m benchmarks.statistics                      # SmolLM2-135M on the CPU; on a GPU, a Llama of 1B
    python -m benchmarks.statistics --setting minilm     # under two minutes
    python -m benchmarks.statistics --skip-peft-run      # leaves out PEFT's run to its own stop, the longest part

Each part interleaves what it compares batch by batch, so that a noisy machine hits all alike, and reports means and
ratios. Prints Markdown; writes JSON next to this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import lora_init
from benchmarks import memory, peft_eva, scaling, settings
from benchmarks.settings import Setting, median, table, timed
from lora_init.collection.activations import ActivationHooks, Sink
from lora_init.collection.loop import Pass
from lora_init.layers.masks import TokenMasks
from lora_init.layers.running import call_model
from lora_init.statistics.incremental_svd import IncrementalSVD
from lora_init.statistics.spectrum import ExactPCA

RANK, RHO = 16, 2.0
N_COMPONENTS = round(RANK * RHO)
CHECKPOINTS = (4, 8, 16, 24, 32, 48, 64, 96, 128)
MAX_PEFT_PASSES = 200


class Ours:
    """The inside of `collect`, step by step, with the time of each part."""

    def __init__(self, hooks: ActivationHooks) -> None:
        self.run = Pass(hooks, call_model, N_COMPONENTS, RANK, tolerance=0.0)

    def step(self, batch: Any) -> dict[str, float]:
        """Take in one batch; seconds of the whole step and of the decomposition in it."""
        parts, before = self.run.found.seconds, dict(self.run.found.seconds)
        whole = timed(lambda: self.run.project(batch, "batch")) + timed(lambda: self.run.update("batch"))
        return {"step": whole, "decomposition": parts["decomposition"] - before["decomposition"]}

    def components(self) -> dict[str, Tensor]:
        """Leading components of each group so far."""
        found = self.run.found.groups
        return {name: record.whole().spectrum().components[:RANK] for name, record in found.items()}


def hooks_on(setting: Setting) -> ActivationHooks:
    """Hooks on all targets of a setting."""
    modules = {name: setting.model.get_submodule(name) for name in lora_init.find_targets(setting.model).layers}
    return ActivationHooks(setting.model, modules, TokenMasks(setting.model, "attention"))


class Into(Sink):
    """Takes all rows, by a function."""

    def __init__(self, take: Callable[[str, Tensor], Any]) -> None:
        self._take = take

    def rows(self, group: str, rows: Tensor) -> None:
        """Hand them on."""
        self._take(group, rows)


@torch.no_grad()
def run(hooks: ActivationHooks, batch: Any, take: Callable[[str, Tensor], Any]) -> None:
    """Run one pass of the body."""
    with hooks.watch(batch, Into(take)) as moved:
        call_model(hooks.model, moved)


def costs(setting: Setting, n_batches: int) -> dict[str, Any]:
    """Time batches through the body, the whole model, our step and, for every fourth, PEFT's step, in turn.

    Ratios are of sums: a step of ours that turns the directions costs more than one that does not.
    """
    seconds: dict[str, list[float]] = {k: [] for k in ("body", "whole", "step", "decomposition", "peft")}
    added_by_peft = []
    with hooks_on(setting) as hooks, torch.no_grad():
        ours = Ours(hooks)
        first = ours.step(setting.seen[0])
        leaders = list(ours.run.found.groups)
        peft_settings = peft_eva.config(RANK, RHO, leaders, setting.task_type)
        for i, batch in enumerate(setting.seen[1 : n_batches + 1]):
            bare = {key: value for key, value in batch.items() if key != "labels"}
            seconds["body"].append(timed(lambda bare=bare: setting.body(**bare)))
            seconds["whole"].append(timed(lambda batch=batch: setting.model(**batch)))
            for part, value in ours.step(batch).items():
                seconds[part].append(value)
            if i % 4 == 0:
                with peft_eva.steps(setting.model, leaders, N_COMPONENTS, peft_settings) as peft_step:
                    peft_step(batch)  # its first step on a fresh decomposition is cheaper than the later ones
                    seconds["peft"].append(timed(lambda batch=batch: peft_step(batch)))
                added_by_peft.append((seconds["peft"][-1] - seconds["whole"][-1]) / seconds["body"][-1])
    body = sum(seconds["body"])
    found = {part: sum(values) / len(values) for part, values in seconds.items()}
    found |= {f"{part} / body": sum(seconds[part]) / body for part in ("whole", "step", "decomposition")}
    found["peft / body"] = sum(seconds["peft"]) / sum(seconds["body"][::4])
    found["peft decomposition / body"] = median(added_by_peft)
    found["first batch: decomposition / body"] = first["decomposition"] / found["body"]
    return found


class Oracle(NamedTuple):
    """The exact decomposition of one input: its scatter matrix [d, d] and leading components [r, d], float64."""

    scatter: Tensor
    components: Tensor
    best: float


def exact(setting: Setting, batches: list[Any]) -> dict[str, Oracle]:
    """Decompose the full covariance of every input, in float64."""
    groups: dict[str, ExactPCA] = {}
    with hooks_on(setting) as hooks:
        for batch in batches:
            run(hooks, batch, lambda group, rows: groups.setdefault(group, ExactPCA()).partial_fit(rows.cpu()) and None)
    found = {}
    for name, one in groups.items():
        weights, vectors = torch.linalg.eigh(one._scatter)
        found[name] = Oracle(one._scatter, vectors.T[-RANK:], float(weights[-RANK:].sum()))
    return found


def ratios(components: dict[str, Tensor], truth: dict[str, Oracle]) -> np.ndarray:
    """Variance captured by the leading components over the most that as many can, for every input."""
    tops = {name: components[name][:RANK].double().cpu() for name in truth}
    return np.array([float((tops[name] @ one.scatter * tops[name]).sum()) / one.best for name, one in truth.items()])


def summary(values: np.ndarray) -> dict[str, float]:
    """Minimum, 10th percentile, median and mean over the groups."""
    return {"min": values.min(), "p10": np.quantile(values, 0.1), "median": np.median(values), "mean": values.mean()}


def accuracy(setting: Setting, n_seen: int) -> dict[str, Any]:
    """What the leading components capture, on the rows seen and on rows never seen."""
    truth, seen = exact(setting, setting.unseen), exact(setting, setting.seen[:n_seen])
    best = {name: one.components for name, one in seen.items()}
    with hooks_on(setting) as hooks:
        ours = Ours(hooks)
        for batch in setting.seen[:n_seen]:
            ours.step(batch)
    mine = ours.components()
    targets = list(lora_init.find_targets(setting.model).layers)
    peft_settings = peft_eva.config(RANK, RHO, targets, setting.task_type)
    theirs, *_ = peft_eva.run(setting.model, setting.seen[:n_seen], peft_settings, max_passes=n_seen + 1)
    found: dict[str, Any] = {"n_seen": n_seen, "n_groups": len(seen)}
    for name, components in (("exact", best), ("ours", mine), ("peft", theirs)):
        found[name] = {"seen": summary(ratios(components, seen)), "unseen": summary(ratios(components, truth))}
    difference = ratios(mine, truth) - ratios(best, truth)
    found["ours"]["unseen - exact"] = {"mean": difference.mean(), "min": difference.min()}
    return found


def race(setting: Setting, peft_run: bool) -> dict[str, Any]:
    """What is captured of rows never seen, and how soon: batch by batch, and where each stops by itself."""
    truth = exact(setting, setting.unseen)
    curve, elapsed = [], 0.0
    with hooks_on(setting) as hooks:
        ours = Ours(hooks)
        for count, batch in enumerate(setting.seen, start=1):
            elapsed += ours.step(batch)["step"]
            if count in CHECKPOINTS or count == len(setting.seen):
                curve.append([count, elapsed, float(ratios(ours.components(), truth).mean())])
    start = time.perf_counter()
    stats = lora_init.collect(setting.model, setting.seen, rank=RANK, rho=RHO, max_batches=len(setting.seen))
    found: dict[str, Any] = {"curve": curve}
    found["ours"] = {
        "seconds": time.perf_counter() - start,
        "passes": stats.provenance.n_batches,
        "stop_reason": stats.provenance.stop_reason,
        "parts": stats.provenance.seconds,
        "unseen": summary(ratios({name: stats[name].components for name in set(stats.group_of.values())}, truth)),
    }
    if peft_run:
        targets = list(lora_init.find_targets(setting.model).layers)
        peft_settings = peft_eva.config(RANK, RHO, targets, setting.task_type)
        start = time.perf_counter()
        theirs, passes, finished = peft_eva.run(setting.model, setting.seen, peft_settings, MAX_PEFT_PASSES)
        seconds = time.perf_counter() - start
        unseen = summary(ratios(theirs, truth))
        found["peft"] = {"seconds": seconds, "passes": passes, "finished": finished, "unseen": unseen}
        reached = next(([n, s] for n, s, value in curve if value >= unseen["mean"]), None)
        found["time to reach peft's"] = {"batches": reached and reached[0], "seconds": reached and reached[1]}
    return found


def alone(setting: Setting, n_batches: int = 8) -> dict[str, float]:
    """Seconds a batch of each decomposition alone, on recorded rows of every eighth group."""
    from peft.utils.incremental_pca import IncrementalPCA as PeftPCA
    from sklearn.decomposition import IncrementalPCA

    recorded: dict[str, list[Tensor]] = {}
    with hooks_on(setting) as hooks:
        for batch in setting.seen[:n_batches]:
            run(hooks, batch, lambda group, rows: recorded.setdefault(group, []).append(rows.float().clone()))
    groups = {name: rows for i, (name, rows) in enumerate(recorded.items()) if i % 8 < 2}  # wide and narrow ones
    makers = {
        "lora_init IncrementalSVD": lambda: IncrementalSVD(N_COMPONENTS),
        "lora_init ExactPCA": lambda: ExactPCA(N_COMPONENTS),
        "PEFT IncrementalPCA": lambda: PeftPCA(N_COMPONENTS, lowrank=True, lowrank_seed=42),
        "scikit-learn IncrementalPCA": lambda: IncrementalPCA(N_COMPONENTS),
    }
    seconds: dict[str, float] = dict.fromkeys(makers, 0.0)
    for rows in groups.values():
        for (
            maker,
            make,
        ) in makers.items():  # one after the other: another library's idle threads would slow the next call
            one = make()
            for i, batch in enumerate(rows):
                part = batch.cpu().numpy() if "scikit" in maker else batch
                taken = timed(lambda one=one, part=part: one.partial_fit(part))
                seconds[maker] += taken if i > 0 else 0.0
    return {maker: value / (len(groups) * (n_batches - 1)) for maker, value in seconds.items()}


def report(found: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    cost, acc, raced = found["cost"], found["accuracy"], found["race"]
    own, theirs = raced["ours"], raced.get("peft")
    rows = [
        ["bare forward pass, body", f"{cost['body']:.3f} s", "1"],
        ["bare forward pass, whole model", f"{cost['whole']:.3f} s", f"{cost['whole / body']:.2f}"],
        ["lora_init, whole step", f"{cost['step']:.3f} s", f"{cost['step / body']:.3f}"],
        ["lora_init, decomposition", f"{cost['decomposition']:.4f} s", f"**{cost['decomposition / body']:.3f}**"],
        ["PEFT, whole step", f"{cost['peft']:.3f} s", f"{cost['peft / body']:.2f}"],
        ["PEFT, decomposition", "", f"{cost['peft decomposition / body']:.2f}"],
    ]
    parts = [f"## {found['setting']}", "", table(["per batch", "mean", "over the body's pass"], rows), ""]

    def line(name: str, side: str) -> list[str]:
        return [f"{name}, {side}", *(f"{acc[name][side][key]:.4f}" for key in ("min", "p10", "median", "mean"))]

    rows = [line(name, side) for side in ("seen", "unseen") for name in ("exact", "ours", "peft")]
    head = [f"captured / optimum, r={RANK}, {acc['n_seen']} batches, {acc['n_groups']} inputs", "min", "p10", "median",
            "mean"]  # fmt: skip
    parts += [table(head, rows), ""]
    rows = [[n, f"{s:.1f} s", f"{value:.4f}"] for n, s, value in raced["curve"]]
    parts += [table(["lora_init: batches", "time", "captured / optimum, unseen, mean"], rows), ""]
    rows = [["lora_init", own["passes"], f"{own['seconds']:.0f} s", own["stop_reason"], f"{own['unseen']['mean']:.4f}"]]
    if theirs:
        reason = "converged" if theirs["finished"] else "bound"
        rows.append(["PEFT", theirs["passes"], f"{theirs['seconds']:.0f} s", reason, f"{theirs['unseen']['mean']:.4f}"])
    parts += [table(["to its own stop", "passes", "time", "why", "captured / optimum, unseen, mean"], rows), ""]
    if theirs and raced["time to reach peft's"]["seconds"]:
        reached = raced["time to reach peft's"]
        parts += [
            f"lora_init reaches what PEFT's run captures at its stop after {reached['batches']} batches, in "
            f"**{reached['seconds'] / theirs['seconds']:.3f}** of its time.",
            "",
        ]
    rows = [[name, f"{seconds * 1e3:.2f} ms"] for name, seconds in found["alone"].items()]
    parts += [table(["decomposition alone, per input and batch", "mean"], rows), ""]
    peak = found["memory"]
    rows = [[phase, f"{mib:.0f} MiB", f"{mib / peak['forward']:.3f}"] for phase, mib in peak.items()]
    parts += [table(["peak memory of the process", "", "over forward"], rows), ""]
    if "scaling" in found:
        parts += [scaling.report(found["scaling"]), ""]
    facts = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    return "\n".join([*parts, f"{facts}."])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "llama_1b" if torch.cuda.is_available() else "smollm2"
    parser.add_argument("--setting", choices=("smollm2", "minilm", "llama_1b"), default=default)
    parser.add_argument("--seen", type=int, default=None, help="batches to learn from")
    parser.add_argument("--skip-peft-run", action="store_true")
    names = ("cost", "alone", "accuracy", "race", "memory", "scaling")
    parser.add_argument("--only", choices=names, help="renew one part of the results")
    arguments = parser.parse_args()
    small = arguments.setting == "minilm"
    n_seen = arguments.seen or (24 if small else 96)
    setting = getattr(settings, arguments.setting)(n_seen, 8 if small else 32)
    file = Path(__file__).parent / "results" / "statistics" / f"{arguments.setting}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if arguments.only and file.exists() else {}
    found |= {"setting": setting.name, "machine": settings.machine()}
    parts: dict[str, Callable[[], Any]] = {
        "cost": lambda: costs(setting, 12 if small else 24),
        "alone": lambda: alone(setting, 4 if small else 8),
        "accuracy": lambda: accuracy(setting, min(n_seen, 16 if small else 32)),
        "race": lambda: race(setting, not (small or arguments.skip_peft_run)),
        "memory": lambda: memory.peaks(arguments.setting, RANK, RHO),
        "scaling": scaling.measure,
    }
    for part, measure in parts.items():
        if arguments.only in (None, part) and not (small and part == "scaling"):
            print(f"measuring: {part}", file=sys.stderr)
            found[part] = measure()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=1, default=float) + "\n")  # what is done stays done
    if arguments.only:
        print(json.dumps(found[arguments.only], indent=1, default=float))
    missing = {"cost", "alone", "accuracy", "race", "memory"} - found.keys()
    if missing:
        sys.exit(f"no report yet, still to be measured: {', '.join(sorted(missing))}")
    text = report(found)
    print(text)
    file.with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
