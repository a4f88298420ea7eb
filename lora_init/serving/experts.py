"""Fused experts in the forms that engines load: an adapter for each projection, of all experts at once or of each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from typing import Any

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


def is_concatenated(module: Any) -> bool:
    """Return whether the rows of the gate stand before those of the up projection, or row by row as in GPT-OSS."""
    # Releases of transformers before this attribute transpose GPT-OSS alone.
    return bool(getattr(module, "is_concatenated", not module.is_transposed))


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
            halves = layer.b.chunk(2, 1)  # experts x 2 d_out x r -> twice experts x d_out x r
            if not is_concatenated(module):
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
        if down == "w2":  # as Mixtral's checkpoints call it, and the others accordingly
            end = {"gate_proj": "w1", "up_proj": "w3", _DOWN: "w2"}[end]
        for i, (a, b) in enumerate(zip(layer.a, layer.b, strict=True)):
            layers[f"{prefix}.{i}.{end}"] = replace(layer, a=a, b=b)
    return replace(trained, layers=layers)


def is_single(name: str) -> bool:
    """Return whether a layer's name is that of one expert."""
    return re.search(r"\.experts\.\d+\.", name) is not None


def for_vllm(trained: Trained, base: Base) -> Trained:
    """Bring experts into the form that vLLM has for them: PEFT's own for some architectures, else one by one."""
    if base.architecture in _FUSED_IN_VLLM:
        return _with_both(trained, base)
    return by_expert(trained, base)


def for_gguf(trained: Trained, base: Base) -> Trained:
    """Cut gate from up projection, except where llama.cpp's converter keeps both in one tensor."""
    if base.architecture == "Gemma4ForCausalLM":
        return _with_both(trained, base)
    return by_projection(trained, base)


def for_mlx(trained: Trained, base: Base) -> Trained:
    """Name projections of all experts as mlx-lm does where it has one module for them."""
    layers = {}
    for name, layer in by_projection(trained, base).layers.items():
        new = name
        if layer.experts and base.architecture not in _SAME_IN_MLX:
            owner, _, end = name.rpartition(".")
            new = f"{_saved_as(owner, base)[0].removesuffix('.experts')}.switch_mlp.{end}"
        layers[new] = layer
    return replace(trained, layers=layers)


def _saved_as(owner: str, base: Base) -> tuple[str, str]:
    """Find what experts and their second matrix are called in a checkpoint; as in the model where it has no single."""
    saved = as_saved(base.model, f"{owner}.{_DOWN}", base.model.get_parameter(f"{owner}.{_DOWN}"))
    match = re.fullmatch(rf"(.+)\.0\.({_DOWN}|w2)\.weight", next(iter(saved)))  # of expert 0
    return (match[1], match[2]) if match else (owner, _DOWN)


def _with_both(trained: Trained, base: Base) -> Trained:
    """Put experts last, module by module with the first matrix first as PEFT nests them, and add what is missing."""
    layers = {name: layer for name, layer in trained.layers.items() if not layer.experts}
    for name, layer in trained.layers.items():
        if not layer.experts:
            continue
        owner = name.rpartition(".")[0]
        module = base.model.get_submodule(owner)
        if experts_of(name, module) is None:  # a router, say
            raise LoraInitError(
                f"{base.architecture}: engines have no form for an adapter of the parameter {name!r}, which is no "
                "matrix of transformers' interface for experts. Write a whole model instead by {merge_into}, without "
                "an engine.",
                merge_into=...,
            )
        for end, _ in module.named_parameters(recurse=False):
            experts = experts_of(key := f"{owner}.{end}", module)
            if experts is not None and key not in layers:
                a = layer.a.new_zeros(experts.n_experts, layer.rank, experts.in_features)
                b = layer.b.new_zeros(experts.n_experts, experts.out_features, layer.rank)
                layers[key] = trained.layers.get(key) or replace(layer, a=a, b=b)  # its own, or one that adds nothing
    return replace(trained, layers=layers)


Change = Callable[[LoraWeights], LoraWeights]  # of A [experts, r, d_in] and B [experts, d_out, r] of a parameter
_MISSING, _OTHER = "a part is missing", "another adapter"
_MOST_NAMED = 32  # experts that are left out one by one to see whether an engine does


def misreadings(n_experts: int, is_concatenated: bool) -> dict[tuple[str, str], tuple[str, Change]]:
    """List what engines are known to do to experts: verdict and reason to the end of a parameter's name and a change.

    An empty end is for all parameters. Engines keep experts in layouts of their own, and each conversion has reshapes
    and transpositions that may go wrong without an error: the shapes of the result are right.
    """
    readings: dict[tuple[str, str], tuple[str, Change]] = {}
    for key, change in _of_halves(is_concatenated).items():
        readings[key] = "gate_up_proj", change
    for key, change in _of_experts(n_experts).items():
        readings[key] = "", change
    return readings


def _of_b(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda weights: LoraWeights(weights.a, change(weights.b))


def _of_a(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda weights: LoraWeights(change(weights.a), weights.b)


def _of_halves(is_concatenated: bool) -> dict[tuple[str, str], Change]:
    """List what is done to the rows of gate and up projection."""
    dim, axes = (
        (1, (2, -1)) if is_concatenated else (2, (-1, 2))
    )  # where the two projections are in what `pairs` returns

    def pairs(b: Tensor) -> Tensor:  # experts x 2 rows x r -> [experts, 2, rows, r] or [experts, rows, 2, r]
        return b.reshape(len(b), *axes, b.shape[2])

    def without(projection: int) -> Change:
        keep = (torch.arange(2) != projection).reshape(2, *[1] * (3 - dim))  # [2, 1, 1] or [2, 1], to be broadcast
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

    def moved(order: Tensor) -> Change:
        return lambda weights: LoraWeights(weights.a[order], weights.b[order])

    def without(lost: Tensor) -> Change:
        return _of_b(lambda b: b * (~lost).to(b)[:, None, None])

    number, half = torch.arange(n_experts), n_experts // 2
    readings: dict[tuple[str, str], Change] = {
        (_OTHER, "experts with other experts' columns of B"): _of_b(
            lambda b: flat(b).reshape(b.shape[1], n_experts, -1).transpose(0, 1)
        ),
        (_OTHER, "experts with other experts' rows and columns of B"): _of_b(lambda b: flat(b).reshape(b.shape)),
        (_OTHER, "experts with other experts' rows of A"): _of_a(
            lambda a: a.reshape(-1, n_experts, a.shape[2]).transpose(0, 1)
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
        # `itemgetter`, since a lambda in a loop would see the last order.
        readings[_OTHER, f"each expert with what is of {whose}"] = moved(order)
        readings[_OTHER, f"each expert with A of {whose}"] = _of_a(itemgetter(order))
        readings[_OTHER, f"each expert with B of {whose}"] = _of_b(itemgetter(order))
    lost = {}
    if n_experts <= _MOST_NAMED:
        for i in range(n_experts):
            lost[f"expert {i}"] = number == i
    lost |= {f"experts 0 to {half - 1}": number < half, f"experts {half} to {n_experts - 1}": number >= half}
    lost |= {"experts of even number": number % 2 == 0, "experts of odd number": number % 2 == 1}
    lost |= {"all experts but the first one": number > 0}
    for which, those in lost.items():
        readings[_MISSING, which] = without(those)
    return readings
