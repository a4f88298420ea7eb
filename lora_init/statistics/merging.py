"""How statistics of several passes over one model are merged, part by part."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from graphlib import TopologicalSorter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from lora_init.errors import LoraInitError, is_number
from lora_init.layers.identity import differing_config
from lora_init.layers.rows import expert_group
from lora_init.statistics.gradient_spectrum import GradientSpectrum, freeze_triplets, product_svd
from lora_init.statistics.spectrum import Moments, Sizes, Spectrum, freeze, principal_directions

if TYPE_CHECKING:
    from lora_init.statistics.statistics import Provenance, Statistics

# A group whose components leave out less than this share of its variance has kept all that its rows span: two rows of
# a float32 model were measured to leave out 3e-6.
_NOTHING = 1e-5
# Weights are typed with a few digits.
_SUM_TOLERANCE = 1e-6
# Settings of batches that decide which rows they begin with, and how these are read.
_PLACE = ("digest of the rows", "offset", "seed of the sample", "template", "completion")
# Settings of a pass that decide what its rows are.
_ALIKE = ("center", "token_mask", "task_type")


def merge_statistics(parts: Sequence[Statistics], weights: Sequence[float] | None) -> Statistics:
    """Merge all parts at once, see `Statistics.merge`; the notes say what came from where."""
    weights = _check_weights(parts, weights)
    _check_parts(parts)
    size = _common_size([part.groups.values() for part in parts])
    group_of, sources = _grouping(parts)
    groups: dict[str, Spectrum] = {}
    for name, source in sources.items():
        shares = None
        if weights is not None:
            counts = [weights[i] * _routed(parts[i], group) for i, group in source.items()]
            shares = [count / sum(counts) for count in counts]
        groups[name] = mix([parts[i].groups[group] for i, group in source.items()], size, shares)
    targets = {name: target for part in reversed(parts) for name, target in part.targets.items()}
    provenance = _provenance(parts, weights)
    notes = [*_origins(parts, weights, size), *_notes(parts)]
    return replace(
        parts[0],
        groups=groups,
        group_of=group_of,
        targets={name: targets[name] for name in group_of},
        provenance=replace(provenance, n_samples=max(one.n_samples for one in groups.values()), notes=notes),
        # Nobody has tested the components of several parts on rows that they had not seen.
        held_out=dict.fromkeys(groups, math.nan),
        unsupported={name: kind for part in parts for name, kind in part.unsupported.items() if name not in group_of},
        gradients=_merge_gradients(parts, weights, list(group_of)) if provenance.gradients else {},
        sizes=dict(_merge_sizes(parts, weights, group_of)),
        path=None,
    )


def mix(spectra: Sequence[Spectrum], size: int, shares: Sequence[float] | None = None) -> Spectrum:
    """Decompose the rows of several sets together, of which only the spectra are known.

    Without shares every row counts once. With shares w_i the second moment is sum w_i E_i, whatever the numbers of rows
    are: a row of set i counts w_i n / n_i times, n the rows of all. The distance of the means counts as variance.

    Mean and total variance are exact, up to the float32 of the means. Of what a set has beyond its own components only
    the sum is known. It is taken to be the same along all directions, as in probabilistic PCA (Tipping and Bishop
    1999): the components mix with what they have above it, and its mean over the sets is added to each of the result.
    Sets that kept all their directions lose nothing. Of made-up rows whose variances fall as j^-0.5 to j^-1.2, the 32
    components of 2 or 8 sets captured at least 0.97 of what any 32 could, and were said to capture 0.90 to 1.0005 of
    what they did.
    """
    if len(spectra) == 1:
        one = spectra[0]
        return replace(one, components=one.components[:size], explained_variance=one.explained_variance[:size])
    n_samples = sum(one.n_samples for one in spectra)
    # How many rows each set counts for.
    counts = [one.n_samples if shares is None else shares[i] * n_samples for i, one in enumerate(spectra)]
    means = torch.stack([one.mean.double() for one in spectra])  # [m, d]
    mean = torch.tensor(counts, dtype=torch.float64) / n_samples @ means
    rows, scatter, noise = [], 0.0, 0.0
    for one, own_mean, count in zip(spectra, means, counts, strict=True):
        degrees = count * max(one.n_samples - 1, 1) / one.n_samples
        above = (one.explained_variance - one.noise_variance).clamp_min(0.0) * degrees
        gap = count**0.5 * (own_mean - mean)
        rows += [above.sqrt()[:, None] * one.components.double(), gap[None]]
        scatter += one.total_variance * degrees + float(gap @ gap)
        noise += one.noise_variance * degrees
    weights, directions = principal_directions(torch.cat(rows), size)
    return freeze(Moments(n_samples, mean, scatter), directions, weights + noise)


def _merge_sizes(
    parts: Sequence[Statistics], weights: Sequence[float] | None, names: Iterable[str]
) -> Iterator[tuple[str, Sizes]]:
    """Average the sizes of each layer over the parts it ran in, if all of them have them."""
    for name in names:
        there = [i for i, part in enumerate(parts) if name in part.group_of]
        if all(name in parts[i].sizes for i in there):
            counts = [weights[i] if weights else parts[i].groups[parts[i].group_of[name]].n_samples for i in there]
            shares = [(count / sum(counts), parts[i].sizes[name]) for i, count in zip(there, counts, strict=True)]
            mean_square = sum(share * size.output**2 for share, size in shares)
            yield name, Sizes(sum(share * size.input for share, size in shares), math.sqrt(mean_square))


def _common_size(spectra: Iterable[Iterable[Spectrum]]) -> int:
    """Compute how many components to keep, given the groups of each part: as many as every part has that left any out.

    A part that saw few rows has few components and lacks nothing. One that was asked for fewer than another lacks the
    rest, and the other part alone would then describe the whole.
    """
    least, whole = math.inf, 0
    for part in map(list, spectra):
        cut = [s.n_components for s in part if float(s.explained_variance.sum()) < (1.0 - _NOTHING) * s.total_variance]
        least = min(least, max(cut, default=math.inf))
        whole += max(one.n_components + 1 for one in part)
    return int(min(least, whole))


def _check_weights(parts: Sequence[Statistics], weights: Sequence[float] | None) -> list[float] | None:
    """Return the weights as numbers; raise if they are not one share for each part, or there is one part alone."""
    for part in parts:
        if not hasattr(part, "provenance"):
            raise LoraInitError(f"merge got a {type(part).__name__}, not Statistics. Read files by Statistics.load.")
    if len(parts) < 2:
        raise LoraInitError("merge: one part alone, expected at least two. Give the statistics to merge it with.")
    if weights is None:
        return None
    try:
        weights = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise LoraInitError(f"weights={weights!r}, expected a list with a number for each part.") from None
    off = abs(sum(weights) - 1.0)
    if len(weights) != len(parts) or not (all(weight > 0 for weight in weights) and off <= _SUM_TOLERANCE):
        raise LoraInitError(
            f"{{weights}}: {len(weights)} for {len(parts)} parts, and "
            f"their sum is {sum(weights):g}, expected positive numbers whose sum is 1, one for each part in order.",
            weights=weights,
        )
    return weights


def _check_parts(parts: Sequence[Statistics]) -> None:
    """Refuse parts that are not about the same layers of one model, read the same way, or that are the same part."""
    names = [str(part.path or f"part {i}") for i, part in enumerate(parts, start=1)]
    for i, (name, part) in enumerate(zip(names, parts, strict=True)):
        _check_alike(parts[0], part, names[0], name)
        for other_name, other in zip(names[:i], parts, strict=False):
            if _have_same_rows(part, other):
                raise LoraInitError(
                    f"{name} and {other_name} hold the same rows, which would count twice. Leave one out."
                )


def _have_same_rows(part: Statistics, other: Statistics) -> bool:
    """Compare where the rows begin, if both say so; else their numbers, variances and means: a row has no variance."""
    places = [[one.provenance.settings.get(name) for name in _PLACE] for one in (part, other)]
    if None not in places[0][:3] and places[0] == places[1]:
        return True
    counts = [[(group, s.total_variance, s.n_samples) for group, s in one.groups.items()] for one in (part, other)]
    return counts[0] == counts[1] and all(
        torch.equal(part.groups[group].mean, other.groups[group].mean) for group in part.groups
    )


def _check_alike(first: Statistics, other: Statistics, first_name: str, other_name: str) -> None:
    one, two = first.provenance, other.provenance
    if one.fingerprint != two.fingerprint:
        raise LoraInitError(
            f"{other_name} was made from another model ({two.model}) than {first_name} ({one.model}). "
            "Merge statistics of one model."
        )
    config = {name: value for name, value in one.settings.items() if name.startswith("config.")}
    if entry := differing_config(two.settings, config):
        raise LoraInitError(f"{other_name} was made with {entry} of {first_name}. Collect both alike.")
    # With gradients, labels count at other rows.
    for setting in (*_ALIKE, "gradients") if one.token_mask == "labels" else _ALIKE:
        if getattr(one, setting) != getattr(two, setting):
            raise LoraInitError(
                f"{other_name} was made with {setting}={getattr(two, setting)!r}, "
                f"{first_name} with {setting}={getattr(one, setting)!r}. Collect both the same way."
            )
    ours, theirs = ({*part.group_of, *part.unsupported} for part in (first, other))
    common = [name for name in first.targets if name in other.targets]
    differing = [name for name in common if first.targets[name] != other.targets[name]]
    odd = [*sorted(ours - theirs), *sorted(theirs - ours), *differing]
    if odd:
        raise LoraInitError(
            f"{other_name} is not about the layers that {first_name} is about: {len(ours - theirs)} are missing, "
            f"{len(theirs - ours)} too many, {len(differing)} of another shape (first: {odd[0]!r}). "
            "Collect both with the same target_modules and target_parameters."
        )


def _grouping(parts: Sequence[Statistics]) -> tuple[dict[str, str], dict[str, dict[int, str]]]:
    """Group the layers that share a group in every part: the group of each layer, and its name in each part by number.

    Layers are in model order. Groups of experts follow the group of their parameter.
    """
    order: TopologicalSorter[str] = TopologicalSorter({name: () for part in parts for name in part.group_of})
    for part in parts:
        for before, name in pairwise(part.group_of):
            order.add(name, before)
    leaders: dict[tuple[tuple[int, str], ...], str] = {}
    group_of: dict[str, str] = {}
    sources: dict[str, dict[int, str]] = {}
    for name in order.static_order():
        source = {i: part.group_of[name] for i, part in enumerate(parts) if name in part.group_of}
        group_of[name] = leaders.setdefault(tuple(source.items()), name)
        sources.setdefault(group_of[name], source)
        for expert in range(parts[min(source)].targets[name].experts):
            group = expert_group(name, expert)
            having = {i: group for i, part in enumerate(parts) if group in part.groups}
            if having:
                sources[group] = having
    return group_of, sources


def _routed(part: Statistics, group: str) -> float:
    """Share of the router's choices that fell on an expert; 1 for what is no expert."""
    if group in part.targets:
        return 1.0
    name, _, expert = group.rpartition(".")
    counts = [part.rows_of_expert(name, i) for i in range(part.targets[name].experts)]
    return counts[int(expert)] / sum(counts)


def _merge_gradients(
    parts: Sequence[Statistics], weights: Sequence[float] | None, names: Sequence[str]
) -> dict[str, GradientSpectrum]:
    """Merge the gradients of all parts, for each of the layers `names`, as `Statistics.merge` says.

    A part in which a layer did not run adds no gradient to it.
    """
    gradients = [part.gradients for part in parts]
    size = _common_size([one.weighted for one in of.values()] for of in gradients)
    n_triplets = _n_triplets(parts)
    n_labels = sum(part.provenance.n_labels for part in parts)
    shares = [part.provenance.n_labels / n_labels for part in parts] if weights is None else weights
    merged = {}
    for name in names:
        spectra = [of[name] for of in gradients if name in of]
        shares_there = [share for share, of in zip(shares, gradients, strict=True) if name in of]
        of_rows = None if weights is None else [share / sum(shares_there) for share in shares_there]
        merged[name] = _merge_gradient(spectra, shares_there, of_rows, n_triplets, size)
    return merged


def _n_triplets(parts: Sequence[Statistics]) -> int:
    """Count the triplets to keep: as many as every part has that may have left any out.

    A pass keeps two triplets for each rank at least. A part with fewer saw few labels, or narrow layers, and lacks
    nothing.
    """
    counts = [max(len(one.singular_values) for one in part.gradients.values()) for part in parts]
    full = [count for count, part in zip(counts, parts, strict=True) if count >= 2 * part.provenance.rank]
    return min(full, default=sum(counts))


def _merge_gradient(
    spectra: Sequence[GradientSpectrum], shares: Sequence[float], of_rows: Sequence[float] | None, n_triplets: int,
    size: int,
) -> GradientSpectrum:  # fmt: skip
    """Merge the gradients of one layer; `shares` weigh the means, `of_rows` the moments, by default rows do."""
    n_samples = sum(one.n_samples for one in spectra)
    # The sum of U_i s_i V_i^T is [U_1, U_2, ...] [s_1 V_1, s_2 V_2, ...]^T: left [d_out, k], right [k, d_in].
    left = torch.cat([one.left.T for one in spectra], 1)
    scaled = [share * one.singular_values[:, None] for share, one in zip(shares, spectra, strict=True)]
    right = torch.cat([values * one.right for values, one in zip(scaled, spectra, strict=True)])
    u, s, v = freeze_triplets(*product_svd(left, right, n_triplets), n_triplets)
    by_rows = of_rows or [one.n_samples / n_samples for one in spectra]
    moments = [share * one.output_moment for share, one in zip(by_rows, spectra, strict=True)]
    weighted = mix([one.weighted for one in spectra], size, of_rows)
    return GradientSpectrum(weighted, u, s, v, torch.stack(moments).sum(0), math.nan, n_samples)


def _provenance(parts: Sequence[Statistics], weights: Sequence[float] | None) -> Provenance:
    made = [part.provenance for part in parts]
    seconds: Counter[str] = Counter()
    for one in made:
        seconds.update(one.seconds)
    gradients = all(one.gradients for one in made)  # the gradients of some are not the gradients of the whole
    return replace(
        made[0],
        data=_data_in_words(made, weights),
        rank=min(one.rank for one in made),
        gradients=gradients,
        n_labels=sum(one.n_labels for one in made) if gradients else 0,
        n_batches=sum(one.n_batches for one in made),
        stop_reason=", ".join(dict.fromkeys(reason for one in made for reason in one.stop_reason.split(", "))),
        complete=all(one.complete for one in made),
        keeps=None,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        settings=_common_settings(made),
        notes=[],
    )


def _data_in_words(made: Sequence[Provenance], weights: Sequence[float] | None) -> str:
    """Describe the data of all parts, each once; with weights each with its own."""
    data = [one.data for one in made]
    if weights is not None:
        shown = [f"({text})" if "; " in text else text or "not described" for text in data]
        data = [f"{weight:g} x {text}" for weight, text in zip(weights, shown, strict=True)]
    return "; ".join(dict.fromkeys(text for text in data if text))


_WEIGHT = re.compile(r"^(\(?[\d.e+-]+ x \(?)+")  # that a part had in a merge


def _common_settings(made: Sequence[Provenance]) -> dict[str, Any]:
    """Return the settings that all parts have alike; of different data the rows are all of theirs."""
    every = [one.settings for one in made]
    common = {
        name: value
        for name, value in every[0].items()
        if all(name in settings and settings[name] == value for settings in every)
    }
    rows = _rows_of_all(made)
    return {**common, "rows": rows} if rows else {name: common[name] for name in common if name != "rows"}


def _rows_of_all(made: Sequence[Provenance]) -> int | None:
    """Count the rows of all data, those of each source once; None if that is unknown.

    The hash of its rows tells a source, whatever it is called. Without it, two parts of one source were read from
    different places of it; else they are two sources of one name.
    """
    counts: dict[Any, int] = {}  # of each source
    names: dict[Any, frozenset[str]] = {}
    places: set[Any] = set()
    for one in made:
        words = frozenset(_source_in_words(text) for text in one.data.split("; "))
        rows: Any = one.settings.get("rows")
        digest = one.settings.get("digest of the rows")
        source, place = digest or words, (words, one.settings.get("offset"), one.settings.get("seed of the sample"))
        others = [names[other] for other in names if other != source and not (digest and isinstance(other, str))]
        is_unnamed = not words.isdisjoint(("", "data in memory"))
        unknown = digest is None and (rows != counts.get(source, rows) or place in places or is_unnamed)
        if not is_number(rows) or unknown or any(not words.isdisjoint(other) for other in others):
            return None
        counts[source] = max(int(rows), counts.get(source, 0))  # an estimate, if some rows make no example
        names[source] = words | names.get(source, frozenset())
        places.add(place)
    return sum(counts.values())


def _source_in_words(text: str) -> str:
    """Return what a description says of the source alone; empty if it was not described."""
    return _WEIGHT.sub("", text).partition(": ")[0].replace("not described", "")


def _origins(parts: Sequence[Statistics], weights: Sequence[float] | None, size: int) -> Iterator[str]:
    for i, part in enumerate(parts):
        made = part.provenance
        weight = "" if weights is None else f" with weight {weights[i]:g}"
        yield (
            f"part {i + 1} of {len(parts)}{weight}: {made.n_samples:,} rows in {made.n_batches} batches, stopped: "
            f"{made.stop_reason}, seed {made.seed}, {made.data or 'data not described'}."
        )
    most = [max(one.n_components for one in part.groups.values()) for part in parts]
    if max(most) > size:
        yield f"the parts have up to {' and '.join(map(str, most))} components of a layer; {size} are kept."
    without = [str(i + 1) for i, part in enumerate(parts) if not part.provenance.gradients]
    if 0 < len(without) < len(parts):
        yield f"part {', '.join(without)} of {len(parts)} has no gradients, so the others' are left out."


def _notes(parts: Sequence[Statistics]) -> Iterator[str]:
    """Keep the notes about single layers: unchanged if all parts have them, else with the number of the part.

    Notes about the experts of a parameter are written anew.
    """
    experts = {name for part in parts for name, target in part.targets.items() if target.experts}
    about = re.compile(r"(.*?)( and \d+ other layers?)?: ")
    said = [
        [note for note in part.provenance.notes if not ((match := about.match(note)) and match[1] in experts)]
        for part in parts
    ]
    everywhere = [note for note in said[0] if all(note in notes for notes in said)]
    yield from everywhere
    for i, notes in enumerate(said, start=1):
        yield from (f"part {i}, {note}" for note in notes if note not in everywhere)
