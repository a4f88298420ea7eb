"""What was learned from the data: one spectrum per layer, where it came from, and its file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lora_init.errors import LoraInitError
from lora_init.spectrum import Spectrum
from lora_init.targets import Target

FORMAT = "lora_init.statistics"
FORMAT_VERSION = 1
_PARTS = ("components", "explained_variance", "mean")


@dataclass(frozen=True)
class Provenance:
    """Which model, which data and which settings the statistics come from.

    Attributes:
        model_id: `config.name_or_path` of the model; empty if it has none.
        model_class: Name of the model's class.
        fingerprint: Hash of the names and shapes of the weights and of a sample of their values, see `fingerprint`.
        target_modules: As given to `collect`.
        exclude_modules: As given to `collect`.
        task_type: PEFT's task type, or None.
        data: Description of the data in words.
        center: Whether the mean was subtracted (PCA) or not (second moment).
        token_mask: `"attention"` or `"labels"`: which tokens were counted.
        seed: Seed of the decomposition.
        rank: Average rank that the pass was made for.
        n_batches: Batches used.
        n_samples: Rows of the layer that saw most.
        stop_reason: `"converged"`, `"exhausted"`, `"max_batches"` or `"interrupted"`.
        seconds: Where the time went: `forward`, `decomposition`, `data`.
        versions: Versions of lora_init, torch, transformers and Python.
        notes: What a user should know about single layers, a sentence each.
    """

    model_id: str
    model_class: str
    fingerprint: str
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None = None
    task_type: str | None = None
    data: str = ""
    center: bool = True
    token_mask: str = "attention"
    seed: int = 0
    rank: int = 16
    n_batches: int = 0
    n_samples: int = 0
    stop_reason: str = "exhausted"
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Statistics(Mapping[str, Spectrum]):
    """One `Spectrum` per layer, in model order, with provenance.

    Layers that read the same tensor (q, k and v) share one stored decomposition; `stats[name]` returns tensors of its own
    each time, so that nothing a caller does to them reaches another layer. `explained_variance` and its neighbours
    answer without touching the components.

    Args:
        groups: Decomposition of each input group, by the name of its first layer.
        group_of: For each layer, in model order, the name of its group.
        targets: For each layer, its kind and widths.
        held_out: For each group, the share of the variance of the last batches that the components found before them
            captured, in [0, 1]; NaN where fewer than two batches were seen.
        unsupported: Targeted layers that cannot be initialised from data, name to kind.
        provenance: Where all this comes from.
    """

    def __init__(
        self,
        groups: Mapping[str, Spectrum],
        group_of: Mapping[str, str],
        targets: Mapping[str, Target],
        provenance: Provenance,
        held_out: Mapping[str, float] | None = None,
        unsupported: Mapping[str, str] | None = None,
    ) -> None:
        self._variances = {name: (s.explained_variance.clone(), s.total_variance) for name, s in groups.items()}
        self._read: Callable[[str], Spectrum] = dict(groups).__getitem__
        self.group_of = dict(group_of)
        self.targets = dict(targets)
        self.held_out = dict(held_out or {})
        self.unsupported = dict(unsupported or {})
        self.provenance = provenance

    def __getitem__(self, name: str) -> Spectrum:
        if name not in self.group_of:
            raise KeyError(name)
        shared = self._read(self.group_of[name])
        return replace(
            shared,
            components=shared.components.clone(),
            explained_variance=shared.explained_variance.clone(),
            mean=shared.mean.clone(),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.group_of)

    def __len__(self) -> int:
        return len(self.group_of)

    def explained_variance(self, name: str) -> Tensor:
        """Variance along each component of a layer, float64 [k], without reading the components."""
        return self._variances[self.group_of[name]][0].clone()

    def total_variance(self, name: str) -> float:
        """Variance of a layer's rows over all directions."""
        return self._variances[self.group_of[name]][1]

    def explained_variance_ratio(self, name: str) -> Tensor:
        """Share of the total variance along each component of a layer, float64 [k]."""
        total = self.total_variance(name)
        variance = self.explained_variance(name)
        return variance / total if total > 0.0 else torch.zeros_like(variance)
