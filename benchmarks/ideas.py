"""Variations on the starts, compared like those: what `LOG.md` reports as tried.

    python -m benchmarks.ideas siqa eva,white,4 natural-gradient,energy,1 --rates 1e-4,3e-4 --seeds 1

An idea is directions, size and factor. Directions: random, eva, eva-grad, grad-a, natural-gradient, or two of them with
a plus between, which get half of the rows each. Size: `unit` rows; `white`, each row as large as makes E (a x)^2 that
of a random row; `energy`, all rows times one number, so that E |A x|^2 is that of EVA's A; `constant`, so that it is r
in every layer. The factor multiplies A. B is zero, but for natural-gradient-step: there it shrinks as A grows, so that
the step stays as it is.

Statistics can be varied, too: `--exponent 2` weights rows by |g|^2 in place of |g|, `--tokens labels` counts those
tokens only that have a label, `--batches 8` learns from 8 batches. `eva-grad` itself runs first.

Tasks are those of `results/`, prepared as their commands say (settings.json), and read from the working directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.building.build import build_adapter
from lora_init.collection.collect import collect
from lora_init.comparison import workbench
from lora_init.comparison.compare import compare
from lora_init.starts.initializers import energy, random_orthonormal, with_energy
from lora_init.statistics.incremental_svd import IncrementalSVD
from lora_init.statistics.statistics import Statistics

RANK = 8
_GAMMA = 256.0  # what the search finds for natural-gradient-step on SIQA
_LANGUAGE: dict[str, Any] = {
    "model": "smol", "batch_size": 4, "dtype": "bfloat16", "steps": 40, "evaluation_points": [10, 20],
    "selection_samples": 64, "report_samples": 128,
}  # fmt: skip
_ENCODER: dict[str, Any] = {"model": "minilm", "max_length": 64}
TASKS: dict[str, dict[str, Any]] = {
    "siqa": _LANGUAGE | {"data": "siqa/all.jsonl", "template": "{passage} {question}\nAnswer:", "options": "options"}
    | {"max_length": 128},
    "openbookqa": _LANGUAGE | {"data": "openbookqa/all.jsonl", "template": "{question}\nAnswer:", "options": "options"}
    | {"max_length": 128},
    "boolq": _LANGUAGE | {"data": "data/BoolQ/dev.jsonl", "template": "{passage}\nQuestion: {question}?\nAnswer:"}
    | {"options": "True,False", "max_length": 96},
    "minilm-siqa-kinds": _ENCODER | {"data": "siqa_kinds/all.jsonl", "template": "{passage} {answer}", "label": "kind"}
    | {"steps": 100},
    "minilm-boolq": _ENCODER | {"data": "data/BoolQ/dev.jsonl", "template": "{question}? {passage}", "label": "answer"}
    | {"steps": 50, "evaluation_points": [10, 25]},
}  # fmt: skip


def directions(stats: Statistics, name: str) -> dict[str, Tensor]:
    """Rows of each layer, [r, d_in]; of a mixture the second's are made orthogonal to the first's."""
    first, _, second = name.partition("+")
    gamma = _GAMMA if first == "natural-gradient-step" else None
    rows = {layer: a for layer, (a, _) in build_adapter(stats, RANK, first, gamma=gamma).weights.items()}
    if not second:
        return rows
    generator = torch.Generator().manual_seed(0)
    mixed = {}
    for layer, other in directions(stats, second).items():
        half = rows[layer][: RANK // 2]
        rest = other - other @ half.T @ half  # half has orthonormal rows
        kept = torch.linalg.svd(rest, full_matrices=False).Vh[: RANK - len(half)]
        mixed[layer] = torch.cat([half, kept, random_orthonormal(RANK - len(half) - len(kept), half, generator)])
    return mixed


def sized(stats: Statistics, layer: str, rows: Tensor, size: str) -> Tensor:
    """Scale the rows of a layer as `size` says."""
    spectrum = stats[layer]
    if size == "energy":
        return with_energy(spectrum, rows, energy(spectrum, spectrum.components[: len(rows)]))
    if size == "constant":
        return rows * math.sqrt(len(rows) / energy(spectrum, rows))
    if size == "white":
        width = rows.shape[1]
        of_random = (spectrum.total_variance + float(spectrum.mean.square().sum())) / (3 * width)
        return torch.stack([row * math.sqrt(of_random / energy(spectrum, row[None])) for row in rows])
    return rows


def start(file: Path, text: str) -> Callable[[nn.Module, int], Any]:
    """Make the function that `compare` calls: it takes the statistics of the seed's own data, collected if need be."""

    def apply(model: nn.Module, seed: int) -> Any:
        stats = Statistics.load(str(file).format(seed=seed))
        name, size, factor = text.split(",")
        stepping = name == "natural-gradient-step"
        step = build_adapter(stats, RANK, name, gamma=_GAMMA).weights if stepping else {}
        weights = {}
        for layer, rows in directions(stats, name).items():
            a = float(factor) * sized(stats, layer, rows, size)
            zero = torch.zeros(stats.targets[layer].out_features, RANK)
            weights[layer] = (a, step[layer][1] * (rows.norm() / a.norm()) if stepping else zero)
        return dataclasses.replace(build_adapter(stats, RANK, "random"), weights=weights).apply(model)

    return apply


def vary(exponent: float, tokens: str) -> None:
    """Have `compare` collect other statistics. Nothing in the package has a place for such a choice."""
    plain = IncrementalSVD.project

    def raised(svd: IncrementalSVD, rows: Tensor, weights: Tensor | None = None) -> None:
        plain(svd, rows, None if weights is None else weights**exponent)

    IncrementalSVD.project = raised  # type: ignore[method-assign]
    workbench.collect = functools.partial(collect, token_mask=tokens)  # type: ignore[attr-defined]


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("ideas", nargs="+")
    parser.add_argument("--rates", default="1e-4,3e-4")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--exponent", type=float, default=1.0)
    parser.add_argument("--tokens", default="attention", choices=["attention", "labels"])
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--output", default="ideas")
    asked = parser.parse_args()
    varied = f"{asked.steps or 'as-is'}-{asked.exponent:g}-{asked.tokens}-{asked.batches}"
    output = Path(asked.output) / f"{asked.task}-{varied}"
    vary(asked.exponent, asked.tokens)
    settings = TASKS[asked.task] | ({"steps": asked.steps} if asked.steps else {})
    file = output / "statistics" / "seed{seed}-centred-gradients.safetensors"
    # A start of ours comes first: it needs the statistics, and leaves them in the directory.
    starts = ["eva-grad", *((text, start(file, text)) for text in asked.ideas)]
    rates = [float(rate) for rate in asked.rates.split(",")]
    found = compare(
        output=output, starts=starts, learning_rates=rates, seeds=asked.seeds, sweep="full", say=print,
        statistics_batches=asked.batches, **settings,
    )  # fmt: skip
    for record in found.records:
        losses = " / ".join(f"{loss:.4f}" for loss in record["report_loss"])
        print(f"{record['start']:32} {record['learning_rate']:g}, seed {record['seed']}: {losses}")


if __name__ == "__main__":
    main()
