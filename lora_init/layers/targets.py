"""Which layers of a model can take an adapter: their names, kinds and widths."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

import regex
import torch
from torch import nn

from lora_init.errors import LoraInitError, warn
from lora_init.layers.grid import PURPOSES, by_purpose, layers_in
from lora_init.layers.rows import CONVOLUTIONS, Experts, experts_of, experts_there, find_parameters, patches_of
from lora_init.layers.wrappers import class_name, is_below, plain_names, unwrapped


def is_conv1d(module: nn.Module) -> bool:
    """Recognize transformers' `Conv1D`, a linear layer with a transposed weight."""
    # By name: transformers need not be imported.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Check whether `"all-linear"` means this layer."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def count_linear(model: nn.Module, names: Collection[str], task_type: str | None = None) -> int:
    """Count the layers that `"all-linear"` means and fused experts, also where some have an adapter.

    They are those of the part of the model that holds the blocks of the named ones: a language model without the vision
    before it. Layers outside blocks, as a pooler, are of the whole model.
    """
    model, heads = unwrapped(model), HEADS.get(task_type or "", ())
    modules = plain_names(model)
    steps = zip(*(name.split(".")[:-1] for name in names), strict=False)
    common = [step[0] for step in takewhile(lambda step: len({*step}) == 1, steps)]
    # The part owns the list of blocks, so one block or one kind of layer, as XLM's attentions, is of the same part.
    owners = [modules.get(owner) for owner in accumulate(common, "{}.{}".format)]
    lists = (n for n, owner in enumerate(owners) if isinstance(owner, (nn.ModuleList, nn.Sequential)))
    part = common[: next(lists, len(common) if len(names) > 1 else 0)]
    others = (".lora_", ".modules_to_save.", ".original_module")
    linear = linear_layers(model, modules)
    linear += _fused_experts(modules, names)
    counted = (name for name in linear if not any(other in name for other in others) and not is_in(name, heads))
    plain = (name.replace(".base_layer", "") for name in counted)
    return sum(layers_in(name) for name in plain if name.split(".")[: len(part)] == part)


def _fused_experts(modules: Mapping[str, nn.Module], adapted: Collection[str]) -> list[str]:
    """List parameters of fused experts, and others that have an adapter; others, as of positions, are none."""
    fused = {f"{o}.{end}": m for o, m in modules.items() for end, _ in m.named_parameters(recurse=False)}
    return [name for name, m in fused.items() if experts_of(name, m) or name.replace(".base_layer", "") in adapted]


def linear_layers(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Name the layers that `"all-linear"` means."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [name for name, module in modules.items() if is_linear(module) and module is not output]


def is_in(name: str, modules: Collection[str]) -> bool:
    """Check whether a layer is one of these modules or in one, as PEFT does for those that it trains whole.

    It takes the names for ends of any length: with `classifier` DistilBERT's `pre_classifier` is trained whole, too.
    """
    owners = accumulate(name.split("."), "{}.{}".format)
    return any(owner.endswith(tuple(modules)) for owner in owners)


def matches(patterns: str | Collection[str], name: str, argument: str) -> bool:
    """Check whether a regular expression, or one of several names or endings, selects a layer, as in PEFT."""
    if isinstance(patterns, str):
        try:
            return regex.fullmatch(patterns, name, timeout=_PATIENCE) is not None
        except regex.error as error:
            problem = f"is not a regular expression: {error}."
        except TimeoutError:
            problem = (
                f"was not matched with {name!r} within {_PATIENCE:g} s, as happens with repetitions inside "
                "repetitions. Write it without, or name layers."
            )
        raise LoraInitError(f"{{{argument}}} {problem}", **{argument: patterns})
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _closest_names(modules: Mapping[str, nn.Module], patterns: Collection[str]) -> str:
    """Describe which names of a model are closest to some that match nothing; else how linear layers are named."""
    endings = Counter(name.rsplit(".", 1)[-1] for name in modules)
    words = [re.split(r"[^\w]+", pattern.rstrip("$)"))[-1] for pattern in patterns]
    close = [match for word in words for match in difflib.get_close_matches(word, list(endings), n=3)]
    linear = Counter(name.rsplit(".", 1)[-1] for name, module in modules.items() if is_linear(module))
    names = dict.fromkeys(close or [name for name, _ in linear.most_common(7)])
    shown = ", ".join(f"{name!r} ({endings[name]} layer{'s' * (endings[name] > 1)})" for name in names)
    return f"Closest names: {shown}." if close else f"Its linear layers are named: {shown or 'none'}."


def _unmatched(modules: Mapping[str, nn.Module], names: Collection[str]) -> list[str]:
    """Find the names that match nothing: they were meant to do something."""
    return [one for one in names if not any(matches([one], name, "") for name in modules)]


# Seconds for one name and a regular expression; a sane one takes microseconds.
_PATIENCE = 1.0
ALL_LINEAR = "all-linear"
# What PEFT puts in front of the names of the plain model, in a PeftModel and in an adapter's file.
PREFIX = "base_model.model."

# PEFT adapts these too, but A cannot start from what they read.
_WITHOUT_ROWS = {
    nn.Embedding: "an embedding reads token ids, whose principal directions are no more than the most frequent tokens",
    nn.MultiheadAttention: "a MultiheadAttention reads several inputs, and its adapter has one A for each",
}
# Libraries whose models are checkpoints as a whole, also those with code of their own on the hub.
_CHECKPOINTS = ("transformers", "transformers_modules", "diffusers", "sentence_transformers")
# For these tasks PEFT trains the head whole, under one of these names, and adapts nothing in it.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def heads_of(model: nn.Module) -> list[str]:
    """Name the modules of a transformers model beside its body that have weights: a checkpoint of the body lacks them.

    Empty for a language model, whose output embedding is a part of the checkpoint.
    """
    model = unwrapped(model)
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return []
    there = {name: child for name, child in model.named_children() if _has_weights(child)}
    body = getattr(model, "base_model_prefix", "")
    known = {name for names in HEADS.values() for name in names}
    return [name for name in there if (name != body if body in there else hasattr(model, "config") and name in known)]


def new_heads(model: nn.Module) -> list[str]:
    """Name what begins at random where it is trained whole: a head and its parts; all of a model of one's own.

    A class of one's own around a model of a library is no checkpoint, though it may have `from_pretrained`, as
    transformers' page on custom models has it: what stands beside that model is new.
    """
    names = plain_names(model)
    owners = _checkpoints(names)
    found = {name: [*heads_of(names[name]), *_added_by_subclass(names[name])] for name in owners}
    heads = [f"{name}.{head}".removeprefix(".") for name, own in found.items() for head in own]
    own = [name for name in names if not any(is_below(name, owner) for owner in owners)]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    own = [name for name in own if names[name] is not output and _has_matrix(names[name])]
    return own + [name for name in names if any(is_below(name, head) for head in heads)]


def trains_new_head(heads: Collection[str], task_type: str | None, modules_to_save: Iterable[str]) -> bool:
    """Check whether PEFT trains one of the `new_heads` of a model whole; a body alone gets the head of its task."""
    whole = [*HEADS.get(task_type or "", ()), *modules_to_save]
    return any(is_in(name, whole) for name in heads) or (task_type in HEADS and not heads)


def _added_by_subclass(model: Any) -> list[str]:
    """Name what a class of one's own has added to the class of a library that it derives from."""
    kind = next((one for one in type(model).__mro__ if one.__module__.partition(".")[0] in _CHECKPOINTS), None)
    if kind is None or kind is type(model):
        return []
    try:
        with torch.device("meta"):
            there = {name for name, _ in kind(model.config).named_children()}
    except Exception:  # of one that is made in another way
        return []
    return [name for name, child in model.named_children() if there and name not in there and _has_weights(child)]


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _checkpoints(names: Mapping[str, nn.Module]) -> list[str]:
    """Name the outermost modules that are loaded from checkpoints, but for classes of one's own around them."""
    whole = {name: one for name, one in names.items() if hasattr(type(one), "from_pretrained")}
    known = [name for name, one in whole.items() if type(one).__module__.partition(".")[0] in _CHECKPOINTS]
    around = {name for name in whole for other in known if name not in known and is_below(other, name)}
    owners = [name for name in whole if name not in around]
    return [name for name in owners if not any(is_below(name, other) for other in owners if other != name)]


def _has_matrix(module: nn.Module) -> bool:
    """Return whether a module itself has a matrix, and is no embedding."""
    matrices = any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    return (matrices or is_linear(module)) and not isinstance(module, nn.Embedding)


# What a file may say of a layer; more is damage, and would take minutes and gigabytes before anybody notices.
_WIDEST = 2**24  # the largest vocabularies have about 2**18 tokens
_MOST_EXPERTS = 2**16  # Switch-C, which has most, has 2**11 (Fedus et al. 2021)


@dataclass(frozen=True)
class Target:
    """One layer that takes an adapter.

    Attributes:
        name: Full name in the model, as in `model.named_modules()`; of a fused parameter, as in `named_parameters()`.
        kind: Class of the layer: `"Linear"`, `"Conv1D"`, `"Conv2d"`, or a quantized linear class;
            of a fused parameter, class of its module.
        in_features: Width d_in of the rows it receives; of a convolution, input channels times the size of the kernel.
        out_features: Width d_out of the rows it returns; of a convolution, output channels.
        kernel: Size of a convolution's kernel; empty for other layers.
        groups: Groups of a convolution. Its rank must be a multiple of them.
        experts: Experts of a fused parameter, each of which has an A and a B of the layer's rank; 0 for other layers.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    experts: int = 0

    @property
    def module(self) -> str:
        """Full name of the module: of the layer, or of the module that a fused parameter is in."""
        return self.name.rpartition(".")[0] if self.experts else self.name

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B of this rank in PEFT. Experts are stacked, A expert by expert."""
        if self.experts:
            return (self.experts * rank, self.in_features), (self.out_features, rank * self.experts)
        channels = self.in_features // math.prod(self.kernel)
        return (rank, channels, *self.kernel), (self.out_features, rank // self.groups, *(1 for _ in self.kernel))

    def parameters(self, rank: int, freeze_a: bool = False, use_dora: bool = False) -> int:
        """Count the trainable parameters of a LoRA pair of this rank, or of its B alone, with DoRA's magnitudes."""
        magnitudes = self.out_features if use_dora and rank else 0
        return magnitudes + (math.prod(self.shapes(rank)[1]) if freeze_a else rank * self.cost)

    def extras(self) -> dict[str, Any]:
        """Return the fields that most layers leave at their defaults, as JSON has them; `read_target` reads them."""
        convolution = {"kernel": list(self.kernel), "groups": self.groups} if self.kernel else {}
        return convolution | ({"experts": self.experts} if self.experts else {})

    @property
    def cost(self) -> int:
        """Trainable parameters of one rank; r ranks have r times as many."""
        return max(self.experts, 1) * (self.in_features + self.out_features // self.groups)


def read_target(name: str, kind: str, in_features: int, out_features: int, extras: Mapping[str, Any]) -> Target:
    """Make a target again from its plain values, with a TypeError or ValueError if they are none."""
    kernel = tuple(int(size) for size in extras.get("kernel", ()))
    groups, experts = int(extras.get("groups", 1)), int(extras.get("experts", 0))
    possible = all(0 < size <= _WIDEST for size in (in_features, out_features, *kernel, groups))
    if not possible or not 0 <= experts <= _MOST_EXPERTS or in_features % math.prod(kernel):
        raise ValueError(f"widths of layer {name!r}")
    return Target(name, str(kind), int(in_features), int(out_features), kernel, groups, experts)


def file_prefixes(targets: Iterable[Target]) -> dict[str, str]:
    """Return what stands before `lora_A` in the names of an adapter's tensors, for all its layers in model order.

    PEFT wraps the module of a fused parameter once for each of its parameters that has an adapter, the last outermost.
    """
    prefixes: dict[str, str] = {}
    inside: Counter[str] = Counter()
    for target in reversed(list(targets)):
        prefixes[target.name] = PREFIX + target.module + ".base_layer" * inside[target.module]
        inside[target.module] += 1
    return prefixes


@dataclass(frozen=True)
class Targets:
    """What `target_modules` selects in one model, in model order."""

    layers: Mapping[str, Target]  # layers that can be initialized from their inputs, by name
    # Layers that PEFT adapts but whose A cannot start from data (an embedding), name to kind, which is `"Parameter"`
    # for a parameter. They keep PEFT's own initialization.
    unsupported: Mapping[str, str]
    reasons: Mapping[str, str]  # why, for each of these

    def check_layers(self) -> None:
        """Refuse a selection without a single layer whose A can start from data; say why for the first."""
        if not self.layers:
            name, reason = next(iter(self.reasons.items()))
            raise LoraInitError(
                f"target_modules selects only layers that cannot start from data: {name!r} is one since {reason}. "
                "Target a linear layer too, or leave these to PEFT's own initialization."
            )


def find_targets(
    model: nn.Module,
    target_modules: str | Collection[str] = ALL_LINEAR,
    exclude_modules: str | Collection[str] | None = None,
    task_type: str | None = None,
    target_parameters: Collection[str] | None = None,
) -> Targets:
    """Select the layers that `peft.get_peft_model` would adapt, given the same arguments, in model order.

    Args:
        model: Any torch model.
        target_modules: `"all-linear"`, a regular expression that matches full names, or a collection of names or
            dot-separated name endings; or, what PEFT does not have, `"attention"`, `"mlp"` or `"cross-attention"`, see
            `by_purpose`. An adapter is written with the full names.
        exclude_modules: Regular expression or collection of names or endings to leave out.
        task_type: PEFT's task type. Those that train a head whole (`"SEQ_CLS"` and the like) leave it out here.
        target_parameters: Names of parameters, or dot-separated endings of names, of fused experts.

    Warns:
        UserWarning: A name in `exclude_modules` matches nothing.

    Raises:
        LoraInitError: A name or expression matches nothing, an expression takes more than a second for a name, or a
            matched module is one that PEFT cannot adapt.

    Example:
        >>> from torch import nn
        >>> list(find_targets(nn.ModuleDict({"up": nn.Linear(2, 8), "down": nn.Linear(8, 2)}), ["up"]).layers)
        ['up']
    """
    if not isinstance(model, nn.Module):
        raise LoraInitError(f"find_targets() takes a model in this place and got {type(model).__name__}.")
    _check_names(target_modules=target_modules, exclude_modules=exclude_modules or ())
    model = unwrapped(model)
    named = plain_names(model)
    modules = {name: module for name, module in named.items() if name}
    selected = _selected(model, modules, target_modules, optional=bool(target_parameters))
    selected = _without(selected, HEADS.get(task_type or "", ()), exclude_modules)
    if exclude_modules and not isinstance(exclude_modules, str):
        for name in _unmatched(modules, exclude_modules):
            said = f"{{exclude_modules}} matches nothing in {type(model).__name__}. {_closest_names(modules, [name])}"
            warn(said, exclude_modules=name)
    parameters = find_parameters(named, target_parameters or (), selected, type(model).__name__)
    if not selected and not parameters:
        raise LoraInitError(
            f"{{target_modules}} with {{exclude_modules}} leaves no layer of "
            f"{type(model).__name__}. Exclude less, or target more.",
            target_modules=target_modules,
            exclude_modules=exclude_modules,
        )
    return _described(_in_model_order([*selected, *parameters], named), modules, parameters)


def _check_names(**arguments: Any) -> None:
    for argument, given in arguments.items():
        if not isinstance(given, Collection) or not all(isinstance(one, str) for one in given):
            raise LoraInitError(
                f"{{{argument}}}: expected a regular expression, or a list of names.", **{argument: given}
            )


def _in_model_order(names: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Sort layers and parameters as the modules are that they are, or that they are in."""
    order = {name: i for i, name in enumerate(modules)}
    return sorted(names, key=lambda name: order[name if name in order else name.rpartition(".")[0]])


def _described(
    names: Iterable[str], modules: Mapping[str, nn.Module], parameters: Mapping[str, Experts | None]
) -> Targets:
    """Describe layers and fused parameters, those whose A can start from their inputs apart from the others."""
    layers: dict[str, Target] = {}
    unsupported: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for name in names:
        target = _target(name, modules[name]) if name in modules else _fused_target(name, parameters[name])
        if isinstance(target, Target):
            layers[name] = target
        else:
            unsupported[name], reasons[name] = target
    return Targets(layers, unsupported, reasons)


def _selected(
    model: nn.Module, modules: Mapping[str, nn.Module], target_modules: str | Collection[str], optional: bool
) -> list[str]:
    """Name the modules that `target_modules` means."""
    keyword = target_modules.lower().replace("_", "-") if isinstance(target_modules, str) else ""
    if keyword in (ALL_LINEAR, *PURPOSES):
        linear = linear_layers(model, modules)
        return linear if keyword == ALL_LINEAR else _of_purpose(keyword, modules, linear, type(model).__name__)
    names = [target_modules] if isinstance(target_modules, str) else target_modules
    selected = [name for name in modules if matches(target_modules, name, "target_modules")]
    # Of names in a list each has to match: one that is misspelt was meant, too.
    wrong = _unmatched(modules, names) if names is target_modules else [] if selected else names
    if wrong or not (selected or optional):
        given = target_modules if wrong is names else wrong
        raise _no_layer(type(model).__name__, modules, given, wrong, wrong or names)
    return selected


def _no_layer(
    model_class: str, modules: Mapping[str, nn.Module], given: str | Collection[str], wrong: Collection[str],
    names: Collection[str],
) -> LoraInitError:  # fmt: skip
    """Make the error about names that select no layer, with the experts that there are if one is of experts."""
    of_experts, options = experts_there(modules) if any("experts" in one for one in names) else ("", {})
    return LoraInitError(
        f"{{target_modules}} matches no layer of {model_class}.{of_experts or f' {_closest_names(modules, wrong)}'}",
        target_modules=given, **options,
    )  # fmt: skip


def _without(names: Iterable[str], heads: Collection[str], exclude_modules: str | Collection[str] | None) -> list[str]:
    """Leave out the layers of heads that are trained whole, and those that are excluded."""
    left = [name for name in names if not is_in(name, heads)]
    if not exclude_modules:
        return left
    return [name for name in left if not matches(exclude_modules, name, "exclude_modules")]


def _of_purpose(purpose: str, modules: Mapping[str, nn.Module], linear: list[str], model_class: str) -> list[str]:
    layers = by_purpose(modules, linear)
    if not layers[purpose]:
        there = {kind: Counter(name.rpartition(".")[2] for name in names) for kind, names in layers.items() if names}
        shown = [f"{kind} ({', '.join(endings)}: {endings.total()} layers)" for kind, endings in there.items()]
        raise LoraInitError(
            f"{{target_modules}}: {model_class} has no such layers. It has {' and '.join(shown) or 'neither'}. "
            "Name layers instead; {target_parameters} names fused experts.",
            target_modules=purpose,
            target_parameters=...,
        )
    return layers[purpose]


def _fused_target(name: str, experts: Experts | None) -> Target | tuple[str, str]:
    """Describe a parameter of experts, or return the kind and the reason why it cannot start from data."""
    if experts is None:
        return "Parameter", "a parameter whose input no interface of transformers' experts shows"
    widths = experts.in_features, experts.out_features
    return Target(name, class_name(experts.module), *widths, experts=experts.n_experts)


def _target(name: str, module: nn.Module) -> Target | tuple[str, str]:
    """Describe a layer, or return its kind and the reason why it cannot start from data."""
    kind = class_name(module)
    reason = next((why for without, why in _WITHOUT_ROWS.items() if isinstance(module, without)), None)
    if reason is not None:
        return kind, reason
    if is_conv1d(module):
        d_in, d_out = module.weight.shape  # type: ignore[misc]
        return Target(name, kind, int(d_in), int(d_out))
    if isinstance(module, CONVOLUTIONS):
        patches_of(name, module)  # refuses those that PEFT cannot adapt
        width = module.in_channels * math.prod(module.kernel_size)
        return Target(name, kind, width, module.out_channels, tuple(module.kernel_size), module.groups)
    # Quantized linear layers of every library keep these two attributes.
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return Target(name, kind, int(module.in_features), int(module.out_features))  # type: ignore[arg-type]
    raise LoraInitError(
        f"target_modules selects {name!r}, a {kind}, and an adapter needs a linear layer or a convolution. "
        "Name the layers inside it, or use a pattern that ends in their names."
    )
