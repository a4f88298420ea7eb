"""The statistics of several passes over one model as one: what becomes of each part."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_init.errors import LoraInitError
from lora_init.layers.experts import expert_group
from lora_init.layers.targets import Target
from lora_init.statistics.gradient_spectrum import GradientSpectrum
from lora_init.statistics.mean_gradient import freeze_triplets, product_svd
from lora_init.statistics.spectrum import Moments, Spectrum, freeze, principal_directions

# A group whose components leave out less than this share of its variance has kept all that its rows span: two rows of
# a float32 model were measured to leave out 3e-6.
_NOTHING = 1e-5


def mix(spectra: Sequence[Spectrum], size: int, shares: Sequence[float] | None = None) -> Spectrum:
    """Decompose the rows of several sets together, of which only the spectra are known.

    Without shares every row counts once. With shares w_i the second moment is sum w_i E_i, whatever the numbers of rows
    are: a row of set i counts w_i n / n_i times, n the rows of all. The distance of the means counts as variance.

    Mean and total variance are exact, up to the float32 of the means. What a set has beyond its own components is lost:
    with l_i for the variance along the last one that set i kept, and w_i for its share of the rows where none is given,
    the variance said to lie along each component of the result is at most what the rows have along it, and at most
    sum w_i l_i short of the exact decomposition, if the spectra of the sets are exact themselves. So r components
    capture what any r can, less r times that at most. Sets that kept all their directions lose nothing.

    Of made-up rows 576 wide, of variances that fall as j^-0.5 to j^-1.2, the 32 components of 2 or 8 sets captured at
    least 0.982 of what any 32 could, and those of one pass over all rows 0.984. The variance said to lie along them was
    up to 13 % less than what they captured, most where it falls slowest.

    Args:
        spectra: One for each set, all of one width and all centred or all not.
        size: Most components to keep.
        shares: One for each set; their sum is 1.

    Returns:
        The spectrum; `n_samples` is the number of rows seen, with shares too.

    Example:
        >>> import torch
        >>> from lora_init import ExactPCA
        >>> rows = torch.randn(30, 3)
        >>> parts = [ExactPCA().partial_fit(part).spectrum() for part in rows.split(10)]
        >>> whole = ExactPCA().partial_fit(rows).spectrum()
        >>> torch.allclose(mix(parts, 3).explained_variance, whole.explained_variance, rtol=1e-5)
        True
    """
    n_samples = sum(one.n_samples for one in spectra)
    # How many rows each set counts for.
    counts = [one.n_samples if shares is None else shares[i] * n_samples for i, one in enumerate(spectra)]
    mean = torch.stack([count / n_samples * one.mean.double() for one, count in zip(spectra, counts, strict=True)])
    mean = mean.sum(0)  # [d]
    rows, scatter = [], 0.0
    for one, count in zip(spectra, counts, strict=True):
        degrees = count * max(one.n_samples - 1, 1) / one.n_samples
        gap = count**0.5 * (one.mean.double() - mean)
        rows += [(one.explained_variance * degrees).sqrt()[:, None] * one.components.double(), gap[None]]
        scatter += one.total_variance * degrees + float(gap @ gap)
    weights, directions = principal_directions(torch.cat(rows), size)
    return freeze(Moments(n_samples, mean, scatter), directions, weights)


def cut(spectrum: Spectrum, size: int) -> Spectrum:
    """Keep at most `size` components, in tensors of its own."""
    return replace(
        spectrum,
        components=spectrum.components[:size].clone(),
        explained_variance=spectrum.explained_variance[:size].clone(),
        mean=spectrum.mean.clone(),
    )


def common_size(variances: Sequence[Collection[tuple[Tensor, float, int]]]) -> int:
    """Say how many components to keep: as many as every part has that left any out.

    A part that saw few rows has few components and lacks nothing. One that was asked for fewer than another lacks the
    rest, and what is known of that from the other alone would pass for the whole.

    Args:
        variances: Of each part, for all its groups: variance along each component, total variance, number of rows.
    """
    most = []
    for part in variances:
        left_out = [len(along) for along, total, _ in part if float(along.sum()) < (1.0 - _NOTHING) * total]
        most += [max(left_out)] if left_out else []
    whole = sum(max(len(variance) + 1 for variance, *_ in part) for part in variances)
    return min(most, default=whole)


def mix_ratios(ratios: Sequence[Tensor], amounts: Sequence[float], n_components: int) -> Tensor | None:
    """Make rows whose mean has the standard error that a weighted sum of the means of several sets of rows has.

    The standard error of a sum of independent means e_i with amounts a_i is sqrt(sum (a_i e_i)^2). The rows returned
    are those of all sets, each about the mean of its own set and scaled by what brings std / sqrt(n) to that.

    Args:
        ratios: Rows [n_i, k_i] of each set.
        amounts: a_i, the share that each set has of the sum.
        n_components: Columns of the result; those that a set lacks count as zeros.

    Returns:
        Rows [n, k]; None if a set has fewer than two, so that its error is unknown.
    """
    if any(len(one) < 2 for one in ratios):
        return None
    n = sum(map(len, ratios))
    middle, rows = torch.zeros(n_components, dtype=torch.float64), []
    for one, amount in zip(ratios, amounts, strict=True):
        columns = one.double()[:, :n_components]
        columns = torch.nn.functional.pad(columns, (0, n_components - columns.shape[1]))
        middle += amount * columns.mean(0)
        rows.append((columns - columns.mean(0)) * (amount * (n * (n - 1) / (len(one) * (len(one) - 1))) ** 0.5))
    return torch.cat(rows) + middle


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


def with_gradients(parts: Sequence[Part]) -> bool:
    """Tell whether all parts have gradients. Of some alone they are not those of the whole."""
    return all(part.provenance.gradients for part in parts)


def merge_gradients(
    parts: Sequence[Part], weights: Sequence[float] | None, names: Sequence[str]
) -> dict[str, GradientSpectrum]:
    """Merge the gradients of all parts, for each of the layers `names`; nothing unless all parts have gradients.

    Weighted rows are merged like all rows, see `mix`, and the output moment is their mean: by numbers of rows, or by
    the weights. The mean gradient is that of the mean loss over the labels of all parts, and with weights that of the
    weighted sum of their mean losses. A part in which a layer did not run adds no gradient to it.

    The importance is not known, NaN: it needs the weights of the layer.
    """
    if not with_gradients(parts):
        return {}
    found = [dict(part.gradients) for part in parts]  # read from the files now
    size = common_size(
        [
            [(w.explained_variance, w.total_variance, w.n_samples) for w in (one.weighted for one in of.values())]
            for of in found
        ]
    )
    n_triplets = _n_triplets(parts, found)
    n_labels = sum(part.provenance.n_labels for part in parts)
    shares = [part.provenance.n_labels / n_labels for part in parts] if weights is None else weights
    merged = {}
    for name in names:
        having = [i for i, of in enumerate(found) if name in of]
        spectra, own = [found[i][name] for i in having], [shares[i] for i in having]
        merged[name] = _merge(spectra, own, weights is not None, size, n_triplets)
    return merged


def _n_triplets(parts: Sequence[Part], found: Sequence[Mapping[str, GradientSpectrum]]) -> int:
    """Say how many triplets to keep: as many as every part has that may have left any out.

    A pass keeps two for each rank at least; one that has fewer saw few labels, or narrow layers, and lacks nothing.
    """
    counts = [max(len(one.singular_values) for one in of.values()) for of in found]
    full = [count for count, part in zip(counts, parts, strict=True) if count >= 2 * part.provenance.rank]
    return min(full, default=sum(counts))


def _merge(
    spectra: Sequence[GradientSpectrum], shares: Sequence[float], by_weight: bool, size: int, n_triplets: int
) -> GradientSpectrum:
    """Merge those of one layer; `shares` are of the loss, and with weights of the rows, too."""
    n_samples = sum(one.n_samples for one in spectra)
    of_rows = [share / sum(shares) for share in shares] if by_weight else [one.n_samples / n_samples for one in spectra]
    moments = [share * one.output_moment for share, one in zip(of_rows, spectra, strict=True)]
    weighted = [one.weighted for one in spectra]
    scaled = [share * one.singular_values[:, None] * one.right for share, one in zip(shares, spectra, strict=True)]
    u, s, v = product_svd(torch.cat([one.left.T for one in spectra], 1), torch.cat(scaled), n_triplets)
    left, values, right = freeze_triplets(u, s, v, n_triplets)
    return GradientSpectrum(
        weighted=cut(weighted[0], size) if len(weighted) == 1 else mix(weighted, size, of_rows if by_weight else None),
        left=left,
        singular_values=values,
        right=right,
        output_moment=torch.stack(moments).sum(0),
        importance=math.nan,
        n_samples=n_samples,
    )


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
