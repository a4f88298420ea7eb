"""What each expert of a fused mixture-of-experts parameter reads, by the router's choice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_init.errors import LoraInitError

# Names of the first and the second matrix of an expert in transformers' experts modules.
_FIRST, _SECOND = ("gate_up_proj", "up_proj"), "down_proj"


@dataclass(frozen=True)
class Experts:
    """One 3-D parameter of a module with transformers' interface for experts, such as `MixtralExperts`.

    Such a module is called with hidden states [tokens, d] and the experts that the router chose for each [tokens, k].
    Its first parameter multiplies the tokens, its second what the gate made of them, which is computed here once more:
    how the module computes it (in a loop, batched, grouped) shows no one what an expert reads.

    Attributes:
        name: Full name of the parameter.
        module: The module.
        n_experts: Number of experts.
        in_features: Width d_in of the rows.
        out_features: Width d_out of what comes out.
    """

    name: str
    module: nn.Module
    n_experts: int
    in_features: int
    out_features: int

    def group(self, expert: int) -> str:
        """Name the input group of one expert; that of all experts has the name of the parameter."""
        return expert_group(self.name, expert)

    def groups(self) -> list[str]:
        """Name all input groups of the parameter."""
        return [self.name, *(self.group(expert) for expert in range(self.n_experts))]

    def rows(
        self, hidden: Tensor, chosen: Tensor, wanted: Callable[[str], bool] = lambda group: True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the group and the rows [n, d_in] of each expert that was chosen, and of all experts.

        A token that went to k experts counts in each. In the group of all it counts k times too, or once where its rows
        are k times the same.

        Args:
            hidden: What the module gets, tokens that count only, [tokens, d].
            chosen: The experts chosen for each, [tokens, k].
            wanted: Tells whether a group still needs rows.
        """
        first = self.name.endswith(_FIRST)
        if first and wanted(self.name):
            yield self.name, hidden
        pooled = []
        for expert in range(self.n_experts):
            mine = wanted(self.group(expert))
            if not mine and (first or not wanted(self.name)):
                continue
            rows = hidden[(chosen == expert).any(-1)]
            if not len(rows):
                continue
            rows = rows if first else self._inside(rows, expert)
            if mine:
                yield self.group(expert), rows
            pooled.append(rows)
        if not first and pooled and wanted(self.name):
            yield self.name, torch.cat(pooled)

    def _inside(self, rows: Tensor, expert: int) -> Tensor:
        """Compute what the second matrix of an expert reads."""
        module: Any = self.module
        name = _first_of(module)
        weight = getattr(module, name)[expert]
        up = rows @ weight if module.is_transposed else F.linear(rows, weight)
        bias = getattr(module, f"{name}_bias", None)
        up = up if bias is None else up + bias[expert]
        inside: Tensor = module._apply_gate(up) if name == _FIRST[0] else module.act_fn(up)
        return inside


def expert_group(name: str, expert: int) -> str:
    """Name the input group of one expert of a parameter."""
    return f"{name}.{expert}"


def experts_of(name: str, module: nn.Module) -> Experts | None:
    """Describe a parameter of a module of experts by its full name; None if it is no such parameter."""
    ending = name.rpartition(".")[2]
    parameter = module._parameters.get(ending)
    is_known = hasattr(module, "is_transposed") and hasattr(module, "_apply_gate") and _first_of(module)
    if not is_known or ending not in (_first_of(module), _SECOND) or parameter is None:
        return None
    if parameter.dim() != 3 or not parameter.is_floating_point():
        return None
    n_experts, d_in, d_out = parameter.shape if module.is_transposed else parameter.mT.shape
    return Experts(name, module, n_experts, d_in, d_out)


def find_parameters(
    modules: Mapping[str, nn.Module], wanted: Collection[str], adapted: Collection[str], model_class: str
) -> dict[str, Experts | None]:
    """Find what PEFT's `target_parameters` selects, by full name; None for a parameter that A cannot start from data.

    Args:
        modules: All modules of the model by name.
        wanted: Names of parameters, or dot-separated endings of names.
        adapted: Modules that have an adapter of their own.
        model_class: What to call the model.

    Raises:
        LoraInitError: A name selects nothing, or something that PEFT cannot adapt.
    """
    if isinstance(wanted, str):
        raise LoraInitError(f"target_parameters={wanted!r} must be a list of names, as in PEFT.")
    found: dict[str, Experts | None] = {}
    hit: set[str] = set()
    for owner, module in modules.items():
        # PEFT wraps the module of a parameter, and cannot wrap the model itself.
        for ending in module._parameters if owner else ():
            name = f"{owner}.{ending}"
            matching = [key for key in wanted if name == key or name.endswith(f".{key}")]
            if matching and module._parameters[ending] is not None:
                hit.update(matching)
                found[name] = _checked(name, module, owner in adapted)
    missing = [key for key in wanted if key not in hit]
    if missing:
        parameters = (pair for module in modules.values() for pair in module.named_parameters(recurse=False))
        fused = sorted({name for name, parameter in parameters if parameter.dim() == 3})
        hint = f"Parameters of three dimensions are named {', '.join(fused)}." if fused else "It has no fused experts."
        raise LoraInitError(f"target_parameters: {missing[0]!r} matches no parameter of {model_class}. {hint}")
    return found


def _checked(name: str, module: nn.Module, has_adapter: bool) -> Experts | None:
    owner, _, ending = name.rpartition(".")
    if has_adapter:
        raise LoraInitError(
            f"target_parameters selects {name!r}, and target_modules its layer. PEFT takes one of the two: "
            "name target_modules that leave it out."
        )
    experts = experts_of(name, module)
    shape = tuple(getattr(module, ending).shape)
    others = any(experts_of(f"{owner}.{other}", module) for other in module._parameters)
    if experts is None and (others or len(shape) not in (2, 3)):
        raise LoraInitError(f"target_parameters selects {name!r} of shape {shape}, which is no weight to adapt.")
    return experts


def routed(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Find the hidden states [tokens, d] and the chosen experts [tokens, k] among the arguments of such a module.

    Raises:
        LoraInitError: They are not there.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    hidden = next((x for x in tensors if x.is_floating_point()), None)
    chosen = next((x for x in tensors if not x.is_floating_point()), None)
    if hidden is None or chosen is None or chosen.shape[:-1] != hidden.shape[:-1]:
        raise LoraInitError(
            f"{name!r}: its module was not called with hidden states and the experts chosen for each. "
            "Leave it out of target_parameters."
        )
    return hidden.flatten(0, -2), chosen.flatten(0, -2)


def _first_of(module: nn.Module) -> str:
    return next((name for name in _FIRST if name in module._parameters), "")
