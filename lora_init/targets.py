"""Which layers of a model can take an adapter: their names, kinds and widths."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from lora_init.errors import LoraInitError

ALL_LINEAR = "all-linear"

# PEFT adapts these too, but they do not multiply rows of activations by a matrix: nothing to decompose.
_WITHOUT_ROWS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
# For these tasks PEFT trains the head whole, under one of these names, and adapts nothing in it.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class Target:
    """One layer that takes an adapter.

    Attributes:
        name: Full name in the model, as in `model.named_modules()`.
        kind: Class of the layer: `"Linear"`, `"Conv1D"`, or a quantised linear class.
        in_features: Width d_in of the rows it receives.
        out_features: Width d_out of the rows it returns.
    """

    name: str
    kind: str
    in_features: int
    out_features: int

    def parameters(self, rank: int) -> int:
        """Count the trainable parameters of a LoRA pair of this rank."""
        return rank * (self.in_features + self.out_features)


@dataclass(frozen=True)
class Targets:
    """What `target_modules` selects in one model, in model order.

    Attributes:
        layers: Layers that can be initialised from their inputs, by name.
        unsupported: Layers that PEFT adapts but that have no input rows (embedding, convolution), name to kind.
            They keep PEFT's own initialisation.
    """

    layers: Mapping[str, Target]
    unsupported: Mapping[str, str]


def find_targets(
    model: nn.Module,
    target_modules: str | Collection[str] = ALL_LINEAR,
    exclude_modules: str | Collection[str] | None = None,
    task_type: str | None = None,
) -> Targets:
    """Select the layers that `peft.get_peft_model` would adapt, given the same arguments.

    Args:
        model: Any torch model.
        target_modules: `"all-linear"`, a regular expression that matches full names, or a collection of names or
            dot-separated name endings.
        exclude_modules: Regular expression or collection of names or endings to leave out.
        task_type: PEFT's task type. Those that train a head whole (`"SEQ_CLS"` and the like) leave it out here.

    Raises:
        LoraInitError: Nothing matches, or a matched module is of a kind that PEFT cannot adapt.

    Example:
        >>> from torch import nn
        >>> list(find_targets(nn.ModuleDict({"up": nn.Linear(2, 8), "down": nn.Linear(8, 2)}), ["up"]).layers)
        ['up']
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        selected = [name for name, module in modules.items() if _is_linear(module)]
        output = getattr(model, "get_output_embeddings", lambda: None)()
        selected = [name for name in selected if modules[name] is not output]
    else:
        selected = [name for name in modules if _matches(target_modules, name, "target_modules")]
        if not selected:
            raise _no_match(model, modules, target_modules)
    heads = HEADS.get(task_type or "", ())
    selected = [name for name in selected if not set(heads) & set(name.split("."))]
    if exclude_modules:
        selected = [name for name in selected if not _matches(exclude_modules, name, "exclude_modules")]
    if not selected:
        raise LoraInitError(
            f"target_modules={target_modules!r} with exclude_modules={exclude_modules!r} leaves no layer of "
            f"{type(model).__name__}. Exclude less, or target more."
        )
    layers: dict[str, Target] = {}
    unsupported: dict[str, str] = {}
    for name in selected:
        module = modules[name]
        if isinstance(module, _WITHOUT_ROWS):
            unsupported[name] = type(module).__name__
        else:
            layers[name] = _target(name, module)
    return Targets(layers, unsupported)


def _is_conv1d(module: nn.Module) -> bool:
    # transformers' Conv1D is a linear layer with a transposed weight. By name: transformers need not be imported.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _target(name: str, module: nn.Module) -> Target:
    kind = type(module).__name__
    if _is_conv1d(module):
        d_in, d_out = module.weight.shape  # type: ignore[misc]
        return Target(name, kind, int(d_in), int(d_out))
    # Quantised linear layers of every library keep these two attributes.
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return Target(name, kind, int(module.in_features), int(module.out_features))  # type: ignore[arg-type]
    raise LoraInitError(
        f"target_modules selects {name!r}, a {kind}, and an adapter needs a linear layer. "
        "Name the linear layers inside it, or use a pattern that ends in their names."
    )


def _matches(patterns: str | Collection[str], name: str, argument: str) -> bool:
    if isinstance(patterns, str):
        try:
            return re.fullmatch(patterns, name) is not None
        except re.error as error:
            raise LoraInitError(f"{argument}={patterns!r} is not a regular expression: {error}.") from None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _no_match(
    model: nn.Module, modules: Mapping[str, nn.Module], target_modules: str | Collection[str]
) -> LoraInitError:
    endings = Counter(name.rsplit(".", 1)[-1] for name, module in modules.items() if _is_linear(module))
    if isinstance(target_modules, str):
        asked = [re.split(r"[^\w]+", target_modules.rstrip("$)"))[-1]]
    else:
        asked = [pattern.rsplit(".", 1)[-1] for pattern in target_modules]
    close = {match: None for word in asked for match in difflib.get_close_matches(word, list(endings), n=3, cutoff=0.4)}
    names = list(close) or [ending for ending, _ in endings.most_common(7)]
    shown = ", ".join(f"{name!r} ({endings[name]} layer{'s' * (endings[name] > 1)})" for name in names)
    hint = f"Closest names: {shown}." if close else f"Its linear layers are named: {shown or 'none'}."
    return LoraInitError(f"target_modules={target_modules!r} matches no layer of {type(model).__name__}. {hint}")
