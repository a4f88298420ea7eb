"""What a pass has found so far: a running decomposition for each input group, and how well it predicted new rows."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_init.statistics.incremental_svd import IncrementalSVD
from lora_init.statistics.mean_gradient import MeanGradient

# Batches before which no layer can count as converged: the held-out share of so few says little.
MIN_BATCHES = 8


@dataclass
class GroupRecord:
    """The running decomposition of one input group and how well it predicted the batches it had not seen.

    Attributes:
        svd: The decomposition.
        shares: For each batch but the first: its number, and the share of its variance that all components captured.
        converged_at: Number of batches after which the group needed no more; None while it does.
    """

    svd: IncrementalSVD
    shares: list[tuple[int, float]] = field(default_factory=list)
    converged_at: int | None = None

    def compare(self, step: int) -> bool:
        """Record how well batch number `step` was predicted; tell whether it could be compared with earlier ones."""
        if self.svd.held_out is None:
            return False
        captured, total, _ = self.svd.held_out
        leading = float(captured[: self.svd.n_components].sum())
        self.shares.append((step, leading / total if total > 0 else 1.0))
        return True

    def held_out(self) -> float:
        """Mean share captured over the later half of the batches; NaN before the second batch."""
        shares = [share for _, share in self.shares]
        return statistics.fmean(shares[len(shares) // 2 :]) if shares else math.nan

    def merge(self, other: GroupRecord) -> None:
        """Take in what another process has seen of this group."""
        self.svd.merge(other.svd)
        self.shares = sorted(self.shares + other.shares)


def has_converged(shares: Sequence[float], captured: float, tolerance: float) -> bool:
    """Tell whether more data has nothing left to improve.

    What any k directions can capture lies between the held-out share and the share on the rows seen, which the
    components were chosen to fit. They are done when the two meet, the held-out share less its standard error: by
    luck of a few easy batches they meet too early. Nor are they done while the held-out share still rises, by more
    than a twelfth of the tolerance from the third to the last quarter of the batches: after a drift of the data the
    components still follow it, and both shares are low together. (A twelfth costs steady data nothing. Components of
    half as many batches, measured on the same rows, would tell as well, at twice the memory.)

    Args:
        shares: Held-out share of each batch but the first.
        captured: Share captured of all rows seen.
        tolerance: Largest gap, relative to `captured`.
    """
    if len(shares) + 1 < MIN_BATCHES:
        return False
    later = shares[len(shares) // 2 :]
    mean = statistics.fmean(later)
    error = math.dist(later, [mean] * len(later)) / math.sqrt((len(later) - 1) * len(later))
    middle = len(later) // 2
    rise = statistics.fmean(later[middle:]) - statistics.fmean(later[:middle])
    return captured - (mean - error) <= tolerance * captured and rise <= tolerance / 12


def falls_sharply(shares: Sequence[float]) -> bool:
    """Tell whether the last batch was predicted far worse than those before: by a quarter, and five deviations."""
    if len(shares) < 4:
        return False
    *before, last = shares
    mean = statistics.fmean(before)
    return last < 0.75 * mean and last < mean - 5.0 * statistics.stdev(before)


@dataclass
class Collected:
    """What one pass found: a decomposition per input group, before anything is frozen.

    Attributes:
        groups: Record of each group, by the name of its first layer.
        weighted: Record of the rows weighted by the size of their gradient, by layer, if gradients were asked for.
        gradients: Running mean gradient of each layer, likewise.
        n_labels: Labels whose loss the gradients are of.
        group_of: Group of every layer that ran.
        n_calls: Largest number of runs of each layer in one forward pass.
        n_batches: Batches taken in, by process.
        stop_reason: `"converged"`, `"exhausted"`, `"max_batches"` or `"interrupted"`.
        seconds: Wall time of the parts `forward`, `decomposition` and `data`.
    """

    groups: dict[str, GroupRecord] = field(default_factory=dict)
    weighted: dict[str, GroupRecord] = field(default_factory=dict)
    gradients: dict[str, MeanGradient] = field(default_factory=dict)
    n_labels: int = 0
    group_of: dict[str, str] = field(default_factory=dict)
    n_calls: dict[str, int] = field(default_factory=dict)
    n_batches: list[int] = field(default_factory=lambda: [0])
    stop_reason: str = "interrupted"
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "decomposition": 0.0, "data": 0.0})

    def merge(self, other: Collected) -> None:
        """Take in what another process has found in the same pass."""
        for ours, theirs in ((self.groups, other.groups), (self.weighted, other.weighted)):
            for name, record in theirs.items():
                if name in ours:
                    ours[name].merge(record)
                else:
                    ours[name] = record
        for name, mean in other.gradients.items():
            self.gradients[name] = self.gradients[name].merge(mean) if name in self.gradients else mean
        self.n_labels += other.n_labels
        self.group_of = other.group_of | self.group_of
        self.n_calls = dict(Counter(self.n_calls) | Counter(other.n_calls))  # the larger of each
        self.n_batches = self.n_batches + other.n_batches
        self.seconds = {part: max(value, other.seconds[part]) for part, value in self.seconds.items()}
