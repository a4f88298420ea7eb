"""The statistics of several passes over one model as one: what becomes of each part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_init.layers.experts import expert_group
from lora_init.statistics.gradient_merging import merge_gradients, with_gradients
from lora_init.statistics.mixtures import common_size, cut, mix, mix_ratios
from lora_init.statistics.parts import Part, check_parts, check_weights
from lora_init.statistics.spectrum import Spectrum


def merge_parts(parts: Sequence[Part], weights: Sequence[float] | None) -> dict[str, Any]:
    """Merge all parts at once: the arguments of the `Statistics` that hold them together. See `Statistics.merge`."""
    check_weights(parts, weights)
    check_parts(parts)
    size = common_size([part.variances.values() for part in parts])
    group_of, sources = _group(parts)
    groups: dict[str, Spectrum] = {}
    held_out: dict[str, float] = {}
    batch_ratios: dict[str, Tensor] = {}
    for name, source in sources.items():
        having = [i for i, group in enumerate(source) if group is not None]
        found = [(parts[i], str(source[i])) for i in having]
        shares = None if weights is None else _shares([weights[i] for i in having], found)
        spectra = [part.groups[group] for part, group in found]
        groups[name] = cut(spectra[0], size) if len(spectra) == 1 else mix(spectra, size, shares)
        # Measured for the components of one part. Nobody has tested those of several on rows that they had not seen.
        held_out[name] = found[0][0].held_out.get(found[0][1], math.nan) if len(found) == 1 else math.nan
        ratios = _ratios(found, spectra, shares, groups[name])
        if ratios is not None:
            batch_ratios[name] = ratios
    missing = {name: kind for part in parts for name, kind in part.unsupported.items() if name not in group_of}
    targets = {name: target for part in reversed(parts) for name, target in part.targets.items()}
    return {
        "groups": groups,
        "group_of": group_of,
        "targets": {name: targets[name] for name in group_of},
        "held_out": held_out,
        "batch_ratios": batch_ratios,
        "unsupported": missing,
        "gradients": merge_gradients(parts, weights, list(group_of)),
        "provenance": replace(
            _provenance(parts, weights),
            n_samples=max(one.n_samples for one in groups.values()),
            notes=[*_origins(parts, weights, size), *_notes(parts, missing)],
        ),
    }


def _group(parts: Sequence[Part]) -> tuple[dict[str, str], dict[str, list[str | None]]]:
    """Group the layers that share a group in every part.

    Returns:
        For each layer, in model order, the name of its group; for each group, what it is called in each part, None
        where a part lacks it. Groups of experts follow that of their parameter.
    """
    leaders: dict[tuple[str | None, ...], str] = {}
    group_of: dict[str, str] = {}
    sources: dict[str, list[str | None]] = {}
    for name in _in_order([list(part.group_of) for part in parts]):
        source = [part.group_of.get(name) for part in parts]
        group_of[name] = leaders.setdefault(tuple(source), name)
        sources.setdefault(group_of[name], source)
        experts = next(part.targets[name].experts for part in parts if name in part.targets)
        for group in (expert_group(name, expert) for expert in range(experts)):
            if any(group in part.groups for part in parts):
                sources[group] = [group if group in part.groups else None for part in parts]
    return group_of, sources


def _in_order(orders: Sequence[Sequence[str]]) -> list[str]:
    """Unite lists that are each in model order: what only a later one has goes behind what it has before it."""
    united = list(orders[0])
    for order in orders[1:]:
        known, behind, last = set(united), {"": list[str]()}, ""
        for name in order:
            if name in known:
                last = name
            else:
                behind.setdefault(last, []).append(name)
        united = behind[""] + [each for name in united for each in (name, *behind.get(name, ()))]
    return united


def _shares(weights: Sequence[float], found: Sequence[tuple[Part, str]]) -> list[float]:
    """Share of each part in a group. An expert reads of a data set what the router sends to it."""
    counts = [weight * _routed(part, group) for weight, (part, group) in zip(weights, found, strict=True)]
    return [count / sum(counts) for count in counts]


def _routed(part: Part, group: str) -> float:
    """Share of the router's choices that fell on an expert; 1 for what is no expert."""
    if group in part.targets:
        return 1.0
    parameter = group.rpartition(".")[0]
    groups = (expert_group(parameter, expert) for expert in range(part.targets[parameter].experts))
    return part.variances[group][2] / sum(part.variances[one][2] for one in groups if one in part.variances)


def _ratios(
    found: Sequence[tuple[Part, str]], spectra: Sequence[Spectrum], shares: Sequence[float] | None, merged: Spectrum
) -> Tensor | None:
    """Carry the sampling error over, as far as every part knows its own."""
    tables = [part.batch_ratios.get(group, torch.zeros(0, 0)) for part, group in found]
    if len(tables) == 1:
        return tables[0][:, : merged.n_components].clone() if len(tables[0]) else None
    shares = shares or [one.n_samples / merged.n_samples for one in spectra]
    if merged.total_variance <= 0.0:
        return None
    amounts = [share * one.total_variance / merged.total_variance for share, one in zip(shares, spectra, strict=True)]
    return mix_ratios(tables, amounts, merged.n_components)


def _provenance(parts: Sequence[Part], weights: Sequence[float] | None) -> Any:
    made = [part.provenance for part in parts]
    data = [one.data for one in made]
    if weights is not None:
        told = [f"({text})" if "; " in text else text or "not described" for text in data]
        data = [f"{weight:g} x {text}" for weight, text in zip(weights, told, strict=True)]
    return replace(
        made[0],
        data="; ".join(dict.fromkeys(text for text in data if text)),
        rank=min(one.rank for one in made),
        gradients=with_gradients(parts),
        n_labels=sum(one.n_labels for one in made) if with_gradients(parts) else 0,
        n_batches=sum(one.n_batches for one in made),
        stop_reason=", ".join(dict.fromkeys(reason for one in made for reason in one.stop_reason.split(", "))),
        seconds=_summed([one.seconds for one in made]),
        versions={
            name: ", ".join(dict.fromkeys(one.versions[name] for one in made if name in one.versions))
            for name in dict.fromkeys(name for one in made for name in one.versions)
        },
    )


def _summed(seconds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for one in seconds for name in one)
    return {name: round(sum(one.get(name, 0.0) for one in seconds), 3) for name in names}


def _origins(parts: Sequence[Part], weights: Sequence[float] | None, size: int) -> Iterator[str]:
    for i, part in enumerate(parts):
        made = part.provenance
        weight = "" if weights is None else f" with weight {weights[i]:g}"
        yield (
            f"part {i + 1} of {len(parts)}{weight}: {made.n_samples:,} rows in {made.n_batches} batches, stopped: "
            f"{made.stop_reason}, seed {made.seed}, {made.data or 'data not described'}."
        )
    most = [max(len(variance) for variance, *_ in part.variances.values()) for part in parts]
    if max(most) > size:
        yield f"the parts have up to {' and '.join(map(str, most))} components of a layer; {size} are kept."
    without = [str(i + 1) for i, part in enumerate(parts) if not part.provenance.gradients]
    if 0 < len(without) < len(parts):
        yield f"part {', '.join(without)} of {len(parts)} has no gradients, so those of the others are left out."


def _notes(parts: Sequence[Part], missing: Mapping[str, str]) -> Iterator[str]:
    """Keep what was said about single layers: as it is where it holds for all, else as said of one part.

    What was said about the experts of a parameter is said anew.
    """
    everywhere = set.intersection(*(set(part.provenance.notes) for part in parts))
    said: dict[str, None] = {}
    for i, part in enumerate(parts):
        for note in part.provenance.notes:
            subject = note.partition(": ")[0]
            if subject in part.targets and part.targets[subject].experts:
                continue
            said[note if note in everywhere or subject in missing else f"part {i + 1}, {note}"] = None
    yield from said
