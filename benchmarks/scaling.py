"""How the cost of the decomposition grows, measured on random rows, and what that means for larger models."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.settings import median, table, timed
from lora_init.statistics.incremental_svd import IncrementalSVD

BASE = {"rows": 512, "width": 1024, "components": 32, "inputs": 8}
SWEEPS = {
    "rows": (128, 512, 2048, 8192),
    "width": (576, 1024, 4096, 16384),
    "components": (8, 16, 32, 64, 128, 256),
    "inputs": (1, 8, 64),
}
# (d_model, d_mlp, layers, parameters without embeddings, of them in projections with an adapter). The published shapes
# of Llama 3.2 1B, Llama 3.1 8B and Llama 3.1 70B.
MODELS = {"1B": (2048, 8192, 16, 0.97e9), "8B": (4096, 14336, 32, 6.98e9), "70B": (8192, 28672, 80, 68.5e9)}


def seconds_per_batch(rows: int, width: int, components: int, inputs: int) -> float:
    """Median seconds of one update of `inputs` decompositions, each with its own rows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    batches = [torch.randn(rows, width, generator=generator, device=device) for _ in range(inputs)]
    groups = [IncrementalSVD(components) for _ in range(inputs)]

    def update() -> None:
        for one, batch in zip(groups, batches, strict=True):
            one.project(batch)
            one.update()

    update()
    return median([timed(update) for _ in range(5)])


def measure() -> dict[str, Any]:
    """Vary one size at a time."""
    return {
        name: [[value, seconds_per_batch(**(BASE | {name: value}))] for value in values]
        for name, values in SWEEPS.items()
    }


def estimate(components: int = 32) -> list[list[Any]]:
    """State and added work for model shapes, computed from sizes alone."""
    k = IncrementalSVD(components)._n_directions
    rows = []
    for name, (d_model, d_mlp, layers, parameters) in MODELS.items():
        widths = layers * (3 * d_model + d_mlp)  # inputs of q/k/v, o, gate/up, down
        rows.append([name, f"{widths * k * 4 / 2**20:.0f} MiB", f"{4 * widths * k / (2 * parameters):.1%}"])
    return rows


def report(found: dict[str, Any]) -> str:
    """Markdown tables."""
    base = ", ".join(f"{value} {name}" for name, value in BASE.items())
    rows = []
    for name, values in found.items():
        for value, seconds in values:
            per_row = seconds / (BASE["inputs"] if name != "inputs" else value)
            per_row /= value if name == "rows" else BASE["rows"]
            rows.append([f"{name} = {value}", f"{seconds * 1e3:.2f} ms", f"{per_row * 1e6:.2f} us"])
    growth = table([f"varied from {base}", "a batch", "a row and input"], rows)
    models = table(
        ["shape, 32 components", "state (float32)", "work over the forward pass of the layers, in operations"],
        estimate(),
    )
    return f"{growth}\n\n{models}"
