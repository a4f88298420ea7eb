"""What layers read that are not linear: patches of a convolution's input, and what the router sends to each expert."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_init.errors import LoraInitError, warn
from lora_init.third_party_internals import apply_gate, is_gated

# Patches that one call of a layer gives at most. Neighbours overlap: more of them cost memory and say little.
MAX_PATCHES = 4096

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# The outputs of a token's k experts are added up. If they are independent, their sum grows with the root of k, and what
# an adapter changes of it with k^(3/4), as changes along k times as many directions do: see `learning_rate.OVERLAP`.
_OF_SUMMED = 0.25
# Names of the first and the second matrix of an expert in transformers' experts modules.
_FIRST, _SECOND = ("gate_up_proj", "up_proj"), "down_proj"


@dataclass(frozen=True)
class Patches:
    """Cut the input of a convolution into what PEFT's `lora_A`, a convolution itself, multiplies by its weight.

    PEFT gives `lora_A` the kernel, stride and padding of the layer, all of its input channels whatever its groups,
    zeros for padding whatever its `padding_mode`, and no dilation. The rows are what `lora_A` reads, not the layer.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # zeros before and after, for each dimension

    def rows(self, x: Tensor, most: int = MAX_PATCHES) -> Tensor:
        """Cut x [batch, channels, *size] into rows [n, channels * prod(kernel)], each laid out as a row of A's weight.

        Of more than `most` patches, `most` are drawn at random over images and places: the same places in every batch
        of this shape, so that a pass can be repeated.
        """
        n_dims = len(self.kernel)
        if x.dim() == n_dims + 1:  # one image without a batch, which torch's convolutions take, too
            x = x[None]
        zeros: list[int] = []
        for before, after in reversed(self.padding):  # torch's pad begins with the last dimension
            zeros += (before, after)
        x = F.pad(x, zeros)
        for i, (size, step) in enumerate(zip(self.kernel, self.stride, strict=True)):
            x = x.unfold(2 + i, size, step)  # a view: [batch, channels, *places, *kernel]
        x = x.movedim(1, 1 + n_dims)  # [batch, *places, channels, *kernel]
        places = x.shape[: 1 + n_dims]
        total = math.prod(places)
        if total <= most:
            return x.reshape(total, -1)  # -> patches x (channels * prod(kernel))
        # A generator of its own, on the CPU: the same draw on every device, and the caller's random state untouched.
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:most].sort().values
        # Indexed before it is flattened, so that the view of overlapping patches is never copied whole.
        return x[torch.unravel_index(drawn.to(x.device), places)].flatten(1)


def patches_of(name: str, module: nn.Module) -> Patches | None:
    """Describe the patches of a convolution; None for any other layer. Refuse one that PEFT's adapter does not fit."""
    if not isinstance(module, CONVOLUTIONS):
        return None
    if module.padding == "same":
        # As torch has it: of an even kernel, the odd zero stands at the end.
        padding = tuple(((size - 1) // 2, size // 2) for size in module.kernel_size)
    elif isinstance(module.padding, str):  # "valid"
        padding = ((0, 0),) * len(module.kernel_size)
    else:
        padding = tuple((size, size) for size in module.padding)
    # A kernel of size 1 has no gaps to widen. With "same" the output has the size of the input, whatever the dilation.
    spread = any(d > 1 and k > 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    if spread and module.padding != "same":
        raise LoraInitError(
            f"layer {name!r}: PEFT's adapter leaves out dilation={module.dilation}, so its output does not fit the "
            "output of the layer. Exclude it."
        )
    return Patches(tuple(module.kernel_size), tuple(module.stride), padding)


@dataclass(frozen=True)
class Experts:
    """One 3-D parameter of a module with transformers' interface for experts, such as `MixtralExperts`.

    Such a module is called with hidden states [tokens, d] and the experts that the router chose for each [tokens, k].
    Its first parameter multiplies the tokens, its second one what the gate made of them. The latter is computed here
    once more: modules compute it in a loop, batched or grouped, and no hook sees what a single expert reads. `name` is
    the full name of the parameter.
    """

    name: str
    module: nn.Module
    n_experts: int
    in_features: int
    out_features: int

    def rows(self, hidden: Tensor, chosen: Tensor) -> Iterator[tuple[int | None, Tensor]]:
        """Yield each expert that was chosen with its rows [n, d_in], and None with the rows of all experts.

        A token [d] that went to k experts, chosen [tokens, k], counts in each. Among the rows of all it counts k times,
        too, or once where its rows are k times the same.
        """
        first = self.name.endswith(_FIRST)
        if first:
            yield None, hidden
        pooled = []
        for expert in range(self.n_experts):
            rows = hidden[(chosen == expert).any(-1)]
            if not len(rows):  # the router sent no token to it
                continue
            if not first:
                rows = self._inside(rows, expert)
                pooled.append(rows)
            yield expert, rows
        if pooled:
            yield None, torch.cat(pooled)

    def times(self, rows: Tensor, expert: int, ending: str = "") -> Tensor:
        """Multiply rows by the matrix of an expert, without its bias; `ending` names another of its matrices."""
        weight: Tensor = getattr(self.module, ending or self.name.rpartition(".")[2])[expert]
        if self.module.is_transposed:  # [d_in, d_out], as GPT-OSS has it
            return rows @ weight
        return F.linear(rows, weight)

    def output(self, rows: Tensor, expert: int, chosen: Tensor) -> Tensor:
        """Compute what an expert makes of its rows, without bias, in the size that changes of it are compared with."""
        y = self.times(rows, expert)
        if self.name.endswith(_FIRST):
            return y
        scale: float = chosen.shape[-1] ** _OF_SUMMED  # it is one of k terms of a sum
        return y / scale

    def _inside(self, rows: Tensor, expert: int) -> Tensor:
        """Compute what the second matrix of an expert reads."""
        module: Any = self.module
        name = _first_of(module)
        up = self.times(rows, expert, name)
        bias = getattr(module, f"{name}_bias", None)  # GPT-OSS has one, Mixtral none
        if bias is not None:
            up = up + bias[expert]
        # Gate and up projection in one matrix, or an up projection alone.
        inside: Tensor = apply_gate(module, up) if name == _FIRST[0] else module.act_fn(up)
        return inside


def expert_group(name: str, expert: int) -> str:
    """Name the input group of one expert of a parameter."""
    return f"{name}.{expert}"


def experts_of(name: str, module: nn.Module) -> Experts | None:
    """Describe a parameter of a module of experts by its full name; None if it is no such parameter."""
    ending = name.rpartition(".")[2]
    parameter = dict(module.named_parameters(recurse=False)).get(ending)
    is_known = hasattr(module, "is_transposed") and is_gated(module) and _first_of(module)
    if not is_known or ending not in (_first_of(module), _SECOND) or parameter is None:
        return None
    if parameter.dim() != 3 or not parameter.is_floating_point():  # of one dimension less, or quantized
        return None
    n_experts, d_in, d_out = parameter.shape if module.is_transposed else parameter.mT.shape
    return Experts(name, module, n_experts, d_in, d_out)


def find_parameters(
    modules: Mapping[str, nn.Module], wanted: Collection[str], adapted: Collection[str], model_class: str
) -> dict[str, Experts | None]:
    """Find what PEFT's `target_parameters` selects, by full name; None for a parameter that A cannot start from data.

    Refuses a name that selects nothing, or something that PEFT cannot adapt, as the modules `adapted` already are.
    """
    if isinstance(wanted, str):
        raise LoraInitError("{target_parameters} must be a list of names, as in PEFT.", target_parameters=wanted)
    parameters: dict[str, Tensor] = {}
    owners: dict[str, nn.Module] = {}
    for owner, module in modules.items():
        if not owner:  # PEFT wraps the module of a parameter, and cannot wrap the model itself
            continue
        for ending, parameter in module.named_parameters(recurse=False):
            parameters[f"{owner}.{ending}"] = parameter
            owners[f"{owner}.{ending}"] = module
    selected: dict[str, Experts | None] = {}
    for key in wanted:
        names = [name for name in parameters if f".{name}".endswith(f".{key}")]
        if not names:
            raise _no_parameter(key, parameters, model_class)
        for name in names:
            _check_adaptable(name, parameters[name], adapted)
            experts = experts_of(name, owners[name])
            selected[name] = experts
            if experts is None:
                _check_weight(name, owners[name], parameters[name])
            else:
                check_peft(name, owners[name])
    return {name: selected[name] for name in parameters if name in selected}  # in model order


def check_peft(name: str, module: nn.Module, release: str = "") -> None:
    """Refuse experts for which a release of PEFT exchanges the widths of A and B. Default: the installed release.

    Releases before 0.19 read all parameters as [experts, in, out], and so exchange the widths of those laid out as
    [experts, out, in]; 0.19.0 exchanges the widths of all.
    """
    release = release or version("peft")
    parts = tuple(int(part) for part in re.findall(r"\d+", release)[:3])
    if parts < (0, 19, 1) and not (parts < (0, 19) and getattr(module, "is_transposed", False)):
        raise LoraInitError(
            f"{name!r}: PEFT {release} exchanges the widths of A and B of these experts. Train by 0.19.1 or newer."
        )


def _check_adaptable(name: str, parameter: Tensor, adapted: Collection[str]) -> None:
    """Refuse a parameter of a module that has an adapter already, and one that is quantized."""
    if name.rpartition(".")[0] in adapted:
        raise LoraInitError(
            f"target_parameters selects {name!r}, and target_modules its layer. PEFT takes one of the two: "
            "name target_modules that leave it out."
        )
    if parameter.dtype.itemsize < 2:  # int8 and float8; all types of weights in float have two bytes or more
        raise LoraInitError(
            f"target_parameters selects {name!r}, which is quantized ({parameter.dtype}), and PEFT adds to "
            "weights in float. Load the model without quantization, or leave the parameter out."
        )


def _no_parameter(key: str, parameters: Mapping[str, Tensor], model_class: str) -> LoraInitError:
    """Make the error about a name that selects no parameter, with the names of those that are fused."""
    fused: dict[str, int] = {}  # number of experts by the end of the name, once for all layers
    for name, parameter in parameters.items():
        if parameter.dim() == 3:
            fused[name.rpartition(".")[2]] = len(parameter)
    if fused:
        shown = ", ".join(f"{ending} (of {n_experts} experts)" for ending, n_experts in sorted(fused.items()))
        hint = f"Parameters of three dimensions: {shown}, which are adapted whole."
    else:
        hint = "It has no fused experts, as models of transformers have them since 5.0."
    return LoraInitError(
        f"{{target_parameters}} matches no parameter of {model_class}. {hint}", target_parameters=[key]
    )


def _check_weight(name: str, module: nn.Module, parameter: Tensor) -> None:
    """Refuse a parameter that is no weight, such as a bias of experts, or one of one dimension or four."""
    owner = name.rpartition(".")[0]
    # A bias of experts has two dimensions, [experts, d_out], as a weight does: its neighbors tell them apart.
    of_experts = any(experts_of(f"{owner}.{other}", module) for other, _ in module.named_parameters(recurse=False))
    if of_experts or parameter.dim() not in (2, 3):
        raise LoraInitError(
            f"target_parameters selects {name!r} of shape {tuple(parameter.shape)}, which is no weight."
        )


def warn_of_experts_left_out(modules: Mapping[str, nn.Module], adapted: Collection[str]) -> str:
    """Warn of fused experts of a model that have no adapter; return the warning, empty if there was none."""
    left_out, size_left_out = [], 0
    for name, size in _fused_sizes(modules).items():
        if name not in adapted:
            left_out.append(name)
            size_left_out += size
    if not left_out:
        return ""
    total = 0
    for module in modules.values():
        for parameter in module.parameters(recurse=False):
            total += parameter.numel()
    text = f"fused experts hold {size_left_out / total:.0%} of the weights and get no adapter: "
    return warn(text + "{target_parameters} adds it.", target_parameters=_ends(left_out))


def _fused_sizes(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Count the numbers in each parameter of fused experts."""
    sizes: dict[str, int] = {}
    for owner, module in modules.items():
        for ending, parameter in module.named_parameters(recurse=False):
            name = f"{owner}.{ending}"
            if experts_of(name, module):
                sizes[name] = parameter.numel()
    return sizes


def _ends(names: Iterable[str]) -> list[str]:
    # Module and parameter, such as experts.down_proj: the same in all layers, and as PEFT's target_parameters has them.
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def experts_there(modules: Mapping[str, nn.Module]) -> tuple[str, dict[str, Any]]:
    """Describe the experts of a model, with options for the error, where somebody names experts that it lacks."""
    if fused := _fused_sizes(modules):
        return " Its experts are fused, which {target_parameters} names.", dict(target_parameters=_ends(fused))
    numbers = []
    for name in modules:
        if match := re.search(r"\bexperts\.(\d+)\b", name):
            numbers.append(int(match[1]))
    if numbers:
        return f" It has the experts 0 to {max(numbers)}.", {}
    return "", {}


def routed(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Find the hidden states [tokens, d] and the chosen experts [tokens, k] among the arguments of such a module."""
    hidden: Tensor | None = None
    chosen: Tensor | None = None
    # Models pass them by position or by keyword. The router's weights, floats too, come after the hidden states: the
    # first tensor of each type is meant.
    for value in (*args, *kwargs.values()):
        if not isinstance(value, Tensor):
            continue
        if value.is_floating_point():
            hidden = value if hidden is None else hidden
        elif chosen is None:
            chosen = value
    if hidden is None or chosen is None or chosen.shape[:-1] != hidden.shape[:-1]:
        raise LoraInitError(
            f"{name!r}: its module was not called with hidden states and the experts chosen for each. "
            "Leave it out of target_parameters."
        )
    return hidden.flatten(0, -2), chosen.flatten(0, -2)


def _first_of(module: nn.Module) -> str:
    return next((name for name in _FIRST if hasattr(module, name)), "")  # PEFT makes properties of parameters
