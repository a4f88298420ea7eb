"""The plan: how many ranks each layer has, what that costs and explains, and how it came about."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lora_init.errors import LoraInitError
from lora_init.files import write_whole
from lora_init.layers.targets import Target, read_target
from lora_init.planning.budgets import Budget, adapter_bytes
from lora_init.statistics.statistics import Provenance, Statistics


@dataclass(frozen=True, eq=False)
class RankAllocation(Mapping[str, int]):
    """The rank of every layer, in model order, and how it came about. A layer of rank 0 gets no adapter.

    Attributes:
        ranks: Layer name to rank. The allocation itself is a mapping with the same content.
        rank: Average rank: `r` of the adapter, and what `lora_alpha` is relative to.
        targets: Kind and widths of each layer; what the accounting is made from.
        explained: Share of each layer's variance that its ranks explain, in [0, 1]; 1 if its rows are constant.
        policy: Name of the policy.
        budget: What was to be spent; None for an allocation made by hand.
        settings: Other arguments that shaped it, as plain values.
        provenance: Of the statistics; None for an allocation made by hand.
        unsupported: Targeted layers that have no statistics, name to kind: PEFT starts them, with `rank`.
        excluded: Layers that did not take part.
        unsettled: Layers whose rank is decided by less than the sampling error: lowest and highest rank it might be.
        error_source: What the sampling error was estimated from, in words; empty if it could not be.
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
    unsettled: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    error_source: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("ranks", "targets", "explained", "settings", "unsupported", "unsettled"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __getitem__(self, name: str) -> int:
        return self.ranks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)

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
        return sum(shares) / len(shares)

    def _shares(self) -> list[float]:
        without = set(self.excluded)
        return [self.explained[name] for name in self.ranks if name not in without]

    def megabytes(self, dtype: str = "float32") -> float:
        """Size of the saved adapter, 10^6 bytes, exact for the file that PEFT writes."""
        return adapter_bytes(self.ranks, self.targets, dtype) / 10**6

    @property
    def spent(self) -> float:
        """What the plan takes of its budget, in the budget's unit."""
        unit = self.budget.unit if self.budget else "ranks"
        if unit == "variance":
            every = self.budget is not None and self.budget.coverage == "every-layer"
            return min(self._shares()) if every else self.explained_variance
        if unit == "bytes" and self.budget:
            return adapter_bytes(self.ranks, self.targets, self.budget.dtype)
        return self.parameters if unit == "parameters" else self.total_rank

    def check_model(self, fingerprint: str, name: str) -> None:
        """Make sure that the plan was made for a model.

        Args:
            fingerprint: Of the model, from `collection.fingerprint`.
            name: What to call the model.

        Raises:
            LoraInitError: The weights have another fingerprint. A plan made by hand has none and fits any model.
        """
        made = self.provenance
        if made is not None and made.fingerprint and fingerprint and made.fingerprint != fingerprint:
            raise LoraInitError(
                f"the plan was made for {made.model_id or made.model_class} (fingerprint {made.fingerprint[:12]}), and "
                f"this is another: {name} ({fingerprint[:12]}). Make a plan from statistics of this model."
            )

    def check(self, stats: Statistics) -> None:
        """Make sure that the plan fits these statistics.

        Raises:
            LoraInitError: It was made for another model, or names a layer that the statistics do not have.
        """
        made = stats.provenance
        self.check_model(made.fingerprint, f"the model of the statistics, {made.model_id or made.model_class}")
        missing = next((name for name in self.ranks if name not in stats), None)
        if missing is not None:
            raise LoraInitError(
                f"the plan names layer {missing!r}, which the statistics do not have. Plan again from these statistics."
            )


FORMAT = "lora_init.plan"
FORMAT_VERSION = 1


def plan_to_dict(plan: RankAllocation) -> dict[str, Any]:
    """Lay a plan out as plain values: everything in it, and totals for readers that are not this package."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "rank": plan.rank,
        "policy": plan.policy,
        "budget": asdict(plan.budget) if plan.budget else None,
        "settings": _plain(plan.settings),
        "totals": {
            "layers": sum(rank > 0 for rank in plan.values()),
            "total_rank": plan.total_rank,
            "parameters": plan.parameters,
            "megabytes_float32": round(plan.megabytes(), 6),
            "explained_variance": round(plan.explained_variance, 9),
        },
        "layers": {
            name: {
                "rank": rank,
                "kind": plan.targets[name].kind,
                "in_features": plan.targets[name].in_features,
                "out_features": plan.targets[name].out_features,
                **plan.targets[name].extras(),
                "parameters": plan.targets[name].parameters(rank),
                "explained_variance": plan.explained[name],
                **({"could_be": list(plan.unsettled[name])} if name in plan.unsettled else {}),
            }
            for name, rank in plan.items()
        },
        "excluded": list(plan.excluded),
        "unsupported": dict(plan.unsupported),
        "error_source": plan.error_source,
        "notes": list(plan.notes),
        "provenance": asdict(plan.provenance) if plan.provenance else None,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def save_plan(plan: RankAllocation, path: str | Path) -> Path:
    """Write a plan to a JSON file. A crash leaves the old file or none, never half a one.

    Raises:
        LoraInitError: The directory does not exist, or cannot be written to.
    """
    path = Path(path).expanduser()
    text = json.dumps(plan_to_dict(plan), indent=1, ensure_ascii=False) + "\n"
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise LoraInitError(f"{path}: the plan could not be written: {error.strerror or error}.") from error
    return path


def load_plan(path: str | Path) -> RankAllocation:
    """Read a plan. Whether it fits a model is checked when it is used, by `RankAllocation.check`.

    Raises:
        LoraInitError: No such file, not a plan, a newer version, or damaged.
    """
    path = Path(path).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoraInitError(f"{path}: the plan could not be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise LoraInitError(f"{path} is not JSON, so it is no plan: {error}. `lora-init ranks` writes one.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise LoraInitError(f"{path} is not a plan of lora_init. `lora-init ranks STATS --output FILE` writes one.")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise LoraInitError(
            f"{path} is a plan of format version {version!r}, and this lora_init reads {FORMAT_VERSION}. "
            "Install a newer one, or plan again."
        )
    try:
        return _plan_from(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoraInitError(f"{path} is damaged: {type(error).__name__} {error}. Plan again.") from error


def _plan_from(content: Mapping[str, Any]) -> RankAllocation:
    layers = content["layers"]
    for name, layer in layers.items():
        for key in ("rank", "in_features", "out_features"):
            if type(layer[key]) is not int or layer[key] < (key != "rank"):
                raise ValueError(f"layer {name!r} has {key}={layer[key]!r}")
        if layer["rank"] > layer["in_features"]:
            raise ValueError(f"layer {name!r} has rank {layer['rank']} and input width {layer['in_features']}")
    if type(content["rank"]) is not int or content["rank"] < 1:
        raise ValueError(f"rank={content['rank']!r}")
    known = {item.name for item in fields(Provenance)}
    provenance = content["provenance"]
    return RankAllocation(
        ranks={name: layer["rank"] for name, layer in layers.items()},
        rank=content["rank"],
        targets={
            name: read_target(name, layer["kind"], layer["in_features"], layer["out_features"], layer)
            for name, layer in layers.items()
        },
        explained={name: float(layer["explained_variance"]) for name, layer in layers.items()},
        policy=str(content["policy"]),
        budget=Budget(**content["budget"]) if content["budget"] else None,
        settings=content["settings"],
        # A later version may tell more about where it comes from; that is no reason to refuse the ranks.
        provenance=Provenance(**{key: value for key, value in provenance.items() if key in known})
        if provenance
        else None,
        unsupported=content["unsupported"],
        excluded=tuple(content["excluded"]),
        unsettled={name: tuple(layer["could_be"]) for name, layer in layers.items() if "could_be" in layer},
        error_source=str(content["error_source"]),
        notes=tuple(content["notes"]),
    )
