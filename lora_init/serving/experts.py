"""Fused experts in the forms that engines load: an adapter for each projection, of all experts at once or of each."""

from __future__ import annotations

import re
from dataclasses import replace

from lora_init.errors import LoraInitError
from lora_init.layers.rows import experts_of
from lora_init.loading.checkpoint import as_saved
from lora_init.serving.base import Base
from lora_init.serving.trained import Layer, Trained

# Of these vLLM 0.32 keeps gate and up projection in one, and reads PEFT's own layout of both parameters.
_FUSED_IN_VLLM = (
    "GptOssForCausalLM", "Qwen3VLMoeForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration",
)  # fmt: skip
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


def for_vllm(trained: Trained, base: Base) -> Trained:
    """Bring experts into the form that vLLM has for them: PEFT's own for some architectures, else one by one."""
    return _with_both(trained, base) if base.architecture in _FUSED_IN_VLLM else by_expert(trained, base)


def for_mlx(trained: Trained, base: Base) -> Trained:
    """Name projections of all experts as mlx-lm does where it has one module for them."""
    layers = {}
    for name, layer in by_projection(trained, base).layers.items():
        owner, _, end = name.rpartition(".")
        prefix = _saved_as(owner, base)[0].removesuffix(".experts") if layer.experts else ""
        layers[f"{prefix}.switch_mlp.{end}" if layer.experts else name] = layer
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
