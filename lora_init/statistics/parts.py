"""The statistics that are to become one: what must agree before they can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_init.errors import LoraInitError
from lora_init.layers.targets import Target
from lora_init.statistics.gradient_spectrum import GradientSpectrum
from lora_init.statistics.spectrum import Spectrum

# Weights are typed with a few digits.
_SUM_TOLERANCE = 1e-6
# Settings of a pass that decide what its rows are.
_ALIKE = ("center", "token_mask", "task_type")


@dataclass(frozen=True)
class Part:
    """What one of the statistics to merge holds, by the names that `Statistics` has for it.

    Attributes:
        name: Its file, or which of them it is: for errors.
        variances: Of each group: variance along each component, total variance, number of rows.
        provenance: A `Provenance`, from the module that imports this one.
    """

    name: str
    groups: Mapping[str, Spectrum]
    variances: Mapping[str, tuple[Tensor, float, int]]
    group_of: Mapping[str, str]
    targets: Mapping[str, Target]
    held_out: Mapping[str, float]
    batch_ratios: Mapping[str, Tensor]
    unsupported: Mapping[str, str]
    gradients: Mapping[str, GradientSpectrum]
    provenance: Any


def check_weights(parts: Sequence[Part], weights: Sequence[float] | None) -> None:
    """Refuse weights that are not one share for each part.

    Raises:
        LoraInitError: So they are, or there is one part only.
    """
    if len(parts) < 2:
        raise LoraInitError("merge: one part alone, expected at least two. Give the statistics to merge it with.")
    if weights is None:
        return
    shown = ", ".join(f"{weight:g}" for weight in weights)
    if len(weights) != len(parts):
        raise LoraInitError(
            f"weights={shown}: {len(weights)} for {len(parts)} parts. Give one for each, in their order."
        )
    if not all(weight > 0 for weight in weights):
        raise LoraInitError(f"weights={shown}, expected positive numbers. Leave out what should not count.")
    if not abs(sum(weights) - 1.0) <= _SUM_TOLERANCE:
        raise LoraInitError(
            f"weights={shown}: their sum is {sum(weights):g}, expected 1. They are shares of the whole."
        )


def check_parts(parts: Sequence[Part]) -> None:
    """Refuse parts that are not about the same layers of one model, read the same way, or that are the same part.

    Raises:
        LoraInitError: Says what differs.
    """
    for other in parts[1:]:
        _check_alike(parts[0], other)
    _check_distinct(parts)


def _check_alike(first: Part, other: Part) -> None:
    one, two = first.provenance, other.provenance
    if one.fingerprint != two.fingerprint:
        models = [f"{made.model_class} {made.model_id}".strip() for made in (one, two)]
        raise LoraInitError(
            f"{other.name} was made from another model ({models[1]}) than {first.name} ({models[0]}). "
            "Merge statistics of one model."
        )
    for setting in _ALIKE:
        if getattr(one, setting) != getattr(two, setting):
            raise LoraInitError(
                f"{other.name} was made with {setting}={getattr(two, setting)!r}, "
                f"{first.name} with {setting}={getattr(one, setting)!r}. Collect both the same way."
            )
    ours, theirs = ({*part.group_of, *part.unsupported} for part in (first, other))
    common = [name for name in first.targets if name in other.targets]
    differing = [name for name in common if first.targets[name] != other.targets[name]]
    odd = [*sorted(ours - theirs), *sorted(theirs - ours), *differing]
    if odd:
        raise LoraInitError(
            f"{other.name} is not about the layers that {first.name} is about: {len(ours - theirs)} are missing, "
            f"{len(theirs - ours)} too many, {len(differing)} of another shape (first: {odd[0]!r}). "
            "Collect both with the same target_modules and target_parameters."
        )


def _check_distinct(parts: Sequence[Part]) -> None:
    """Refuse the same statistics given twice: its rows would count twice, and seem to be more than there are."""
    for i, one in enumerate(parts):
        for other in parts[:i]:
            if one.variances.keys() == other.variances.keys() and all(
                ours[1:] == theirs[1:] and torch.equal(ours[0], theirs[0])
                for ours, theirs in ((one.variances[name], other.variances[name]) for name in one.variances)
            ):
                raise LoraInitError(
                    f"{one.name} and {other.name} hold the same statistics, so the same rows would count twice. "
                    "Leave one out."
                )
