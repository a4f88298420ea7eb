"""From the name of a start to a model that carries that adapter, everything else equal."""

from __future__ import annotations

import bisect
import difflib
import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.build import build_adapter
from lora_init.adapters.initializers import GRADIENT_METHODS, changes_output, layer_generator, random
from lora_init.adapters.peft_model import (
    adapter_layers,
    check_model,
    exact_pattern,
    load_adapter,
    match_modes,
    remember,
)
from lora_init.adapters.step_size import find_step_size
from lora_init.errors import LoraInitError, first_line
from lora_init.layers.targets import find_targets
from lora_init.planning.allocate import RankAllocation, allocate_ranks
from lora_init.planning.policies import GRADIENT_POLICIES
from lora_init.statistics.spectrum import Spectrum
from lora_init.statistics.statistics import Provenance, Statistics

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

StartFunction: TypeAlias = "Callable[[nn.Module, int], PeftModel]"
OwnStart: TypeAlias = "tuple[str, str | Path | StartFunction]"


@dataclass(frozen=True)
class AdapterShape:
    """What all starts have in common.

    Attributes:
        rank: Average rank of a layer.
        lora_alpha: The adapter is scaled by lora_alpha / rank.
        target_modules: See `collect`.
        task_type: PEFT's task type.
    """

    rank: int
    lora_alpha: float
    target_modules: str | list[str] = "all-linear"
    task_type: str | None = None


def _no_data(*_: object) -> NoReturn:
    raise LoraInitError("this start learns from data, and there is none.")


@dataclass(frozen=True)
class StartData:
    """What a start may ask for beside the model.

    Attributes:
        statistics: Called with whether they are centred and whether they have gradients; for the rank with rho = 2.
        batches: Data for `corda`, which reads some by itself. May be any iterable.
        loss_of: Measures the loss of the model as it is, on data that the statistics are not from. Starts that step
            take the size of their step by it, see `find_step_size`.
    """

    statistics: Callable[[bool, bool], Statistics] = _no_data
    batches: Iterable[Any] = ()
    loss_of: Callable[[nn.Module], float] = _no_data


@dataclass(frozen=True, eq=False)
class Prepared:
    """A start on a model, as `prepare` returns it.

    Attributes:
        peft_model: The model with the adapter. The plain model inside it is the one that was given.
        seconds: Time that it took, without that for statistics.
        passes: Forward passes of data that it took, without those for statistics.
        gamma: What B A was divided by, where B is not zero and the start is ours.
        release: Puts the plain model back, bit for bit; `peft_model` is of no use afterwards.
    """

    peft_model: PeftModel
    seconds: float
    passes: int
    gamma: float | None
    release: Callable[[], None] = field(repr=False)

    @property
    def trainable_parameters(self) -> int:
        """All that training changes: adapters, and heads that PEFT trains whole."""
        return sum(parameter.numel() for parameter in self.peft_model.parameters() if parameter.requires_grad)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each layer that has an adapter."""
        return {name: int(next(iter(layer.r.values()))) for name, layer in adapter_layers(self.peft_model).items()}

    @property
    def a_scale(self) -> float:
        """Root mean square of the norms of all rows of A."""
        weights = a_weights(self.peft_model).values()
        energy = sum(float(weight.detach().double().square().sum()) for weight in weights)
        return math.sqrt(energy / max(1, sum(len(weight) for weight in weights)))


@dataclass(frozen=True)
class _Recipe:
    """A start made from statistics: method, rho and policy of the ranks, whether centred, whether A stays as it is."""

    method: str = "eva"
    rho: float = 2.0
    center: bool = True
    frozen_a: bool = False
    policy: str = "eva"

    @property
    def gradients(self) -> bool:
        """Whether the statistics must have gradients."""
        return self.method in GRADIENT_METHODS or self.policy in GRADIENT_POLICIES


PEFT_STARTS = ("pissa", "olora", "corda", "loftq")
_WITHOUT_DATA = ("random", "gaussian", "orthogonal")
_FROM_DATA = {
    "eva": _Recipe(),
    "eva-rho1": _Recipe(rho=1.0),
    "eva-uncentred": _Recipe(center=False),
    "eva-rho1-uncentred": _Recipe(rho=1.0, center=False),
    "random-scaled": _Recipe(method="random-scaled", rho=1.0),
    "eva-ranks": _Recipe(method="random"),
    "eva-frozen-a": _Recipe(frozen_a=True),
    **{name: _Recipe(method=name, rho=1.0) for name in GRADIENT_METHODS},
    "gradient-ranks": _Recipe(method="random", policy="gradient"),
}
# Starts that change the base weights, which have to be put back.
_CHANGES_BASE = (*PEFT_STARTS, *(name for name, method in GRADIENT_METHODS.items() if method.corrects))
START_NAMES: tuple[str, ...] = (*_WITHOUT_DATA, *_FROM_DATA, *PEFT_STARTS)


def check_start(start: str | OwnStart) -> None:
    """Make sure that a start of this name exists, or that a start of one's own has a name of its own.

    Raises:
        LoraInitError: It does not. The closest name is suggested.
    """
    if isinstance(start, tuple):
        name = start[0] if len(start) == 2 else None
        if not isinstance(name, str) or not name or name in START_NAMES:
            raise LoraInitError(f"start {start!r}: a pair is needed, of a new name and a directory or a function.")
    elif start not in START_NAMES:
        close = difflib.get_close_matches(str(start), START_NAMES, n=1, cutoff=0.0)
        raise LoraInitError(f"start {start!r} is unknown. Closest: {close[0]!r}. All: {', '.join(START_NAMES)}.")


def prepare(
    start: str | OwnStart,
    model: nn.Module,
    shape: AdapterShape,
    seed: int,
    data: StartData | None = None,
    *,
    matched_scale: bool = False,
    equal_parameters: bool = False,
) -> Prepared:
    """Put the adapter of a start on a model: the same layers and the same scaling lora_alpha / rank for every start.

    Starts, with B = 0 in all of these:

    - `random`, `gaussian` (PEFT's two), `orthogonal`: rank `rank` everywhere, no data;
    - `eva`: principal directions, ranks moved between layers with rho = 2; `eva-rho1`: rank `rank` everywhere;
      `eva-uncentred`, `eva-rho1-uncentred`: the second moment in place of the variance;
    - `random-scaled`: the A of `random`, in each layer as large as makes E |A x|^2 that of `eva-rho1`, which tells the
      size of A x from its directions;
    - `eva-ranks`: the ranks of `eva` with the A of `random`, which tells redistribution from directions;
    - `eva-frozen-a`: `eva`, but only B is trained, so it has fewer trainable parameters than the others;
    - `eva-grad`, `grad-a`, `natural-gradient`, `natural-gradient-scaled`: A from the gradient, rank `rank` everywhere,
      see `gradient_starts`;
    - `gradient-ranks`: ranks by the policy `gradient` with the A of `random`.

    `lora-ga`, `lora-one` and `natural-gradient-step` start with B other than 0; the first changes base weights to make
    up for it, the model's output with the others is another one.

    PEFT's `pissa` (arXiv 2404.02948), `olora` (arXiv 2406.01775) and `corda` (arXiv 2406.05223, instruction-previewed
    mode) take a part of each weight into A and B and leave the rest in the base, so the output changes by rounding
    only. `loftq` (arXiv 2310.08659) rounds the base to 4 bits and lets A and B make up for part of the error: its
    output is near that of the plain model, not equal.

    Args:
        start: One of `START_NAMES`; or a pair of a name of one's own and its source: an adapter directory, the same for
            every seed, or a function of the plain model and the seed that returns the PeftModel around that model. It
            may change the weights.
        model: The plain model.
        shape: Layers, rank and scaling.
        seed: The same seed gives the same adapter.
        data: What the start may learn from; None for starts that learn from nothing.
        matched_scale: Scale A of each layer as `match_scale` says.
        equal_parameters: Give starts that move ranks as many trainable parameters as `random` has, as nearly as whole
            ranks of at most 2 x `rank` allow, and never more.

    Raises:
        LoraInitError: An unknown start, or one that does not apply to this model; the model is as it was.
    """
    check_start(start)
    data = data or StartData()
    name = start if isinstance(start, str) else start[0]
    if equal_parameters and not isinstance(start, str):
        raise LoraInitError(f"start {name!r} has ranks of its own; equal parameters are for {', '.join(_FROM_DATA)}.")
    restore = remember(model, weights=name in _CHANGES_BASE or not isinstance(start, str))
    recipe = _FROM_DATA.get(name)
    passes, gamma = 0, None
    try:
        stats = data.statistics(recipe.center, recipe.gradients) if recipe else None
        began = time.perf_counter()
        # Whatever a start draws, training begins with the same random state.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            if not isinstance(start, str):
                peft_model = _apply_own(name, start[1], model, seed)
            elif recipe and stats is not None:
                plan = _ranks(stats, recipe, shape.rank, equal_parameters)
                build = partial(build_adapter, stats, plan, recipe.method, lora_alpha=shape.lora_alpha, seed=seed)
                stepped = changes_output(recipe.method)
                init = find_step_size(model, lambda g: build(gamma=g), data.loss_of) if stepped else build()
                peft_model, gamma = init.apply(model), init.gamma
                if recipe.frozen_a:
                    for a in a_weights(peft_model).values():
                        a.requires_grad_(False)
            elif name in PEFT_STARTS:
                peft_model, passes = _apply_peft(name, model, _plain(model, "random", shape, seed), data.batches)
            else:
                peft_model = _plain(model, name, shape, seed).apply(model)
            if matched_scale:
                match_scale(peft_model, seed)
    except BaseException:
        restore()
        raise
    return Prepared(peft_model, time.perf_counter() - began, passes, gamma, restore)


def blank_spectrum(width: int) -> Spectrum:
    """Make the spectrum of a layer of which nothing is known but the width of its input."""
    return Spectrum(torch.empty(0, width), torch.empty(0, dtype=torch.float64), 0.0, torch.zeros(width), 0)


def a_weights(peft_model: PeftModel) -> dict[str, Tensor]:
    """Find A of each layer that has one, [r, d_in]; embeddings keep theirs elsewhere, convolutions as [r, c, k, k]."""
    found = {name: layer.lora_A for name, layer in adapter_layers(peft_model).items() if len(layer.lora_A)}
    weights = {name: next(iter(adapters.values())).weight for name, adapters in found.items()}
    return {name: weight for name, weight in weights.items() if weight.dim() == 2}


@torch.no_grad()
def match_scale(peft_model: PeftModel, seed: int) -> None:
    """Scale A of each layer so that the root mean square of its rows' norms is that of the random start.

    The comparison that "The Primacy of Magnitude" (arXiv 2507.06558) asks for: what remains of a start's advantage
    when its updates are as large as those of plain LoRA. B is divided by the same number, which changes nothing where B
    is zero, and elsewhere keeps B A and with it the model's output.

    Args:
        peft_model: Changed in place.
        seed: That of the random start to compare with.
    """
    layers = adapter_layers(peft_model)
    for name, a in a_weights(peft_model).items():
        reference = random(blank_spectrum(a.shape[1]), len(a), layer_generator(seed, name))
        norm = float(a.double().norm())
        if norm > 0.0:
            factor = float(reference.double().norm()) / norm
            a.mul_(factor)
            next(iter(layers[name].lora_B.values())).weight.div_(factor)


def _plain(model: nn.Module, method: str, shape: AdapterShape, seed: int) -> AdapterInit:
    """Build an adapter that needs no data, from statistics that know nothing but the layers' widths."""
    modules = shape.target_modules
    targets = find_targets(model, modules, task_type=shape.task_type)
    made_for = Provenance(
        model_id=str(getattr(getattr(model, "config", None), "name_or_path", "") or ""),
        model_class=type(model).__name__,
        fingerprint="",
        target_modules=modules if isinstance(modules, str) else sorted(modules),
        task_type=shape.task_type,
        rank=shape.rank,
    )
    stats = Statistics(
        groups={name: blank_spectrum(target.in_features) for name, target in targets.layers.items()},
        group_of={name: name for name in targets.layers},
        targets=targets.layers,
        unsupported=targets.unsupported,
        provenance=made_for,
    )
    return build_adapter(stats, shape.rank, method, lora_alpha=shape.lora_alpha, seed=seed)


def _ranks(stats: Statistics, recipe: _Recipe, rank: int, equal_parameters: bool) -> RankAllocation:
    if not equal_parameters:
        return allocate_ranks(stats, rank=rank, rho=recipe.rho, policy=recipe.policy)
    budget = sum(target.parameters(rank) for name, target in stats.targets.items() if name in stats)
    if recipe.frozen_a:
        plan = _ranks_for_b_alone(stats, recipe.rho, rank, budget)
    else:
        plan = allocate_ranks(stats, parameters=budget, rho=recipe.rho, policy=recipe.policy)
    return replace(plan, rank=rank)  # keeps the scaling lora_alpha / rank


def _ranks_for_b_alone(stats: Statistics, rho: float, rank: int, budget: int) -> RankAllocation:
    """Allocate as many ranks as B alone has budget for, at most round(rho * rank) in a layer."""
    cap = round(rho * rank)
    most = sum(min(cap, len(stats.explained_variance(name))) for name in stats)

    def plan(total: int) -> RankAllocation:
        return allocate_ranks(stats, total_rank=total, rho=float(cap * len(stats)), max_rank=cap)

    def cost(total: int) -> int:
        return sum(layer_rank * stats.targets[name].out_features for name, layer_rank in plan(total).items())

    # With one more place a plan keeps the others, so the cost rises with the total.
    return plan(max(1, bisect.bisect_right(range(1, most + 1), budget, key=cost)))


def _apply_own(name: str, source: Any, model: nn.Module, seed: int) -> PeftModel:
    """Put the user's adapter on the model: from a directory, or by a function that may raise what it likes."""
    from peft import PeftModel

    if not callable(source) and not isinstance(source, (str, Path)):
        raise LoraInitError(
            f"start {name!r} is a {type(source).__name__}. Give an adapter directory, or a function of model and seed."
        )
    try:
        if not callable(source):
            return load_adapter(model, source, trainable=True)
        peft_model = source(model, seed)
    except LoraInitError as error:
        raise LoraInitError(f"start {name!r}: {error}") from error
    except Exception as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise LoraInitError(f"start {name!r}: its function raised {said}") from error
    if not isinstance(peft_model, PeftModel) or peft_model.get_base_model() is not model:
        raise LoraInitError(
            f"start {name!r}: its function returned {type(peft_model).__name__}, expected a PeftModel around the model "
            "that it was given."
        )
    match_modes(peft_model)
    return peft_model


# Batches that CorDA sees: as many as `collect` does at most.
_MAX_BATCHES = 64


def _apply_peft(start: str, model: nn.Module, shape: AdapterInit, batches: Iterable[Any]) -> tuple[PeftModel, int]:
    """Let PEFT start the adapter, which changes the model's weights, and count the batches that it took.

    Raises:
        LoraInitError: The start does not apply: a quantised base, layers of another kind, a layer narrower than the
            rank, a package or a device that is missing, or what PEFT says.
    """
    from peft import get_peft_model

    check_model(model, shape, "default")
    _check_applies(start, model, shape)
    config = shape.to_peft_config()
    config.base_model_name_or_path = None
    config.target_modules = exact_pattern(shape.targets)
    config.init_lora_weights = start  # type: ignore[assignment]
    passes = 0
    try:
        with warnings.catch_warnings():
            # Advice on saving such an adapter, and on a flag that PEFT then sets correctly itself.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            if start == "corda":
                passes = _preprocess_corda(model, config, shape, batches)
            if start == "loftq":
                config.loftq_config = {"loftq_bits": 4, "loftq_iter": 1}
            peft_model = get_peft_model(model, config)
    except LoraInitError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise LoraInitError(f"start {start!r} does not apply here, PEFT says: {first_line(error)}") from error
    match_modes(peft_model)
    return peft_model, passes


def _check_applies(start: str, model: nn.Module, shape: AdapterInit) -> None:
    if shape.unsupported:
        name, kind = next(iter(shape.unsupported.items()))
        raise LoraInitError(
            f"start {start!r} is for linear layers, and {name!r} is a {kind}. Leave it out of the targets."
        )
    for name, target in shape.targets.items():
        weight: Any = model.get_submodule(name).weight
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise LoraInitError(
                f"start {start!r} takes the plain weights apart, and {name!r} is quantised. Load the model in float."
            )
        if target.kind == "Conv1D" and start in ("olora", "loftq"):
            raise LoraInitError(f"start {start!r}: PEFT computes it for nn.Linear only, and {name!r} is a Conv1D.")
        narrow = min(target.in_features, target.out_features)
        if shape.rank > narrow:
            raise LoraInitError(
                f"start {start!r}: layer {name!r} has {narrow} singular vectors, and rank {shape.rank} asks for more."
            )
    for needy, module, package in (("corda", "attr", "attrs"), ("loftq", "bitsandbytes", "bitsandbytes")):
        if start == needy and importlib.util.find_spec(module) is None:
            raise LoraInitError(f"start {start!r} needs the package {package}, which is not installed.")
    if start == "loftq" and not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise LoraInitError("start 'loftq' needs a GPU: PEFT rounds the weights to 4 bits there, and there is none.")


def _preprocess_corda(model: nn.Module, config: LoraConfig, shape: AdapterInit, batches: Iterable[Any]) -> int:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config.corda_config = CordaConfig(corda_method="ipm")
    passes = 0

    def run_model() -> None:
        nonlocal passes
        device = next(model.parameters()).device
        for batch in islice(batches, _MAX_BATCHES):
            for example in _examples(batch):
                model(**send_to_device(example, device))
            passes += 1
        if not passes:
            raise LoraInitError("start 'corda' reads data, and there is no batch.")

    modes = [(module, module.training) for module in model.modules()]
    with _with_a_token_axis([model.get_submodule(name) for name in shape.targets]):
        preprocess_corda(model, config, run_model)
    for module, training in modes:
        module.training = training
    return passes


def _examples(batch: Any) -> Iterator[dict[str, Tensor]]:
    """Cut a batch into its examples without padding: PEFT's CorDA takes one sequence at a time and knows no mask."""
    if not isinstance(batch, Mapping):
        raise LoraInitError(
            f"start 'corda' needs batches that are mappings of tensors, and this is a {type(batch).__name__}."
        )
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    mask = tensors.get("attention_mask")
    for row in range(max(map(len, tensors.values()), default=0)):
        example = {key: value[row : row + 1] for key, value in tensors.items()}
        if mask is not None:
            kept = mask[row].bool()
            example = {key: v[:, kept] if tensors[key].shape == mask.shape else v for key, v in example.items()}
        yield example


@contextmanager
def _with_a_token_axis(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Show a layer that reads one row [1, d] per sequence, as BERT's pooler does, to CorDA's hook as [1, 1, d].

    The hook drops the first axis, and would take a row for a single number otherwise. All other axes stay as they are:
    what follows such a layer works on the last axis alone.
    """
    handles = [
        layer.register_forward_pre_hook(lambda _, args: (args[0][None], *args[1:]) if args[0].dim() == 2 else None)
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
