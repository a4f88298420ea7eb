"""`lora-init init --dry-run`: what the command would do and cost, without the weights of the model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_init.cli.tables import facts
from lora_init.layers.rows import experts_of
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
# How configurations name the number of experts that a token is sent to.
_AT_ONCE = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk")
# Rows of float32 that an input's two halves and the batch between them take at most, in multiples of rank x rho
# (measured: 8 in the first ten batches, 15 later).
STATE = 15
_MARGIN = 1.5  # the range that is shown is from the estimate over this to the estimate times it


# Everything is counted on a model without weights, on the meta device: it has all modules and shapes, and takes neither
# memory nor time. Only the speed of the machine is measured, by products of matrices in the type that a pass would use.
def estimate(read: Opened, loading: LoadingQuantized, config: InitConfig, rho: float) -> dict[str, Any]:
    """Compute how many layers take an adapter, and what that and the pass would cost, in plain values.

    A pass keeps `rho` times the rank; without batches there would be none. The parameters are for one rank everywhere;
    the time is for an idle machine: beside other work a pass of 21 s was seen to take 59 s. `operations` are matrix
    products.
    """
    import transformers

    rank, opened, shape = config.ranks.rank, read.model, config.shape
    batches: Batches | None = read.examples.batches  # None where a statistics file is used as it is
    with torch.device("meta"):  # no weights
        loader = getattr(transformers, opened.auto_class)
        model = loader.from_config(opened.config, trust_remote_code=loading.trust_remote_code)
    targets = find_targets(model, **vars(config.layers))
    targets.check_layers()
    place = find_device(loading.device)
    dtype = _dtype(model, opened.config, loading, place)
    # Layers of one module that read the same width, such as q_proj, k_proj and v_proj, share an input's statistics.
    inputs = set()
    for name, target in targets.layers.items():
        inputs.add((name.rpartition(".")[0], target.in_features))
    used = (batches or [])[: config.run.max_batches]
    tokens = sum(batch["input_ids"].numel() for batch in used)
    operations = _operations(model, used)
    if config.needs_gradient:
        operations *= _BACKWARD
    weights_bytes = _weights_bytes(model, dtype, loading.quantize)
    per_second = _speed(dtype, place)
    return {
        "layers": len(targets.layers),
        "unsupported": dict(targets.unsupported),
        "parameters": sum(
            target.parameters(rank, shape.freeze_a, shape.use_dora) for target in targets.layers.values()
        ),
        "rank": rank,
        "data": batches.description if batches is not None else None,
        "batches": len(used),
        "tokens": tokens,
        "weights_bytes": weights_bytes,
        "statistics_bytes": round(STATE * rank * rho * 4 * sum(width for _, width in inputs)),
        "offloaded_bytes_read": weights_bytes * len(used),
        "operations": operations,
        "operations_per_second": per_second,
        "seconds": operations * _OVERHEAD / per_second,
    }


def _dtype(model: Any, config: Any, loading: LoadingQuantized, place: torch.device) -> torch.dtype:
    """Find the type that the model would run in."""
    dtype = getattr(config, "dtype", None) if loading.dtype == "auto" else getattr(torch, loading.dtype)
    if not isinstance(dtype, torch.dtype):  # checkpoints that name none are in float32
        dtype = torch.float32
    if loading.dtype != "auto":
        return dtype
    # `load` makes the same choice: a processor that emulates a narrow type is slower by it than in float32, if the
    # weights fit in memory so. A quantized base has no float weights to widen.
    n_bytes = 0 if loading.quantize else 4 * _n_parameters(model)
    if is_better_in_float32(dtype, place, n_bytes):
        return torch.float32
    return dtype


def _n_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _operations(model: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """Count a product and a sum for each weight and token; behind an encoder, a decoder reads what it is to write."""
    every, read = _n_multiplied(model), sum(batch["input_ids"].numel() for batch in batches)
    if not model.config.is_encoder_decoder:
        return 2.0 * every * read
    decoder, written = _n_multiplied(model.get_decoder()), 0
    for batch in batches:
        labels = batch.get("labels")
        # A class is not written: to tell one, the decoder reads the input as well.
        written += (batch["input_ids"] if labels is None or labels.dim() != 2 else labels).numel()
    return 2.0 * ((every - decoder) * read + decoder * written)


def _n_multiplied(model: Any) -> float:
    """Count the weights that a token is multiplied with: all matrices but embeddings, of which the last is not reached.

    Of fused experts those that the router sends a token to; all, where the configuration has no such number.
    """
    ends = set()
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):  # which may be one matrix
        if end is not None:
            ends.add(id(end.weight))
    config = model.config.get_text_config()
    at_once = next((number for name in _AT_ONCE if (number := getattr(config, name, None))), None)
    every = float(sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in ends))
    if at_once is None:
        return every
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if experts := experts_of(f"{path}.{name}", module):
                every -= parameter.numel() * max(0.0, 1 - at_once / experts.n_experts)
    return every


def _weights_bytes(model: Any, dtype: torch.dtype, quantize: str | None) -> int:
    """Compute the size of the weights. Linear layers except the head are quantized."""
    every = _n_parameters(model) * dtype.itemsize
    if quantize is None:
        return every
    head = model.get_output_embeddings()
    packed = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    return round(every - packed * (dtype.itemsize - QUANTIZED_BYTES[quantize]))


def _speed(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the operations a second of a matrix product, for about a fifth of a second."""
    a = torch.ones(1024, 1024, dtype=dtype, device=device)
    (a @ a).sum().item()  # the first product starts threads or a GPU, and is not counted
    start, n_products = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        (a @ a)[0, 0].item()  # which waits for a GPU
        n_products += 1
    return 2 * 1024**3 * n_products / (time.perf_counter() - start)  # n x n times n x n: n^3 products, as many sums


def show_estimate(console: Console, estimated: Mapping[str, Any]) -> None:
    """Print what `estimate` returned."""
    layers = f"{estimated['layers']} take an adapter"
    if estimated["unsupported"]:
        layers += f", {len(estimated['unsupported'])} keep PEFT's own start"
    # bytes -> GB, operations -> GFLOP
    weights, statistics = estimated["weights_bytes"] / 10**9, estimated["statistics_bytes"] / 10**9
    read = estimated["offloaded_bytes_read"] / 10**9
    speed, seconds = estimated["operations_per_second"] / 10**9, estimated["seconds"]
    rows = {
        "layers": layers,
        "parameters": f"{estimated['parameters']:,} at rank {estimated['rank']} everywhere",
        "data": estimated["data"] or "none: the statistics file is used as it is",
        "pass": f"{estimated['batches']} batches at most, {estimated['tokens']:,} tokens",
        "memory": f"weights {weights:.2f} GB, statistics {statistics:.2f} GB, and the activations of one batch",
        "offloaded": f"{read:,.2f} GB to read, the weights once a batch, if device_map leaves them on disk",
        "work": f"{estimated['operations'] / 10**12:,.2f} TFLOP in matrix products",
        "time": f"{seconds / _MARGIN:,.0f} to {seconds * _MARGIN:,.0f} s on an idle machine at {speed:,.0f} GFLOP/s, "
        "several times that beside other work",
    }
    console.print(facts(rows))
