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


def for_gguf(trained: Trained, base: Base) -> Trained:
    """Cut gate from up projection, except where llama.cpp's converter keeps both in one tensor."""
    return _with_both(trained, base) if base.architecture == "Gemma4ForCausalLM" else by_projection(trained, base)


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
_MISSING, _OTHER = "a part is missing", "another adapter"
_MOST_NAMED = 32  # experts that are left out one by one to see whether an engine does


def misreadings(n_experts: int, is_concatenated: bool) -> dict[tuple[str, str], tuple[str, Change]]:
    """List what engines are known to do to experts: verdict and reason to the end of a parameter's name and a change.

    An empty end is for all parameters.
    """
    halves = {key: ("gate_up_proj", change) for key, change in _of_halves(is_concatenated).items()}
    return halves | {key: ("", change) for key, change in _of_experts(n_experts).items()}


def _of_b(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda one: LoraWeights(one.a, change(one.b))


def _of_halves(is_concatenated: bool) -> dict[tuple[str, str], Change]:
    """List what is done to the rows of gate and up projection."""
    dim = 1 if is_concatenated else 2  # of what `pairs` returns: of the two projections

    def pairs(b: Tensor) -> Tensor:  # [experts, 2, rows, r] or [experts, rows, 2, r]
        return b.reshape(len(b), *((2, -1) if is_concatenated else (-1, 2)), b.shape[2])

    def without(projection: int) -> Change:
        keep = (torch.arange(2) != projection).reshape(2, *[1] * (3 - dim))
        return _of_b(lambda b: (pairs(b) * keep.to(b)).reshape(b.shape))

    return {
        (_MISSING, "gate_proj of experts"): without(0),
        (_MISSING, "up_proj of experts"): without(1),
        (_OTHER, "gate and up projection of experts exchanged"): _of_b(lambda b: pairs(b).flip(dim).reshape(b.shape)),
        (_OTHER, "rows of gate and up projection of experts in another order"): _of_b(
            lambda b: pairs(b).transpose(1, 2).reshape(b.shape)
        ),
    }


def _of_experts(n_experts: int) -> dict[tuple[str, str], Change]:
    """List what is done to all experts, to some, and to the order of them."""

    def flat(b: Tensor) -> Tensor:  # as PEFT has it: a column of each expert for one rank after another
        return b.permute(1, 2, 0).flatten(1)

    def moved(order: Tensor, a: bool = True, b: bool = True) -> Change:
        return lambda one: LoraWeights(one.a[order] if a else one.a, one.b[order] if b else one.b)

    def without(lost: Tensor) -> Change:
        return _of_b(lambda b: b * (~lost).to(b)[:, None, None])

    number, half = torch.arange(n_experts), n_experts // 2
    readings: dict[tuple[str, str], Change] = {
        (_OTHER, "experts with other experts' columns of B"): _of_b(
            lambda b: flat(b).reshape(b.shape[1], n_experts, -1).transpose(0, 1)
        ),
        (_OTHER, "experts with other experts' rows and columns of B"): _of_b(lambda b: flat(b).reshape(b.shape)),
        (_OTHER, "experts with other experts' rows of A"): lambda one: LoraWeights(
            one.a.reshape(-1, n_experts, one.a.shape[2]).transpose(0, 1), one.b
        ),
        (_OTHER, "experts in reverse order"): moved(number.flip(0)),
        (_MISSING, "half of the ranks of experts"): _of_b(
            lambda b: b * (torch.arange(b.shape[2]).to(b) < b.shape[2] / 2)
        ),
        ("scaled", "experts by -1"): _of_b(torch.neg),
    }
    orders = {"the first one": torch.zeros_like(number)}
    for by, words in ((1, "one"), (2, "one 2")):
        orders |= {f"the {words} before it": number.roll(by), f"the {words} after it": number.roll(-by)}
    for whose, order in orders.items():
        for what, a, b in (("what is", True, True), ("A", True, False), ("B", False, True)):
            readings[_OTHER, f"each expert with {what} of {whose}"] = moved(order, a, b)
    lost = {f"expert {i}": number == i for i in range(n_experts if n_experts <= _MOST_NAMED else 0)}
    lost |= {f"experts 0 to {half - 1}": number < half, f"experts {half} to {n_experts - 1}": number >= half}
    lost |= {"experts of even number": number % 2 == 0, "experts of odd number": number % 2 == 1}
    lost |= {"all experts but the first one": number > 0}
    return readings | {(_MISSING, which): without(those) for which, those in lost.items()}
