"""How statistics of several passes over one model are merged, part by part."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from graphlib import TopologicalSorter
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import torch

from lora_init.errors import LoraInitError, is_number
from lora_init.layers.identity import differing_config
from lora_init.layers.rows import expert_group
from lora_init.statistics.gradient_spectrum import GradientSpectrum, freeze_triplets, product_svd
from lora_init.statistics.spectrum import Moments, Sizes, Spectrum, freeze, principal_directions

if TYPE_CHECKING:
    from lora_init.layers.targets import Target
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


# How the merge works. A file holds spectra, not rows, so each group of layers is merged from the moments and leading
# directions of its parts (`mix`). What a part truncated is lost, and is modeled as isotropic noise. All parts are
# merged in one call, since merging two at a time would truncate once for each call.
def merge_statistics(
    parts: Sequence[Statistics], weights: Sequence[float] | None = None, one_pass: bool = False
) -> Statistics:
    """Merge all parts at once, see `Statistics.merge`; the notes list where each part comes from.

    Parts of `one_pass` have other rows, even where they are alike.
    """
    weights = _check_weights(parts, weights)
    _check_alike_parts(parts)
    if not one_pass:
        _check_other_rows(parts)
    size = _common_size([part.groups.values() for part in parts])
    group_of, sources = _grouping(parts)
    groups: dict[str, Spectrum] = {}
    for name, source in sources.items():
        spectra = [parts[i].groups[group] for i, group in source.items()]
        groups[name] = mix(spectra, size, _shares_of_group(parts, weights, source))
    provenance = _provenance(parts, weights)
    notes = [*_origins(parts, weights, size), *_notes(parts)]
    most_rows = max(spectrum.n_samples for spectrum in groups.values())
    gradients: dict[str, GradientSpectrum] = {}
    if provenance.gradients:
        gradients = _merge_gradients(parts, weights, list(group_of))
    return replace(
        parts[0],
        groups=groups,
        group_of=group_of,
        targets=_merge_targets(parts, group_of),
        provenance=replace(provenance, n_samples=most_rows, notes=notes),
        # Nobody has tested the components of several parts on rows that they had not seen.
        held_out=dict.fromkeys(groups, math.nan),
        unsupported=_merge_unsupported(parts, group_of),
        gradients=gradients,
        sizes=dict(_merge_sizes(parts, weights, group_of)),
        path=None,
    )


def _shares_of_group(
    parts: Sequence[Statistics], weights: Sequence[float] | None, source: dict[int, str]
) -> list[float] | None:
    """Return the share of each part that has a group; None without weights, where every row counts once.

    `source` has the name of the group in each part, by the number of the part.
    """
    if weights is None:
        return None
    # An expert reads a part of the tokens: the weight of a data set is split as the router split its tokens.
    return _shares([weights[i] * _routed(parts[i], group) for i, group in source.items()])


def _shares(counts: Sequence[float]) -> list[float]:
    """Return numbers as shares of their sum: the parts that have a layer may be some of all parts only."""
    total = sum(counts)
    return [count / total for count in counts]


def _merge_targets(parts: Sequence[Statistics], names: Iterable[str]) -> dict[str, Target]:
    targets: dict[str, Target] = {}
    # The first part comes last and wins; parts agree on common layers, as `_check_alike` has found.
    for part in reversed(parts):
        targets.update(part.targets)
    return {name: targets[name] for name in names}


def _merge_unsupported(parts: Sequence[Statistics], supported: dict[str, str]) -> dict[str, str]:
    """Collect the layers that have a spectrum in no part: a layer that ran in one of them has one now."""
    unsupported: dict[str, str] = {}
    for part in parts:
        for name, kind in part.unsupported.items():
            if name not in supported:
                unsupported[name] = kind
    return unsupported


def mix(spectra: Sequence[Spectrum], size: int, shares: Sequence[float] | None = None) -> Spectrum:
    """Decompose the rows of several sets together, of which only the spectra are known.

    Without shares every row counts once. With shares w_i the second moment is sum w_i E_i, whatever the numbers of rows
    are: a row of set i counts w_i n / n_i times, where n is the number of rows of all sets. The distance of the means
    counts as variance.

    Mean and total variance are exact, up to the float32 of the means. What a set has outside of its own components is
    known as a sum only. It is taken to be the same along all directions, as in probabilistic PCA (Tipping and Bishop
    1999): the components are mixed with their variance above this noise, and the mean noise of all sets is added to
    each component of the result. Sets that kept all their directions lose nothing. Of made-up rows whose variances fall
    as j^-0.5 to j^-1.2, the 32 components of 2 or 8 sets captured at least 0.97 of what any 32 could, and their stated
    variance was 0.90 to 1.0005 of what they captured.
    """
    if len(spectra) == 1:
        # Shares do not matter here, and decomposing anew would only round.
        only = spectra[0]
        return replace(only, components=only.components[:size], explained_variance=only.explained_variance[:size])
    n_samples = sum(spectrum.n_samples for spectrum in spectra)
    counts: list[float] = []  # how many rows each set counts for
    own_means: list[torch.Tensor] = []
    for i, spectrum in enumerate(spectra):
        counts.append(spectrum.n_samples if shares is None else shares[i] * n_samples)
        own_means.append(spectrum.mean.double())
    means = torch.stack(own_means)  # sets x inputs
    mean = torch.tensor(counts, dtype=torch.float64) / n_samples @ means  # sets, sets x inputs -> inputs
    # Instead of a covariance, inputs x inputs, stack rows whose scatter is the sum of all: a row for each component,
    # as long as the root of its scatter, and a row for the distance of each mean from the common one.
    rows: list[torch.Tensor] = []
    scatter, noise = 0.0, 0.0
    for spectrum, own_mean, count in zip(spectra, means, counts, strict=True):
        # From variance to scatter: the reverse of `freeze`, which divides by n - 1, and by 1 for a single row.
        degrees = count * max(spectrum.n_samples - 1, 1) / spectrum.n_samples
        # A running decomposition may understate a weak component, even below the noise.
        above = (spectrum.explained_variance - spectrum.noise_variance).clamp_min(0.0) * degrees
        gap = count**0.5 * (own_mean - mean)
        rows += [above.sqrt()[:, None] * spectrum.components.double(), gap[None]]
        scatter += spectrum.total_variance * degrees + float(gap @ gap)
        noise += spectrum.noise_variance * degrees
    weights, directions = principal_directions(torch.cat(rows), size)  # -> size, size x inputs
    return freeze(Moments(n_samples, mean, scatter), directions, weights + noise)


def _merge_sizes(
    parts: Sequence[Statistics], weights: Sequence[float] | None, names: Iterable[str]
) -> Iterator[tuple[str, Sizes]]:
    """Average the sizes of each layer over the parts it ran in, if all of them have them.

    Older files have none, and an average over the others alone would not describe the merged data.
    """
    for name in names:
        counts: list[float] = []
        sizes: list[Sizes] = []
        for i, part in enumerate(parts):
            if name not in part.group_of:
                continue
            counts.append(weights[i] if weights else part.groups[part.group_of[name]].n_samples)
            if name in part.sizes:
                sizes.append(part.sizes[name])
        if len(sizes) < len(counts):
            continue
        inputs: list[float] = []
        squares: list[float] = []
        for share, size in zip(_shares(counts), sizes, strict=True):
            inputs.append(share * size.input)
            squares.append(share * size.output**2)  # a root mean square: its square is what averages over rows
        yield name, Sizes(sum(inputs), math.sqrt(sum(squares)))


def _common_size(spectra_of_parts: Iterable[Iterable[Spectrum]]) -> int:
    """Compute how many components to keep, given the groups of each part: as many as every part has that left any out.

    A part that saw few rows has few components and lacks nothing. One that was asked for fewer than another lacks the
    rest, and the other part alone would then describe the whole.
    """
    smallest: float = math.inf
    rows_of_mixture = 0
    for part in spectra_of_parts:
        spectra = list(part)
        truncated = []
        for spectrum in spectra:
            kept = float(spectrum.explained_variance.sum())
            if kept < (1.0 - _NOTHING) * spectrum.total_variance:
                truncated.append(spectrum.n_components)
        smallest = min(smallest, max(truncated, default=math.inf))
        # A set enters `mix` as its components and the distance of its mean.
        rows_of_mixture += max(spectrum.n_components + 1 for spectrum in spectra)
    return int(min(smallest, rows_of_mixture))


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
    # Negated as a whole, so that NaN, which compares as False, is refused.
    if len(weights) != len(parts) or not (all(weight > 0 for weight in weights) and off <= _SUM_TOLERANCE):
        raise LoraInitError(
            f"{{weights}}: {len(weights)} for {len(parts)} parts, and "
            f"their sum is {sum(weights):g}, expected positive numbers whose sum is 1, one for each part in order.",
            weights=weights,
        )
    return weights


def _check_alike_parts(parts: Sequence[Statistics]) -> None:
    """Refuse parts of other layers or another model, and parts that were read in another way."""
    names = _names(parts)
    for name, part in zip(names, parts, strict=True):
        _check_alike(parts[0], part, names[0], name)


def _check_other_rows(parts: Sequence[Statistics]) -> None:
    """Refuse parts that hold the same rows as another one."""
    for (first_name, first), (name, part) in combinations(zip(_names(parts), parts, strict=True), 2):
        if _have_same_rows(first, part):
            raise LoraInitError(f"{name} and {first_name} hold the same rows, which would count twice. Leave one out.")


def _names(parts: Sequence[Statistics]) -> list[str]:
    return [str(part.path or f"part {i}") for i, part in enumerate(parts, start=1)]


def _have_same_rows(part: Statistics, other: Statistics) -> bool:
    """Compare where the rows begin, if both say so; else their numbers, variances and means: a row has no variance."""
    place, other_place = _place_of(part), _place_of(other)
    # Older statistics lack a hash, an offset or a seed. Batches without a template or a completion have None there.
    if None not in place[:3] and place == other_place:
        return True
    if _moments_of(part) != _moments_of(other):
        return False
    return all(torch.equal(part.groups[group].mean, other.groups[group].mean) for group in part.groups)


def _place_of(part: Statistics) -> list[Any]:
    return [part.provenance.settings.get(name) for name in _PLACE]


def _moments_of(part: Statistics) -> list[tuple[str, float, int]]:
    # Exact, and so different for any other rows, as a path or a description is not.
    return [(group, spectrum.total_variance, spectrum.n_samples) for group, spectrum in part.groups.items()]


def _check_alike(first: Statistics, other: Statistics, first_name: str, other_name: str) -> None:
    expected, got = first.provenance, other.provenance
    if expected.fingerprint != got.fingerprint:
        raise LoraInitError(
            f"{other_name} was made from another model ({got.model}) than {first_name} ({expected.model}). "
            "Merge statistics of one model."
        )
    # The same weights with another `rope_theta`, say, are another model, and have the same fingerprint.
    config = {name: value for name, value in expected.settings.items() if name.startswith("config.")}
    if entry := differing_config(got.settings, config):
        raise LoraInitError(f"{other_name} was made with {entry} of {first_name}. Collect both alike.")
    compared: tuple[str, ...] = _ALIKE
    if expected.token_mask == "labels":
        compared = (*_ALIKE, "gradients")  # with gradients, labels count at other rows, see `TokenMasks`
    for setting in compared:
        value, other_value = getattr(expected, setting), getattr(got, setting)
        if value != other_value:
            raise LoraInitError(
                f"{other_name} was made with {setting}={other_value!r}, "
                f"{first_name} with {setting}={value!r}. Collect both the same way."
            )
    _check_layers(first, other, first_name, other_name)


def _check_layers(first: Statistics, other: Statistics, first_name: str, other_name: str) -> None:
    """Refuse parts that were collected for other layers; which of these ran may differ."""
    ours = {*first.group_of, *first.unsupported}
    theirs = {*other.group_of, *other.unsupported}
    differing = []
    for name, target in first.targets.items():
        if name in other.targets and target != other.targets[name]:
            differing.append(name)
    odd = [*sorted(ours - theirs), *sorted(theirs - ours), *differing]
    if odd:
        raise LoraInitError(
            f"{other_name} is not about the layers that {first_name} is about: {len(ours - theirs)} are missing, "
            f"{len(theirs - ours)} too many, {len(differing)} of another shape (first: {odd[0]!r}). "
            "Collect both with the same target_modules and target_parameters."
        )


# A group stands for layers that read the same tensor. Two layers may share their input in one part and not in another,
# as where one of them did not run. So the merged groups are the coarsest ones that every part agrees on: layers go
# together only if they are in one group in each part, and in the same parts.
def _grouping(parts: Sequence[Statistics]) -> tuple[dict[str, str], dict[str, dict[int, str]]]:
    """Return the group of each layer, and the name that each group has in each part, by the number of the part.

    Layers are in model order. Groups of experts follow the group of their parameter.
    """
    # No part need have all layers: the model order is one that agrees with the order of each part.
    # Parts of one model never contradict each other in it.
    order: TopologicalSorter[str] = TopologicalSorter()
    for part in parts:
        for name in part.group_of:
            order.add(name)
        for before, name in pairwise(part.group_of):
            order.add(name, before)
    leaders: dict[tuple[tuple[int, str], ...], str] = {}
    group_of: dict[str, str] = {}
    sources: dict[str, dict[int, str]] = {}
    for name in order.static_order():
        source = {i: part.group_of[name] for i, part in enumerate(parts) if name in part.group_of}
        # The first layer with these groups names the merged one.
        group_of[name] = leaders.setdefault(tuple(source.items()), name)
        sources.setdefault(group_of[name], source)
        for expert in range(parts[min(source)].targets[name].experts):
            group = expert_group(name, expert)
            having = {i: group for i, part in enumerate(parts) if group in part.groups}
            if having:  # the router sent it a row in some part
                sources[group] = having
    return group_of, sources


def _routed(part: Statistics, group: str) -> float:
    """Return the share of the router's choices that fell on an expert; 1 for a group that is not an expert's."""
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
    weighted = []
    for part in parts:
        weighted.append([gradient.weighted for gradient in part.gradients.values()])
    size = _common_size(weighted)
    n_triplets = _n_triplets(parts)
    # Each gradient is the mean over a part's labels: weighed by their number, the sum is the mean over all labels.
    all_shares = weights or _shares([part.provenance.n_labels for part in parts])
    merged = {}
    for name in names:
        spectra: list[GradientSpectrum] = []
        shares: list[float] = []
        for share, part in zip(all_shares, parts, strict=True):
            if name in part.gradients:
                spectra.append(part.gradients[name])
                shares.append(share)
        # The mean loss counts all parts, also those in which the layer did not run, so these shares stay as they are.
        # Moments of rows are of the rows that there are, so their shares are made to add up to 1.
        row_shares = None if weights is None else _shares(shares)
        merged[name] = _merge_gradient(spectra, shares, row_shares, n_triplets, size)
    return merged


def _n_triplets(parts: Sequence[Statistics]) -> int:
    """Count the triplets to keep: as many as every part has that may have left any out.

    A pass keeps two triplets for each rank at least. A part with fewer saw few labels, or narrow layers, and lacks
    nothing.
    """
    counts = []
    full = []
    for part in parts:
        count = max(len(gradient.singular_values) for gradient in part.gradients.values())
        counts.append(count)
        if count >= 2 * part.provenance.rank:
            full.append(count)
    return min(full, default=sum(counts))


def _merge_gradient(
    spectra: Sequence[GradientSpectrum], shares: Sequence[float], row_shares: Sequence[float] | None, n_triplets: int,
    size: int,
) -> GradientSpectrum:  # fmt: skip
    """Merge the gradients of one layer; `shares` weigh the means, `row_shares` the moments, by default rows do."""
    counts = [gradient.n_samples for gradient in spectra]
    by_rows = row_shares or _shares(counts)
    # The sum of U_i s_i V_i^T is [U_1, U_2, ...] [s_1 V_1, s_2 V_2, ...]^T: left [d_out, k], right [k, d_in].
    # No d_out x d_in matrix is made for it.
    left, right, moments, weighted = [], [], [], []
    for share, row_share, gradient in zip(shares, by_rows, spectra, strict=True):
        left.append(gradient.left.T)
        right.append(share * gradient.singular_values[:, None] * gradient.right)
        moments.append(row_share * gradient.output_moment)
        weighted.append(gradient.weighted)
    u, s, v = freeze_triplets(*product_svd(torch.cat(left, 1), torch.cat(right), n_triplets), n_triplets)
    moment = torch.stack(moments).sum(0)  # parts x d_out -> d_out
    # The importance needs the weights of the model, which a merge does not have.
    return GradientSpectrum(mix(weighted, size, row_shares), u, s, v, moment, math.nan, sum(counts))


def _provenance(parts: Sequence[Statistics], weights: Sequence[float] | None) -> Provenance:
    """Add up or list what the provenance of all parts says; what cannot be, as a seed, comes from the first part."""
    provenances = [part.provenance for part in parts]
    seconds: Counter[str] = Counter()
    stop_reasons: dict[str, None] = {}  # each once, in order
    n_labels = n_batches = 0
    for provenance in provenances:
        seconds.update(provenance.seconds)
        stop_reasons.update(dict.fromkeys(provenance.stop_reason.split(", ")))  # of a merge, several
        n_labels += provenance.n_labels
        n_batches += provenance.n_batches
    # The gradients of some parts are not the gradients of the whole.
    gradients = all(provenance.gradients for provenance in provenances)
    return replace(
        provenances[0],
        data=_data_in_words(provenances, weights),
        rank=min(provenance.rank for provenance in provenances),
        gradients=gradients,
        n_labels=n_labels if gradients else 0,
        n_batches=n_batches,
        stop_reason=", ".join(stop_reasons),
        complete=all(provenance.complete for provenance in provenances),
        keeps=None,  # was estimated from halves of one pass
        seconds={name: round(value, 3) for name, value in seconds.items()},
        settings=_common_settings(provenances),
        notes=[],  # written by `merge_statistics`
    )


def _data_in_words(provenances: Sequence[Provenance], weights: Sequence[float] | None) -> str:
    """Describe the data of all parts, each once; with weights each with its own."""
    texts: dict[str, None] = {}
    for i, provenance in enumerate(provenances):
        text = provenance.data
        if weights is not None:
            text = text or "not described"
            if "; " in text:  # merged before: the weight is of all of it
                text = f"({text})"
            text = f"{weights[i]:g} x {text}"
        if text:
            texts[text] = None
    return "; ".join(texts)


_WEIGHT = re.compile(r"^(\(?[\d.e+-]+ x \(?)+")  # that a part had in a merge


def _common_settings(provenances: Sequence[Provenance]) -> dict[str, Any]:
    """Return the settings that are the same in all parts; `rows` is the number of rows of all their data.

    A setting that differs describes none of the merged rows, and is left out.
    """
    common: dict[str, Any] = {}
    for name, value in provenances[0].settings.items():
        # None is a value here: a setting that a part lacks is unknown, and agrees with nothing.
        if all(name in provenance.settings and provenance.settings[name] == value for provenance in provenances):
            common[name] = value
    rows = _rows_of_all(provenances)
    if rows:
        common["rows"] = rows
    else:
        common.pop("rows", None)
    return common


# The length of a training is planned from this number, so it is None where descriptions leave it open.
def _rows_of_all(provenances: Sequence[Provenance]) -> int | None:
    """Count the rows of all data, the rows of each source once; None if that is unknown.

    The hash of its rows tells a source, whatever it is called. Without it, two parts of one source were read from
    different places of it; else they are two sources of one name.
    """
    counts: dict[Any, int] = {}  # of each source, by its hash or else its names
    names_of: dict[Any, frozenset[str]] = {}  # a merged part has several
    places: set[Any] = set()
    for provenance in provenances:
        settings = provenance.settings
        names = frozenset(_source_in_words(text) for text in provenance.data.split("; "))
        rows: Any = settings.get("rows")
        digest = settings.get("digest of the rows")
        source = digest or names
        place = names, settings.get("offset"), settings.get("seed of the sample")
        # These two names are of any data at all.
        is_unnamed = not names.isdisjoint(("", "data in memory"))
        if digest is None and (rows != counts.get(source, rows) or place in places or is_unnamed):
            return None
        if not is_number(rows) or _may_share_rows(digest, source, names, names_of):
            return None
        counts[source] = max(int(rows), counts.get(source, 0))  # an estimate, if some rows make no example
        names_of[source] = names | names_of.get(source, frozenset())
        places.add(place)
    return sum(counts.values())


def _may_share_rows(digest: Any, source: Any, names: frozenset[str], names_of: Mapping[Any, frozenset[str]]) -> bool:
    """Check whether another source has a name of this one, and hashes do not tell the two apart."""
    for other, other_names in names_of.items():
        told_apart = digest and isinstance(other, str)  # both are known by their hashes
        if other != source and not told_apart and not names.isdisjoint(other_names):
            return True
    return False


def _source_in_words(text: str) -> str:
    """Return what a description says of the source alone; empty if it was not described."""
    # Such as "0.5 x (en/a.jsonl: 64 of 200 examples".
    return _WEIGHT.sub("", text).partition(": ")[0].replace("not described", "")


def _origins(parts: Sequence[Statistics], weights: Sequence[float] | None, size: int) -> Iterator[str]:
    """Describe each part, and what the merge has left out of them."""
    for i, part in enumerate(parts):
        provenance = part.provenance
        weight = ""
        if weights is not None:
            weight = f" with weight {weights[i]:g}"
        yield (
            f"part {i + 1} of {len(parts)}{weight}: {provenance.n_samples:,} rows in {provenance.n_batches} batches, "
            f"stopped: {provenance.stop_reason}, seed {provenance.seed}, {provenance.data or 'data not described'}."
        )
    most = []
    without_gradients = []
    for i, part in enumerate(parts, start=1):
        most.append(max(spectrum.n_components for spectrum in part.groups.values()))
        if not part.provenance.gradients:
            without_gradients.append(str(i))
    if max(most) > size:
        yield f"the parts have up to {' and '.join(map(str, most))} components of a layer; {size} are kept."
    if 0 < len(without_gradients) < len(parts):
        yield f"part {', '.join(without_gradients)} of {len(parts)} has no gradients, so the others' are left out."


def _notes(parts: Sequence[Statistics]) -> Iterator[str]:
    """Keep the notes about single layers: unchanged if all parts have them, else with the number of the part.

    Notes about the experts of a parameter are written anew: how many read too few rows is another number now.
    """
    of_experts: set[str] = set()
    for part in parts:
        for name, target in part.targets.items():
            if target.experts:
                of_experts.add(name)
    notes_of = []
    for part in parts:
        notes_of.append([note for note in part.provenance.notes if _subject_of(note) not in of_experts])
    in_all = set.intersection(*map(set, notes_of))
    common = [note for note in notes_of[0] if note in in_all]
    yield from common
    for i, notes in enumerate(notes_of, start=1):
        for note in notes:
            if note not in common:
                yield f"part {i}, {note}"


# A note begins with the layer, or the first of several: see `grid.one_line_each`.
_SUBJECT = re.compile(r"(.*?)( and \d+ other layers?)?: ")


def _subject_of(note: str) -> str | None:
    match = _SUBJECT.match(note)
    return None if match is None else match[1]
