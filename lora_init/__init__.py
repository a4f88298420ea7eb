"""Data-driven starts and rank budgets for LoRA adapters."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Resolved on first use, so that importing the package, and `lora-init --help`, do not import torch.
_HOMES = {
    "LoraInitError": "errors",
    "find_targets": "layers.targets",
    "Target": "layers.targets",
    "Spectrum": "statistics.spectrum",
    "principal_angles": "statistics.spectrum",
    "IncrementalSVD": "statistics.incremental_svd",
    "ExactPCA": "statistics.exact_pca",
    "Statistics": "statistics.statistics",
    "Provenance": "statistics.statistics",
    "collect": "collection.collect",
    "allocate_ranks": "planning.allocate",
    "RankAllocation": "planning.allocate",
    "build_adapter": "adapters.build",
    "AdapterInit": "adapters.build",
    "initialize": "adapters.initialize",
    "find_step_size": "adapters.step_size",
    "mean_loss": "adapters.step_size",
    "correct_base": "adapters.adapter_init",
    "GradientSpectrum": "statistics.gradient_spectrum",
    "get_eva_state_dict": "adapters.peft_eva",
    "initialize_lora_eva_weights": "adapters.peft_eva",
    "load_batches": "loading.batches",
    "compare": "comparison.compare",
    "Comparison": "comparison.compare",
    "intruder_dimensions": "adapters.intruders",
    "Intruders": "adapters.intruders",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_init' has no attribute {name!r}")
    return getattr(import_module(f"lora_init.{_HOMES[name]}"), name)
