"""The plan as a JSON file: written once, read by `lora-init init --ranks` and by `build_adapter`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lora_init.errors import LoraInitError
from lora_init.files import write_whole
from lora_init.layers.targets import read_target
from lora_init.planning.budgets import Budget
from lora_init.planning.plan import RankAllocation
from lora_init.statistics.statistics import Provenance

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
