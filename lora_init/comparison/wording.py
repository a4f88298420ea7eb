"""Numbers and lists of a comparison in words, the same in every table and sentence."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence


def number(value: float | None) -> str:
    """Write a loss or a difference of losses, small ones with two digits; a dash for what is not known.

    Example:
        >>> number(0.25), number(0.00012), number(None)
        ('0.2500', '0.00012', '–')
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if not value or abs(value) >= 0.001:
        return f"{value:.4f}"
    return f"{value:.{1 - math.floor(math.log10(abs(value)))}f}"


def signed(value: float | None) -> str:
    """Write a difference.

    Example:
        >>> signed(-0.25), signed(0.0), signed(None)
        ('−0.2500', '0.0000', '–')
    """
    return number(value) if not value else f"{'−' if value < 0 else '+'}{number(abs(value))}"


def rate_text(rate: float) -> str:
    """Write a learning rate.

    Example:
        >>> rate_text(0.0003), rate_text(0.001)
        ('3e-4', '1e-3')
    """
    digits, exponent = f"{rate:.6e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def count(n: int, noun: str) -> str:
    """Write a count with its noun.

    Example:
        >>> count(1, "run"), count(2, "run")
        ('1 run', '2 runs')
    """
    return f"{n} {noun}{'' if n == 1 else 's'}"


def join(words: Sequence[str]) -> str:
    """Join words as a sentence does.

    Example:
        >>> join(["a", "b", "c"])
        'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def seed_list(seeds: Collection[int]) -> str:
    """Write seeds with their noun.

    Example:
        >>> seed_list([0, 1])
        'seeds 0 and 1'
    """
    return f"seed{'' if len(seeds) == 1 else 's'} {join([str(seed) for seed in sorted(seeds)])}"
