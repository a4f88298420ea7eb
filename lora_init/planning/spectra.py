"""The explained-variance ratios of many layers as one array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_init.layers.targets import Target
from lora_init.statistics.statistics import Statistics


@dataclass(frozen=True, eq=False)
class Spectra:
    """What n layers' components explain, at most K components each.

    Attributes:
        names: Layer names.
        targets: Their kinds and widths.
        ratios: Explained-variance ratio of each component, falling, [n, K]; 0 beyond what a layer has.
        reached: Share of the variance that the first r components explain together, [n, K + 1]: column r. 1 where
            rows are constant: there is nothing to explain.
        collected: Components that each layer has, [n].
        starved: Layers that have fewer components than were asked for, because too few rows were seen, [n].
    """

    names: list[str]
    targets: list[Target]
    ratios: NDArray[np.float64]
    reached: NDArray[np.float64]
    collected: NDArray[np.int64]
    starved: NDArray[np.bool_]

    @property
    def most_collected(self) -> int:
        """Components of the layer that has most: what the pass was asked for, if rows and widths allowed it."""
        return int(self.ratios.shape[1])

    @property
    def widths(self) -> NDArray[np.int64]:
        """Parameters that one rank of each layer costs, d_in + d_out of a linear one, [n]."""
        return np.array([target.cost for target in self.targets], dtype=np.int64)


def stack_spectra(stats: Statistics, names: Sequence[str]) -> Spectra:
    """Stack the variances of layers; components are not read."""
    # One read per input group: q, k and v are the same numbers.
    groups = {stats.group_of[name]: name for name in names}
    shared = {group: stats.explained_variance_ratio(name).numpy() for group, name in groups.items()}
    rows = [shared[stats.group_of[name]] for name in names]
    targets = [stats.targets[name] for name in names]
    collected = np.array([len(row) for row in rows], dtype=np.int64)
    most = int(collected.max(initial=0))
    ratios = np.zeros((len(rows), most))
    for padded, row in zip(ratios, rows, strict=True):
        padded[: len(row)] = row
    d_in = np.array([target.in_features for target in targets], dtype=np.int64)
    # Fewer than others have, or as many as there were rows to find them in (one less where the mean is taken out).
    few_rows = 0 < stats.provenance.n_samples <= most + 1
    starved = (collected < np.minimum(most, d_in)) | (few_rows & (collected < d_in))
    reached = np.concatenate([np.zeros((len(rows), 1)), np.cumsum(ratios, axis=1)], axis=1)
    reached[[stats.total_variance(name) <= 0.0 for name in names]] = 1.0
    return Spectra(list(names), targets, ratios, reached, collected, starved)
