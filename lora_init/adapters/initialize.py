"""initialize(): from a model and data to a model with an adapter, in one call."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_init.adapters.build import build_adapter, check_adapter_options
from lora_init.adapters.initializers import GRADIENT_METHODS, changes_output
from lora_init.adapters.peft_model import check_modules_to_save, check_plain
from lora_init.adapters.step_size import find_step_size, mean_loss, set_aside
from lora_init.collection.collect import collect
from lora_init.collection.processes import Processes
from lora_init.planning.allocate import allocate_ranks

if TYPE_CHECKING:
    from peft import PeftModel


def initialize(
    model: nn.Module,
    batches: Iterable[Any],
    rank: int = 16,
    rho: float = 2.0,
    method: str = "eva",
    *,
    target_modules: str | Collection[str] = "all-linear",
    whiten: bool = False,
    lora_alpha: float = 16,
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_dropout: float = 0.0,
    modules_to_save: Sequence[str] = (),
    gamma: float | None = None,
    freeze_a: bool = False,
    adapter_name: str = "default",
    seed: int = 0,
    **collect_options: Any,
) -> PeftModel:
    """Do all of it in one call: collect statistics, allocate ranks, build the adapter, put it on the model.

    Args:
        model: The plain model.
        batches: What `collect` takes.
        rank: Average rank of a layer.
        rho: At most round(rho * rank) in one layer; 1 gives every layer the same rank.
        method: See `build_adapter`, as for `whiten`, `lora_alpha`, `use_rslora`, `use_dora`, `lora_dropout`,
            `modules_to_save` and `freeze_a`.
        target_modules: See `collect`.
        gamma: See `build_adapter`. By default a method that steps sets the first four batches aside and takes the size
            of its step by the loss on them, see `find_step_size`. Where there are no more than four, they serve for
            both, with a warning.
        adapter_name: PEFT's name for the adapter.
        seed: Seed of the decomposition and of random initializations.
        **collect_options: Passed on to `collect`: `exclude_modules`, `target_parameters`, `task_type` and so on.

    Raises:
        LoraInitError: As `collect`, `allocate_ranks`, `build_adapter`, `find_step_size` and `AdapterInit.apply` do;
            before any batch is read, where that can be known then.
    """
    check_plain(model, "initialize()")
    options: dict[str, Any] = dict(method=method, whiten=whiten, lora_alpha=lora_alpha, use_dora=use_dora)
    options |= dict(lora_dropout=lora_dropout, modules_to_save=modules_to_save)
    check_adapter_options(**options, gamma=gamma)
    check_modules_to_save(model, modules_to_save)
    searched = gamma is None and changes_output(method)
    aside, others = set_aside(batches) if searched else ([], batches)
    if method in GRADIENT_METHODS:
        collect_options.setdefault("gradients", True)
    stats = collect(model, others, target_modules, rank=rank, rho=rho, seed=seed, **collect_options)
    build = partial(
        build_adapter, stats, allocate_ranks(stats, rank=rank, rho=rho), use_rslora=use_rslora, seed=seed,
        freeze_a=freeze_a, **options,
    )  # fmt: skip
    if not searched:
        return build(gamma=gamma).apply(model, adapter_name)

    def loss_of(model: nn.Module) -> float:
        return _mean_of_processes(mean_loss(model, aside, collect_options.get("forward"), collect_options.get("loss")))

    return find_step_size(model, lambda candidate: build(gamma=candidate), loss_of).apply(model, adapter_name)


def _mean_of_processes(value: float) -> float:
    """Average over the processes of a distributed run: each has batches of its own, and all must take the same step."""
    with Processes() as processes:
        return statistics.fmean(processes.gather(value))
