"""PEFT's own EVA, driven from outside: one step of it for timing, and its decompositions after a run of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import eva
from peft.tuners.lora.config import EvaConfig
from torch import Tensor, nn


def config(rank: int, rho: float, targets: list[str], task_type: str | None) -> LoraConfig:
    """The configuration under which PEFT does the same work."""
    return LoraConfig(
        r=rank, target_modules=targets, init_lora_weights="eva", eva_config=EvaConfig(rho=rho), task_type=task_type
    )


@contextmanager
def steps(model: nn.Module, leaders: list[str], n_components: int, settings: LoraConfig) -> Iterator[Any]:
    """Register PEFT's SVD hooks on one layer of each input group; yields a function that does one step on a batch."""
    hooks = {name: eva.SVDHook(n_components=n_components, sim_thresh=0.99, name=name,
                               prepare_layer_inputs_fn=eva.prepare_layer_inputs_fn_language_modeling,
                               gather_distributed_inputs=False) for name in leaders}  # fmt: skip
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]

    @torch.no_grad()
    def step(batch: Mapping[str, Tensor]) -> None:
        positions = eva.prepare_model_inputs_fn_language_modeling(dict(batch), settings)
        for hook in hooks.values():
            hook.model_input = positions
        model(**batch)

    try:
        yield step
    finally:
        for handle in handles:
            handle.remove()


class StopAfter(Exception):
    """The bound on the number of passes was reached."""


def run(
    model: nn.Module, batches: list[dict[str, Tensor]], settings: LoraConfig, max_passes: int
) -> tuple[dict[str, Tensor], int, bool]:
    """Run `get_eva_state_dict` to its own stop, or to `max_passes`.

    Returns:
        The decompositions of its layers by name, as components [k, d] before ranks are cut; passes made; whether it
        stopped by itself.
    """
    made: dict[str, Any] = {}
    passes = 0
    original = eva.SVDHook.__init__

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made[self.name] = self

    def forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        nonlocal passes
        if passes >= max_passes:
            raise StopAfter
        passes += 1
        return model(**batch)

    eva.SVDHook.__init__ = remember
    finished = True
    try:
        eva.get_eva_state_dict(model, batches, settings, forward_fn=forward, show_progress_bar=False)
    except StopAfter:
        finished = False
        for module in model.modules():  # PEFT leaves its hooks behind when it is stopped
            for key, hook in list(module._forward_hooks.items()):
                if isinstance(hook, eva._Hook):
                    del module._forward_hooks[key]
    finally:
        eva.SVDHook.__init__ = original
    return {name: hook.svd.components_.cpu() for name, hook in made.items()}, passes, finished
