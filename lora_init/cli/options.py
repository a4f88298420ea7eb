"""Options that several commands have, and how their texts are read. Importing this file imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from typer import Option

from lora_init.errors import LoraInitError

_MODEL = "Model"  # heading in the help
TrustRemoteCode = Annotated[
    bool,
    Option("--trust-remote-code", rich_help_panel=_MODEL, help="Run code that comes with the model. Read it first."),
]
Quantize = Annotated[
    Literal["nf4", "fp4", "int8"] | None,
    Option(rich_help_panel=_MODEL, help="Quantize the base while it is loaded, as QLoRA does, by bitsandbytes."),
]
FloatWeights = Annotated[
    str | None,
    Option(
        "--weights",
        rich_help_panel=_MODEL,
        help="The float model that a quantized MODEL was made of. Default: MODEL itself.",
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Option(
        rich_help_panel=_MODEL,
        help="Type of the base weights. auto: the checkpoint's, or float32 where the CPU emulates that.",
    ),
]


WrittenAs = Literal["float32", "float16", "bfloat16"]
Device = Annotated[str, Option(rich_help_panel=_MODEL, help="Where the model runs: auto, cpu, cuda, cuda:1, mps.")]
Samples = Annotated[int, Option(rich_help_panel="Data", min=1, help="Examples to draw at random, at most.")]
MaxLength = Annotated[int, Option(rich_help_panel="Data", min=2, help="Tokens of an example at most.")]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the weights of a model are read."""

    dtype: Dtype = "auto"
    device: Device = "auto"
    trust_remote_code: TrustRemoteCode = False
    quantize: Quantize = None


def read_numbers(option: str, text: str, kind: type[float] | type[int]) -> list[Any]:
    """Read numbers separated by commas."""
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise LoraInitError(f"{option} {text!r}: expected {what} separated by commas.") from None
