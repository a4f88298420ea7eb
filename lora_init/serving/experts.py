"""Fused experts in the forms that engines load: an adapter for each projection, of all experts at once or of each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lora_init.errors import LoraInitError
from lora_init.layers.rows import experts_of
from lora_init.loading.checkpoint import as_saved
from lora_init.serving.base import Base
from lora_init.serving.trained import Layer, Trained
from lora_init.starts.weights import LoraWeights

# Of these vLLM 0.32 keeps gate and up projection in one, and reads PEFT's own layout of both parameters.
_FUSED_IN_VLLM = (
    "GptOssForCausalLM", "Qwen3VLMoeForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration",
)  # fmt: skip
# Of these mlx-lm 0.32 has no module of another name than the experts' for projections of all experts.
_SAME_IN_MLX = ("GptOssForCausalLM", "Dots1ForCausalLM")
_DOWN = "down_proj"


def by_projection(trained: Trained, base: Base) -> Trained:
    """Cut what fused experts have in one parameter into gate and up projection, which share A.

    Where a module has one of its two parameters adapted, the other one gets an adapter that adds nothing, since
    engines take both or neither.
    """
    layers: dict[str, Layer] = {}
    for name, layer in _with_both(trained, base).layers.items():
        owner, _, end = name.rpartition(".")
        if layer.experts and end == "gate_up_proj":
            module = base.model.get_submodule(owner)
            halves = layer.b.chunk(2, 1)
            if not getattr(module, "is_concatenated", not module.is_transposed):
                halves = layer.b[:, ::2], layer.b[:, 1::2]
            for kind, b in zip(("gate_proj", "up_proj"), halves, strict=True):
                layers[f"{owner}.{kind}"] = replace(layer, a=layer.a.clone(), b=b)  # files hold no tensor twice
        else:
            layers[name] = layer
    return replace(trained, layers=layers)


def by_expert(trained: Trained, base: Base) -> Trained:
    """Make linear layers of each expert's projections, under the names that a checkpoint with single experts has."""
    layers: dict[str, Layer] = {}
    for name, layer in by_projection(trained, base).layers.items():
        if not layer.experts:
            layers[name] = layer
            continue
        owner, _, end = name.rpartition(".")
        prefix, down = _saved_as(owner, base)
        end = {"gate_proj": "w1", "up_proj": "w3", _DOWN: "w2"}[end] if down == "w2" else end
        for i, (a, b) in enumerate(zip(layer.a, layer.b, strict=True)):
            layers[f"{prefix}.{i}.{end}"] = replace(layer, a=a, b=b)
    return replace(trained, layers=layers)


def is_single(name: str) -> bool:
    """Return whether a layer's name is that of one expert."""
    return re.search(r"\.experts\.\d+\.", name) is not None


def for_vllm(trained: Trained, base: Base) -> Trained:
    """Bring experts into the form that vLLM has for them: PEFT's own for some architectures, else one by one."""
    return _with_both(trained, base) if base.architecture in _FUSED_IN_VLLM else by_expert(trained, base)


def for_mlx(trained: Trained, base: Base) -> Trained:
    """Name projections of all experts as mlx-lm does where it has one module for them."""
    layers = {}
    for name, layer in by_projection(trained, base).layers.items():
        owner, _, end = name.rpartition(".")
        is_renamed = layer.experts and base.architecture not in _SAME_IN_MLX
        prefix = _saved_as(owner, base)[0].removesuffix(".experts") if is_renamed else ""
        layers[f"{prefix}.switch_mlp.{end}" if is_renamed else name] = layer
    return replace(trained, layers=layers)


def _saved_as(owner: str, base: Base) -> tuple[str, str]:
    """Find what experts and their second matrix are called in a checkpoint; as in the model where it has no single."""
    saved = as_saved(base.model, f"{owner}.{_DOWN}", base.model.get_parameter(f"{owner}.{_DOWN}"))
    match = re.fullmatch(rf"(.+)\.0\.({_DOWN}|w2)\.weight", next(iter(saved)))
    return (match[1], match[2]) if match else (owner, _DOWN)


def _with_both(trained: Trained, base: Base) -> Trained:
    """Put experts last, module by module with the first matrix first as PEFT nests them, and add what is missing."""
    layers = {name: layer for name, layer in trained.layers.items() if not layer.experts}
    for name, layer in trained.layers.items():
        if not layer.experts:
            continue
        owner = name.rpartition(".")[0]
        module = base.model.get_submodule(owner)
        if experts_of(name, module) is None:
            raise LoraInitError(
                f"{base.architecture}: engines have no form for an adapter of the parameter {name!r}, which is no "
                "matrix of transformers' interface for experts. Write a whole model instead by {merge_into}, without "
                "an engine.",
                merge_into=...,
            )
        for end, _ in module.named_parameters(recurse=False):
            experts = experts_of(key := f"{owner}.{end}", module)
            if experts is not None and key not in layers:
                zeros = layer.a.new_zeros(experts.n_experts, layer.rank, experts.in_features)
                nothing = layer.b.new_zeros(experts.n_experts, experts.out_features, layer.rank)
                layers[key] = trained.layers.get(key) or replace(layer, a=zeros, b=nothing)
    return replace(trained, layers=layers)


Change = Callable[[LoraWeights], LoraWeights]  # of A [experts, r, d_in] and B [experts, d_out, r] of a parameter
_MOST_NAMED = 32  # experts that are left out one by one to see whether an engine does


def misreadings(n_experts: int, is_concatenated: bool) -> dict[tuple[str, str], tuple[str, Change]]:
    """List what engines are known to do to experts: verdict and reason to the end of a parameter's name and a change.

    An empty end is for all parameters.
    """

    def rows(b: Tensor, gate: bool) -> Tensor:  # a view of the rows of one projection
        half = b.shape[1] // 2
        first = slice(half) if is_concatenated else slice(0, None, 2)
        return b[:, first if gate else slice(half, None) if is_concatenated else slice(1, None, 2)]

    def without(gate: bool) -> Change:
        def change(one: LoraWeights) -> LoraWeights:
            b = one.b.clone()
            rows(b, gate).zero_()
            return LoraWeights(one.a, b)

        return change

    def exchanged(one: LoraWeights) -> LoraWeights:
        b = one.b.clone()
        rows(b, True).copy_(rows(one.b, False))
        rows(b, False).copy_(rows(one.b, True))
        return LoraWeights(one.a, b)

    def other_rows(one: LoraWeights) -> LoraWeights:
        (experts, n_rows, rank), half = one.b.shape, one.b.shape[1] // 2
        paired = one.b.reshape(experts, *((2, half) if is_concatenated else (half, 2)), rank).transpose(1, 2)
        return LoraWeights(one.a, paired.reshape(experts, n_rows, rank))

    def by_blocks(one: LoraWeights) -> LoraWeights:  # B of one expert after another, which PEFT's is not
        flat = one.fused().b
        return LoraWeights(one.a, flat.reshape(len(flat), n_experts, -1).permute(1, 0, 2))

    def moved(order: Tensor, with_a: bool = True) -> Change:
        return lambda one: LoraWeights(one.a[order] if with_a else one.a, one.b[order])

    def alone(expert: int) -> Change:
        keep = torch.arange(n_experts) != expert
        return lambda one: LoraWeights(one.a, one.b * keep.to(one.b)[:, None, None])

    missing, other = "a part is missing", "another adapter"
    readings: dict[tuple[str, str], tuple[str, Change]] = {
        (missing, "gate_proj of experts"): ("gate_up_proj", without(True)),
        (missing, "up_proj of experts"): ("gate_up_proj", without(False)),
        (other, "experts with other experts' columns of B"): ("", by_blocks),
        (other, "gate and up projection of experts exchanged"): ("gate_up_proj", exchanged),
        (other, "rows of gate and up projection of experts in another order"): ("gate_up_proj", other_rows),
        (other, "all experts with what is the first one's"): ("", moved(torch.zeros(n_experts, dtype=torch.long))),
        (other, "experts in reverse order"): ("", moved(torch.arange(n_experts).flip(0))),
    }
    for by, words in ((1, "one before it"), (-1, "one after it")):
        order = torch.arange(n_experts).roll(by)
        readings[other, f"each expert with what is of the {words}"] = "", moved(order)
        readings[other, f"each expert with B of the {words}"] = "", moved(order, with_a=False)
    for expert in range(n_experts if n_experts <= _MOST_NAMED else 0):
        readings[missing, f"expert {expert}"] = ("", alone(expert))
    return readings
