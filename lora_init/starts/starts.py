"""The registry of starts: all that is known of one stands in its `Start`. Importing this file imports no torch.

A start is a named initialization of an adapter. Everything else asks the registry: what builds adapters, the command
line and its help, comparisons, the guard of `export`, the table in the documentation. To add a start, add a `Start` to
`STARTS`; or publish a package of your own with an entry point of the group `lora_init.starts` that refers to one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from inspect import signature
from typing import Any

from lora_init.errors import LoraInitError, did_you_mean
from lora_init.packages import Group, package_of
from lora_init.planning.policies import POLICIES
from lora_init.starts.providers import PROVIDERS

_THEIRS = Group("lora_init.starts", "start")  # starts of other packages, by their entry points
_INITIALIZERS = "lora_init.starts.initializers"  # by its name, since importing it would import torch


@dataclass(frozen=True)
class Start:
    """A start that a function computes layer by layer, with all settings that depend on it. Other kinds are below.

    Attributes:
        name: The name that selects it.
        summary: One line for help and tables.
        function: Computes the start of one layer: A, [rank, d_in]; or A and B, [d_out, rank], where B is not zero. Its
            parameters are, by their names, those that it needs of `providers.PROVIDERS`. Given as `"module:name"`, it
            is imported when it is first used. None for kinds that are made in another way.
        directions: What of the statistics bounds the rank: a spectrum, whose components are counted, or a number.
            None if any rank can be had.
        b_is_zero: Whether B is zero, so that the adapter changes nothing until it is trained. False where the function
            returns A and B.
        corrects_base: Whether s B A is subtracted from the base weights.
        gamma: Default of the number that B A is divided by, for starts whose step has a size of its own: the best is
            searched by `find_step_size`, from this one on, unless the base is corrected. Of no effect where B is zero.
        one_rank: Whether all layers must have the rank that was collected for.
        matched: Whether A has a size of its own on purpose. Else, where B is zero, `build_adapter` gives A x the size
            that it has with `random`.
        package: Name and version of the package that it comes from; empty for our own.
        takes: The names of the function's parameters, as ours have them: importing the functions would import torch.
            Default: read from the function.

    Raises:
        LoraInitError: A number is not finite and positive.
    """

    name: str
    summary: str
    function: Callable[..., Any] | str | None = None
    directions: Callable[[Any, Any], Any] | None = None
    b_is_zero: bool = True
    corrects_base: bool = False
    gamma: float | None = None
    one_rank: bool = False
    matched: bool = False
    package: str = ""
    takes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.gamma is not None and not 0.0 < self.gamma < math.inf:
            raise LoraInitError(f"{self}: gamma={self.gamma!r}, expected a positive number.")

    @property
    def needed(self) -> frozenset[str]:
        """What must be at hand before: `"inputs"`, `"gradients"`, `"errors"`, `"weights"`, a `"bank"`."""
        # Not declared a second time: it follows from what the function takes.
        return frozenset(PROVIDERS[name].needs for name in self.arguments) - {"nothing"}

    @property
    def changes_base(self) -> bool:
        """Whether the base weights are others with this start: they give up B A, or a part of themselves."""
        return self.corrects_base

    @property
    def changes_output(self) -> bool:
        """Whether the start changes the model's output: B is not zero, and the base weights stay."""
        return not self.b_is_zero and not self.changes_base

    @property
    def takes_step(self) -> bool:
        """Whether the size of its step is searched, by the loss on batches that are set aside."""
        return self.changes_output and self.gamma is not None

    def measures(self, gamma: float | None) -> bool:
        """Return whether a loss is measured: to find the size of a step without `gamma`, or to check a correction."""
        return self.needs_error or (self.takes_step and gamma is None)

    @property
    def needs_gradient(self) -> bool:
        """Whether it needs backward passes."""
        return "gradients" in self.needed

    @property
    def needs_error(self) -> bool:
        """Whether it corrects what quantization took from the weights."""
        return "errors" in self.needed

    def corrects(self, is_quantized: bool) -> bool:
        """Return whether it corrects a base that was quantized, of a base that is, or is not."""
        return self.needs_error

    @property
    def init_options(self) -> tuple[str, ...]:
        """With which options `lora-init init` makes it; empty if it does not."""
        return ("--method", self.name)

    @functools.cached_property
    def arguments(self) -> tuple[str, ...]:
        """The names of the parameters of its function."""
        if not self.function:
            return ()
        return self.takes or tuple(signature(load_function(self.function)).parameters)

    def __str__(self) -> str:
        return f"start {self.name!r}" + (f" ({self.package})" if self.package else "")

    def compute(self, **known: Any) -> Any:
        """Call the function with the arguments that it names. What it raises passes."""
        assert self.function is not None
        return load_function(self.function)(**{name: known[name] for name in self.arguments})


# The kinds of start below have no function: they are made of a whole model, by PEFT, from a bank, or not at all. Where
# an answer is the same for all of a kind, it stands here as an attribute without an annotation, which dataclasses take
# for no field, in place of the property of `Start`.
@dataclass(frozen=True)
class PeftStart(Start):
    """A start that PEFT makes of a whole model, under this name; it takes a part of each weight into A and B."""

    b_is_zero: bool = False
    needed: frozenset[str] = frozenset({"weights"})
    linear_only: bool = False  # whether it is for `nn.Linear` alone
    corrects_quantized: bool = False  # whether it has a form that corrects a quantized base, without data
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)  # what else its LoraConfig has
    changes_base = True
    init_options = ()

    def corrects(self, is_quantized: bool) -> bool:
        """Return whether it corrects a base that was quantized."""
        return is_quantized and self.corrects_quantized


@dataclass(frozen=True)
class BankWay(Start):
    """A start from adapters of other tasks, made of a whole model by a function of `bank.start.WAYS`."""

    b_is_zero: bool = False
    gamma: float | None = 1.0  # the adapter at its full size
    needed = frozenset({"bank"})

    @property
    def way(self) -> str:
        """How it uses a bank's adapters, by the word of `--by`."""
        return self.name.removeprefix("bank-")

    def measures(self, gamma: float | None) -> bool:
        """Return True: a mixture is weighed by the loss, and every adapter is checked by it."""
        return True

    @property
    def init_options(self) -> tuple[str, ...]:
        """With which options `lora-init init` makes it."""
        return ("--method", FROM_BANK, "--by", self.way, "--bank", "BANK")


@dataclass(frozen=True)
class FullTraining(Start):
    """No adapter: all weights are trained."""

    b_is_zero: bool = False
    changes_base = True
    init_options = ()


def load_function(function: Callable[..., Any] | str) -> Callable[..., Any]:
    """Return a function; one that is given as "module:name" is imported."""
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    loaded: Callable[..., Any] = getattr(import_module(module), name)
    return loaded


def _triplets(spectrum: Any, gradient: Any) -> int:
    """Count the singular triplets of the mean gradient, for `directions` of a start that is made of them."""
    return len(gradient.singular_values)


RANDOM, FULL, FROM_BANK = "random", "full", "from-bank"
# In the order of help and of tables: those that leave the model as it is, those that change it, PEFT's, a bank's.
STARTS: tuple[Start, ...] = (
    Start(
        "eva",
        "the principal directions of what the layer reads (EVA, arXiv 2410.07170)",
        function=f"{_INITIALIZERS}:eva",
        takes=("spectrum", "rank", "generator", "whiten"),
        directions=lambda spectrum, gradient: spectrum,
    ),
    Start(
        RANDOM,
        "PEFT's default: Kaiming uniform",
        function=f"{_INITIALIZERS}:random",
        takes=("width", "rank", "generator"),
        matched=True,
    ),
    Start(
        "random-scaled",
        "random, with as much energy in A x as with eva in rows of length one",
        function=f"{_INITIALIZERS}:random_scaled",
        takes=("spectrum", "rank", "generator"),
        matched=True,
    ),
    Start(
        "gaussian",
        'PEFT\'s init_lora_weights="gaussian"',
        function=f"{_INITIALIZERS}:gaussian",
        takes=("width", "rank", "generator"),
        matched=True,
    ),
    Start(
        "orthogonal",
        "random orthonormal directions: eva without the data",
        function=f"{_INITIALIZERS}:orthogonal",
        takes=("width", "rank", "generator"),
    ),
    Start(
        "eva-grad",
        "the directions of the inputs, weighted by how much the loss depends on them",
        function=f"{_INITIALIZERS}:eva_grad",
        takes=("gradient", "rank"),
        directions=lambda spectrum, gradient: gradient.weighted,
    ),
    Start(
        "grad-a",
        "the right singular vectors of the mean gradient",
        function=f"{_INITIALIZERS}:grad_a",
        takes=("gradient", "rank"),
        directions=_triplets,
    ),
    Start(
        "natural-gradient",
        "the right singular vectors of a step along the natural gradient",
        function=f"{_INITIALIZERS}:natural_gradient",
        takes=("spectrum", "gradient", "rank"),
        directions=_triplets,
    ),
    Start(
        "natural-gradient-step",
        "a step along the natural gradient; B is not zero",
        function=f"{_INITIALIZERS}:natural_gradient_step",
        takes=("spectrum", "gradient", "rank"),
        directions=_triplets,
        b_is_zero=False,
        gamma=1024.0,
    ),
    Start(
        "lora-ga",
        "LoRA-GA (arXiv 2407.05000); B is not zero, and s B A is subtracted from the base weights",
        function=f"{_INITIALIZERS}:lora_ga",
        takes=("gradient", "rank"),
        b_is_zero=False,
        corrects_base=True,
        gamma=16.0,  # which is not searched: the base is corrected, so no loss tells steps apart before training
        one_rank=True,
    ),
    Start(
        "lora-one",
        "LoRA-One (arXiv 2502.01235): a step down the gradient; B is not zero",
        function=f"{_INITIALIZERS}:lora_one",
        takes=("gradient", "rank"),
        directions=_triplets,
        b_is_zero=False,
        gamma=1024.0,
    ),
    Start(
        "qera",
        "of a quantized base: what quantization took from the weights, where the data are (QERA, arXiv 2410.06040)",
        function=f"{_INITIALIZERS}:qera",
        takes=("spectrum", "error", "rank", "scaling", "generator"),
        b_is_zero=False,
    ),
    PeftStart("pissa", "PEFT's PiSSA (arXiv 2404.02948)"),
    PeftStart("olora", "PEFT's OLoRA (arXiv 2406.01775)", linear_only=True),
    PeftStart("corda", "PEFT's CorDA (arXiv 2406.05223)", needed=frozenset({"inputs"})),
    PeftStart(
        "loftq",
        "PEFT's LoftQ (arXiv 2310.08659), which rounds the base to 4 bits",
        linear_only=True,
        corrects_quantized=True,
        settings={"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    ),
    BankWay("bank-nearest", "the adapter of the nearest task"),
    BankWay("bank-mixture", "the mixture that lowers the loss most"),
    BankWay("bank-generated", "what the bank's generator makes"),
    BankWay("bank-mean", "the mean of all adapters, a control"),
    FullTraining(FULL, "no adapter: all weights are trained"),
)
# What is recommended, see docs/which-start.md; and the start that corrects a quantized base by data.
DEFAULT, DEFAULT_FOR_CLASSES, CORRECTION = "eva", "natural-gradient", "qera"
# How a bank's adapters are used, by the word of `--by`, the default first.
BANK_WAYS = {start.way: start for start in STARTS if isinstance(start, BankWay)}
BANK_WAY = next(iter(BANK_WAYS))
_OWN = {start.name: start for start in STARTS}


@dataclass(frozen=True)
class Recipe:
    """A start with the choices that a comparison makes for it."""

    start: Start  # what A and B are
    rho: float  # at most rho x rank in one layer
    policy: str = "eva"  # what ranks compete by
    center: bool = True  # whether the statistics are centered
    freeze_a: bool = False  # whether A stays as it is in training
    resized: bool = True  # whether, where ranks are moved, it is also run with as many parameters as random has

    @property
    def moves_ranks(self) -> bool:
        """Whether layers get unequal ranks."""
        return self.rho > 1.0

    @property
    def needs_gradient(self) -> bool:
        """Whether the statistics must have gradients, for the start or for its ranks."""
        return self.start.needs_gradient or POLICIES[self.policy].needs_gradient

    @property
    def is_made_by_init(self) -> bool:
        """Whether the command `init` has options for it: it allocates by explained variance."""
        return self.policy == "eva"

    @property
    def reads_data(self) -> bool:
        """Whether statistics are needed, for the start or for its ranks."""
        return bool(self.start.needed & {"inputs", "gradients"}) or self.moves_ranks


# Names of runs, which reports keep, so that an old name goes on meaning the same.
_VARIATIONS = {
    "eva-rho1": Recipe(_OWN["eva"], rho=1.0),  # what it was called before that was the default
    "eva-rho2": Recipe(_OWN["eva"], rho=2.0),
    "eva-uncentred": Recipe(_OWN["eva"], rho=2.0, center=False),
    "eva-rho1-uncentred": Recipe(_OWN["eva"], rho=1.0, center=False),
    "eva-ranks": Recipe(_OWN[RANDOM], rho=2.0, resized=False),  # a control, of eva
    "gradient-ranks": Recipe(_OWN[RANDOM], rho=2.0, policy="gradient"),
    "eva-frozen-a": Recipe(_OWN["eva"], rho=2.0, freeze_a=True),
    "random-frozen-a": Recipe(_OWN[RANDOM], rho=1.0, freeze_a=True),
    "natural-gradient-frozen-a": Recipe(_OWN["natural-gradient"], rho=1.0, freeze_a=True),
}
_TAKEN = {*_OWN, *_VARIATIONS, FROM_BANK}  # names that a start of another package cannot have


def start_names() -> tuple[str, ...]:
    """Return the names of all starts, other packages' last. None of these is imported for it."""
    return (*_OWN, *(name for name in _THEIRS.entries if name not in _TAKEN))


def buildable() -> list[str]:
    """Return the names of the starts that `build_adapter` makes."""
    # Starts of other packages have a function, or loading them is refused.
    return [name for name in start_names() if name not in _OWN or _OWN[name].function]


def compared_names() -> tuple[str, ...]:
    """Return the names of all that a comparison can run: the starts, and some of them with other choices."""
    return (*start_names(), *_VARIATIONS)


def find_start(name: str) -> Start:
    """Look a start up; warn of one of a package that has the name of one of ours, which counts."""
    if name in _TAKEN:
        _THEIRS.warn_of(name)
    if name in _OWN:
        return _OWN[name]
    if name not in start_names():
        raise LoraInitError(f"start {name!r} is unknown. {did_you_mean(str(name), start_names())}")
    return _load(name)


def find_recipe(name: str) -> Recipe | None:
    """Look up how a comparison makes a start; None for those that `build_adapter` does not make."""
    if name in _VARIATIONS:
        _THEIRS.warn_of(name)
        return _VARIATIONS[name]
    start = find_start(name)
    return Recipe(start, rho=1.0) if start.function else None


def changes_base(name: str) -> bool:
    """Return whether a start changes the base weights, by the name that a file has, such as PEFT's `pissa_niter_4`."""
    # By its beginning: PEFT's names may have a suffix. Full training changes the base, but has no adapter and no file.
    began = name.lower().replace("_", "-")
    return any(began.startswith(start.name) for start in STARTS if start.changes_base and start.name != FULL)


@functools.cache
def _load(name: str) -> Start:
    """Load a start of another package; refuse what is none, or takes what there is not."""
    with _THEIRS.loading(name) as (entry, where):  # whose errors name the package, whatever its code raises
        start = entry.load()
        if not isinstance(start, Start) or not start.function:
            raise LoraInitError(f"{where}: {entry.value} is no lora_init.Start with a function.")
        start = replace(start, name=name, package=package_of(entry))
        strange = [name for name in start.arguments if name not in PROVIDERS]
    if strange:
        raise LoraInitError(
            f"{where}: its function asks for {', '.join(strange)}, and there is {', '.join(PROVIDERS)}. Rename them."
        )
    return start
