"""Text from a command line -> arguments of `allocate_ranks`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_init.errors import LoraInitError

BUDGETS = ("rank", "total_rank", "parameters", "fraction", "megabytes", "variance")
_WHOLE = ("rank", "min_rank", "max_rank", "multiple_of")
_NUMBER = ("fraction", "megabytes", "variance", "rho")
_TEXT = ("total_rank", "parameters", "policy", "dtype", "coverage")  # counts such as 2.5M are read by allocate_ranks
_LIMITS = ("rank", "min_rank", "max_rank", "multiple_of", "allowed_ranks")


def read_value(key: str, text: str, where: str) -> Any:
    """Read the value of one argument.

    Raises:
        LoraInitError: It is not what the argument takes.
    """
    try:
        if key in _WHOLE:
            return int(text)
        if key in _NUMBER:
            return float(text)
        if key == "allowed_ranks":
            return tuple(int(part) for part in text.split("/"))
    except ValueError:
        kind = "a number" if key in _NUMBER else "a whole number, or several with / between" if "/" in text else "whole"
        raise LoraInitError(f"{where}: {key}={text!r} is not {kind}.") from None
    return text


def read_overrides(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read limits for some layers from texts such as `"*.down_proj:max_rank=8,multiple_of=4"`.

    Raises:
        LoraInitError: A text is not of this form.

    Example:
        >>> read_overrides(["*.down_proj:max_rank=8", "lm_head:allowed_ranks=8/16"])
        {'*.down_proj': {'max_rank': 8}, 'lm_head': {'allowed_ranks': (8, 16)}}
    """
    overrides: dict[str, dict[str, Any]] = {}
    for text in texts:
        pattern, colon, rest = text.partition(":")
        if not colon or not pattern.strip():
            raise LoraInitError(f"--override {text!r}: write it like '*.down_proj:max_rank=8'.")
        overrides.setdefault(pattern.strip(), {}).update(_pairs(rest, _LIMITS, f"--override {text!r}"))
    return overrides


def read_variants(texts: Sequence[str], base: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Read what to compare with: changes of `base`, such as `"uniform"` or `"parameters=1M,policy=cost-aware"`.

    A word alone is a policy. A budget takes the place of the one in `base`.

    Raises:
        LoraInitError: A text is not of this form.

    Example:
        >>> read_variants(["uniform", "parameters=1M"], {"rank": 8, "policy": "eva"})
        {'uniform': {'rank': 8, 'policy': 'uniform'}, 'parameters=1M': {'policy': 'eva', 'parameters': '1M'}}
    """
    variants = {}
    for text in texts:
        full = text if "=" in text else f"policy={text}"
        change = _pairs(full, (*_WHOLE, *_NUMBER, *_TEXT, "allowed_ranks"), f"--compare {text!r}")
        kept = {k: v for k, v in base.items() if k not in BUDGETS or not any(budget in change for budget in BUDGETS)}
        variants[text] = {**kept, **change}
    return variants


def _pairs(text: str, keys: Sequence[str], where: str) -> dict[str, Any]:
    pairs = {}
    for part in text.split(","):
        key, equals, value = (side.strip() for side in part.partition("="))
        key = key.replace("-", "_")
        if not equals or not value:
            raise LoraInitError(f"{where}: {part.strip()!r} is not of the form key=value.")
        if key not in keys:
            raise LoraInitError(f"{where}: {key!r} is unknown. Choose from {', '.join(keys)}.")
        pairs[key] = read_value(key, value, where)
    return pairs
