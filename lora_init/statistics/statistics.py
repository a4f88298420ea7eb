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
        # Settings are plain values of a file, where anything may stand.
        if isinstance(rho, (int, float)) and 1.0 <= rho < 1e6:
            return float(rho)
        return None


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
        gradients = ", gradients" if self.gradients else ""
        return (
            f"Statistics({len(self)} layers of {made.model_class}, {len(self.groups)} inputs, "
            f"{made.n_batches} batches, {made.n_samples:,} rows{gradients})"
        )

    def _repr_html_(self) -> str:
        table = self.to_pandas().to_html(max_rows=20, float_format="{:.4g}".format, border=0)
        return f"<p>{escape(repr(self))}</p>{table}"

    def to_pandas(self) -> pd.DataFrame:
        """Make a table with a row for each layer: kind, widths, group, components, rows, variance and shares of it.

        `captured` is the share of the variance that the components hold, `held_out` what they held of new batches.
        """
        import pandas as pd

        rows = {}
        for name, group in self.group_of.items():
            target, spectrum = self.targets[name], self.groups[group]
            rows[name] = {
                "kind": target.kind,
                "in_features": target.in_features,
                "out_features": target.out_features,
                "group": group,
                "n_components": spectrum.n_components,
                "n_samples": spectrum.n_samples,
                "total_variance": spectrum.total_variance,
                "captured": float(spectrum.explained_variance_ratio.sum()),
                "held_out": self.held_out.get(group, math.nan),
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")

    def __getitem__(self, name: str) -> Spectrum:
        if name not in self.group_of:
            raise KeyError(name)
        shared = self.groups[self.group_of[name]]
        # A frozen dataclass holds its tensors, but their values can be changed in place.
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
        # This and the next two copy no components, which are nearly all of the memory of a spectrum.
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
            raise KeyError(name)  # as for any other mapping
        if name not in self.gradients:
            raise LoraInitError(
                "these statistics have no gradients. Collect them with {gradients}, from data with labels.",
                gradients=True,
            )
        return self.gradients[name]

    def of_experts(self, name: str) -> list[Spectrum]:
        """Return the spectrum of each expert of a fused parameter; with too few rows of its own, of all experts."""
        few = set(self.experts_with_few_rows(name))
        pooled = self[name]  # one copy for all of them
        spectra = []
        for expert in range(self.targets[name].experts):
            if expert in few:
                spectra.append(pooled)
            else:
                spectra.append(self.groups[expert_group(name, expert)])
        return spectra

    def experts_with_few_rows(self, name: str) -> list[int]:
        """Find the experts of a fused parameter that read fewer than two rows for each component to be found."""
        least = 2 * len(self.explained_variance(name))
        experts = range(self.targets[name].experts)
        return [expert for expert in experts if self.rows_of_expert(name, expert) < least]

    def rows_of_expert(self, name: str, expert: int) -> int:
        """Count the rows that an expert of a fused parameter has read."""
        group = expert_group(name, expert)
        if group not in self.groups:  # the router sent it none
            return 0
        return self.groups[group].n_samples

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
        return _with_notes(merge_statistics([self, *others], weights))

    def continued_by(self, rest: Statistics) -> Statistics:
        """Merge a pass that was interrupted with the rest of it: other rows, even where they are alike."""
        return _with_notes(merge_statistics([self, rest], one_pass=True))

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
                "held_out": None if math.isnan(share) else share,  # JSON has no NaN
            }
        layers: dict[str, list[Any]] = {}
        for name, target in self.targets.items():
            layers[name] = [self.group_of[name], target.kind, target.in_features, target.out_features]
            if extras := target.extras():  # left out for most layers, as docs/file-formats.md specifies it
                layers[name].append(extras)
        header: dict[str, Any] = {
            "provenance": asdict(self.provenance),
            "layers": layers,
            "groups": groups,
            "unsupported": self.unsupported,
            "gradients": {},
            "sizes": self.sizes,
        }
        for name, gradient in self.gradients.items():
            header["gradients"][name], parts = gradient.pack()
            for part, tensor in parts.items():
                tensors[f"{name}{_BY_GRADIENT}/{part}"] = tensor
        return write_tensors(path, FORMAT, FORMAT_VERSION, header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read a file that `save` wrote, and check all of it.

        Raises:
            LoraInitError: The file is no statistics file, is truncated or was changed, or is of a newer version.
        """
        file = TensorFile(path, FORMAT, FORMAT_VERSION)
        with file.checking("its content"):
            header = {"sizes": {}, **file.header}  # older files have none
            groups: dict[str, Spectrum] = {}
            held_out: dict[str, float] = {}
            for name, group in header["groups"].items():
                groups[name] = _read_group(file, name, group)
                share = group["held_out"]
                held_out[name] = math.nan if share is None else float(share)
            group_of: dict[str, str] = {}
            targets: dict[str, Target] = {}
            for name, layer in header["layers"].items():
                group_of[name] = str(layer[0])
                _, kind, d_in, d_out, *extras = layer
                targets[name] = read_target(name, kind, d_in, d_out, extras[0] if extras else {})
            gradients: dict[str, GradientSpectrum] = {}
            for name, numbers in header["gradients"].items():
                gradients[name] = GradientSpectrum.unpack(numbers, partial(_floats, file, f"{name}{_BY_GRADIENT}"))
            statistics = cls(
                groups=groups,
                group_of=group_of,
                targets=targets,
                provenance=read_fields(Provenance, header["provenance"]),
                held_out=held_out,
                unsupported=header["unsupported"],
                gradients=gradients,
                sizes={name: Sizes(*map(float, pair)) for name, pair in header["sizes"].items()},
                path=file.path,
            )
            statistics._check(file)  # digests say that a file is unchanged, not that its parts fit each other
        return statistics

    def _check(self, file: TensorFile) -> None:
        """Refuse a file whose parts do not fit each other."""
        if not is_of(self.unsupported, dict[str, str]):
            raise file.changed("its list of unsupported layers")
        # Not all layers have sizes or gradients, but only layers do.
        if not {*self.gradients, *self.sizes} <= self.group_of.keys():
            raise file.changed("its list of layers")
        for pair in self.sizes.values():
            if not all(0.0 <= size < math.inf for size in pair):
                raise file.changed("its sizes of inputs and outputs")
        for name, group in self.group_of.items():
            if len(self.groups[group].mean) != self.targets[name].in_features:
                raise file.changed(f"the width of layer {name!r}")


def notes_on_experts(stats: Statistics) -> list[str]:
    """Name the experts that start from the rows of all experts."""
    few: dict[str, list[int]] = {}
    counts, sizes, needed = [], [], []
    for name, target in stats.targets.items():
        if experts := stats.experts_with_few_rows(name):
            few[name] = experts
            counts.append(len(experts))
            sizes.append(target.experts or 0)
            needed.append(2 * len(stats.explained_variance(name)))
    if not few:
        return []
    first = next(iter(few.values()))
    shown = ", ".join(map(str, first[:8]))
    if len(first) > 8:
        shown += ", ..."
    if len(few) > 1:
        shown += " in the first"
    text = f"{span(counts)} of {span(sizes)} experts read fewer than {span(needed)} rows"
    return [f"{some([*few])}: {text} and start from the rows of all experts: {shown}."]


def _with_notes(merged: Statistics) -> Statistics:
    """Note which experts have few rows: after the merge, as few in each part may be enough in all."""
    notes = [*merged.provenance.notes, *notes_on_experts(merged)]
    return replace(merged, provenance=replace(merged.provenance, notes=notes))


def _read_group(file: TensorFile, name: str, group: Mapping[str, Any]) -> Spectrum:
    """Read a group's spectrum; raise if its tensors do not fit each other, or no pass can have found them."""
    components = _floats(file, name, "components")
    along = _floats(file, name, "explained_variance")
    mean = _floats(file, name, "mean")
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
