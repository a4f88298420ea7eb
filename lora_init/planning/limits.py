"""Limits on the rank of single layers, and layers that must have the same rank."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from lora_init.errors import LoraInitError, check_number, did_you_mean
from lora_init.layers.grid import layer_grid
from lora_init.layers.targets import Target
from lora_init.planning.budgets import BoolArray, IntArray


@dataclass(frozen=True)
class Limits:
    """What a layer's rank may be. Rank 0, no adapter, is always allowed unless `min_rank` is above 0."""

    min_rank: int = 0  # smallest rank
    max_rank: int | None = None  # largest rank; None for no limit
    multiple_of: int = 1  # ranks are multiples of this, as some kernels want them
    # The only ranks there are, as for a server that fixes them; None for any.
    allowed_ranks: tuple[int, ...] | None = None

    def changed(self, settings: Mapping[str, Any], where: str) -> Limits:
        """Return a copy with some limits replaced, checked. `rank` fixes it: `min_rank` and `max_rank` at once."""
        settings = dict(settings)
        if "rank" in settings:
            settings["min_rank"] = settings["max_rank"] = settings.pop("rank")
        known = list(asdict(Limits()))
        for key in settings:
            if key not in known:
                raise LoraInitError(f"{where}{key!r} is no limit. {did_you_mean(key, ('rank', *known))}")
        checked: dict[str, Any] = {}
        for key, value in settings.items():
            if value is None:  # an override takes a limit back
                checked[key] = getattr(Limits(), key)
            elif key == "allowed_ranks":
                checked[key] = _rank_list(value, f"{where}allowed_ranks")
            elif key == "multiple_of":
                checked[key] = whole_number(value, f"{where}{key}", 1)
            else:
                checked[key] = whole_number(value, f"{where}{key}", 0)
        changed = replace(self, **checked)
        if changed.max_rank is not None and changed.min_rank > changed.max_rank:
            raise LoraInitError(
                f"{where}{{min_rank}} is above {{max_rank}}. Lower it.",
                min_rank=changed.min_rank,
                max_rank=changed.max_rank,
            )
        return changed

    def __str__(self) -> str:
        default = asdict(Limits())
        limits = [f"{key}={value}" for key, value in asdict(self).items() if value != default[key]]
        return ", ".join(limits) or "any rank"

    def ranks(self, top: int) -> IntArray:
        """List the ranks allowed from 1 to `top`, rising, without regard to `min_rank`."""
        if self.max_rank is not None:
            top = min(top, self.max_rank)
        ranks = np.arange(self.multiple_of, top + 1, self.multiple_of, dtype=np.int64)
        if self.allowed_ranks is None:
            return ranks
        return ranks[np.isin(ranks, self.allowed_ranks)]

    def highest(self, top: int) -> int:
        """Find the largest rank allowed up to `top`; 0 if there is none."""
        return int(self.ranks(top).max(initial=0))


def whole_number(value: Any, argument: str, least: int) -> int:
    """Refuse anything but a whole number of at least `least`."""
    check_number(argument, value, least, whole=True)
    return int(value)


def _rank_list(values: Any, argument: str) -> tuple[int, ...]:
    ranks: list[int] = []
    if isinstance(values, Collection) and not isinstance(values, str):
        # 0 is always allowed, unless `min_rank` forbids it.
        ranks = sorted({whole_number(value, argument, 0) for value in values} - {0})
    if not ranks:
        raise LoraInitError(
            f"{{{argument}}}: a list of ranks above 0 is needed, such as [8, 16, 32].", **{argument: values}
        )
    return tuple(ranks)


def _patterns(value: Any, argument: str) -> list[str]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, Collection) or not all(isinstance(pattern, str) for pattern in patterns):
        raise LoraInitError(
            f"{{{argument}}}: a name, an ending or a wildcard is needed, or a list of them.", **{argument: value}
        )
    return list(patterns)


def select(pattern: str, names: Sequence[str], argument: str) -> list[str]:
    """List the layers that a pattern means, at least one: a name or an ending of it after a dot, with wildcards."""
    selected = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
    if not selected and pattern in names:  # a name with a bracket in it is no wildcard
        return [pattern]
    if selected:
        return selected
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    close = difflib.get_close_matches(pattern.rsplit(".", 1)[-1].strip("*"), endings, n=3, cutoff=0.4)
    hint = f"Closest: {', '.join(close)}." if close else f"Names end in {', '.join(endings[:7])}."
    raise LoraInitError(f"{{{argument}}} matches no layer. {hint}", **{argument: pattern})


def layer_limits(
    targets: Mapping[str, Target],
    base: Mapping[str, Any],
    overrides: Mapping[str, Mapping[str, Any]] | None,
    exclude: str | Collection[str],
) -> dict[str, Limits]:
    """Work out the limits of each layer that takes part, in the order of `targets`.

    `base` holds for all layers; a later override wins over an earlier one, limit by limit. PEFT takes a grouped
    convolution only at ranks that its groups divide.
    """
    names = list(targets)
    # One frozen object for all layers, until an override gives a layer its own.
    limits = dict.fromkeys(names, Limits().changed(base, ""))
    if overrides is None:
        overrides = {}
    if not isinstance(overrides, Mapping) or not all(isinstance(value, Mapping) for value in overrides.values()):
        raise LoraInitError(f"overrides={overrides!r}: a mapping such as {{'up_proj': {{'max_rank': 8}}}} is needed.")
    for pattern, settings in overrides.items():
        for name in select(str(pattern), names, "overrides"):
            limits[name] = limits[name].changed(settings, f"overrides[{pattern!r}]: ")
    for pattern in _patterns(exclude, "exclude"):
        for name in select(pattern, names, "exclude"):
            limits.pop(name, None)  # patterns may overlap
    if not limits:
        raise LoraInitError(f"{{exclude}} leaves none of {len(names)} layers.", exclude=exclude)
    for name, limit in limits.items():
        limits[name] = replace(limit, multiple_of=math.lcm(limit.multiple_of, targets[name].groups))
    return limits


def allowed_by_unit(limits: Mapping[str, Limits], tops: IntArray, most: int, unit_of: IntArray) -> BoolArray:
    """Mark the ranks that every layer of a unit may have, [u, most + 1]: column r is rank r. Each has one at least.

    `tops` are the largest ranks that something else than the limits leaves the layers, [n].
    """
    allowed = np.ones((int(unit_of.max()) + 1, most + 1), dtype=np.bool_)
    for unit, limit, top in zip(unit_of, limits.values(), tops.tolist(), strict=True):
        ranks = limit.ranks(top)  # without regard to `min_rank`
        of_layer = np.isin(np.arange(most + 1), ranks[ranks >= limit.min_rank])
        of_layer[0] = limit.min_rank == 0
        allowed[unit] &= of_layer  # tied layers have one rank, so each has to allow it
    names = list(limits)
    for unit in np.flatnonzero(~allowed.any(axis=1)).tolist():
        members = np.flatnonzero(unit_of == unit).tolist()
        shown = ", ".join(f"{names[i]!r} ({limits[names[i]]}; at most {tops[i]})" for i in members[:4])
        subject = "tied layers have" if len(members) > 1 else "a layer has"
        raise LoraInitError(
            f"{subject} no possible rank: {shown}. The last is what "
            "its input width, the components collected and rho x average rank allow. Relax the limits or the tie."
        )
    return allowed


def tie_layers(names: Sequence[str], tie: Sequence[str] | Sequence[Sequence[str]], per_kind: bool = False) -> IntArray:
    """Number the units that get one rank each, [n]: layers that are tied share a number, all others have their own.

    `("q_proj", "k_proj", "v_proj")` ties these three within each block: layers of equal name up to that ending.
    `per_kind` ties all layers that differ in their block only. Ties that have a layer in common are one tie.
    """
    place = {name: i for i, name in enumerate(names)}
    ties: list[list[int]] = []
    if per_kind:
        for layers in layer_grid(names).by_kind.values():
            ties.append([place[name] for name in layers.values()])
    for endings in _read_ties(tie):
        groups: dict[str, list[int]] = {}
        for ending in endings:
            for name in select(ending, names, "tie"):
                # A wildcard stands for whole names, and would leave no block to tie within: endings only.
                if name != ending and not name.endswith(f".{ending}"):
                    raise LoraInitError(f"{{tie}}: {ending!r} must be how names end, such as 'q_proj'.", tie=endings)
                # By what stands before the ending: the block, and the module within it.
                groups.setdefault(name[: len(name) - len(ending)], []).append(place[name])
        if all(len(members) < 2 for members in groups.values()):
            raise LoraInitError("{tie} ties nothing: no two of these are in one block. Name at least two.", tie=endings)
        ties += groups.values()
    # Each tie takes the units that its members are in by now, whole: so ties that share a layer become one.
    unit = np.arange(len(names), dtype=np.int64)
    for members in ties:
        joined = np.isin(unit, unit[members])
        unit[joined] = unit[joined].min()
    # Numbered without gaps, by the first layer of each unit.
    return np.unique(unit, return_inverse=True)[1].astype(np.int64)


def _read_ties(tie: Any) -> list[list[str]]:
    """Read one tie, a sequence of endings, or several."""
    if isinstance(tie, Collection) and not all(isinstance(names, str) for names in tie):
        return [_patterns(names, "tie") for names in tie]
    names = _patterns(tie, "tie")
    if names:
        return [names]
    return []
