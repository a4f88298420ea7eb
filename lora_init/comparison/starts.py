"""From the name of a start to a model that carries that adapter, everything else equal."""

from __future__ import annotations

import bisect
import difflib
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.build import build_adapter
from lora_init.adapters.gradient_starts import GRADIENT_METHODS, changes_output
from lora_init.adapters.peft_model import remember
from lora_init.adapters.step_size import find_step_size
from lora_init.comparison.own_starts import OwnStart, apply_own_start
from lora_init.comparison.peft_starts import PEFT_STARTS, apply_peft_start
from lora_init.comparison.prepared import (
    Prepared,
    a_weights,
    blank_spectrum,
    count_trainable,
    match_scale,
    ranks_of,
    row_scale,
)
from lora_init.errors import LoraInitError
from lora_init.layers.targets import find_targets
from lora_init.planning.policies import GRADIENT_POLICIES
from lora_init.planning.ranks import RankAllocation, allocate_ranks
from lora_init.statistics.statistics import Provenance, Statistics

if TYPE_CHECKING:
    from peft import PeftModel


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
