"""How a comparison is put into words: numbers, the sentences of `templates/sentences.jinja`, and pages around them."""

from __future__ import annotations

import base64
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt

from lora_init.comparison.variants import Variant
from lora_init.rates.learning_rate import rate_text as rate_text


def number(value: float | None, sign: str = "") -> str:
    """Write a loss, or with the sign "+" a difference of losses; a dash for what is not known.

    Example:
        >>> number(0.25), number(-0.25, "+"), number(None)
        ('0.2500', '−0.2500', '–')
    """
    return "–" if value is None or math.isnan(value) else f"{value:{sign}.4f}".replace("-", "−")


def percent(part: float, sign: str = "") -> str:
    """Write a share in per cent, or with the sign "+" a difference in per cent.

    Example:
        >>> percent(0.0005), percent(-0.0123, "+"), percent(0.0005, "+")
        ('0.05 %', '−1.2 %', '+0.05 %')
    """
    value = 100 * part
    digits = 1 if abs(value) >= 1 else 2
    return f"{value:{sign}.{digits}f} %".replace("-", "−")


def share(part: float) -> str:
    """Write a share of something in whole per cent.

    Example:
        >>> share(0.79), share(-0.2)
        ('79 %', '−20 %')
    """
    return f"{100 * part:.0f} %".replace("-", "−")


def in_words(start: str) -> str:
    """Write the name of a start so that it says how it is run.

    Example:
        >>> in_words("eva"), in_words("eva+32-alpha+equal-parameters")
        ('eva', 'eva with lora_alpha 32 and as many parameters as random (eva+32-alpha+equal-parameters)')
    """
    variant = Variant.parse(start)
    settings = []
    if variant.alpha:
        settings.append(f"lora_alpha {variant.alpha}")
    if variant.equal_parameters:
        settings.append("as many parameters as random")
    if variant.batches:
        settings.append(f"statistics of {variant.batches} batches")
    if not settings:
        return start
    return f"{variant.base} with {' and '.join(settings)} ({start})"


def say(sentence: str, **facts: Any) -> str:
    """Fill facts into a macro of `sentences.jinja`."""
    macro = getattr(_environment(html=False).get_template("sentences.jinja").module, sentence)
    text = macro(**facts)
    return " ".join(text.split())  # a template has lines of its own, a sentence has none


def fill(content: dict[str, Any]) -> str:
    """Fill content into `report.md`."""
    text = _environment(html=False).get_template("report.md").render(content)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"  # parts that are left out leave gaps


def page_of(title: str, text: str, pictures: Mapping[str, bytes]) -> str:
    """Make one HTML page of Markdown that contains its pictures; `pictures` has SVG by the name in the text."""
    # No HTML of the text's own: names of starts and error texts are anybody's.
    body = MarkdownIt("commonmark", {"html": False, "xhtmlOut": False}).enable("table").render(text)
    for name, svg in pictures.items():
        data = base64.b64encode(svg).decode()
        body = body.replace(f'src="{name}"', f'src="data:image/svg+xml;base64,{data}"')
    return _environment(html=True).get_template("report.html").render(title=title, body=body)


@functools.cache
def _environment(html: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("lora_init.comparison"),
        autoescape=html,
        undefined=StrictUndefined,  # a fact that a sentence lacks is an error, not a gap
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number, "percent": percent, "share": share, "rate": rate_text, "in_words": in_words, "plain": _plain,
    }  # fmt: skip
    return environment


def _plain(text: str) -> str:
    """Keep Markdown from reading signs in text as its own."""
    return re.sub(r"([\\`*_\[\]<>|#$~])", r"\\\1", " ".join(text.split()))
