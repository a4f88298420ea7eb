"""Which layers `target_modules` and its like select, by name and by kind, as PEFT reads them."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Mapping

from torch import nn

from lora_init.errors import LoraInitError


def is_conv1d(module: nn.Module) -> bool:
    """Tell transformers' `Conv1D`, a linear layer with a transposed weight."""
    # By name: transformers need not be imported.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Tell whether `"all-linear"` means this layer."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_in(name: str, modules: Collection[str]) -> bool:
    """Tell whether a layer is one of these modules or in one of them, by parts of its name, as PEFT does."""
    return any(f".{module}." in f".{name}." for module in modules)


def matches(patterns: str | Collection[str], name: str, argument: str) -> bool:
    """Tell whether a regular expression, or one of several names or endings, selects a layer.

    Raises:
        LoraInitError: The expression is none.
    """
    if isinstance(patterns, str):
        try:
            return re.fullmatch(patterns, name) is not None
        except re.error as error:
            raise LoraInitError(f"{argument}={patterns!r} is not a regular expression: {error}.") from None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def no_match(
    model: nn.Module, modules: Mapping[str, nn.Module], target_modules: str | Collection[str]
) -> LoraInitError:
    """Make the error for `target_modules` that select nothing, with the closest names that there are."""
    endings = Counter(name.rsplit(".", 1)[-1] for name, module in modules.items() if is_linear(module))
    if isinstance(target_modules, str):
        asked = [re.split(r"[^\w]+", target_modules.rstrip("$)"))[-1]]
    else:
        asked = [pattern.rsplit(".", 1)[-1] for pattern in target_modules]
    close = {match: None for word in asked for match in difflib.get_close_matches(word, list(endings), n=3, cutoff=0.4)}
    names = list(close) or [ending for ending, _ in endings.most_common(7)]
    shown = ", ".join(f"{name!r} ({endings[name]} layer{'s' * (endings[name] > 1)})" for name in names)
    hint = f"Closest names: {shown}." if close else f"Its linear layers are named: {shown or 'none'}."
    return LoraInitError(f"target_modules={target_modules!r} matches no layer of {type(model).__name__}. {hint}")
