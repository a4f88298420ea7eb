"""Which model this is: a fingerprint of its weights, and how many parameters it has."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from lora_init.layers.wrappers import unwrapped, weights


def count_parameters(model: nn.Module) -> int:
    """Count a model's parameters, each shared one once, 4-bit weights by their unpacked size."""
    states = ((p, getattr(p, "quant_state", None)) for p in model.parameters())
    return sum(p.numel() if state is None else state.shape.numel() for p, state in states)


def dtype_of(model: nn.Module) -> str:
    """Return the type of a model's first weight that is no integer, such as `"bfloat16"`; empty if there is none."""
    return next((str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()), "")


def fingerprint(model: nn.Module) -> str:
    """Compute what tells models apart: a hash of the names and shapes of the weights and of 16 values of each.

    They are 32 hexadecimal digits. Values are rounded to bfloat16, so that one checkpoint gives one fingerprint in
    float32 and in bfloat16.
    """
    digest = hashlib.sha256()
    for name, weight in weights(unwrapped(model)):
        digest.update(f"{name}:{tuple(weight.shape)};".encode())
        if weight.device.type != "meta" and weight.numel():
            try:
                flat = weight.reshape(-1)
            except NotImplementedError:  # a quantized weight in a tensor class of its own, such as torchao's
                flat = weight.dequantize().reshape(-1)
            places = torch.linspace(0, flat.numel() - 1, 16, dtype=torch.float64).long()
            values = flat[places.to(flat.device)].to(torch.bfloat16).cpu()
            digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]
