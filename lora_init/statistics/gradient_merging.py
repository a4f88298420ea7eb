"""What the loss says about layers in several passes over one model, as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from lora_init.statistics.gradient_spectrum import GradientSpectrum
from lora_init.statistics.mean_gradient import freeze_triplets, product_svd
from lora_init.statistics.mixtures import common_size, cut, mix
from lora_init.statistics.parts import Part


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
