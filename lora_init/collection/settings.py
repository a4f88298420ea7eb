"""The settings of a pass and how far it has come in its data, and how a statistics file holds both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import Any

from lora_init.statistics.statistics import Provenance


@dataclass(frozen=True)
class Settings:
    """What a pass is made with: what it runs with, what all its processes share, and what its file is compared by."""

    fingerprint: str  # of the model
    layers: str  # number of layers and a hash of them
    rank: int
    rho: float
    center: bool
    token_mask: str
    max_batches: int
    tolerance: float
    seed: int
    gradients: bool
    task_type: str | None
    data: str
    forward: str | None  # name of the function that runs the model; None for the model itself
    loss: str | None  # name of the function for the loss; None for the model's own
    of_batches: Mapping[str, Any] = field(default_factory=dict)  # what the batches bring along: how they were read

    @property
    def n_components(self) -> int:
        """Components of each layer."""
        return round(self.rho * self.rank)

    def compared(self) -> dict[str, Any]:
        """Name what has to be the same for two passes to be one; the model first, then in the order of a message."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "of_batches"}
        if not self.gradients:
            del own["loss"]
        beside = {name: value for name, value in own.items() if name not in _IN_PROVENANCE}
        return {"fingerprint": self.fingerprint, **self.of_batches, **beside, **own}

    def stored(self) -> dict[str, Any]:
        """Return the fields of a `Provenance` that hold all this."""
        compared = self.compared()
        inside = {name: compared.pop(name) for name in _IN_PROVENANCE}
        return {**inside, "settings": compared}


# Those with a field of their own in a file; the others are in its `settings`.
_IN_PROVENANCE = ("fingerprint", "rank", "center", "token_mask", "seed", "gradients", "task_type", "data")


def read_settings(made: Provenance) -> dict[str, Any]:
    """Read from a file what `Settings.compared` gives; a file of an earlier version may not say all."""
    return {**made.settings, **{name: getattr(made, name) for name in _IN_PROVENANCE}}


@dataclass(frozen=True)
class Position:
    """How far a pass has come, and in which data."""

    first_batch: str | None  # hash of the first batch; None if a file does not say
    batches: str | None = None  # hash of all batches that it may read, where they are in memory
    common_loader: bool = False  # whether all processes read one loader, each its part
    used: tuple[int, ...] = ()  # batches read, of each process, or of all where the loader is common
    n_bad: int = 0  # how many of them failed and were left out

    @classmethod
    def of(cls, made: Provenance) -> Position:
        """Read it from a file."""
        kept = made.settings
        used = tuple(kept.get("used", [made.n_batches]))
        common = bool(kept.get("common_loader", False))
        return cls(kept.get("first_batch"), kept.get("batches"), common, used, int(kept.get("bad_batches", 0)))

    def stored(self) -> dict[str, Any]:
        """Return the entries in the `settings` of a file."""
        batches = {} if self.batches is None else {"batches": self.batches}
        bad = {"bad_batches": self.n_bad} if self.n_bad else {}
        kept = {"first_batch": self.first_batch, **batches, "common_loader": self.common_loader}
        return {**kept, "used": list(self.used), **bad}

    def is_in_other_data(self, other: Position) -> bool:
        """Check whether the two are known to be in different data."""
        pairs = ((self.first_batch, other.first_batch), (self.batches, other.batches))
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)

    def used_after(self, earlier: Position) -> tuple[tuple[int, ...], int]:
        """Add what an earlier part of the pass has used: batches read, and those that failed."""
        pairs = zip_longest(earlier.used, self.used, fillvalue=0)
        return tuple(a + b for a, b in pairs), earlier.n_bad + self.n_bad
