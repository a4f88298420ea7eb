"""Put adapter weights on a model through PEFT: the only place that changes a model, and it can take the change back.

PEFT changes a model in place: it replaces modules, freezes parameters and leaves attributes behind, and stops half-way
where something does not fit. So what can be checked is checked before, and the rest runs under `remember`, which puts
everything back. After PEFT has run, its result is compared with the plan: where PEFT finds nothing to do for a name or
a pattern, it says nothing, or warns.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_init.adapters.directory import AdapterDirectory
from lora_init.errors import LoraInitError, in_one_line
from lora_init.layers.targets import HEADS, Target, find_targets, is_in
from lora_init.layers.wrappers import is_away, plain_name, without_adapter
from lora_init.planning.lora_config import exact_pattern
from lora_init.third_party_internals import has_added_adapter

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_init.adapters.adapter_init import AdapterInit


def check_plain(model: Any, taker: str) -> None:
    """Refuse what is no model, or has an adapter already, as an argument of the function `taker`."""
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        if isinstance(model, str):
            got = f"its name, {model!r}. Load it by from_pretrained()"
        raise LoraInitError(f"{taker} takes a model in this place and got {got}.")
    if holds_layers(model):
        remover = _remover_of(model)
        raise LoraInitError(
            f"{type(model).__name__} already has an adapter. Call its {remover} first, or give {taker} the plain model."
        )


def check_in_memory(layers: Mapping[str, nn.Module], taker: str) -> None:
    """Refuse layers whose weights accelerate keeps elsewhere: PEFT would make A and B without numbers, too."""
    away = [name for name, layer in layers.items() if is_away(getattr(layer, "base_layer", layer))]  # PEFT's, or plain
    if away:
        raise LoraInitError(
            f"{taker}: {len(away)} of {len(layers)} layers are offloaded, the first is {away[0]!r}, and A and B would "
            "be lost there. Save the start by build_adapter(collect(...)).save_pretrained(directory), and put it on "
            "where the model is in memory."
        )


def _remover_of(model: nn.Module) -> str:
    """Name the method that takes adapters off a model: of diffusers, of PEFT, or of transformers."""
    if hasattr(model, "delete_adapters"):
        return "delete_adapters()"
    if hasattr(model, "unload"):
        return "unload() or merge_and_unload()"
    return "delete_adapter()"


def holds_layers(model: Any) -> bool:
    """Return whether there are layers of an adapter in a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(model, nn.Module) and any(isinstance(module, BaseTunerLayer) for module in model.modules())


def is_filled(model: Any) -> bool:
    """Return whether a model has LoRA layers from `add_adapter`, which are filled, and is no PeftModel."""
    return holds_layers(model) and not hasattr(model, "get_base_model") and has_added_adapter(model)


def check_fresh(layers: Mapping[str, Any], adapter: str, whose: str, remedy: str) -> None:
    """Refuse an adapter that was trained, or started in another way."""
    if not all(adds_nothing(layer, adapter) for layer in layers.values() if adapter in layer.r):
        raise LoraInitError(f"{whose} is no fresh one: B is not zero. {remedy}")


def adds_nothing(layer: Any, adapter: str) -> bool:
    """Return whether the adapter of a layer is as PEFT begins it: B is zero, or A of an embedding."""
    if adapter in layer.lora_B:
        factors = [layer.lora_B[adapter].weight]
    else:
        factors = [layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]]
    # On the meta device there are no numbers yet, so it cannot have been trained.
    return any(factor.is_meta or not bool(factor.any()) for factor in factors)


def check_modules_to_save(
    model: nn.Module, modules_to_save: Collection[str], task_type: str | None = None, drawn: Collection[str] = ()
) -> None:
    """Refuse names of no module, which PEFT leaves out silently, and random weights that an adapter would not hold."""
    names = [name for name, _ in model.named_modules() if name]
    for ending in modules_to_save:
        if not any(name.endswith(ending) for name in names):
            endings = sorted({name.rpartition(".")[2] for name in names})
            close = difflib.get_close_matches(ending.rpartition(".")[2], endings, n=3, cutoff=0.4)
            text = f"{{modules_to_save}} is no module of {type(model).__name__}."
            if close:
                text += f" Closest: {', '.join(close)}."
            raise LoraInitError(text, modules_to_save=ending)
    heads = HEADS.get(task_type or "", ())  # PEFT saves these; T5's `classification_head` is one that it does not know
    owners = sorted({name.rpartition(".")[0] for name in drawn})  # the modules of the weights that were drawn
    lost = ",".join(owner for owner in owners if not is_in(owner, (*heads, *modules_to_save)))
    if heads and lost:
        raise LoraInitError(
            f"the weights of {lost} are new and random, and an adapter holds only the weights of "
            f"{' and '.join(heads)}. Take them along: {{modules_to_save}}.",
            modules_to_save=lost,
        )


def check_adapter_name(adapter_name: Any) -> None:
    """Refuse a name under which PEFT cannot save an adapter and read it again."""
    # PEFT only warns of a part of its prefix "lora_", after which weights are not reloaded properly; torch takes no dot
    # in the name of a submodule.
    if not isinstance(adapter_name, str) or "." in adapter_name or adapter_name in "lora_":  # "" is a part of it
        raise LoraInitError(f"adapter_name={adapter_name!r}: use a word without dots that is not a part of 'lora_'.")


def check_fits(model: nn.Module, init: AdapterInit, adapter_name: str) -> None:
    """Refuse a model that has an adapter already, or lacks a layer, or has one of another kind or width."""
    check_adapter_name(adapter_name)
    check_plain(model, "apply()")
    modules = dict(model.named_modules())
    for name in modules:
        if plain_name(name) != name:
            raise LoraInitError(
                f"{type(model).__name__} has parts that are compiled or wrapped, as {name!r} is. Give apply() the "
                "plain model, and wrap what it returns."
            )
    origin, targets = init.provenance.model_id or init.provenance.model_class, init.targets
    named: dict[str, Any] = {**modules, **dict(model.named_parameters())}  # fused experts are parameters
    for name in (*targets, *init.unsupported):
        if name not in named:
            raise LoraInitError(
                f"layer {name!r} of the statistics (from {origin}) is not in {type(model).__name__}. "
                "Apply the adapter to the model that the statistics come from."
            )
    _check_layers(model, targets, named, origin)
    check_in_memory({target.module: modules[target.module] for target in targets.values()}, "apply()")
    check_modules_to_save(model, init.modules_to_save)


def _check_layers(model: nn.Module, targets: Mapping[str, Target], named: Mapping[str, Any], origin: str) -> None:
    """Refuse a model with a layer of another kind or width than the statistics from `origin` have."""
    modules, parameters = [], []
    for name, target in targets.items():
        if target.experts:
            parameters.append(name)
        else:
            modules.append(name)
    layers = find_targets(model, exact_pattern(modules) if modules else [], target_parameters=parameters).layers
    for name, expected in targets.items():
        got = layers.get(name)
        if got is None or _comparable(got) != _comparable(expected):
            shown = type(named[name]).__name__
            if got is not None:
                shown = _described(got)
            raise LoraInitError(
                f"layer {name!r}: the statistics (from {origin}) have {_described(expected)}, "
                f"{type(model).__name__} has {shown}. Apply the adapter to the model that the statistics come from."
            )


# What PEFT, or a loss, may change of a model: attributes of modules (children, hooks, modes among them), the contents
# of the dicts that these attributes are, whether parameters are trained and their gradients, buffers, and weights. A
# deep copy would hold all of it, and take the memory of a second model; so weights are copied only where they change.
def remember(model: nn.Module, weights: bool = False) -> Callable[[], None]:
    """Note how a model is, with a copy of its `weights` if asked for, and return a function that puts it back."""
    noted: list[tuple[dict[str, Any], dict[str, Any]]] = []  # a dict, and a copy of what is in it
    for module in model.modules():
        noted.append((vars(module), dict(vars(module))))
    # Their dicts stay the same objects, since whoever added a hook holds on to one.
    # Configurations of other classes are objects, and diffusers' allow no change.
    for _, attributes in list(noted):
        for value in attributes.values():
            if type(value) in (dict, OrderedDict):
                noted.append((value, dict(value)))
    trainable = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    tensors = list(model.buffers())
    if weights:
        tensors += model.parameters()
    # `data` too: a tensor may have been moved or replaced by another one, not only written to.
    contents = [(tensor, tensor.data, tensor.detach().clone()) for tensor in tensors]

    def restore() -> None:
        # Modules first: the other dicts are attributes of theirs.
        for changed, content in noted:
            changed.clear()
            changed.update(content)
        for parameter, requires_grad, grad in trainable:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for tensor, data, value in contents:
            tensor.data = data
            tensor.data.copy_(value)

    return restore


@contextmanager
def as_it_was(model: nn.Module, weights: bool = False) -> Iterator[None]:
    """Put a model back after the block, see `remember`."""
    restore = remember(model, weights)
    try:
        yield
    finally:
        restore()


def adapter_layers(peft_model: PeftModel | nn.Module, adapter_name: str | None = None) -> dict[str, Any]:
    """Find PEFT's layers, of one adapter if it is named, by the names of the plain model's layers and parameters."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    layers: dict[str, Any] = {}
    for name, module in without_adapter(peft_model).named_modules():
        if isinstance(module, ParamWrapper):  # one inside another for each parameter of a module
            layers[f"{name.replace('.base_layer', '')}.{module.parameter_name}"] = module
        # nn.MultiheadAttention's adapter holds the one of its output projection: one layer, not two.
        # AdaLoRA's A is no module.
        elif isinstance(module, LoraLayer) and isinstance(module.lora_A, nn.ModuleDict) and ".base_layer." not in name:
            layers[name] = module
    if adapter_name is None:
        return layers
    return {name: layer for name, layer in layers.items() if adapter_name in layer.scaling}


def attach(model: nn.Module, init: AdapterInit, adapter_name: str) -> PeftModel:
    """Wrap a model that passed `check_fits` by `get_peft_model` and copy A and B in; restore it if that fails."""
    from peft import get_peft_model

    config = init.to_peft_config(model)
    config.base_model_name_or_path = None  # get_peft_model sets the model's own name, and warns if another was there
    restore = remember(model)
    try:
        with warnings.catch_warnings():
            # Linear and Conv1D layers in one model: PEFT adjusts the flag for each layer, correctly, and warns.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            # PEFT finds the ranks of parameters, then warns that no module has such a name; `_fill` checks.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            peft_model = get_peft_model(model, config, adapter_name=adapter_name)
        _fill(peft_model, init, adapter_name)
    except BaseException:  # also where the user interrupts
        restore()
        raise
    return peft_model


def name_of_adapter(model: Any) -> str:
    """Return PEFT's name of the first adapter that a model has; "default" where there is none."""
    return next(iter(getattr(model, "peft_config", {})), "default")


@torch.no_grad()
def fill_in_place(model: Any, init: AdapterInit) -> None:
    """Copy A and B into the fresh layers that a model has from `add_adapter`, and freeze A if the start does.

    Where A is shorter than the layer's the rest stays.
    """
    layers, name = adapter_layers(model), type(model).__name__
    adapter = name_of_adapter(model)
    if len(getattr(model, "peft_config", ())) > 1:
        raise LoraInitError(f"{name} has the adapters {', '.join(model.peft_config)}, and one is expected.")
    check_fresh(layers, adapter, f"the adapter on {name}", "Delete it, and call add_adapter() again.")
    if init.corrects_base:
        raise LoraInitError(
            f"method={init.method!r} changes the base weights, and an adapter in {name} is saved without them. Take a "
            "start at B = 0, or give the plain model."
        )
    differing = sorted({*layers} ^ {*init.weights, *init.unsupported, *init.left_out})
    if differing:
        raise LoraInitError(
            f"the adapter on {name} has other layers than the start; first of {len(differing)} differences: "
            f"{differing[0]!r}. Collect with the same target_modules."
        )
    ranks = init.ranks
    for layer in init.weights:  # all are checked before the first is filled
        rank, scaling = layers[layer].r[adapter], layers[layer].scaling[adapter]
        # The rows of several experts stand one below the other, so a shorter A would not be a part of the longer one.
        is_part_of_experts = ranks[layer] < rank and bool(init.targets[layer].experts)
        if is_part_of_experts or ranks[layer] > rank or not math.isclose(scaling, init.scaling):
            raise LoraInitError(
                f"layer {layer!r}: the adapter on {name} has rank {rank} and scaling {scaling:.4g}, the start "
                f"{ranks[layer]} and {init.scaling:.4g}. Allocate with rho=1 and the rank and lora_alpha of the "
                "adapter."
            )
    for layer, (a, b) in init.weights.items():
        # Into the tensors that are there, which an optimizer may hold already.
        layers[layer].lora_A[adapter].weight[: len(a)].copy_(a)
        layers[layer].lora_B[adapter].weight[:, : len(a)].copy_(b)
    if init.freeze_a:
        freeze_a(model, adapter)


def freeze_a(adapted: nn.Module, adapter_name: str) -> None:
    """Keep every A of an adapter as it is in training, for which PEFT has no setting."""
    from peft.tuners.lora import LoraLayer

    freeze = partial(_freeze_layer, adapter_name)
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            freeze(layer)
            # Where an adapter was switched off for a moment, as for the reference of DPO, PEFT lets its A train again.
            layer.register_forward_pre_hook(freeze)


def _freeze_layer(adapter_name: str, layer: Any, inputs: Any = None) -> None:
    if adapter_name in layer.lora_A:
        for parameter in layer.lora_A[adapter_name].parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)


def match_modes(peft_model: PeftModel) -> None:
    """Put PEFT's new modules, which start in training mode, into the mode of the model inside them."""
    for layer in adapter_layers(peft_model).values():
        layer.train(layer.get_base_layer().training)
    for module in peft_model.get_base_model().modules():
        if hasattr(module, "modules_to_save"):  # a head that is trained whole
            module.train(module.original_module.training)  # type: ignore[union-attr]
    peft_model.training = peft_model.base_model.training = peft_model.get_base_model().training


def remove_adapters(model: nn.Module) -> None:
    """Put the plain layers back in the place of PEFT's, as `PeftModel.unload` does, on the model inside a PeftModel."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    vars(model).pop("peft_config", None)
    for name, module in reversed(list(model.named_modules())):  # what is inside another layer first
        if isinstance(module, BaseTunerLayer):
            plain = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            plain = module.original_module  # the pretrained copy of a module that is trained whole
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)


@torch.no_grad()
def _fill(peft_model: PeftModel, init: AdapterInit, adapter_name: str) -> None:
    base, layers = peft_model.get_base_model(), adapter_layers(peft_model)
    planned, ranks, scaling = {*init.weights, *init.unsupported}, init.ranks, init.scaling
    if set(layers) != planned:
        differing = sorted(set(layers) ^ planned)
        raise LoraInitError(
            f"PEFT adapted other layers of {type(base).__name__} than planned; first of {len(differing)} differences: "
            f"{differing[0]!r}. PEFT rewrites names of this architecture or keeps layers for this task: collect again "
            "with exclude_modules naming them."
        )
    for name, (a, b) in init.weights.items():
        layer = layers[name]
        if layer.r[adapter_name] != ranks[name] or not math.isclose(layer.scaling[adapter_name], scaling):
            got = f"rank {layer.r[adapter_name]} and scaling {layer.scaling[adapter_name]:.4g}"
            raise LoraInitError(f"layer {name!r}: PEFT gave {got}, planned {ranks[name]} and {scaling:.4g}.")
        layer.lora_A[adapter_name].weight.copy_(a)
        layer.lora_B[adapter_name].weight.copy_(b)
    match_modes(peft_model)


def _comparable(target: Target) -> Target:
    """Return what a layer has in common with those that can take the same A and B."""
    if target.kind == "Conv1D":  # which keeps its weight transposed
        return target
    return replace(target, kind="")  # all other kinds of linear layer, quantized ones too, are alike to PEFT


def _described(target: Target) -> str:
    if not target.kernel:
        return f"{target.kind} {target.in_features} -> {target.out_features}"
    channels, kernel = target.shapes(1)[0][1], "x".join(map(str, target.kernel))
    return f"{target.kind} {channels} -> {target.out_features}, kernel {kernel}, groups {target.groups}"


def load_adapter(model: nn.Module, directory: AdapterDirectory, trainable: bool) -> PeftModel:
    """Put an adapter directory on a plain model, in place, and check what PEFT does not: that all of it is there."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    path, in_file = directory.path, _names_of_a_and_b(directory.shapes)
    try:
        with warnings.catch_warnings():
            # What matters of it is checked below; the rest is about magnitudes and heads that PEFT fills in.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            peft_model = PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
    except (ValueError, TypeError, AttributeError, RuntimeError, LookupError, OSError) as error:
        raise LoraInitError(
            f"{path} cannot be put on {type(model).__name__}: {in_one_line(error)} Name the model it was made for."
        ) from error
    on_model = _names_of_a_and_b(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    if in_file != on_model:
        differing = sorted(in_file ^ on_model)
        place = "on the model"
        if differing[0] in in_file:
            place = "in the file"
        raise LoraInitError(
            f"{path} does not fit {type(model).__name__}: {len(differing)} tensors are only {place}, the first is "
            f"{differing[0]!r}. Name the model it was made for, or load it there and save it again."
        )
    match_modes(peft_model)
    return peft_model


def _names_of_a_and_b(names: Iterable[str]) -> set[str]:
    return {name for name in names if ".lora_A" in name or ".lora_B" in name}


@contextmanager
def with_adapter(model: nn.Module, directory: AdapterDirectory) -> Iterator[PeftModel]:
    """Put an adapter directory on a plain model while the block runs, to look at it, see `load_adapter`."""
    # PEFT draws an A before it reads the adapter's: whoever trains goes on with the random numbers that they had.
    with torch.random.fork_rng(devices=[]), as_it_was(model, weights=directory.changes_weights):
        yield load_adapter(model, directory, trainable=False)
