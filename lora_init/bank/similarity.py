"""Which adapters of a bank are for data like these: by the embeddings of prompts, by statistics, or by both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_init.bank.store import Bank
from lora_init.errors import LoraInitError
from lora_init.statistics.statistics import Statistics


@dataclass(frozen=True)
class Neighbour:
    """An adapter of the bank, and how close its data are."""

    name: str  # the entry
    task: str  # its task
    # between the mean embeddings, in standard deviations of one prompt, root mean square over the dimensions; 0 is
    # the same
    distance: float
    # mean squared cosine of the principal angles between the leading directions of the layers' inputs, in [0, 1];
    # None where statistics were not compared
    overlap: float | None = None

    def in_words(self) -> str:
        """Return in words how close it is."""
        overlap = "" if self.overlap is None else f", subspaces overlap by {self.overlap:.0%}"
        return f"{self.name} ({self.task}): {self.distance:.2f} standard deviations away{overlap}"


def neighbours(
    bank: Bank, embeddings: Tensor, statistics: Statistics | None = None, similarity: str = "embeddings"
) -> list[Neighbour]:
    """Order the tasks of a bank by how close their data are, the nearest first; of each task the last entry.

    Hidden states have a few dimensions that are hundreds of times larger than the rest, and a cosine sees these alone.
    So each dimension is divided by its standard deviation over the prompts of the bank, within the tasks. With `"both"`
    similarities the places in the two orders are summed.
    """
    if similarity != "embeddings" and statistics is None:
        raise LoraInitError(
            "{similarity} compares statistics, and there are none. Pass --statistics.", similarity=similarity
        )
    if statistics is not None and statistics.provenance.fingerprint != bank.fingerprint:
        raise LoraInitError(f"the statistics are of another model ({statistics.provenance.model}) than {bank.path}.")
    # Of checkpoints along a training the last one trained longest.
    known = {names[-1]: bank.embeddings(names[-1]) for names in bank.tasks.values()}
    distances = _distances(known, embeddings)
    overlaps: dict[str, float | None] = dict.fromkeys(known)
    if statistics is not None and similarity != "embeddings":
        overlaps = {name: _overlap(bank, name, statistics) for name in known}
    by_distance = sorted(known, key=lambda name: distances[name])
    by_overlap = sorted(known, key=lambda name: -(overlaps[name] or 0.0))  # the largest first
    places = {
        "embeddings": by_distance.index,
        "subspaces": by_overlap.index,
        # Places and not values: a distance has no upper bound and an overlap is a share, so they have no common scale.
        "both": lambda name: by_distance.index(name) + by_overlap.index(name),
    }[similarity]
    order = sorted(by_distance, key=places)  # of equal places the one whose prompts are nearer comes first
    return [Neighbour(name, bank.entries[name].task, distances[name], overlaps[name]) for name in order]


def _distances(known: dict[str, Tensor], embeddings: Tensor) -> dict[str, float]:
    """Compute how far the mean of each entry is from the mean of the new prompts, in spreads of one prompt."""
    within = torch.cat([rows - rows.mean(0) for rows in known.values()])  # prompts of all tasks x d
    spread = within.double().square().mean(0).sqrt().clamp_min(1e-12)  # [d]; a dimension may be constant
    mean = embeddings.double().mean(0)
    distances = {}
    for name, rows in known.items():
        distances[name] = float(((rows.double().mean(0) - mean) / spread).square().mean().sqrt())
    return distances


# The r leading directions of one data set span a subspace, and |A B^T|^2 / r, with orthonormal rows A and B, is the
# mean squared cosine of the principal angles between two such subspaces. It does not depend on the order or the signs
# of directions, which swap between samples where variances are nearly equal.
def _overlap(bank: Bank, name: str, statistics: Statistics) -> float:
    """Average over layers the share of the r leading directions of one data set that lies within another's."""
    other = bank.statistics(name)
    if other is None:
        raise LoraInitError(f"entry {name!r} of {bank.path} has no statistics. Compare by embeddings alone.")
    # A layer of each group that both have: its first may be in one alone.
    layers = {statistics.group_of[layer]: layer for layer in statistics if layer in other}
    shares = []
    for layer in layers.values():
        a, b = statistics[layer].components, other[layer].components  # [k, d_in] each
        rank = min(len(a), len(b), bank.entries[name].rank)
        shares.append(float((a[:rank] @ b[:rank].T).square().sum()) / rank)
    if not shares:
        raise LoraInitError(f"the statistics of entry {name!r} are about other layers. Compare by embeddings alone.")
    return sum(shares) / len(shares)
