"""Options that several commands have, and how their texts are read. Importing this file imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

from typer import Argument, Option

from lora_init.adapters.init_config import HELP_OF_WEIGHTS, Sample
from lora_init.cli.console import busy
from lora_init.errors import LoraInitError
from lora_init.rates.training_length import BATCH_SIZE, TrainingLength

if TYPE_CHECKING:
    from lora_init.loading.models import LoadedModel, ModelSource

_MODEL = "Model"  # heading in the help
of_adapter = partial(Option, rich_help_panel="The adapter")


# An option that `init` has stands in a dataclass of `init_config`. A command that has single ones of them takes limits
# and help from there, so that they cannot come to differ.
def as_declared(kind: Any, name: str) -> dict[str, Any]:
    """Return limits and help of an option from the dataclass that declares it, for a command that has it alone.

    Where it stands in the help, and its default, are the command's own.
    """
    declared = dict(get_type_hints(kind, include_extras=True)[name].__metadata__[0])
    declared.pop("first", None)
    return declared


ModelName = Annotated[str, Argument(help="Model directory or hub id.", show_default=False)]
TrainedAdapter = Annotated[Path, Argument(help="Directory of a trained LoRA adapter.", show_default=False)]
BaseModel = Annotated[str | None, Option(help="Base model. Default: the one that the adapter names.")]
TrustRemoteCode = Annotated[
    bool, Option(rich_help_panel=_MODEL, help="Run code that comes with the model. Read it first.")
]
FloatWeights = Annotated[str | None, Option("--weights", rich_help_panel=_MODEL, help=HELP_OF_WEIGHTS)]
WrittenAs = Literal["float32", "float16", "bfloat16"]
MaxLength = Annotated[int, Option(rich_help_panel="Data", **as_declared(Sample, "max_length"))]


# Fields are annotated as in `init_config`, see there; `cli/commands.py` makes options of them.
@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the weights of a model are read."""

    title: ClassVar = _MODEL
    # A processor without arithmetic of a narrow type is much slower in it than in float32.
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        dict(help="Type of the base weights. auto: the checkpoint's, or float32 where the CPU emulates that."),
    ] = "auto"
    device: Annotated[str, dict(help="Where the model runs: auto, cpu, cuda, cuda:1, mps.")] = "auto"
    trust_remote_code: TrustRemoteCode = False

    def load(self, source: ModelSource, **more: Any) -> LoadedModel:
        """Read the weights of a model."""
        how = dict(vars(self))
        del how["trust_remote_code"]  # which `open_model` was given, before anything was read
        with busy(f"loading {source.name}"):
            return source.load(**how, **more)


@dataclass(frozen=True, kw_only=True)
class LoadingQuantized(Loading):
    """How they are read, or quantized while they are read."""

    quantize: Annotated[
        Literal["nf4", "fp4", "int8"] | None,
        dict(help="Quantize the base while it is loaded, as QLoRA does, by bitsandbytes."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long an adapter will be trained, which its learning rate depends on."""

    title: ClassVar = "The training to come"
    # None stands for what is known otherwise: from the data, or from the record of an adapter.
    steps: Annotated[
        int | None, dict(min=1, help="Steps that it will be trained for. Default: what --epochs are.", first=True)
    ] = None
    epochs: Annotated[float | None, dict(help="How often training sees each example. Default: once.", first=True)] = (
        None
    )
    train_batch_size: Annotated[
        int | None,
        dict(min=1, help=f"Examples in a step, over all GPUs and accumulated batches. Default: {BATCH_SIZE}."),
    ] = None

    def plan(self, rows: int | None) -> TrainingLength:
        """Complete it with the number of examples."""
        return TrainingLength.plan(rows, self.steps, self.epochs, self.train_batch_size or BATCH_SIZE)


# Weights of a base are loaded once, for all adapters of a command.
def one_base(bases: Iterable[str]) -> str:
    """Return the base that all adapters have."""
    named = sorted({*bases})  # in the same order in each message
    if len(named) > 1:
        raise LoraInitError(f"the adapters are of {', '.join(named)}. Take those of one base, or name --base.")
    return named[0]


def read_share(option: str, text: str) -> float:
    """Read a share such as 2% or 0.02."""
    number, unit = text, 1
    if text.endswith("%"):
        number, unit = text.removesuffix("%"), 100
    try:
        return float(number) / unit
    except ValueError:
        raise LoraInitError(f"{option} {text!r}: expected a share such as 2% or 0.02.") from None


def read_numbers(option: str, text: str, kind: type[float] | type[int]) -> list[Any]:
    """Read numbers separated by commas."""
    # `int` and `float` allow for spaces around a number, and refuse an empty word.
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise LoraInitError(f"{option} {text!r}: expected {what} separated by commas.") from None
