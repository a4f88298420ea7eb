"""Options that several commands have, and how their texts are read. Importing this file imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from typer import Option

from lora_init.errors import LoraInitError
from lora_init.layers.grid import PURPOSES
from lora_init.loading.examples import FORMATS


def unescape(template: str | None) -> str | None:
    r"""Read \n and \t as newline and tab, which are hard to type in a shell."""
    return None if template is None else template.replace("\\n", "\n").replace("\\t", "\t")


TrustRemoteCode = Annotated[
    bool,
    Option("--trust-remote-code", help="Run code that comes with the model. Read it first."),
]
if TYPE_CHECKING:
    _Format: TypeAlias = str
else:  # the registry decides what there is
    _Format = Literal[tuple(FORMATS)]
Quantize = Annotated[
    Literal["nf4", "fp4", "int8"] | None,
    Option(help="Quantize the base while it is loaded, as QLoRA does, by bitsandbytes."),
]
FloatWeights = Annotated[
    str | None, Option("--weights", help="The float model that a quantized MODEL was made of. Default: MODEL itself.")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Option(help="Type of the base weights. auto: the checkpoint's, or float32 where the CPU emulates that."),
]
WrittenAs = Literal["float32", "float16", "bfloat16"]
Device = Annotated[str, Option(help="Where the model runs: auto, cpu, cuda, cuda:1, mps.")]
Samples = Annotated[int, Option(min=1, help="Examples to draw at random, at most.")]
MaxLength = Annotated[int, Option(min=2, help="Tokens of an example at most.")]


@dataclass(frozen=True)
class Reading:
    """How data become examples: options of every command that reads data, and arguments of `load_batches`."""

    template: Annotated[
        str | None, Option(callback=unescape, help='Text of an example, as in "{passage}\\nQuestion: {question}?".')
    ] = None
    completion: Annotated[
        str | None, Option(callback=unescape, help="What the model should answer; --template is then the prompt.")
    ] = None
    format: Annotated[
        _Format | None, Option(help="How examples are written. Default: what the columns say.", show_default=False)
    ] = None
    subset: Annotated[str | None, Option(help="Configuration of a hub data set.")] = None
    split: Annotated[str, Option(help="Split of a hub data set or a folder.")] = "train"


def read_modules(text: str) -> str | list[str]:
    """Read names separated by commas as a list; what has a character that no name has is a regular expression."""
    keywords = ("all-linear", *PURPOSES)
    if text.lower().replace("_", "-") in keywords or re.search(r"[^\w.,\s-]", text):
        return text
    return read_names(text)


def read_names(text: str | None) -> list[str]:
    """Read names separated by commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def read_numbers(option: str, text: str, kind: type[float] | type[int]) -> list[Any]:
    """Read numbers separated by commas."""
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise LoraInitError(f"{option} {text!r}: expected {what} separated by commas.") from None
