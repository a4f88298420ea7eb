"""`lora-init init --dry-run`: what the command would do and cost, without the weights of the model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_init.cli.tables import facts
from lora_init.layers.targets import find_targets
from lora_init.loading.models import QUANTIZED_BYTES, find_device, is_better_in_float32

if TYPE_CHECKING:
    from rich.console import Console

    from lora_init.adapters.init_config import InitConfig
    from lora_init.cli.options import LoadingQuantized
    from lora_init.cli.source import Opened
    from lora_init.loading.batches import Batches

# How much longer a pass takes than its matrix products alone (measured: 1.4 to 1.74), and with backward passes.
_OVERHEAD, _BACKWARD = 1.5, 3.0
# Rows of float32 that an input's two halves and the batch between them take at most, in multiples of rank x rho
# (measured: 8 in the first ten batches, 15 later).
STATE = 15
# The range that is shown is from the estimate over this to the estimate times it.
_MARGIN = 1.5


def estimate(read: Opened, loading: LoadingQuantized, config: InitConfig, rho: float) -> dict[str, Any]:
    """Compute how many layers take an adapter, and what that and the pass would cost, in plain values.

    A pass keeps `rho` times the rank; without batches there would be none. The parameters are for one rank everywhere;
    the time is for an idle machine: beside other work a pass of 21 s was seen to take 59 s. `operations` are matrix
    products.
    """
    import transformers

    rank, opened, shape = config.ranks.rank, read.model, config.shape
    batches: Batches | None = read.examples.batches
    with torch.device("meta"):  # no weights
        loader = getattr(transformers, opened.auto_class)
        model = loader.from_config(opened.config, trust_remote_code=loading.trust_remote_code)
    targets = find_targets(model, **vars(config.layers))
    targets.check_layers()
    place = find_device(loading.device)
    dtype = _dtype(model, opened.config, loading, place)
    shared = {(name.rpartition(".")[0], target.in_features) for name, target in targets.layers.items()}
    used = (batches or [])[: config.run.max_batches]
    tokens = sum(batch["input_ids"].numel() for batch in used)
    operations = 2 * _n_multiplied(model) * tokens * (_BACKWARD if config.needs_gradient else 1.0)
    weights_bytes = _weights_bytes(model, dtype, loading.quantize)
    per_second = _speed(dtype, place)
    return {
        "layers": len(targets.layers),
        "unsupported": dict(targets.unsupported),
        "parameters": sum(one.parameters(rank, shape.freeze_a, shape.use_dora) for one in targets.layers.values()),
        "rank": rank,
        "data": batches.description if batches is not None else None,
        "batches": len(used),
        "tokens": tokens,
        "weights_bytes": weights_bytes,
        "statistics_bytes": round(STATE * rank * rho * 4 * sum(width for _, width in shared)),
        "offloaded_bytes_read": weights_bytes * len(used),
        "operations": operations,
        "operations_per_second": per_second,
        "seconds": operations * _OVERHEAD / per_second,
    }


def _dtype(model: Any, config: Any, loading: LoadingQuantized, place: torch.device) -> torch.dtype:
    """Find the type that the model would run in."""
    if loading.dtype != "auto":
        dtype = getattr(torch, loading.dtype)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32
    saved_in = getattr(config, "dtype", None)
    dtype = saved_in if isinstance(saved_in, torch.dtype) else torch.float32
    n_bytes = 0 if loading.quantize else 4 * sum(p.numel() for p in model.parameters())
    return torch.float32 if is_better_in_float32(dtype, place, n_bytes) else dtype


def _n_multiplied(model: Any) -> int:
    """Count the weights that a pass multiplies with: all matrices but embeddings, of which the last is not reached."""
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    return sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in ends)


def _weights_bytes(model: Any, dtype: torch.dtype, quantize: str | None) -> int:
    """Compute the size of the weights. Linear layers except the head are quantized."""
    every: int = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    if quantize is None:
        return every
    head = model.get_output_embeddings()
    packed = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    return round(every - packed * (dtype.itemsize - QUANTIZED_BYTES[quantize]))


def _speed(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the operations a second of a matrix product, for about a fifth of a second."""
    a = torch.ones(1024, 1024, dtype=dtype, device=device)
    (a @ a).sum().item()
    start, n_products = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        (a @ a)[0, 0].item()  # which waits for a GPU
        n_products += 1
    return 2 * 1024**3 * n_products / (time.perf_counter() - start)


def show_estimate(console: Console, about: Mapping[str, Any]) -> None:
    """Print what `estimate` returned."""
    kept = f", {len(about['unsupported'])} keep PEFT's own start" if about["unsupported"] else ""
    weights, statistics, read = (
        about[key] / 10**9 for key in ("weights_bytes", "statistics_bytes", "offloaded_bytes_read")
    )
    speed = about["operations_per_second"] / 10**9
    rows = {
        "layers": f"{about['layers']} take an adapter{kept}",
        "parameters": f"{about['parameters']:,} at rank {about['rank']} everywhere",
        "data": about["data"] or "none: the statistics file is used as it is",
        "pass": f"{about['batches']} batches at most, {about['tokens']:,} tokens",
        "memory": f"weights {weights:.2f} GB, statistics {statistics:.2f} GB, and the activations of one batch",
        "offloaded": f"{read:,.2f} GB to read, the weights once a batch, if device_map leaves them on disk",
        "work": f"{about['operations'] / 10**12:,.2f} TFLOP in matrix products",
        "time": f"{about['seconds'] / _MARGIN:,.0f} to {about['seconds'] * _MARGIN:,.0f} s on an idle machine at "
        f"{speed:,.0f} GFLOP/s, several times that beside other work",
    }
    console.print(facts(rows))
