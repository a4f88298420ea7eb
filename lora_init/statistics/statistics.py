"""What was learned from the data: one spectrum per layer, where it came from, and its file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lora_init.errors import LoraInitError
from lora_init.files import is_of, read_fields
from lora_init.layers.grid import some, span
from lora_init.layers.rows import expert_group
from lora_init.layers.targets import Target, read_target
from lora_init.statistics.gradient_spectrum import GradientSpectrum
from lora_init.statistics.merging import merge_statistics
from lora_init.statistics.spectrum import Sizes, Spectrum
from lora_init.statistics.tensorfile import TensorFile, write_tensors

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "lora_init.statistics"
FORMAT_VERSION = 2
SPARE = 2.0  # components that a pass keeps for each rank by default, so that ranks can be planned from its statistics
_BY_GRADIENT = " by gradient"  # follows the name of a layer in the names of its tensors


@dataclass(frozen=True)
class Provenance:
    """Which model, which data and which settings the statistics come from.

    Attributes:
        model_id: `config.name_or_path` of the model; empty if it has none.
        model_class: Name of the model's class.
        fingerprint: Hash of the names and shapes of the weights and of a sample of their values, see `fingerprint`.
        n_parameters: Number of parameters of the model; 0 if unknown.
        n_linear: Number of layers that `"all-linear"` means in the part of the model that was read; 0 if unknown.
        target_modules: As given to `collect`.
        target_parameters: As given to `collect`.
        exclude_modules: As given to `collect`.
        task_type: PEFT's task type, or None.
        data: Description of the data in words.
        center: Whether the mean was subtracted (PCA) or not (second moment).
        token_mask: `"attention"` or `"labels"`: which tokens were counted.
        seed: Seed of the decomposition.
        rank: Average rank that the pass was made for.
        n_batches: Batches used; not those that failed and were left out, see `collect`.
        n_samples: Rows of the layer that saw most.
        stop_reason: `"converged"`, `"exhausted"`, `"max_batches"`, `"interrupted"` or `"failed"`; those of all parts,
            with commas, if statistics were merged.
        seconds: Where the time went: `forward`, `decomposition`, `data`.
        versions: Versions of lora_init, torch, transformers and Python.
        notes: What a user should know about single layers, a sentence each.
        gradients: Whether backward passes were run, too; in all parts, if statistics were merged.
        n_labels: Labels whose loss the gradients are of.
        complete: Whether the pass came to its end; a pass that was interrupted or failed can be resumed.
        settings: Further settings of the pass, see `collect`; empty if they are unknown.
        quantisation: How the model was quantized, as `quantization_config` of `from_pretrained` says it; else None.
            Spelled as in files.
        keeps: Share of what a start from these statistics captures that it would keep on other data, estimated from two
            halves of the batches; None if unknown, as after a merge.
    """

    model_id: str
    model_class: str
    fingerprint: str
    target_modules: str | list[str]
    target_parameters: list[str] | None = None
    n_parameters: int = 0
    n_linear: int = 0
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
    quantisation: dict[str, Any] | None = None
    keeps: float | None = None

    @property
    def model(self) -> str:
        """Class and id of the model."""
        return f"{self.model_class} {self.model_id}".strip()

    @property
    def rho(self) -> float | None:
        """The rho of the pass; None if the file does not say one."""
        rho = self.settings.get("rho")
        return float(rho) if isinstance(rho, (int, float)) and 1.0 <= rho < 1e6 else None


@dataclass(frozen=True, eq=False, repr=False)
class Statistics(Mapping[str, Spectrum]):
    """One `Spectrum` per layer, in model order, with provenance.

    Layers that read the same tensor (q, k and v) share one stored decomposition; `stats[name]` returns tensors of its
    own each time, so that nothing a caller does to them reaches another layer.

    Attributes:
        groups: Decomposition of each input group, by the name of its first layer.
        group_of: For each layer, in model order, the name of its group.
        targets: For each layer, its kind and widths.
        provenance: Where all this comes from.
        held_out: For each group, the share of the variance of the last batches that the components found before them
            captured, in [0, 1]; NaN where fewer than three batches were seen, and where statistics were merged.
        unsupported: Targeted layers without a spectrum (no rows to learn from, or never ran), name to kind.
        gradients: For each layer the gradient of the loss by its weight; empty if there were no backward passes.
        sizes: For each layer, how large its input and output are, from which the learning rate follows. Layers whose
            output no hook sees have none, and neither have older files.
        path: The file that `load` read; None if these statistics are from no file.
    """

    groups: Mapping[str, Spectrum]
    group_of: Mapping[str, str]
    targets: Mapping[str, Target]
    provenance: Provenance
    held_out: Mapping[str, float] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)
    gradients: Mapping[str, GradientSpectrum] = field(default_factory=dict)
    sizes: Mapping[str, Sizes] = field(default_factory=dict)
    path: Path | None = None

    def __repr__(self) -> str:
        made = self.provenance
        return (
            f"Statistics({len(self)} layers of {made.model_class}, {len(self.groups)} inputs, "
            f"{made.n_batches} batches, {made.n_samples:,} rows{', gradients' if self.gradients else ''})"
        )

    def _repr_html_(self) -> str:
        table = self.to_pandas().to_html(max_rows=20, float_format="{:.4g}".format, border=0)
        return f"<p>{escape(repr(self))}</p>{table}"

    def to_pandas(self) -> pd.DataFrame:
        """Make a table with a row for each layer: kind, widths, group, components, rows, variance and shares of it.

        `captured` is the share of the variance that the components hold, `held_out` what they held of new batches.
        """
        import pandas as pd

        rows = {
            name: {
                "kind": self.targets[name].kind,
                "in_features": self.targets[name].in_features,
                "out_features": self.targets[name].out_features,
                "group": group,
                "n_components": self.groups[group].n_components,
                "n_samples": self.groups[group].n_samples,
                "total_variance": self.groups[group].total_variance,
                "captured": float(self.explained_variance_ratio(name).sum()),
                "held_out": self.held_out.get(group, math.nan),
            }
            for name, group in self.group_of.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")

    def __getitem__(self, name: str) -> Spectrum:
        if name not in self.group_of:
            raise KeyError(name)
        shared = self.groups[self.group_of[name]]
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
        """Variance along each component of a layer, float64 [k]."""
        return self.groups[self.group_of[name]].explained_variance.clone()

    def total_variance(self, name: str) -> float:
        """Variance of a layer's rows over all directions."""
        return self.groups[self.group_of[name]].total_variance

    def explained_variance_ratio(self, name: str) -> Tensor:
        """Share of the total variance along each component of a layer, float64 [k]."""
        return self.groups[self.group_of[name]].explained_variance_ratio

    def gradient(self, name: str) -> GradientSpectrum:
        """Return the mean gradient of the loss by the weight of a layer, and what goes with it.

        With `token_mask="labels"` it is the part of the gradient that comes from the tokens that predict a label.

        Raises:
            LoraInitError: The statistics were collected without gradients.
        """
        if name not in self.group_of:
            raise KeyError(name)
        if name not in self.gradients:
            raise LoraInitError(
                "these statistics have no gradients. Collect them with {gradients}, from data with labels.",
                gradients=True,
            )
        return self.gradients[name]

    def of_experts(self, name: str) -> list[Spectrum]:
        """Return the spectrum of each expert of a fused parameter; with too few rows of its own, of all experts."""
        few, pooled, n_experts = set(self.experts_with_few_rows(name)), self[name], self.targets[name].experts
        return [pooled if i in few else self.groups[expert_group(name, i)] for i in range(n_experts)]

    def experts_with_few_rows(self, name: str) -> list[int]:
        """Find the experts of a fused parameter that read fewer than two rows for each component to be found."""
        least = 2 * len(self.explained_variance(name))
        counts = [self.rows_of_expert(name, expert) for expert in range(self.targets[name].experts)]
        return [expert for expert, count in enumerate(counts) if count < least]

    def rows_of_expert(self, name: str, expert: int) -> int:
        """Count the rows that an expert of a fused parameter has read."""
        group = expert_group(name, expert)
        return self.groups[group].n_samples if group in self.groups else 0

    def merge(self, *others: Statistics, weights: Sequence[float] | None = None) -> Statistics:
        """Make the statistics of all rows that these and the others have seen; none of them is changed.

        All must come from one model, with the same layers, `center`, `token_mask` and `task_type`. Without weights each
        row counts once: shards of one data set, or more of it later. With weights the data sets count by these shares
        whatever their numbers of rows are: the second moment of a layer's input is the weighted sum of theirs. Of each
        part an expert reads the rows that the router sends to it.

        Counts, means and total variances are exact. What each part has left out is taken to be the same along all
        directions, see `merging.mix`. As many components are kept as all parts have. Layers that ran in some parts only
        come from those. Gradients are merged if all have them: the mean gradient is that of the mean loss over all
        labels, with weights of the weighted sum of the mean losses; the importance, which needs the model's weights, is
        unknown, NaN, so that the policy `gora` is refused. `held_out` is unknown, NaN: nobody has measured how
        much of new rows the common components capture.

        Rows that two parts share count twice; parts that begin with the same ones are refused. Merge several parts in
        one call: each call leaves something out. Fields of `provenance` that cannot be added or listed, such as the
        seed, come from the first part; the notes describe every part.

        Args:
            others: Statistics.
            weights: Share of each, these first; positive, their sum 1.

        Raises:
            LoraInitError: Another model, other layers or settings; nothing to merge with; the same rows twice;
                weights that are not one share for each.

        Example:
            >>> import torch
            >>> from lora_init import collect
            >>> model, batches = torch.nn.Sequential(torch.nn.Linear(8, 4)), [torch.randn(32, 8) for _ in range(4)]
            >>> one, other = (collect(model, part, rank=2) for part in (batches[:1], batches[1:]))
            >>> one.merge(other)["0"].n_samples, one.merge(other, weights=[0.7, 0.3]).provenance.n_batches
            (128, 4)
        """
        merged = merge_statistics([self, *others], weights)
        notes = [*merged.provenance.notes, *notes_on_experts(merged)]
        return replace(merged, provenance=replace(merged.provenance, notes=notes))

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file; its format is in docs/file-formats.md. A crash leaves no half file.

        Raises:
            LoraInitError: The file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        groups: dict[str, dict[str, Any]] = {}
        for name, spectrum in self.groups.items():
            tensors[f"{name}/components"] = spectrum.components
            tensors[f"{name}/explained_variance"] = spectrum.explained_variance
            tensors[f"{name}/mean"] = spectrum.mean
            share = self.held_out.get(name, math.nan)
            groups[name] = {
                "total_variance": spectrum.total_variance,
                "n_samples": spectrum.n_samples,
                "held_out": None if math.isnan(share) else share,
            }
        layers = {
            name: [self.group_of[name], target.kind, target.in_features, target.out_features, target.extras()]
            for name, target in self.targets.items()
        }
        header: dict[str, Any] = {
            "provenance": asdict(self.provenance),
            "layers": {name: layer if layer[-1] else layer[:-1] for name, layer in layers.items()},
            "groups": groups,
            "unsupported": self.unsupported,
            "gradients": {},
            "sizes": self.sizes,
        }
        for name, gradient in self.gradients.items():
            header["gradients"][name], parts = gradient.pack()
            tensors |= {f"{name}{_BY_GRADIENT}/{part}": tensor for part, tensor in parts.items()}
        return write_tensors(path, FORMAT, FORMAT_VERSION, header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read a file that `save` wrote, and check all of it.

        Raises:
            LoraInitError: The file is no statistics file, is truncated or was changed, or is of a newer version.
        """
        file = TensorFile(path, FORMAT, FORMAT_VERSION)
        with file.checking("its content"):
            header = {"sizes": {}, **file.header}
            groups = header["groups"]
            shares = {name: group["held_out"] for name, group in groups.items()}
            statistics = cls(
                groups={name: _read_group(file, name, group) for name, group in groups.items()},
                group_of={name: str(layer[0]) for name, layer in header["layers"].items()},
                targets={
                    name: read_target(name, kind, d_in, d_out, extras[0] if extras else {})
                    for name, (_, kind, d_in, d_out, *extras) in header["layers"].items()
                },
                provenance=read_fields(Provenance, header["provenance"]),
                held_out={name: math.nan if share is None else float(share) for name, share in shares.items()},
                unsupported=header["unsupported"],
                gradients={
                    name: GradientSpectrum.unpack(numbers, partial(_floats, file, f"{name}{_BY_GRADIENT}"))
                    for name, numbers in header["gradients"].items()
                },
                sizes={name: Sizes(*map(float, pair)) for name, pair in header["sizes"].items()},
                path=file.path,
            )
            statistics._check(file)
        return statistics

    def _check(self, file: TensorFile) -> None:
        """Refuse a file whose parts do not fit each other."""
        if not is_of(self.unsupported, dict[str, str]):
            raise file.changed("its list of unsupported layers")
        if not {*self.gradients, *self.sizes} <= self.group_of.keys():
            raise file.changed("its list of layers")
        if not all(0.0 <= size < math.inf for pair in self.sizes.values() for size in pair):
            raise file.changed("its sizes of inputs and outputs")
        for name, group in self.group_of.items():
            if len(self.groups[group].mean) != self.targets[name].in_features:
                raise file.changed(f"the width of layer {name!r}")


def notes_on_experts(stats: Statistics) -> list[str]:
    """Name the experts that start from the rows of all experts."""
    few = {name: numbers for name in stats.targets if (numbers := stats.experts_with_few_rows(name))}
    if not few:
        return []
    counts, needed = span([len(few[n]) for n in few]), [2 * len(stats.explained_variance(n)) for n in few]
    of_all, (first, *_) = span([stats.targets[name].experts or 0 for name in few]), few.values()
    shown = ", ".join(map(str, first[:8])) + (", ..." if len(first) > 8 else "") + " in the first" * (len(few) > 1)
    said = f"{counts} of {of_all} experts read fewer than {span(needed)} rows and start from the rows of all experts"
    return [f"{some([*few])}: {said}: {shown}."]


def _read_group(file: TensorFile, name: str, group: Mapping[str, Any]) -> Spectrum:
    components, along, mean = (_floats(file, name, part) for part in ("components", "explained_variance", "mean"))
    total, n_samples = float(group["total_variance"]), int(group["n_samples"])
    fit = along.dim() == 1 and components.shape == (len(along), len(mean))
    possible = 0.0 <= total < math.inf and n_samples >= 0 and bool((along >= 0.0).all())
    if not fit or not possible or bool((components.square().sum(1) > 1.001).any()):  # rows are of length 1, in float32
        raise file.changed(f"group {name!r}")
    return Spectrum(components, along, total, mean, n_samples)


def _floats(file: TensorFile, name: str, part: str) -> Tensor:
    tensor = file.tensor(f"{name}/{part}")
    if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
        raise file.changed(f"tensor {name + '/' + part!r}")
    return tensor
