"""Which layers of a model can take an adapter: their names, kinds and widths."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate
from types import NoneType
from typing import Any

import regex
import torch
from torch import nn

from lora_init.errors import LoraInitError, warn
from lora_init.layers.grid import PURPOSES, by_purpose, layers_in
from lora_init.layers.rows import CONVOLUTIONS, Experts, experts_of, experts_there, find_parameters, patches_of
from lora_init.layers.wrappers import class_name, is_below, plain_name, plain_names, unwrapped


def is_conv1d(module: nn.Module) -> bool:
    """Recognize transformers' `Conv1D`, a linear layer with a transposed weight."""
    # By name: transformers need not be imported.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Check whether `"all-linear"` means this layer."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _has_widths(module: nn.Module) -> bool:
    """Recognize a linear layer, also a quantized one: those of every library keep these two attributes."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def count_linear(model: nn.Module, names: Collection[str], task_type: str | None = None) -> int:
    """Count the layers that `"all-linear"` means, quantized ones of any library and fused experts, adapted or not.

    Only the part of the model counts that holds the blocks of the named layers, such as a language model without the
    vision tower before it. If a layer outside of blocks is named, as a pooler, the whole model counts.
    """
    model, heads = unwrapped(model), HEADS.get(task_type or "", ())
    modules = plain_names(model)
    part = _common_part(modules, names)
    count = 0
    for name in linear_layers(model, modules) + _quantized(model, modules) + _fused_experts(modules, names):
        if any(infix in name for infix in _ADDED_BY_PEFT) or is_in(name, heads):
            continue
        plain = name.replace(".base_layer", "")  # PEFT's wrapper holds the layer itself under this name
        if plain.split(".")[: len(part)] == part:
            count += layers_in(plain)
    return count


# In the names of what an adapter adds: its matrices, and modules trained whole beside their originals.
_ADDED_BY_PEFT = (".lora_", ".modules_to_save.", ".original_module")


def _common_part(modules: Mapping[str, nn.Module], names: Collection[str]) -> list[str]:
    """Return the path, step by step, to the part of a model that owns the blocks of all these layers."""
    common = []
    paths = [name.split(".")[:-1] for name in names]
    for steps in zip(*paths, strict=False):
        if len(set(steps)) > 1:
            break
        common.append(steps[0])
    # The part owns the list of blocks, so one block or one kind of layer, as XLM's attentions, is of the same part.
    for length, owner in enumerate(accumulate(common, "{}.{}".format)):
        if isinstance(modules.get(owner), (nn.ModuleList, nn.Sequential)):
            return common[:length]
    if len(names) > 1:
        return common
    return []  # what is around a single layer outside of blocks says nothing


def _quantized(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Name the linear layers of libraries that quantize by classes of their own, which `"all-linear"` leaves out."""
    output = output_embedding(model)
    # PEFT's wrappers have widths, too, and hold the layer.
    found = [name for name, module in modules.items() if _has_widths(module) and not any(module.children())]
    return [name for name in found if not is_linear(modules[name]) and modules[name] is not output]


def _fused_experts(modules: Mapping[str, nn.Module], adapted: Collection[str]) -> list[str]:
    """List the parameters of fused experts and those that have an adapter; not others, as parameters of positions."""
    names = []
    for owner, module in modules.items():
        for ending, _ in module.named_parameters(recurse=False):
            name = f"{owner}.{ending}"
            if experts_of(name, module) or name.replace(".base_layer", "") in adapted:
                names.append(name)
    return names


def linear_layers(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Name the layers that `"all-linear"` means."""
    # PEFT leaves the head of a language model out. Models of other libraries have no such method.
    output = output_embedding(model)
    return [name for name, module in modules.items() if is_linear(module) and module is not output]


def is_in(name: str, modules: Collection[str]) -> bool:
    """Check whether a layer is one of these modules or in one, as PEFT does for those that it trains whole.

    A module matches if its name ends so, also within a word: with `classifier`, PEFT trains DistilBERT's
    `pre_classifier` whole, too.
    """
    owners = accumulate(name.split("."), "{}.{}".format)
    return any(owner.endswith(tuple(modules)) for owner in owners)


def matches(patterns: str | Collection[str], name: str, argument: str) -> bool:
    """Check whether a regular expression, or one of several names or endings, selects a layer, as in PEFT."""
    if isinstance(patterns, str):
        try:
            # `regex` and not `re`, which has no time limit: some expressions take exponential time.
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
    """Describe the names of a model that are close to patterns which match nothing; if none is, its linear layers."""
    endings: Counter[str] = Counter()
    linear: Counter[str] = Counter()
    for name, module in modules.items():
        ending = name.rsplit(".", 1)[-1]
        endings[ending] += 1
        if is_linear(module):
            linear[ending] += 1
    close: list[str] = []
    for pattern in patterns:
        # The last word of a pattern such as `.*(q|v)_proj$`.
        word = re.split(r"[^\w]+", pattern.rstrip("$)"))[-1]
        close += difflib.get_close_matches(word, list(endings), n=3)
    names = dict.fromkeys(close or [name for name, _ in linear.most_common(7)])  # each once, in order
    shown = ", ".join(f"{name!r} ({endings[name]} layer{'s' * (endings[name] > 1)})" for name in names)
    if close:
        return f"Closest names: {shown}."
    return f"Its linear layers are named: {shown or 'none'}."


def _unmatched(modules: Mapping[str, nn.Module], names: Collection[str]) -> list[str]:
    """Find the names that match nothing: they were meant to do something."""
    unmatched = []
    for pattern in names:
        if not any(matches([pattern], name, "") for name in modules):
            unmatched.append(pattern)
    return unmatched


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


def output_embedding(model: nn.Module) -> nn.Module | None:
    """Find the layer that a language model turns hidden states into logits with; None in other models."""
    found: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    return found


def heads_of(model: nn.Module) -> list[str]:
    """Name the modules of a transformers model beside its body that have weights: a checkpoint of the body lacks them.

    Empty for a language model, whose output embedding is a part of the checkpoint.
    """
    model = unwrapped(model)
    if output_embedding(model) is not None:
        return []
    parts = [name for name, child in model.named_children() if _has_weights(child)]
    body = getattr(model, "base_model_prefix", "")
    if body in parts:
        parts.remove(body)
        return parts
    if not hasattr(model, "config"):  # is no model of transformers, and its names mean nothing here
        return []
    known: set[str] = set()
    for names in HEADS.values():
        known.update(names)
    return [name for name in parts if name in known]


# A head that is trained from a random start needs another learning rate than an adapter of a pretrained layer. What is
# new in a model is, first, what a library adds beside the body of a checkpoint (`heads_of`); second, what a user's
# subclass adds to a library's class; third, the matrices of a user's own module around or beside such models.
def new_heads(model: nn.Module) -> list[str]:
    """Name the modules that begin at random if they are trained whole: heads with their parts, a user's own layers.

    A user's class around a library's model is no checkpoint, though it may have `from_pretrained`, as on transformers'
    page about custom models: what stands beside that model is new.
    """
    modules = plain_names(model)
    owners = _checkpoints(modules)
    heads = []
    for owner in owners:
        for head in (*heads_of(modules[owner]), *_added_by_subclass(modules[owner])):
            heads.append(f"{owner}.{head}".removeprefix("."))  # the model itself is called ""
    output = output_embedding(model)
    new = []
    for name, module in modules.items():
        in_checkpoint = any(is_below(name, owner) for owner in owners)
        if not in_checkpoint and module is not output and _has_matrix(module):
            new.append(name)
    for name in modules:
        if any(is_below(name, head) for head in heads):
            new.append(name)
    return new


def trains_new_head(heads: Collection[str], task_type: str | None, modules_to_save: Iterable[str]) -> bool:
    """Check whether PEFT trains one of the `new_heads` of a model whole; a body alone gets the head of its task."""
    whole = [*HEADS.get(task_type or "", ()), *modules_to_save]
    return any(is_in(name, whole) for name in heads) or (task_type in HEADS and not heads)


def _added_by_subclass(model: Any) -> list[str]:
    """Name the modules that a user's class has added to the class of a library that it derives from."""
    kind = next((parent for parent in type(model).__mro__ if _is_of_library(parent)), None)
    if kind is None or kind is type(model):
        return []
    try:
        # Which modules the library's class makes, without memory for their weights.
        with torch.device("meta"):
            original = {name for name, _ in kind(model.config).named_children()}
    except Exception:  # a class that is not made from a configuration alone
        return []
    if not original:  # an abstract class, as PreTrainedModel: nothing to compare with
        return []
    return [name for name, child in model.named_children() if name not in original and _has_weights(child)]


def _is_of_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _CHECKPOINTS


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _checkpoints(modules: Mapping[str, nn.Module]) -> list[str]:
    """Name the outermost modules that are loaded from checkpoints, but for a user's classes around them."""
    loadable, known = [], []
    for name, module in modules.items():
        if hasattr(type(module), "from_pretrained"):
            loadable.append(name)
            if _is_of_library(type(module)):
                known.append(name)
    owners = []
    for name in loadable:
        # A user's class that has a library's model inside is a wrapper with new parts, not a checkpoint as a whole.
        is_wrapper = name not in known and any(is_below(other, name) for other in known)
        if not is_wrapper:
            owners.append(name)
    outermost = []
    for name in owners:
        if not any(is_below(name, other) for other in owners if other != name):
            outermost.append(name)
    return outermost


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
        if self.experts:
            return self.name.rpartition(".")[0]
        return self.name

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B of this rank in PEFT. Experts are stacked, A expert by expert."""
        if self.experts:
            return (self.experts * rank, self.in_features), (self.out_features, rank * self.experts)
        # A is a convolution with the layer's kernel over all of its input channels; B has a kernel of size 1 and the
        # groups of the layer. The product over an empty kernel, of a linear layer, is 1.
        channels = self.in_features // math.prod(self.kernel)
        ones = (1,) * len(self.kernel)
        return (rank, channels, *self.kernel), (self.out_features, rank // self.groups, *ones)

    def parameters(self, rank: int, freeze_a: bool = False, use_dora: bool = False) -> int:
        """Count the trainable parameters of a LoRA pair of this rank, or of its B alone, with DoRA's magnitudes."""
        if freeze_a:
            _, shape_of_b = self.shapes(rank)
            count = math.prod(shape_of_b)
        else:
            count = rank * self.cost
        if use_dora and rank:
            count += self.out_features  # one magnitude for each row of the weight
        return count

    def extras(self) -> dict[str, Any]:
        """Return the fields that most layers leave at their defaults, as JSON has them; `read_target` reads them."""
        extras: dict[str, Any] = {}
        if self.kernel:
            extras |= {"kernel": list(self.kernel), "groups": self.groups}
        if self.experts:
            extras["experts"] = self.experts
        return extras

    @property
    def cost(self) -> int:
        """Trainable parameters of one rank; r ranks have r times as many."""
        return max(self.experts, 1) * (self.in_features + self.out_features // self.groups)


def read_target(name: str, kind: str, in_features: int, out_features: int, extras: Mapping[str, Any]) -> Target:
    """Make a target again from its plain values; raise TypeError or ValueError if no layer can have these."""
    kernel = tuple(int(size) for size in extras.get("kernel", ()))
    groups, experts = int(extras.get("groups", 1)), int(extras.get("experts", 0))
    possible = all(0 < size <= _WIDEST for size in (in_features, out_features, *kernel, groups))
    # Checked from left to right: `prod(kernel)` is not 0 once all sizes are possible.
    if not possible or not 0 <= experts <= _MOST_EXPERTS or in_features % math.prod(kernel):
        raise ValueError(f"widths of layer {name!r}")
    return Target(name, str(kind), int(in_features), int(out_features), kernel, groups, experts)


def file_prefixes(targets: Iterable[Target]) -> dict[str, str]:
    """Return what stands before `lora_A` in the names of an adapter's tensors, for all its layers in model order.

    PEFT wraps the module of a fused parameter once for each of its parameters that has an adapter, the last outermost.
    """
    prefixes: dict[str, str] = {}
    inside: Counter[str] = Counter()
    # The last in model order is wrapped last and stands outermost, so it is reached without a `base_layer`; each one
    # before it is one level further in.
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
        exclude_modules: Regular expression or collection of names or endings to leave out, or a purpose as above.
        task_type: PEFT's task type. Those that train a head whole (`"SEQ_CLS"` and the like) leave it out here.
        target_parameters: Names of parameters, or dot-separated endings of names, of fused experts.

    Warns:
        UserWarning: `exclude_modules`, or a name in it, matches no layer, or a parameter, which stays; a layer is in
            several modules.

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
    optional = {"exclude_modules": exclude_modules, "target_parameters": target_parameters}
    _check_names(target_modules=target_modules, **{name: () if one is None else one for name, one in optional.items()})
    if not isinstance(task_type, (str, NoneType)):
        raise LoraInitError("{task_type}, expected a text.", task_type=task_type)
    model = unwrapped(model)
    named = plain_names(model)
    modules = {name: module for name, module in named.items() if name}  # without the model itself, called ""
    selected = _selected(model, modules, target_modules, optional=bool(target_parameters))
    excluded = _excluded(model, modules, exclude_modules)
    selected = _without(selected, HEADS.get(task_type or "", ()), excluded)
    _warn_of_other_places(model, selected)
    parameters = find_parameters(named, target_parameters or (), selected, type(model).__name__)
    warn_of_exclusions(model, excluded, selected, parameters)
    if not selected and not parameters:
        raise LoraInitError(
            f"{{target_modules}} with {{exclude_modules}} leaves no layer of "
            f"{type(model).__name__}. Exclude less, or target more.",
            target_modules=target_modules,
            exclude_modules=exclude_modules,
        )
    return _described(_in_model_order([*selected, *parameters], named), modules, parameters)


def _warn_of_other_places(model: nn.Module, names: Iterable[str]) -> None:
    """Warn of a layer that several modules hold, since PEFT puts its adapter into the first of them alone."""
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, dict[tuple[int, str], str]] = defaultdict(dict)  # names of a module, by who holds it as what
    for name, module in modules.items():
        holder, _, attribute = name.rpartition(".")
        places[id(module)].setdefault((id(modules[holder]), attribute), plain_name(name))
    others = {first: rest for first, *rest in map(dict.values, places.values()) if rest}
    for name in names:
        if name in others:
            warn(
                f"{name} is one layer with {', '.join(others[name])}. PEFT adapts it in the first place alone, and its "
                "start is of the inputs in all of them. Leave it out: {exclude_modules}.",
                exclude_modules=name,
            )


def _check_names(**arguments: Any) -> None:
    for argument, given in arguments.items():
        # A string is a collection of strings, too.
        if not isinstance(given, (Sequence, Set, Mapping)) or not all(isinstance(name, str) for name in given):
            raise LoraInitError(
                f"{{{argument}}}: expected a regular expression, or a list of names.", **{argument: given}
            )


def _in_model_order(names: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Sort layers, and parameters by the modules that they are in, in the order of the modules."""
    order = {name: i for i, name in enumerate(modules)}

    def place(name: str) -> int:
        if name in order:
            return order[name]
        return order[name.rpartition(".")[0]]  # a parameter, by its module

    return sorted(names, key=place)


def _described(
    names: Iterable[str], modules: Mapping[str, nn.Module], parameters: Mapping[str, Experts | None]
) -> Targets:
    """Describe layers and fused parameters; keep those whose A cannot start from their inputs apart."""
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
    """Name the modules that `target_modules` selects; it may select none if it is `optional` and an empty list."""
    model_class = type(model).__name__
    if isinstance(target_modules, str) and _keyword(target_modules) == ALL_LINEAR:
        return linear_layers(model, modules)
    if isinstance(target_modules, str) and _keyword(target_modules) in PURPOSES:
        return _of_purpose(model, modules, "target_modules", target_modules)
    selected = [name for name in modules if matches(target_modules, name, "target_modules")]
    if isinstance(target_modules, str):
        if not selected:
            raise _no_layer(model_class, modules, target_modules, [target_modules])  # also where it is optional
        return selected
    # Of names in a list each has to match: one that is misspelt was meant, too.
    wrong = _unmatched(modules, target_modules)
    if wrong or not (selected or optional):
        raise _no_layer(model_class, modules, wrong, wrong)
    return selected


def _no_layer(
    model_class: str, modules: Mapping[str, nn.Module], given: str | Collection[str], wrong: Collection[str]
) -> LoraInitError:
    """Make the error about names that select no layer, with the experts that there are if one is of experts."""
    hint = ""
    options: dict[str, Any] = {}
    if any("experts" in name for name in wrong):
        hint, options = experts_there(modules)
    if not hint:
        hint = f" {_closest_names(modules, wrong)}"
    return LoraInitError(
        f"{{target_modules}} matches no layer of {model_class}.{hint}", target_modules=given, **options
    )


def _without(names: Iterable[str], heads: Collection[str], exclude_modules: str | Collection[str] | None) -> list[str]:
    """Leave out the layers of heads that are trained whole, and those that are excluded."""
    left = []
    for name in names:
        if is_in(name, heads) or (exclude_modules and matches(exclude_modules, name, "exclude_modules")):
            continue
        left.append(name)
    return left


def _keyword(text: str) -> str:
    return text.lower().replace("_", "-")


def _excluded(
    model: nn.Module, modules: Mapping[str, nn.Module], exclude_modules: str | Collection[str] | None
) -> str | Collection[str]:
    """Return what `exclude_modules` says, or the names of the layers if it says a purpose."""
    if isinstance(exclude_modules, str) and _keyword(exclude_modules) in PURPOSES:
        return _of_purpose(model, modules, "exclude_modules", exclude_modules)
    return exclude_modules or ()


def warn_of_exclusions(
    model: nn.Module, excluded: str | Collection[str], selected: Collection[str], parameters: Collection[str]
) -> None:
    """Warn of names, or of an expression, that match no layer, or a parameter: they were meant to leave something out.

    A layer is what has a weight and no modules inside it. One that was not selected in the first place counts:
    "lm_head" is often excluded beside `"all-linear"`, which leaves it out itself.
    """
    modules = plain_names(model)
    owners = {name.rpartition(".")[0] for name in modules}
    layers = [name for name in modules if name in selected or (name not in owners and _has_weight(modules[name]))]
    experts = {name: name for name in parameters} | {name.rpartition(".")[0]: name for name in parameters}

    def first(pattern: str | list[str], names: Iterable[str]) -> str | None:
        return next((name for name in names if matches(pattern, name, "exclude_modules")), None)

    for name in [excluded] if isinstance(excluded, str) else excluded:
        pattern = name if isinstance(excluded, str) else [name]
        expert = first(pattern, experts)
        if expert is not None:
            text = f"{{exclude_modules}} leaves out modules, as in PEFT, and not the parameter {experts[expert]}."
            warn(f"{text} Name fewer in {{target_parameters}}.", exclude_modules=name, target_parameters=...)
        elif name and first(pattern, layers) is None:
            hint = _closest_names(modules, [name])
            if first(pattern, modules) is not None:
                hint = f"For what is in a block, write an expression: '(.*[.])?{name}[.].*'."
            warn(f"{{exclude_modules}} matches no layer of {type(model).__name__}. {hint}", exclude_modules=name)


def _has_weight(module: nn.Module) -> bool:
    return any(p.dim() > 1 for p in module.parameters(recurse=False))


def _of_purpose(model: nn.Module, modules: Mapping[str, nn.Module], argument: str, purpose: str) -> list[str]:
    layers = by_purpose(modules, linear_layers(model, modules))
    names = layers[_keyword(purpose)]
    if not names:
        shown = []
        for kind, names in layers.items():
            if names:
                endings = dict.fromkeys(name.rpartition(".")[2] for name in names)
                shown.append(f"{kind} ({', '.join(endings)}: {len(names)} layers)")
        there = f"It has {' and '.join(shown) or 'neither'}. Name layers instead"
        if argument == "target_modules":
            there += "; {target_parameters} names fused experts"
        raise LoraInitError(
            f"{{{argument}}}: {type(model).__name__} has no such layers. {there}.",
            **{argument: purpose, "target_parameters": ...},
        )
    return names


def _fused_target(name: str, experts: Experts | None) -> Target | tuple[str, str]:
    """Describe a parameter of experts, or return the kind and the reason why it cannot start from data."""
    if experts is None:
        return "Parameter", "a parameter whose input no interface of transformers' experts shows"
    widths = experts.in_features, experts.out_features
    return Target(name, class_name(experts.module), *widths, experts=experts.n_experts)


def _target(name: str, module: nn.Module) -> Target | tuple[str, str]:
    """Describe a layer, or return its kind and the reason why it cannot start from data."""
    kind = class_name(module)
    for without_rows, reason in _WITHOUT_ROWS.items():
        if isinstance(module, without_rows):
            return kind, reason
    if is_conv1d(module):
        d_in, d_out = module.weight.shape  # type: ignore[misc]  # the transpose of nn.Linear's
        return Target(name, kind, int(d_in), int(d_out))
    if isinstance(module, CONVOLUTIONS):
        patches_of(name, module)  # refuses those that PEFT cannot adapt
        # All input channels, whatever the groups: PEFT's A has none.
        width = module.in_channels * math.prod(module.kernel_size)
        return Target(name, kind, width, module.out_channels, tuple(module.kernel_size), module.groups)
    if _has_widths(module):
        return Target(name, kind, int(module.in_features), int(module.out_features))  # type: ignore[arg-type]
    raise LoraInitError(
        f"target_modules selects {name!r}, a {kind}, and an adapter needs a linear layer or a convolution. "
        "Name the layers inside it, or use a pattern that ends in their names."
    )
