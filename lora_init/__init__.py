"""Data-driven starts and rank budgets for LoRA adapters."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Resolved on first use, so that importing the package, and `lora-init --help`, do not import torch.
_HOMES = {
    "LoraInitError": "errors",
    "find_targets": "targets",
    "Target": "targets",
    "Spectrum": "spectrum",
    "principal_angles": "spectrum",
    "IncrementalSVD": "svd",
    "ExactPCA": "exact",
    "Statistics": "statistics",
    "Provenance": "statistics",
    "collect": "collection",
    "allocate_ranks": "ranks",
    "RankAllocation": "ranks",
    "build_adapter": "adapter",
    "AdapterInit": "adapter",
    "initialize": "initialization",
    "find_step_size": "step_size",
    "mean_loss": "step_size",
    "correct_base": "correction",
    "GradientSpectrum": "gradients",
    "get_eva_state_dict": "peft_eva",
    "initialize_lora_eva_weights": "peft_eva",
    "load_batches": "data",
    "compare": "comparison",
    "Comparison": "comparison",
    "intruder_dimensions": "intruders",
    "Intruders": "intruders",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_init' has no attribute {name!r}")
    return getattr(import_module(f"lora_init.{_HOMES[name]}"), name)
