"""What the components of layers explain, and the worth that a policy gives to each rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_init.errors import LoraInitError, first_line
from lora_init.layers.targets import Target
from lora_init.packages import check_takes
from lora_init.planning.budgets import BoolArray, FloatArray, IntArray
from lora_init.planning.policies import find_policy
from lora_init.statistics.spectrum import Spectrum
from lora_init.statistics.statistics import Statistics


@dataclass(frozen=True, eq=False)
class Spectra:
    """What n layers' components explain, at most K components each."""

    names: list[str]  # layer names
    targets: list[Target]  # their kinds and widths
    ratios: FloatArray  # explained-variance ratio of each component, falling, [n, K]; 0 beyond what a layer has
    # Share of the variance that the first r components explain, [n, K + 1]: column r. 1 where rows are constant: there
    # is nothing to explain.
    reached: FloatArray
    collected: IntArray  # components that each layer has, [n]
    starved: BoolArray  # layers that have fewer components than were asked for, because their data has no more, [n]

    @property
    def most_collected(self) -> int:
        """Components of the layer that has most: what the pass was asked for, if data and widths allowed it."""
        return int(self.ratios.shape[1])

    def reached_at(self, ranks: IntArray) -> FloatArray:
        """Return the share of its variance that each layer's rank explains, [n]."""
        return np.take_along_axis(self.reached, ranks[:, None], axis=1)[:, 0]

    @property
    def widths(self) -> IntArray:
        """Parameters that one rank of each layer costs, d_in + d_out of a linear one, [n]."""
        return np.array([target.cost for target in self.targets], dtype=np.int64)


def _stacked(rows: Sequence[Any], n_columns: int) -> FloatArray:
    """Stack rows of unequal length, cut or filled with 0, [n, n_columns]."""
    stacked = np.zeros((len(rows), n_columns))
    for filled, row in zip(stacked, rows, strict=True):  # `filled` is a view of a row of the result
        filled[: len(row)] = row[:n_columns]
    return stacked


def stack_spectra(stats: Statistics, names: Sequence[str]) -> Spectra:
    """Stack the variances of layers; components are not read."""
    # One read per input group: q, k and v are the same numbers.
    ratios_of: dict[str, FloatArray] = {}
    rows: list[FloatArray] = []
    targets: list[Target] = []
    for name in names:
        targets.append(stats.targets[name])
        group = stats.group_of[name]
        if group not in ratios_of:
            ratios_of[group] = stats.explained_variance_ratio(name).numpy()
        rows.append(ratios_of[group])
    collected = np.array([len(row) for row in rows], dtype=np.int64)
    most = int(collected.max(initial=0))
    ratios = _stacked(rows, most)  # -> layers x components
    d_in = np.array([target.in_features for target in targets], dtype=np.int64)
    # A pass asks for rank x rho; a merge keeps fewer, and an old file does not say rho. A layer with fewer, or with as
    # many as there were rows (one less where the mean is taken out), would not have more if more had been asked for.
    few_rows = 0 < stats.provenance.n_samples <= most + 1
    asked = max(most, round(stats.provenance.rank * (stats.provenance.rho or 1.0)))
    starved = (collected < d_in) & ((collected < asked) | few_rows)
    reached = np.concatenate([np.zeros((len(rows), 1)), np.cumsum(ratios, axis=1)], axis=1)  # from rank 0 on
    reached[[stats.total_variance(name) <= 0.0 for name in names]] = 1.0
    return Spectra(list(names), targets, ratios, reached, collected, starved)


# A rule of one's own: (layer name, its spectrum) -> worth of its 1st, 2nd, ... rank, at most k numbers.
Rule = Callable[[str, Spectrum], FloatArray]


def worth(policy: str | Rule, stats: Statistics, spectra: Spectra) -> tuple[FloatArray, FloatArray]:
    """Apply a policy by name, or somebody's own rule, whose numbers are sorted.

    Returns the worth of each rank, [n, K], and what a layer's worth is divided by, [n].
    """
    widths = spectra.widths.astype(np.float64)
    if callable(policy):
        check_takes(policy, f"the policy {getattr(policy, '__name__', policy)}", "name", "spectrum")
        rows = []
        for name in spectra.names:
            spectrum = stats[name]  # a copy: whatever somebody's rule does to it reaches no other layer
            where = f"layer {name!r}: the policy"
            rows.append(_scores(where, (spectrum.n_components,), policy, name, spectrum))
        return _stacked(rows, spectra.most_collected), np.ones(len(widths))
    known = find_policy(policy)
    numbers = spectra.ratios
    if known.reads is not None:
        numbers = _stacked([known.reads(stats, name) for name in spectra.names], spectra.most_collected)
        # All worth nothing: the order of the layers alone would decide.
        if not numbers.any():
            raise LoraInitError(
                f"{{policy}}: all layers are worth nothing, since {known.if_zero}. Choose another policy.",
                policy=policy,
            )
    scores = _scores(f"policy {policy!r}", numbers.shape, known.function, numbers, widths)
    return scores, widths if known.per_parameter else np.ones(len(widths))


def _scores(where: str, shape: tuple[int, ...], function: Callable[..., Any], *arguments: Any) -> FloatArray:
    """Compute the worth of ranks by somebody's function, and sort it, falling."""
    try:
        scores = np.asarray(function(*arguments), dtype=np.float64)
    except LoraInitError:
        raise
    except Exception as error:
        raise LoraInitError(f"{where} raised {type(error).__name__}: {first_line(error)}") from error
    if scores.shape != shape or not np.isfinite(scores).all():
        raise LoraInitError(
            f"{where} returned numbers of shape {scores.shape}, {np.isfinite(scores).sum()} of them finite. Expected "
            f"finite ones of shape {shape}, one for each component."
        )
    # `make_steps` takes a layer's ranks one after the other, so none may be worth more than the one before it.
    return -np.sort(-scores, axis=-1)
