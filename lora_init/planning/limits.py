"""Limits on the rank of single layers, and layers that must have the same rank."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_init.errors import LoraInitError

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Limits:
    """What a layer's rank may be. Rank 0, no adapter, is always allowed unless `min_rank` is above 0.

    Attributes:
        min_rank: Smallest rank.
        max_rank: Largest rank; None for no limit.
        multiple_of: Ranks are multiples of this, as some kernels want them.
        allowed_ranks: The only ranks there are, as for a server that fixes them; None for any.
    """

    min_rank: int = 0
    max_rank: int | None = None
    multiple_of: int = 1
    allowed_ranks: tuple[int, ...] | None = None

    def changed(self, settings: Mapping[str, Any], where: str) -> Limits:
        """Return a copy with some limits replaced, checked. `rank` fixes it: `min_rank` and `max_rank` at once.

        Raises:
            LoraInitError: Unknown name or impossible value.
        """
        settings = dict(settings)
        if "rank" in settings:
            settings["min_rank"] = settings["max_rank"] = settings.pop("rank")
        unknown = next((key for key in settings if key not in Limits.__dataclass_fields__), None)
        if unknown is not None:
            raise LoraInitError(
                f"{where}{unknown!r} is no limit. Choose from rank, {', '.join(Limits.__dataclass_fields__)}."
            )
        checked: dict[str, Any] = {}
        for key, value in settings.items():
            if key == "allowed_ranks" and value is not None:
                values = [_whole(v, f"{where}allowed_ranks", 0) for v in value]
                checked[key] = tuple(sorted(set(values) - {0}))
                if not checked[key]:
                    raise LoraInitError(f"{where}allowed_ranks={value!r} allows no rank above 0.")
            elif value is not None:
                checked[key] = _whole(value, f"{where}{key}", 1 if key == "multiple_of" else 0)
            elif key in ("max_rank", "allowed_ranks"):
                checked[key] = None
        return replace(self, **checked)

    def highest(self, top: int) -> int:
        """Find the largest rank allowed up to `top`; 0 if there is none."""
        ranks = self.ranks(top)
        return int(ranks[-1]) if len(ranks) else 0

    def ranks(self, top: int) -> IntArray:
        """List the ranks allowed from 1 to `top`, rising, without regard to `min_rank`."""
        if self.max_rank is not None:
            top = min(top, self.max_rank)
        ranks = np.arange(self.multiple_of, top + 1, self.multiple_of, dtype=np.int64)
        return ranks if self.allowed_ranks is None else ranks[np.isin(ranks, self.allowed_ranks)]


@dataclass(frozen=True)
class Ceiling:
    """The largest rank something other than `Limits` leaves a layer, and what that is, in words."""

    rank: int
    reason: str


def _whole(value: Any, argument: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise LoraInitError(f"{argument}={value!r}: a whole number of at least {least} is needed.")
    return int(value)


def matches(pattern: str, name: str) -> bool:
    """Tell whether a pattern means a layer: its name or an ending of it after a dot, either with wildcards."""
    return name == pattern or any(fnmatchcase(name, wildcard) for wildcard in (pattern, f"*.{pattern}"))


def select(pattern: str, names: Sequence[str], argument: str) -> list[str]:
    """List the layers that a pattern means.

    Raises:
        LoraInitError: There is none.
    """
    found = [name for name in names if matches(pattern, name)]
    if found:
        return found
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    close = difflib.get_close_matches(pattern.rsplit(".", 1)[-1].strip("*"), endings, n=3, cutoff=0.4)
    hint = f"Closest: {', '.join(close)}." if close else f"Names end in {', '.join(endings[:7])}."
    raise LoraInitError(f"{argument}: {pattern!r} matches no layer. {hint}")


def layer_limits(
    names: Sequence[str],
    base: Mapping[str, Any],
    overrides: Mapping[str, Mapping[str, Any]] | None,
    exclude: str | Collection[str],
) -> dict[str, Limits]:
    """Work out the limits of each layer; a later override wins over an earlier one, limit by limit.

    Returns:
        Limits of the layers that take part, in the order of `names`; those excluded are missing.

    Raises:
        LoraInitError: A pattern matches nothing, a limit is unknown or impossible, or every layer is excluded.
    """
    limits = dict.fromkeys(names, Limits().changed(base, ""))
    for pattern, settings in (overrides or {}).items():
        if not isinstance(settings, Mapping):
            raise LoraInitError(f"overrides[{pattern!r}]={settings!r}: a mapping such as {{'max_rank': 8}} is needed.")
        for name in select(pattern, names, "overrides"):
            limits[name] = limits[name].changed(settings, f"overrides[{pattern!r}]: ")
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        for name in select(pattern, names, "exclude"):
            limits.pop(name, None)
    if not limits:
        raise LoraInitError(f"exclude={exclude!r} leaves none of {len(names)} layers.")
    return limits


def allowed_ranks(names: Sequence[str], limits: Sequence[Limits], ceilings: Sequence[Ceiling], most: int) -> BoolArray:
    """Mark the ranks that each layer may have, [n, most + 1]: column r is rank r.

    Raises:
        LoraInitError: A layer is left with no rank at all: says which limits contradict each other, and by how much.
    """
    rows: dict[tuple[Limits, int], BoolArray] = {}
    marked = []
    for name, limit, ceiling in zip(names, limits, ceilings, strict=True):
        if (limit, ceiling.rank) not in rows:
            ranks = limit.ranks(ceiling.rank)
            ranks = ranks[ranks >= limit.min_rank]
            if limit.min_rank > 0 and not len(ranks):
                raise _contradiction(name, limit, ceiling)
            row = np.zeros(most + 1, dtype=np.bool_)
            row[ranks] = True
            row[0] = limit.min_rank == 0
            rows[limit, ceiling.rank] = row
        marked.append(rows[limit, ceiling.rank])
    return np.stack(marked)


def _contradiction(name: str, limit: Limits, ceiling: Ceiling) -> LoraInitError:
    if limit.max_rank is not None and limit.max_rank < ceiling.rank:
        ceiling = Ceiling(limit.max_rank, f"max_rank={limit.max_rank}")
    if limit.min_rank > ceiling.rank:
        above = limit.min_rank - ceiling.rank
        return LoraInitError(f"layer {name!r}: min_rank={limit.min_rank} is {above} above {ceiling.reason}.")
    grid = f"multiple_of={limit.multiple_of}" if limit.multiple_of > 1 else ""
    if limit.allowed_ranks is not None:
        grid = f"{grid} and allowed_ranks={limit.allowed_ranks}".removeprefix(" and ")
    beyond = replace(limit, max_rank=None).ranks(
        2 * max(limit.multiple_of, *(limit.allowed_ranks or (1,)), ceiling.rank)
    )
    beyond = beyond[beyond >= limit.min_rank]
    nearest = f"; the next, {beyond[0]}, is {beyond[0] - ceiling.rank} above {ceiling.reason}" if len(beyond) else ""
    return LoraInitError(
        f"layer {name!r}: {grid} allows no rank from min_rank={limit.min_rank} to {ceiling.rank}{nearest}."
    )


def tie_layers(names: Sequence[str], tie: Sequence[str] | Sequence[Sequence[str]]) -> IntArray:
    """Number the units that get one rank each, [n]: layers that are tied share a number, all others have their own.

    `("q_proj", "k_proj", "v_proj")` ties these three within each block: layers of equal name up to that ending.

    Raises:
        LoraInitError: A name matches nothing, ties nothing, or is in two ties.
    """
    ties: list[tuple[str, ...]] = []
    if tie:
        ties = [tuple(tie)] if all(isinstance(t, str) for t in tie) else [tuple(t) for t in tie]  # type: ignore[arg-type]
    unit = np.arange(len(names), dtype=np.int64)
    tied_by: dict[int, tuple[str, ...]] = {}
    for endings in ties:
        groups: dict[str, list[int]] = {}
        for ending in endings:
            for name in select(ending, names, f"tie={endings!r}"):
                # A wildcard stands for whole names, and would leave no block to tie within: endings only.
                if name != ending and not name.endswith(f".{ending}"):
                    raise LoraInitError(f"tie={endings!r}: {ending!r} must be how names end, such as 'q_proj'.")
                groups.setdefault(name[: len(name) - len(ending)], []).append(names.index(name))
        if all(len(members) < 2 for members in groups.values()):
            raise LoraInitError(f"tie={endings!r} ties nothing: no two of these are in one block. Name at least two.")
        for members in groups.values():
            other = next((tied_by[i] for i in members if i in tied_by), None)
            if other is not None:
                raise LoraInitError(
                    f"tie={endings!r} and tie={other!r} conflict: both hold layer "
                    f"{names[next(i for i in members if i in tied_by)]!r}. Make them one tie."
                )
            tied_by |= dict.fromkeys(members, endings)
            unit[members] = min(members)
    return np.unique(unit, return_inverse=True)[1].astype(np.int64)


def tied_ranks(names: Sequence[str], allowed: BoolArray, unit_of: IntArray) -> BoolArray:
    """Mark the ranks that every layer of a unit may have, [n_units, n_columns].

    Raises:
        LoraInitError: The limits of two tied layers exclude each other.
    """
    order = np.argsort(unit_of, kind="stable")
    starts = np.searchsorted(unit_of[order], np.arange(int(unit_of.max()) + 1))
    shared: BoolArray = np.logical_and.reduceat(allowed[order], starts, axis=0)
    empty = np.flatnonzero(~shared.any(axis=1))
    if len(empty):
        members = [int(i) for i in np.flatnonzero(unit_of == empty[0])]
        least = max(members, key=lambda i: int(np.flatnonzero(allowed[i])[0]))
        most = min(members, key=lambda i: int(np.flatnonzero(allowed[i])[-1]))
        low, high = int(np.flatnonzero(allowed[least])[0]), int(np.flatnonzero(allowed[most])[-1])
        apart = f": {low - high} apart" if low > high else ", and share no rank between"
        raise LoraInitError(
            f"tied layers conflict: {names[least]!r} needs rank {low} or more, "
            f"{names[most]!r} takes at most {high}{apart}."
        )
    return shared
