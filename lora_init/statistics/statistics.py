"""What was learned from the data: one spectrum per layer, where it came from, and its file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_init.errors import LoraInitError
from lora_init.layers.experts import expert_group
from lora_init.layers.targets import Target, read_target
from lora_init.statistics.gradient_spectrum import GradientSpectrum, importance, weighted_group
from lora_init.statistics.merging import Part, merge_parts
from lora_init.statistics.spectrum import Spectrum
from lora_init.statistics.tensorfile import TensorFile, write_tensors

FORMAT = "lora_init.statistics"
FORMAT_VERSION = 2
_READABLE = (1, FORMAT_VERSION)  # 1 had no gradients


@dataclass(frozen=True)
class Provenance:
    """Which model, which data and which settings the statistics come from.

    Attributes:
        model_id: `config.name_or_path` of the model; empty if it has none.
        model_class: Name of the model's class.
        fingerprint: Hash of the names and shapes of the weights and of a sample of their values, see `fingerprint`.
        n_parameters: Number of parameters of the model; 0 if unknown.
        target_modules: As given to `collect`.
        target_parameters: As given to `collect`.
        exclude_modules: As given to `collect`.
        task_type: PEFT's task type, or None.
        data: Description of the data in words.
        center: Whether the mean was subtracted (PCA) or not (second moment).
        token_mask: `"attention"` or `"labels"`: which tokens were counted.
        seed: Seed of the decomposition.
        rank: Average rank that the pass was made for.
        n_batches: Batches used.
        n_samples: Rows of the layer that saw most.
        stop_reason: `"converged"`, `"exhausted"`, `"max_batches"` or `"interrupted"`; those of all parts, with commas,
            if statistics were merged.
        seconds: Where the time went: `forward`, `decomposition`, `data`.
        versions: Versions of lora_init, torch, transformers and Python.
        notes: What a user should know about single layers, a sentence each.
        gradients: Whether backward passes were run, too; in all parts, if statistics were merged.
        n_labels: Labels whose loss the gradients are of.
        complete: Whether the pass came to its end; one that was interrupted can be gone on with.
        settings: What else the pass was made with, see `collect`; empty if it is not known.
    """

    model_id: str
    model_class: str
    fingerprint: str
    target_modules: str | list[str]
    target_parameters: list[str] | None = None
    n_parameters: int = 0
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
    gradients: bool = False
    n_labels: int = 0
    complete: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


class Statistics(Mapping[str, Spectrum]):
    """One `Spectrum` per layer, in model order, with provenance.

    Layers that read the same tensor (q, k and v) share one stored decomposition; `stats[name]` returns tensors of its
    own each time, so that nothing a caller does to them reaches another layer. `explained_variance` and its neighbours
    answer without touching the components.

    Args:
        groups: Decomposition of each input group, by the name of its first layer.
        group_of: For each layer, in model order, the name of its group.
        targets: For each layer, its kind and widths.
        held_out: For each group, the share of the variance of the last batches that the components found before them
            captured, in [0, 1]; NaN where fewer than two batches were seen, and where statistics were merged.
        batch_ratios: For each group, one row for each of its last batches: the share of that batch's variance along
            each component found before it, float64 [n, k]. Their scatter is the sampling error.
        unsupported: Targeted layers without a spectrum (no rows to learn from, or never ran), name to kind.
        provenance: Where all this comes from.
        gradients: For each layer what the loss says about it; empty if there were no backward passes.
    """

    def __init__(
        self,
        groups: Mapping[str, Spectrum],
        group_of: Mapping[str, str],
        targets: Mapping[str, Target],
        provenance: Provenance,
        held_out: Mapping[str, float] | None = None,
        batch_ratios: Mapping[str, Tensor] | None = None,
        unsupported: Mapping[str, str] | None = None,
        gradients: Mapping[str, GradientSpectrum] | None = None,
    ) -> None:
        self._groups = groups
        self._gradients = gradients or {}
        self._variances = {name: _variances(groups, name) for name in groups}
        self.group_of = dict(group_of)
        self.targets = dict(targets)
        self.held_out = dict(held_out or {})
        self.batch_ratios = dict(batch_ratios or {})
        self.unsupported = dict(unsupported or {})
        self.provenance = provenance

    def __getitem__(self, name: str) -> Spectrum:
        if name not in self.group_of:
            raise KeyError(name)
        shared = self._groups[self.group_of[name]]
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

    def gradient(self, name: str) -> GradientSpectrum:
        """Give what the loss says about a layer.

        Raises:
            LoraInitError: The statistics were collected without gradients.
        """
        if name not in self.group_of:
            raise KeyError(name)
        if name not in self._gradients:
            raise LoraInitError(
                "these statistics have no gradients. Collect them with gradients=True, on the command line with "
                "--gradients, from data with labels."
            )
        return self._gradients[name]

    def set_importance(self, name: str, weight: Tensor) -> None:
        """Compute GoRA's measure of a layer, which a merge does not know, from its weight [d_out, d_in]."""
        gradient = self.gradient(name)
        value = importance(weight, gradient.left, gradient.singular_values, gradient.right)
        self._gradients = {**self._gradients, name: replace(gradient, importance=value)}

    def of_experts(self, name: str) -> list[Spectrum]:
        """Give the spectrum of each expert of a fused parameter; with too few rows of its own, that of all together."""
        few, pooled, n_experts = set(self.experts_with_few_rows(name)), self[name], self.targets[name].experts
        return [pooled if i in few else self._groups[expert_group(name, i)] for i in range(n_experts)]

    def experts_with_few_rows(self, name: str) -> list[int]:
        """Name the experts of a fused parameter that read fewer than two rows for each component to be found."""
        least = 2 * len(self.explained_variance(name))
        groups = [expert_group(name, expert) for expert in range(self.targets[name].experts)]
        return [expert for expert, group in enumerate(groups) if self._variances.get(group, (0, 0, 0))[2] < least]

    def merge(self, *others: Statistics, weights: Sequence[float] | None = None) -> Statistics:
        """Make the statistics of all rows that these and the others have seen; none of them is changed.

        All must come from one model, with the same layers, `center`, `token_mask` and `task_type`. Without weights each
        row counts once: shards of one data set, or more of it later. With weights the data sets count by these shares
        whatever their numbers of rows are: the second moment of a layer's input is the weighted sum of theirs. An
        expert reads of each what the router sends to it.

        Counts, means and total variances are exact. Components are so up to what each part had left out: see
        `mixtures.mix` for the bound. As many components are kept as all parts have. Layers that ran in some parts only
        come from those. Gradients are merged if all have them: the mean gradient is that of the mean loss over all
        labels, with weights of the weighted sum of the mean losses; the importance, which needs the model's weights, is
        unknown, NaN, so that the policy `gora` is refused. `held_out` is unknown, NaN, for layers of several parts:
        nobody has measured how much of new rows their common components capture. The sampling error, from
        `batch_ratios`, is that of the weighted sum.

        Rows that two parts share count twice. Merge more than two in one call: each call leaves something out. What
        `provenance` has no sum or list for, such as the seed, is that of the first; its notes describe every part.

        Args:
            others: Statistics.
            weights: Share of each, these first; positive, their sum 1.

        Raises:
            LoraInitError: Another model, other layers or settings; nothing to merge with; the same statistics twice;
                weights that are not one share for each.

        Example:
            >>> import torch
            >>> from lora_init import collect
            >>> model, batches = torch.nn.Sequential(torch.nn.Linear(8, 4)), [torch.randn(32, 8) for _ in range(4)]
            >>> one, other = (collect(model, part, rank=2) for part in (batches[:1], batches[1:]))
            >>> one.merge(other)["0"].n_samples, one.merge(other, weights=[0.7, 0.3]).provenance.n_batches
            (128, 4)
        """
        merged = Statistics(**merge_parts([one._part(i + 1) for i, one in enumerate((self, *others))], weights))
        merged.provenance.notes.extend(notes_on_experts(merged))
        return merged

    def _part(self, number: int) -> Part:
        name = str(self._groups.path) if isinstance(self._groups, _StoredGroups) else f"part {number}"
        return Part(
            name=name,
            groups=self._groups,
            variances=self._variances,
            group_of=self.group_of,
            targets=self.targets,
            held_out=self.held_out,
            batch_ratios=self.batch_ratios,
            unsupported=self.unsupported,
            gradients=self._gradients,
            provenance=self.provenance,
        )

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file; its format is in docs/file-formats.md. A crash leaves no half file.

        Raises:
            LoraInitError: The file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for name in self._groups:
            spectrum = self._groups[name]
            tensors[f"{name}/components"] = spectrum.components
            tensors[f"{name}/explained_variance"] = spectrum.explained_variance
            tensors[f"{name}/mean"] = spectrum.mean
            if name in self.batch_ratios:
                tensors[f"{name}/batch_ratios"] = self.batch_ratios[name]
        groups = {
            name: {
                "total_variance": self._variances[name][1],
                "n_samples": self._groups[name].n_samples,
                "held_out": None if math.isnan(share := self.held_out.get(name, math.nan)) else share,
            }
            for name in self._groups
        }
        header: dict[str, Any] = {
            "provenance": asdict(self.provenance),
            "layers": {name: [self.group_of[name], *_plain(target)] for name, target in self.targets.items()},
            "groups": groups,
            "unsupported": self.unsupported,
            "gradients": {},
        }
        for name, gradient in self._gradients.items():
            header["gradients"][name], parts = gradient.pack()
            tensors |= {f"{weighted_group(name)}/{part}": tensor for part, tensor in parts.items()}
        return write_tensors(path, FORMAT, FORMAT_VERSION, header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read a file that `save` wrote. Components are read when a layer is asked for, everything else now.

        Raises:
            LoraInitError: Not such a file; truncated, changed since it was written, or of a newer version.
        """
        file = TensorFile(path, FORMAT, *_READABLE)
        try:
            header = file.header
            groups = _StoredGroups(file, header["groups"])
            layers: dict[str, list[Any]] = header["layers"]
            shares = {name: group["held_out"] for name, group in header["groups"].items()}
            statistics = cls(
                groups=groups,
                group_of={name: str(layer[0]) for name, layer in layers.items()},
                targets={
                    name: read_target(name, kind, d_in, d_out, extras[0] if extras else {})
                    for name, (_, kind, d_in, d_out, *extras) in layers.items()
                },
                provenance=Provenance(**header["provenance"]),
                held_out={name: math.nan if share is None else float(share) for name, share in shares.items()},
                batch_ratios={
                    name: file.tensor(f"{name}/batch_ratios")
                    for name in groups
                    if f"{name}/batch_ratios" in header["digests"]
                },
                unsupported=header["unsupported"],
                gradients=_StoredGradients(file, header.get("gradients", {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise file.changed(f"its header ({error})") from error
        if not set(statistics.group_of.values()) <= set(groups):
            raise file.changed("its list of layers")
        return statistics


def notes_on_experts(stats: Statistics) -> list[str]:
    """Name the experts that start from the rows of all experts."""
    notes = []
    for name, target in stats.targets.items():
        few = stats.experts_with_few_rows(name)
        if few:
            shown = ", ".join(map(str, few[:8])) + (", ..." if len(few) > 8 else "")
            notes.append(
                f"{name}: {len(few)} of {target.experts} experts read fewer than "
                f"{2 * len(stats.explained_variance(name))} rows and start from those of all experts: {shown}."
            )
    return notes


class _StoredGroups(Mapping[str, Spectrum]):
    """Spectra in a file, read when they are asked for."""

    def __init__(self, file: TensorFile, groups: Mapping[str, Mapping[str, Any]]) -> None:
        self.path = file.path
        self._file = file
        self._groups = groups

    def __getitem__(self, name: str) -> Spectrum:
        components = self._file.tensor(f"{name}/components")
        variance, total, n_samples = self.variances(name)
        mean = self._file.tensor(f"{name}/mean")
        if components.shape != (len(variance), len(mean)) or not bool(components.isfinite().all()):
            raise self._file.changed(f"group {name!r}")
        return Spectrum(components, variance, total, mean, n_samples)

    def variances(self, name: str) -> tuple[Tensor, float, int]:
        """Read the variances and the number of rows alone."""
        group = self._groups[name]
        return self._file.tensor(f"{name}/explained_variance"), float(group["total_variance"]), int(group["n_samples"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)


class _StoredGradients(Mapping[str, GradientSpectrum]):
    """What the loss says, in a file, read when it is asked for."""

    def __init__(self, file: TensorFile, numbers: Mapping[str, Mapping[str, Any]]) -> None:
        self._file = file
        self._numbers = numbers

    def __getitem__(self, name: str) -> GradientSpectrum:
        numbers = self._numbers[name]
        try:
            return GradientSpectrum.unpack(numbers, lambda part: self._file.tensor(f"{weighted_group(name)}/{part}"))
        except (TypeError, ValueError) as error:
            raise self._file.changed(f"the gradient of layer {name!r}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def _variances(groups: Mapping[str, Spectrum], name: str) -> tuple[Tensor, float, int]:
    if isinstance(groups, _StoredGroups):
        return groups.variances(name)
    return groups[name].explained_variance.clone(), groups[name].total_variance, groups[name].n_samples


def _plain(target: Target) -> tuple[Any, ...]:
    extras = target.extras()
    return target.kind, target.in_features, target.out_features, *([extras] if extras else [])
