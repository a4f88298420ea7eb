"""A program of a user, as mypy reads it in `make check`: what is marked is refused there, and nothing else is."""

from typing import Any

import torch

import lora_init
from lora_init import Statistics, build_adapter, collect, initialize


def use(model: torch.nn.Module, some: Any, stats: Statistics) -> None:
    """Call with every option, and with what is wrong."""
    initialize(
        model, some, method="eva", tokenizer=some, config=None, adapter_name="mine", rank=some, rho=some, template=some,
        completion=some, format=some, subset=some, split=some, label=some, samples=some, batch_size=some,
        max_length=some, offset=some, seq2seq=some, needs_labels=some, known_classes=some, target_modules=some,
        exclude_modules=some, target_parameters=some, task_type=some, lora_alpha=some, use_rslora=some, use_dora=some,
        lora_dropout=some, modules_to_save=some, freeze_a=some, whiten=some, unit_rows=some, gamma=some, weights=some,
        unchecked=some, gradients=some, center=some, token_mask=some, max_batches=some, skip_bad_batches=some,
        seed=some, tolerance=some, forward=some, loss=some, data=some, progress=some, statistics=some, overwrite=some,
    )  # fmt: skip
    initialize(model, [], 8, 1.0, "eva", lora_alpha=16, target_modules=["q_proj"], center=False)
    initialize(some)
    collect(model, [], rank=8, seed=1)
    build_adapter(stats, 8, lora_alpha=16)
    initialize(model, [], rnak=8)  # type: ignore[call-arg]
    initialize(model, [], rank="8")  # type: ignore[arg-type]
    collect(model, [], rnak=8)  # type: ignore[call-arg]
    build_adapter(stats, rnak=8)  # type: ignore[call-arg]
    plan: int = lora_init.allocate_ranks(stats)  # type: ignore[assignment]
    lora_init.build_adaptor  # type: ignore[attr-defined]  # noqa: B018
    print(plan)
