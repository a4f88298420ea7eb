"""The plan: how many ranks each layer has, what that costs and explains, how it came about, and its file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_init.errors import LoraInitError
from lora_init.files import as_plain, read_fields, read_json, write_whole
from lora_init.layers.grid import layer_grid
from lora_init.layers.targets import Target, read_target
from lora_init.on_demand import on_demand
from lora_init.planning.budgets import Budget, bytes_per_parameter
from lora_init.planning.lora_config import listed_or_pattern, lora_config
from lora_init.statistics.statistics import Provenance, Statistics

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class _OfLayers(dict[str, Any]):
    """What a plan says about each layer, by name. One that was made by hand may lack it."""

    def __missing__(self, name: str) -> Any:
        raise LoraInitError(
            f"the plan was made by hand and does not know enough about layer {name!r}. Give targets= and explained= to "
            "RankAllocation, or let allocate_ranks make the plan."
        )


@dataclass(frozen=True, eq=False, repr=False)
class RankAllocation(Mapping[str, int]):
    """The rank of every layer, in model order, and how it was chosen. A layer of rank 0 gets no adapter.

    Attributes:
        ranks: Layer name to rank. The allocation itself is a mapping with the same content.
        rank: Average rank: `r` of the adapter, and the rank that `lora_alpha` is relative to.
        targets: Kind and widths of each layer, from which parameters are counted.
        explained: Share of each layer's variance that its ranks explain, in [0, 1]; 1 if its rows are constant.
        policy: Name of the policy.
        budget: The budget that was spent; None for an allocation made by hand.
        settings: Other arguments that shaped the allocation, as plain values.
        provenance: Where the statistics come from; None for an allocation made by hand.
        unsupported: Targeted layers that have no statistics, name to kind: PEFT starts them, with `rank`.
        excluded: Layers that did not take part.
        notes: What a user should know about the plan, a sentence each.
    """

    ranks: Mapping[str, int]
    rank: int
    targets: Mapping[str, Target] = field(default_factory=dict)
    explained: Mapping[str, float] = field(default_factory=dict)
    policy: str = ""
    budget: Budget | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Provenance | None = None
    unsupported: Mapping[str, str] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Copies, so that no change of a caller's mapping reaches the plan; a frozen dataclass is set only in this way.
        for name in ("ranks", "settings", "unsupported"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        for name in ("targets", "explained"):
            object.__setattr__(self, name, _OfLayers(getattr(self, name)))

    def __getitem__(self, name: str) -> int:
        return self.ranks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)

    def __repr__(self) -> str:
        used = [rank for rank in self.ranks.values() if rank]
        span = "0"
        if used:
            span = f"{min(used)} to {max(used)}"
        return f"RankAllocation({len(used)} of {len(self)} layers with rank {span}, total rank {self.total_rank:,})"

    def _repr_html_(self) -> str:
        return str(rank_grid(self.ranks).to_html(na_rep="·", float_format="{:.0f}".format, border=0))

    def plot(self) -> Figure:
        """Draw the ranks as a heat map, blocks from top to bottom, and return the matplotlib figure."""
        figure: Figure = on_demand("heat map")(self.ranks)
        return figure

    def to_pandas(self) -> pd.DataFrame:
        """Return a table with a row for each layer, by name: rank, widths, parameters, explained variance.

        Raises:
            LoraInitError: A plan made by hand, without the widths of its layers.
        """
        import pandas as pd

        columns: dict[str, list[float]] = {
            "rank": [], "in_features": [], "out_features": [], "parameters": [], "explained_variance": [],
        }  # fmt: skip
        for name, rank in self.ranks.items():
            target = self.targets[name]
            columns["rank"].append(rank)
            columns["in_features"].append(target.in_features)
            columns["out_features"].append(target.out_features)
            columns["parameters"].append(target.parameters(rank))
            # A plan made by hand may lack the shares; the widths it must have.
            columns["explained_variance"].append(self.explained.get(name, math.nan))
        return pd.DataFrame(columns, index=pd.Index(list(self.ranks), name="layer"))

    @property
    def total_rank(self) -> int:
        """Sum of the ranks of all layers."""
        return sum(self.ranks.values())

    @property
    def parameters(self) -> int:
        """Trainable parameters of the adapter: rank x (d_in + d_out), summed over the layers."""
        return sum(self.targets[name].parameters(rank) for name, rank in self.ranks.items())

    @property
    def explained_variance(self) -> float:
        """Mean over the layers that take part of the share of their variance that their ranks explain."""
        shares = self._shares()
        if not shares:
            return 0.0
        return sum(shares) / len(shares)

    def _shares(self) -> list[float]:
        # Excluded layers have rank 0 because of the user, not of the policy: they would only lower the mean.
        without = set(self.excluded)
        return [self.explained[name] for name in self.ranks if name not in without]

    def megabytes(self, dtype: str = "float32") -> float:
        """Size of the saved adapter, 10^6 bytes: parameters times the bytes of `dtype`."""
        return self.parameters * bytes_per_parameter(dtype) / 10**6

    @property
    def spent(self) -> float:
        """The part of its budget that the plan takes, in the budget's unit."""
        if self.budget is None or self.budget.unit == "ranks":
            return self.total_rank
        if self.budget.unit == "variance":
            if self.budget.coverage == "every-layer":
                return min(self._shares())  # every layer must reach the share, so the lowest counts
            return self.explained_variance
        if self.budget.unit == "bytes":
            return self.parameters * bytes_per_parameter(self.budget.dtype)
        return self.parameters

    def check_model(self, fingerprint: str, name: str) -> None:
        """Check that the plan was made for the model of a fingerprint. One made by hand has none and fits any model."""
        made = self.provenance
        if made is not None and made.fingerprint and fingerprint and made.fingerprint != fingerprint:
            raise LoraInitError(
                f"the plan was made for {made.model_id or made.model_class} (fingerprint {made.fingerprint[:12]}), and "
                f"this is another: {name} ({fingerprint[:12]}). Make a plan from statistics of this model."
            )

    def check(self, stats: Statistics) -> None:
        """Check that the plan fits these statistics: of the same model, with all its layers."""
        made = stats.provenance
        self.check_model(made.fingerprint, f"the model of the statistics, {made.model_id or made.model_class}")
        for name in self.ranks:
            if name not in stats:
                raise LoraInitError(
                    f"the plan names layer {name!r}, which the statistics do not have. "
                    "Plan again from these statistics."
                )


def source_text(plan: RankAllocation) -> str:
    """Describe what a plan was computed from."""
    made = plan.provenance
    if made is None:
        return "a plan made by hand"
    model = made.model_id or made.model_class or "a model without a name"
    rows = "rows that were not counted"
    if made.n_samples:
        rows = f"{made.n_samples:,} rows in {made.n_batches} batches"
    centered = "centered (PCA)" if made.center else "not centered (second moment)"
    return f"the inputs of each layer of {model} on {made.data or 'data not described'}: {rows}, {centered}"


def plan_text(plan: RankAllocation) -> str:
    """Describe what was asked for, in the words of the command line."""
    parts = [f"policy {plan.policy or 'by hand'}, budget {plan.budget or 'by hand'}"]
    for key, value in plan.settings.items():
        if isinstance(value, float):
            parts.append(f"{key}={value:g}")  # 2 and not 2.0, as one types it
        else:
            parts.append(f"{key}={value}")
    return ", ".join(parts)


def plan_config(plan: RankAllocation, scaling: float, use_rslora: bool = False) -> dict[str, Any]:
    """Write the LoraConfig of a plan as plain values; all layers have one scaling."""
    named: list[str] = []
    without: list[str] = []
    for name, rank in plan.items():
        if rank:
            named.append(name)
        else:
            without.append(name)
    # Fused experts are parameters and not modules: PEFT has another argument for these.
    fused: list[str] = []
    for name in named:
        if name in plan.targets and plan.targets[name].experts:  # a plan made by hand may have no targets
            fused.append(name)
    for name, kind in plan.unsupported.items():
        if kind == "Parameter":
            fused.append(name)
    modules: list[str] = []
    for name in (*named, *plan.unsupported):
        if name not in fused:
            modules.append(name)
    task_type = None
    if plan.provenance:
        task_type = plan.provenance.task_type
    return lora_config(
        plan,
        plan.rank,
        scaling,
        listed_or_pattern(modules, without),
        use_rslora,
        target_parameters=fused,
        task_type=task_type,
    )


FORMAT = "lora_init.plan"
FORMAT_VERSION = 1
_ROUNDING = 1e-9  # by which a share of the variance, a sum of ratios, may exceed 1


def plan_to_dict(plan: RankAllocation) -> dict[str, Any]:
    """Lay a plan out as plain values: everything in it, and totals for readers that are not this package."""
    layers = {}
    n_adapted = 0
    for name, rank in plan.items():
        if rank > 0:
            n_adapted += 1
        target = plan.targets[name]
        layers[name] = {
            "rank": rank,
            "kind": target.kind,
            "in_features": target.in_features,
            "out_features": target.out_features,
            **target.extras(),
            # Not read back: it follows from the widths, and saves other readers the count.
            "parameters": target.parameters(rank),
            "explained_variance": plan.explained[name],
        }
    budget, provenance = None, None  # of a plan made by hand
    if plan.budget:
        budget = asdict(plan.budget)
    if plan.provenance:
        provenance = asdict(plan.provenance)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "rank": plan.rank,
        "policy": plan.policy,
        "budget": budget,
        "settings": as_plain(plan.settings),
        "totals": {
            "layers": n_adapted,
            "total_rank": plan.total_rank,
            "parameters": plan.parameters,
            "megabytes_float32": round(plan.megabytes(), 6),  # a byte
            "explained_variance": round(plan.explained_variance, 9),
        },
        "layers": layers,
        "excluded": list(plan.excluded),
        "unsupported": dict(plan.unsupported),
        "notes": list(plan.notes),
        "provenance": provenance,
    }


def save_plan(plan: RankAllocation, path: str | Path) -> Path:
    """Write a plan to a JSON file. A crash leaves the old file or none, never half a one."""
    path = Path(path).expanduser()
    # Laid out before the file is touched: a plan made by hand may not know enough for it.
    text = json.dumps(plan_to_dict(plan), indent=1, ensure_ascii=False) + "\n"
    write_whole(path, text.encode())
    return path


def load_plan(path: str | Path) -> RankAllocation:
    """Read a plan. Whether it fits a model is checked when it is used, by `RankAllocation.check`."""
    path = Path(path).expanduser()
    try:
        content = read_json(path)
    except OSError as error:
        reason = error.strerror or error
        raise LoraInitError(
            f"{path}: the plan could not be read: {reason}. Name a file that `lora-init ranks --output` wrote."
        ) from error
    if content.get("format") != FORMAT:
        raise LoraInitError(f"{path} is not a plan of lora_init. `lora-init ranks STATS --output FILE` writes one.")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise LoraInitError(
            f"{path} is a plan of format version {version!r}, and this lora_init reads {FORMAT_VERSION}. "
            "Install a newer one, or plan again."
        )
    try:
        return _plan_from(content)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise LoraInitError(f"{path} is damaged: {type(error).__name__} {error}. Plan again.") from error


def _plan_from(content: Mapping[str, Any]) -> RankAllocation:
    """Read the fields that this version knows; others, of older and later versions, are left alone."""
    layers = content["layers"]
    for name, layer in layers.items():
        _check_layer(name, layer)
    if type(content["rank"]) is not int or content["rank"] < 1:
        raise ValueError(f"rank={content['rank']!r}")
    ranks: dict[str, int] = {}
    targets: dict[str, Target] = {}
    explained: dict[str, float] = {}
    for name, layer in layers.items():
        ranks[name] = layer["rank"]
        targets[name] = read_target(name, layer["kind"], layer["in_features"], layer["out_features"], layer)
        explained[name] = float(layer["explained_variance"])
    return RankAllocation(
        ranks=ranks,
        rank=content["rank"],
        targets=targets,
        explained=explained,
        policy=str(content["policy"]),
        budget=_read_if_given(Budget, content["budget"]),
        settings=content["settings"],
        provenance=_read_if_given(Provenance, content["provenance"]),
        unsupported=content["unsupported"],
        excluded=tuple(map(str, content["excluded"])),
        notes=tuple(map(str, content["notes"])),
    )


def _check_layer(name: str, layer: Any) -> None:
    """Raise ValueError if a layer's rank, widths or share are impossible."""
    rank, d_in, d_out = layer["rank"], layer["in_features"], layer["out_features"]
    # `type`, since True is an instance of int.
    possible = all(type(number) is int for number in (rank, d_in, d_out)) and 0 <= rank <= d_in and d_out > 0
    if not possible or not 0.0 <= float(layer["explained_variance"]) <= 1.0 + _ROUNDING:
        raise ValueError(f"layer {name!r} has {layer}")


def _read_if_given(kind: Any, content: Any) -> Any:
    if not content:  # null: the plan was made by hand
        return None
    return read_fields(kind, content)


def rank_grid(ranks: Mapping[str, int]) -> pd.DataFrame:
    """Lay ranks out as block x kind; NaN where there is no adapter."""
    import pandas as pd

    columns: dict[str, dict[int, float]] = {}
    for kind, layers in layer_grid(ranks).by_kind.items():
        columns[kind] = {}
        for block, name in layers.items():
            columns[kind][block] = ranks[name] or math.nan
    table = pd.DataFrame(columns, dtype=float).sort_index()
    return table.rename(index={-1: ""})  # of layers outside any block
