"""What a pass has found so far: a running decomposition for each input group, and what the stopping rule remembers."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_init.statistics.gradient_spectrum import mean_group
from lora_init.statistics.incremental_svd import IncrementalSVD
from lora_init.statistics.mean_gradient import MeanGradient
from lora_init.statistics.tensorfile import flatten, nest

# Batches before which no layer can count as converged: the held-out share of so few says little.
MIN_BATCHES = 8
# Batches whose captured shares are kept, for the sampling error of the ranks.
KEPT_BATCHES = 16


@dataclass
class GroupRecord:
    """The running decomposition of one input group and how well it predicted the batches it had not seen.

    Attributes:
        svd: The decomposition.
        ratios: For each of the last batches, the share of its variance along each component, float64 [k].
        shares: For each batch but the first, the share captured by all components to report.
        converged_at: Number of batches after which the group needed no more; None while it does.
    """

    svd: IncrementalSVD
    ratios: deque[Tensor] = field(default_factory=lambda: deque(maxlen=KEPT_BATCHES))
    shares: list[float] = field(default_factory=list)
    converged_at: int | None = None

    def held_out(self) -> float:
        """Mean share captured over the later half of the batches; NaN before the second batch."""
        return statistics.fmean(self._later()) if self.shares else float("nan")

    def _later(self) -> list[float]:
        return self.shares[len(self.shares) // 2 :]

    def _has_converged(self, tolerance: float) -> bool:
        """Tell whether more data has nothing left to improve.

        What any k directions can capture lies between the held-out share and the share on the rows seen, which the
        components were chosen to fit. They are done when the two meet, the held-out share less its standard error: by
        luck of a few easy batches they meet too early.
        """
        later = self._later()
        mean = statistics.fmean(later)
        error = math.dist(later, [mean] * len(later)) / math.sqrt((len(later) - 1) * len(later))
        gap = self.svd.captured - (mean - error)
        return bool(gap <= tolerance * self.svd.captured)

    def after_batch(self) -> bool:
        """Record the batch that was just taken in; tell whether it could be compared with those before."""
        if self.svd.held_out is None:
            return False
        captured, total, _ = self.svd.held_out
        self.svd.held_out = None
        ratios = torch.zeros(self.svd.n_components, dtype=torch.float64)
        if total > 0:
            ratios[: len(captured)] = captured[: self.svd.n_components].cpu() / total
        self.ratios.append(ratios)
        self.shares.append(float(ratios.sum()) if total > 0 else 1.0)
        return True

    def decide(self, tolerance: float, n_batches: int) -> None:
        """Decide whether more batches are needed than the `n_batches` so far."""
        if n_batches >= MIN_BATCHES and len(self.shares) > 2 and self._has_converged(tolerance):
            self.converged_at = n_batches


@dataclass
class Collected:
    """What one pass found: a decomposition per input group, before anything is frozen.

    Attributes:
        groups: Record of each group, by the name of its first layer; with gradients also of the weighted rows of each
            layer, by `weighted_group`.
        gradients: Running mean gradient of each layer, if gradients were asked for.
        n_labels: Labels whose loss the gradients are of.
        group_of: Group of every layer that ran, in the order of `modules`.
        never_ran: Layers that no batch reached.
        n_calls: Largest number of runs of each layer in one forward pass.
        n_batches: Batches taken in.
        stop_reason: `"converged"`, `"exhausted"`, `"max_batches"` or `"interrupted"`.
        seconds: Wall time of the parts `forward`, `decomposition` and `data`.
    """

    groups: dict[str, GroupRecord] = field(default_factory=dict)
    gradients: dict[str, MeanGradient] = field(default_factory=dict)
    n_labels: int = 0
    group_of: dict[str, str] = field(default_factory=dict)
    never_ran: list[str] = field(default_factory=list)
    n_calls: dict[str, int] = field(default_factory=dict)
    n_batches: int = 0
    stop_reason: str = "exhausted"
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "decomposition": 0.0, "data": 0.0})

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Write everything as a JSON-serialisable header and tensors on the CPU."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, record in self.groups.items():
            parts[name] = dict(record.svd.state_dict())
            if record.ratios:
                parts[name]["ratios"] = torch.stack(list(record.ratios))
        parts |= pack_means(self.gradients)
        header = {
            "gradients": list(self.gradients),
            "n_labels": self.n_labels,
            "groups": {name: [record.shares, record.converged_at] for name, record in self.groups.items()},
            "group_of": self.group_of,
            "n_calls": self.n_calls,
            "n_batches": self.n_batches,
            "seconds": self.seconds,
        }
        return header, flatten(parts)

    def unpack(
        self, header: Mapping[str, Any], tensors: Mapping[str, Tensor], make: Callable[[str], IncrementalSVD]
    ) -> None:
        """Take over what `pack` wrote.

        Args:
            header: The header.
            tensors: The tensors by name.
            make: Makes an empty decomposition for a group.
        """
        by_group = nest(tensors, [*header["groups"], *map(mean_group, header["gradients"])])
        self.gradients = unpack_means(header["gradients"], by_group)
        self.n_labels = header["n_labels"]
        self.groups = {}
        for name, (shares, converged_at) in header["groups"].items():
            parts = by_group[name]
            record = GroupRecord(make(name), shares=list(shares), converged_at=converged_at)
            record.ratios.extend(parts.pop("ratios", ()))
            record.svd.load_state_dict(parts)
            self.groups[name] = record
        self.group_of, self.n_calls = dict(header["group_of"]), dict(header["n_calls"])
        self.n_batches = header["n_batches"]
        self.seconds.update(header["seconds"])


def pack_means(gradients: Mapping[str, MeanGradient]) -> dict[str, dict[str, Tensor]]:
    """Give the states of mean gradients, by `mean_group`, beside those of decompositions."""
    return {mean_group(name): dict(mean.state_dict()) for name, mean in gradients.items()}


def unpack_means(names: Iterable[str], parts: dict[str, dict[str, Tensor]]) -> dict[str, MeanGradient]:
    """Take what `pack_means` gave out of `parts`."""
    return {name: MeanGradient(1).load_state_dict(parts.pop(mean_group(name))) for name in names}
