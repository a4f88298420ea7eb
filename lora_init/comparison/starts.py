"""From the name of a start to a model that carries that adapter, everything else equal."""

from __future__ import annotations

import bisect
import difflib
import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
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


@dataclass(frozen=True, eq=False)
class Prepared:
    """A start on a model, as `prepare` returns it.

    Attributes:
        peft_model: The model with the adapter. The plain model inside it is the one that was given.
        trainable_parameters: All that training changes: adapters, and heads that PEFT trains whole.
        ranks: Rank of each layer that has an adapter, or None if all layers have the rank asked for.
        a_scale: Root mean square of the norms of all rows of A.
        seconds: Time that it took, without that for statistics.
        passes: Forward passes of data that it took, without those for statistics.
        gamma: What B A was divided by, where B is not zero and the start is ours.
        release: Puts the plain model back, bit for bit; `peft_model` is of no use afterwards.
    """

    peft_model: PeftModel
    trainable_parameters: int
    ranks: dict[str, int] | None
    a_scale: float
    seconds: float
    passes: int
    gamma: float | None
    release: Callable[[], None] = field(repr=False)


def blank_spectrum(width: int) -> Spectrum:
    """Make the spectrum of a layer of which nothing is known but the width of its input."""
    return Spectrum(torch.empty(0, width), torch.empty(0, dtype=torch.float64), 0.0, torch.zeros(width), 0)


def a_weights(peft_model: PeftModel) -> dict[str, Tensor]:
    """Find A of each layer that has one, [r, d_in]; embeddings and convolutions keep theirs elsewhere or folded."""
    found = {name: layer.lora_A for name, layer in adapter_layers(peft_model).items() if len(layer.lora_A)}
    weights = {name: next(iter(adapters.values())).weight for name, adapters in found.items()}
    return {name: weight for name, weight in weights.items() if weight.dim() == 2}


def ranks_of(peft_model: PeftModel) -> dict[str, int]:
    """Read the rank of each layer that has an adapter."""
    return {name: int(next(iter(layer.r.values()))) for name, layer in adapter_layers(peft_model).items()}


def row_scale(peft_model: PeftModel) -> float:
    """Measure the root mean square of the norms of all rows of A."""
    weights = a_weights(peft_model).values()
    energy = sum(float(weight.detach().double().square().sum()) for weight in weights)
    return math.sqrt(energy / max(1, sum(len(weight) for weight in weights)))


def count_trainable(peft_model: PeftModel) -> int:
    """Count the parameters that training changes."""
    return sum(parameter.numel() for parameter in peft_model.parameters() if parameter.requires_grad)


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


StartFunction: TypeAlias = "Callable[[nn.Module, int], PeftModel]"
OwnStart: TypeAlias = "tuple[str, str | Path | StartFunction]"


def apply_own_start(name: str, source: Any, model: nn.Module, seed: int) -> PeftModel:
    """Put the user's adapter on the model.

    Args:
        name: What he calls it.
        source: An adapter directory, the same for every seed; or a function of the plain model and the seed that
            returns the PeftModel around that model. It may change the weights.
        model: The plain model.
        seed: Passed on to the function.

    Raises:
        LoraInitError: As `load_adapter`; or the function failed or returned something else.
    """
    if isinstance(source, (str, Path)):
        try:
            return load_adapter(model, source, trainable=True)
        except LoraInitError as error:
            raise LoraInitError(f"start {name!r}: {error}") from error
    if not callable(source):
        raise LoraInitError(
            f"start {name!r} is a {type(source).__name__}. Give an adapter directory, or a function of model and seed."
        )
    from peft import PeftModel

    try:
        peft_model = source(model, seed)
    except LoraInitError:
        raise
    except Exception as error:  # whatever a user's code raises
        raise LoraInitError(
            f"start {name!r}: its function raised {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(peft_model, PeftModel) or peft_model.get_base_model() is not model:
        raise LoraInitError(
            f"start {name!r}: its function returned {type(peft_model).__name__}, expected a PeftModel around the model "
            "that it was given."
        )
    match_modes(peft_model)
    return peft_model


PEFT_STARTS = ("pissa", "olora", "corda", "loftq")
# Batches that CorDA sees: as many as `collect` does at most.
_MAX_BATCHES = 64


def apply_peft_start(start: str, model: nn.Module, shape: AdapterInit, batches: Iterable[Any]) -> tuple[PeftModel, int]:
    """Let PEFT start the adapter. Changes the model's weights; `attach.remember` with weights=True puts them back.

    `pissa` (arXiv 2404.02948), `olora` (arXiv 2406.01775) and `corda` (arXiv 2406.05223, instruction-previewed mode)
    take a part of each weight into A and B and leave the rest in the base, so the output changes by rounding only.
    `loftq` (arXiv 2310.08659) rounds the base to 4 bits and lets A and B make up for part of the error: its output is
    near that of the plain model, not equal.

    Args:
        start: One of `PEFT_STARTS`.
        model: The plain model.
        shape: Layers, rank, scaling. Its weights are not used.
        batches: For `corda`: mappings of tensors; 64 at most are read.

    Returns:
        The model with the adapter, and the number of batches that were run through it.

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
    except (ValueError, TypeError, ImportError) as error:
        if isinstance(error, LoraInitError):
            raise
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
    if start == "loftq":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise LoraInitError("start 'loftq' needs the package bitsandbytes, which is not installed.")
        if not (torch.cuda.is_available() or torch.xpu.is_available()):
            raise LoraInitError(
                "start 'loftq' needs a GPU: PEFT rounds the weights to 4 bits there, and there is none."
            )


def _preprocess_corda(model: nn.Module, config: LoraConfig, shape: AdapterInit, batches: Iterable[Any]) -> int:
    if importlib.util.find_spec("attr") is None:
        raise LoraInitError("start 'corda' needs the package attrs, which is not installed.")  # PEFT's code imports it

    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config.corda_config = CordaConfig(corda_method="ipm")
    passes = 0

    def run_model() -> None:
        nonlocal passes
        device = next(model.parameters()).device
        for batch in islice(batches, _MAX_BATCHES):
            for example in _examples(batch):
                model(**{key: value.to(device) for key, value in example.items()})
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

    The hook drops the first axis, and would take a row for a single number otherwise.
    """
    narrow: set[nn.Module] = set()

    def before(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].dim() != 2:
            return None
        narrow.add(layer)
        return (args[0][None], *args[1:])

    def after(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if layer not in narrow:
            return None
        narrow.discard(layer)
        return output[0]

    handles = []
    for layer in layers:
        handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    *,
    statistics: Callable[[bool, bool], Statistics],
    batches: Iterable[Any],
    loss_of: Callable[[nn.Module], float],
    rank: int,
    lora_alpha: float,
    seed: int,
    target_modules: str | Collection[str] = "all-linear",
    task_type: str | None = None,
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
    `pissa`, `olora`, `corda` and `loftq` are PEFT's and start with B other than 0, see `apply_peft_start`.

    Args:
        start: One of `START_NAMES`; or the name of a start of one's own with its source, see `apply_own_start`.
        model: The plain model.
        statistics: Called if the start needs statistics, with whether they are centred and whether they have gradients;
            collected for `rank` with rho = 2.
        batches: Data for `corda`, which reads some by itself. May be any iterable.
        loss_of: Measures the loss of the model as it is, on data that the statistics are not from. Starts that step
            take the size of their step by it, see `find_step_size`.
        rank: Average rank of a layer.
        lora_alpha: Numerator of the scaling.
        seed: The same seed gives the same adapter.
        target_modules: See `collect`.
        task_type: PEFT's task type.
        matched_scale: Scale A as `match_scale` says.
        equal_parameters: Give starts that move ranks as many trainable parameters as `random` has, as nearly as whole
            ranks of at most 2 x `rank` allow, and never more.

    Raises:
        LoraInitError: An unknown start, or one that does not apply to this model; the model is as it was.
    """
    check_start(start)
    name = start if isinstance(start, str) else start[0]
    if equal_parameters and not isinstance(start, str):
        raise LoraInitError(f"start {name!r} has ranks of its own; equal parameters are for {', '.join(_FROM_DATA)}.")
    restore = remember(model, weights=name in _CHANGES_BASE or not isinstance(start, str))
    began = time.perf_counter()
    waited, passes, gamma = 0.0, 0, None

    def timed_statistics(recipe: _Recipe) -> Statistics:
        nonlocal waited
        asked = time.perf_counter()
        stats = statistics(recipe.center, recipe.gradients)
        waited += time.perf_counter() - asked
        return stats

    try:
        # Whatever a start draws, training begins with the same random state.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            if not isinstance(start, str):
                peft_model = apply_own_start(name, start[1], model, seed)
            elif start in _FROM_DATA:
                recipe = _FROM_DATA[start]
                stats = timed_statistics(recipe)
                plan = _ranks(stats, recipe, rank, equal_parameters)
                build = partial(build_adapter, stats, plan, recipe.method, lora_alpha=lora_alpha, seed=seed)
                init = (
                    find_step_size(model, lambda g: build(gamma=g), loss_of)
                    if changes_output(recipe.method)
                    else build()
                )
                peft_model, gamma = init.apply(model), init.gamma
                if recipe.frozen_a:
                    for a in a_weights(peft_model).values():
                        a.requires_grad_(False)
            else:
                method = start if start in _WITHOUT_DATA else "random"
                adapter = _plain(model, method, rank, lora_alpha, seed, target_modules, task_type)
                if start in PEFT_STARTS:
                    peft_model, passes = apply_peft_start(start, model, adapter, batches)
                else:
                    peft_model = adapter.apply(model)
            if matched_scale:
                match_scale(peft_model, seed)
    except BaseException:
        restore()
        raise
    return _described(peft_model, rank, time.perf_counter() - began - waited, passes, gamma, restore)


def _described(
    peft_model: PeftModel, rank: int, seconds: float, passes: int, gamma: float | None, release: Callable[[], None]
) -> Prepared:
    ranks = ranks_of(peft_model)
    return Prepared(
        peft_model=peft_model,
        trainable_parameters=count_trainable(peft_model),
        ranks=ranks if any(own != rank for own in ranks.values()) else None,
        a_scale=row_scale(peft_model),
        seconds=seconds,
        passes=passes,
        gamma=gamma,
        release=release,
    )


def _plain(
    model: nn.Module,
    method: str,
    rank: int,
    lora_alpha: float,
    seed: int,
    target_modules: str | Collection[str],
    task_type: str | None,
) -> AdapterInit:
    """Build an adapter that needs no data, from statistics that know nothing but the layers' widths."""
    targets = find_targets(model, target_modules, task_type=task_type)
    stats = Statistics(
        groups={name: blank_spectrum(target.in_features) for name, target in targets.layers.items()},
        group_of={name: name for name in targets.layers},
        targets=targets.layers,
        unsupported=targets.unsupported,
        provenance=Provenance(
            model_id=str(getattr(getattr(model, "config", None), "name_or_path", "") or ""),
            model_class=type(model).__name__,
            fingerprint="",
            target_modules=target_modules if isinstance(target_modules, str) else sorted(target_modules),
            task_type=task_type,
            rank=rank,
        ),
    )
    return build_adapter(stats, rank, method, lora_alpha=lora_alpha, seed=seed)


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
