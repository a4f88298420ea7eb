"""The options of `initialize` and `lora-init init`, declared once: a dataclass for each topic, such as data or ranks.

Below the entrances the dataclasses travel whole: the function that reads data takes a `Reading` and a `Sample`. The
annotation of a field describes its option on the command line; a field without one exists in Python only. Importing
this file imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from functools import cache
from inspect import signature
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    ParamSpec,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from lora_init.errors import LoraInitError, check_number, did_you_mean, is_number, is_whole
from lora_init.layers.grid import PURPOSES
from lora_init.loading.examples import BATCH_SIZE, FORMATS, MAX_LENGTH, SAMPLES
from lora_init.planning.policies import RHO
from lora_init.starts.starts import DEFAULT, STARTS, Start, find_start

if TYPE_CHECKING:
    _Format: TypeAlias = str  # mypy takes no computed Literal
else:  # the registry decides what there is
    _Format = Literal[tuple(FORMATS)]

RANK = 16
SCALING = 2.0  # lora_alpha / rank where nothing else is asked for, as most of PEFT's users have it
# How --help writes that an option takes a list, or data: each is given once, see `cli.help`.
LIST = "A,B,..."
DATA = "DATA"
HELP_OF_WEIGHTS = "The float model that a quantized MODEL was made of. Default: MODEL itself."
_BY_DEFAULT = find_start(DEFAULT)
# Of `takes`: the parameters that are shown, and what the function returns.
_P = ParamSpec("_P")
_R = TypeVar("_R")
_hints = cache(get_type_hints)  # what kind of value each field of a dataclass takes

# The keys of an annotation, which `cli` reads: `help`; `min`, the smallest number, which `Checked` holds in Python,
# too; `kind`, the type on the command line where it is another one than in Python; `callback`, which reads the text;
# `first`, for the options that help shows before all others; `default` and `show_default` as typer has them.


def unescape(template: str | None) -> str | None:
    r"""Read \n and \t as newline and tab, which are hard to type in a shell."""
    return None if template is None else template.replace("\\n", "\n").replace("\\t", "\t")


def read_modules(text: str | None) -> str | list[str] | None:
    """Read names separated by commas as a list; what has a character that no name has is a regular expression."""
    if not text:
        return None
    is_keyword = text.lower().replace("_", "-") in ("all-linear", *PURPOSES)
    if is_keyword or re.search(r"[^\w.,\s-]", text):
        return text
    return read_names(text)


def read_names(text: str | None) -> list[str]:
    """Read names separated by commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


@cache
def _least(part: Any) -> dict[str, tuple[bool, float]]:
    """Find which fields of a dataclass have a smallest value, and whether they are whole numbers."""
    plain, annotated = _hints(part), get_type_hints(part, include_extras=True)
    least = {}
    for name, hint in plain.items():
        option = getattr(annotated[name], "__metadata__", [{}])[0]  # a field without one exists in Python only
        if "min" in option:
            takes_float = float in (hint, *get_args(hint))  # get_args for `float | None`
            least[name] = (not takes_float, option["min"])
    return least


# How a message calls a kind of value; texts are all that has a choice.
_IN_WORDS = {
    str: "a text", Literal: "a text", Path: "a path", int: "a whole number", float: "a number", bool: "True or False",
    Callable: "a function", Sequence: "a list of texts", Collection: "a list of texts",
}  # fmt: skip


def _is_a(value: Any, hint: Any) -> bool:
    """Return whether a value is of one kind; numbers of numpy are numbers."""
    kind = get_origin(hint) or hint
    if kind in (Sequence, Collection):  # an array has what a collection needs, but `==` makes no bool of it
        is_list = isinstance(value, (Sequence, Set)) and not isinstance(value, str)
        return is_list and all(isinstance(one, str) for one in value)
    if kind in (int, float):
        return is_whole(value) if kind is int else is_number(value)
    return isinstance(value, {Literal: str, Path: PathLike}.get(kind, kind))


def _check_kind(name: str, value: Any, hint: Any) -> None:
    """Refuse a value of another kind than those that an annotation names."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if not any(_is_a(value, kind) for kind in kinds):
        words = [_IN_WORDS[get_origin(kind) or kind] for kind in kinds if kind is not NoneType]
        raise LoraInitError(f"{{{name}}}, expected {' or '.join(words)}.", **{name: value})


class Checked:
    """Refuses numbers below the declared minimum, as the command line does, and values of another kind.

    Each number becomes a plain one: one of numpy, or a fraction, is no JSON, and in 16 bits it loses digits.
    """

    def __post_init__(self) -> None:
        part: Any = type(self)
        for name, (whole, least) in _least(part).items():
            value = getattr(self, name)
            if value is not None:  # None stands for a default that is found later
                check_number(name, value, least, whole=whole)
        for option in fields(part):
            value = getattr(self, option.name)
            if value is not None or option.default not in ("", ()):  # None is nothing, as PEFT has it for a list
                _check_kind(option.name, value, _hints(part)[option.name])
            if is_number(value):
                object.__setattr__(self, option.name, int(value) if is_whole(value) else float(value))


@dataclass(frozen=True, kw_only=True)
class Reading(Checked):
    """How data become examples: options of every command that reads data, and arguments of `load_batches`."""

    title: ClassVar = "Data"
    template: Annotated[
        str | None,
        dict(callback=unescape, help='Text of an example, as in "{passage}\\nQuestion: {question}?".', first=True),
    ] = None
    completion: Annotated[
        str | None,
        dict(callback=unescape, help="What the model should answer; --template is then the prompt.", first=True),
    ] = None
    format: Annotated[
        _Format | None, dict(help="How examples are written. Default: what the columns say.", show_default=False)
    ] = None
    subset: Annotated[str | None, dict(help="Configuration of a hub data set.")] = None
    split: Annotated[str, dict(help="Split of a hub data set or a folder.")] = "train"


@dataclass(frozen=True, kw_only=True)
class Sample(Checked):
    """Which examples are read, and as what: the other arguments of `load_batches`. None is for what fits the model."""

    title: ClassVar = "Data"
    label: Annotated[
        str | None, dict(help="Column of the class: an adapter and a head for a classifier.", first=True)
    ] = None
    samples: Annotated[int | None, dict(min=1, help="Examples to draw at random, at most.")] = SAMPLES
    batch_size: Annotated[int, dict(min=1, help="Examples in a batch.")] = BATCH_SIZE
    max_length: Annotated[int, dict(min=2, help="Tokens of an example at most.")] = MAX_LENGTH
    offset: int = 0
    seq2seq: bool | None = None
    needs_labels: bool | None = None
    known_classes: Sequence[str] | None = None


@dataclass(frozen=True)
class Ranks(Checked):
    """How much rank there is, and how far it may move between layers."""

    title: ClassVar = "Layers and ranks"
    rank: Annotated[int, dict(min=1, help="Average rank of a layer.", first=True)] = RANK
    rho: Annotated[float, dict(min=1.0, help="At most rho x rank in one layer; 1 gives all the same.")] = RHO


@dataclass(frozen=True, kw_only=True)
class Layers(Checked):
    """Which layers take an adapter: arguments of `find_targets`."""

    title: ClassVar = "Layers and ranks"
    target_modules: Annotated[
        str | Collection[str],
        dict(
            kind=str, metavar=LIST, callback=read_modules,
            help="all-linear, attention, mlp, cross-attention, names, or a regular expression for full names.",
        ),
    ] = "all-linear"  # fmt: skip
    exclude_modules: Annotated[
        str | Collection[str] | None,
        dict(
            kind=str | None,
            metavar=LIST,
            callback=read_modules,
            help="What to leave out: attention, mlp, cross-attention, names, or a regular expression.",
        ),
    ] = None
    target_parameters: Annotated[
        Collection[str] | None,
        dict(
            kind=str | None,
            metavar=LIST,
            callback=lambda text: read_names(text) or None,
            help="Names of fused parameters of experts.",
        ),
    ] = None
    task_type: Annotated[str | None, dict(help="PEFT's task type. Default: what the checkpoint is for.")] = None


@dataclass(frozen=True, kw_only=True)
class Shape(Checked):
    """The form of the adapter: arguments of `build_adapter`, and fields of an `AdapterInit`.

    The record of an adapter directory keeps those that a LoraConfig has no field for.
    """

    title: ClassVar = "The adapter"
    # The fields that a LoraConfig has, too, under the same names.
    of_peft: ClassVar = ("lora_alpha", "use_rslora", "use_dora", "lora_dropout", "modules_to_save")
    lora_alpha: Annotated[
        float | None,
        dict(help="The adapter is scaled by lora_alpha / rank. Default: twice the rank."),
    ] = None
    use_rslora: Annotated[bool, dict(help="Scale by lora_alpha / sqrt(rank).")] = False
    use_dora: Annotated[bool, dict(help="Add DoRA's magnitudes.")] = False
    lora_dropout: float = 0.0
    modules_to_save: Annotated[
        Sequence[str],
        dict(
            kind=str | None,
            metavar=LIST,
            callback=read_names,
            help="Modules to train whole, such as lm_head.",
            default=None,
        ),
    ] = ()
    freeze_a: Annotated[bool, dict(help="Train B alone: see the adapter's README.md.")] = False
    whiten: Annotated[bool, dict(help="With eva: scale each row by its variance.")] = False
    unit_rows: Annotated[bool, dict(help="Leave the rows of A at length one, as PEFT's EVA does.")] = False
    gamma: Annotated[
        float | None,
        dict(
            help="Where B is not zero: larger is a smaller step. Default: searched"
            f"{''.join(f'; {one.name} {one.gamma:g}' for one in STARTS if one.corrects_base)}."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Correction(Checked):
    """How a quantized base is corrected: by which float model, and whether the loss must fall."""

    title: ClassVar = "The adapter"
    weights: Annotated[str | Path | None, dict(kind=str | None, help=HELP_OF_WEIGHTS)] = None
    unchecked: Annotated[
        bool, dict(help="With qera: write it even if the loss on examples set aside does not fall.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class PassOptions(Checked):
    """How the pass over the data is made: the other arguments of `collect`."""

    title: ClassVar = "The pass over the data"
    gradients: Annotated[bool, dict(help="Run backward passes, too, for later use.")] = False
    center: Annotated[bool, dict(help="Subtract the mean: PCA. Without: the second moment.")] = True
    token_mask: Annotated[
        Literal["attention", "labels"], dict(help="Count all tokens but padding, or those with a label.")
    ] = "attention"
    max_batches: Annotated[int, dict(min=1, help="Batches at most; fewer if the start would not change.")] = 64
    skip_bad_batches: Annotated[int, dict(min=0, help="Batches that may fail, and are then left out.")] = 0
    seed: Annotated[int, dict(min=0, help="Seed of the sample and of all else that is random.")] = 0
    tolerance: float | None = None
    forward: Callable[..., Any] | None = None
    loss: Callable[..., Any] | None = None
    data: str = ""
    progress: bool | None = None
    statistics: str | Path | None = None
    overwrite: bool = False


# Dataclasses take the fields of their bases from the last to the first: `rank` and `rho` come first, which alone may be
# passed by position.
@dataclass(frozen=True)
class Options(PassOptions, Correction, Shape, Layers, Sample, Reading, Ranks):
    """Every option as an argument of one call, for those who declare what `initialize` takes."""


@dataclass(frozen=True)
class InitConfig:
    """The options of one initialization, sorted by topic; those that were not given have their defaults."""

    method: str | None = None  # None for the start that is recommended
    start: Start = _BY_DEFAULT
    reading: Reading = Reading()
    sample: Sample = Sample()
    ranks: Ranks = Ranks()
    layers: Layers = Layers()
    shape: Shape = Shape()
    correction: Correction = Correction()
    run: PassOptions = PassOptions()
    given: Mapping[str, Any] = field(default_factory=dict)  # as it was, which a LoraConfig must not contradict

    @property
    def needs_gradient(self) -> bool:
        """Whether the pass runs backward, too."""
        return self.run.gradients or self.start.needs_gradient

    @property
    def measures(self) -> bool:
        """Whether the start needs a loss, which is measured on held-out examples."""
        return self.start.measures(self.shape.gamma)

    def _parts(self) -> Iterator[tuple[str, Any]]:
        return ((name, value) for name, value in vars(self).items() if name not in ("method", "start", "given"))

    def with_options(self, **changes: Any) -> InitConfig:
        """Return a copy with some options changed, each in the part that has it."""
        parts = {}
        for name, part in self._parts():
            own = {option.name: changes[option.name] for option in fields(part) if option.name in changes}
            if own:  # the others were checked as they were made
                parts[name] = replace(part, **own)
        return replace(self, **parts)

    @classmethod
    def from_arguments(cls, taker: str, method: str | None = None, **given: Any) -> InitConfig:
        """Sort the keywords of a function into parts; refuse those that are in none, with the nearest one."""
        known = {option.name for option in fields(Options)}
        for name in given:
            if name not in known:
                # For the hint alone: arguments of `initialize` beside the options.
                named = sorted({*known, "tokenizer", "config", "adapter_name", "learning_rate"})
                raise LoraInitError(f"{taker} has no argument {name}=. {did_you_mean(name, named)}")
        return cls(method=method, given=given).with_options(**given)


# A function that takes dozens of options hands them on as **options. Written out they would stand twice, here and in
# its signature, and drift apart. For mypy and editors a ParamSpec takes the parameters of the dataclass; for help() and
# `inspect` the signature is set, with annotations without what the command line needs.
def takes(arguments: Callable[_P, Any]) -> Callable[[Callable[..., _R]], Callable[_P, _R]]:
    """Show mypy, editors and help() the fields of a dataclass, the `Options` among them, as what a function takes."""

    def shown(function: Callable[..., _R]) -> Callable[_P, _R]:
        declared, plain = signature(arguments), get_type_hints(Options)
        parameters = []
        for parameter in declared.parameters.values():
            parameters.append(parameter.replace(annotation=plain.get(parameter.name, parameter.annotation)))
        returned = signature(function).return_annotation
        function.__signature__ = declared.replace(  # type: ignore[attr-defined]
            parameters=parameters, return_annotation=returned
        )
        return function

    return shown
