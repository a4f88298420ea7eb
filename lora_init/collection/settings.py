"""What a statistics file says of its pass: the settings that it is compared by, and how far it came in its data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from lora_init.files import read_fields
from lora_init.statistics.statistics import Provenance

# Settings with a field of their own in a file; the others are in its `settings`.
_IN_PROVENANCE = ("fingerprint", "rank", "center", "token_mask", "seed", "gradients", "task_type", "data")


def read_settings(made: Provenance) -> dict[str, Any]:
    """Return what has to be the same for two passes to be one, in the order of a message; older files have less."""
    # The fingerprint first: of another model all else differs, too.
    own = {name: getattr(made, name) for name in _IN_PROVENANCE}
    return {"fingerprint": made.fingerprint, **made.settings, **own}


@dataclass(frozen=True)
class Position:
    """How far a pass has come, and in which data: entries in the `settings` of its file."""

    first_batch: str | None = None  # hash of the first batch; None if a file does not say
    batches: str | None = None  # hash of all batches that it may read, where they are in memory
    common_loader: bool = False  # whether all processes read one loader, each its part
    used: list[int] = field(default_factory=list)  # batches read, of each process, or of all where the loader is common
    bad_batches: int = 0  # how many of them failed and were left out

    @classmethod
    def of(cls, made: Provenance) -> Position:
        """Read it from a file; one of an earlier version does not say all."""
        return read_fields(cls, {"used": [made.n_batches], **made.settings})

    def is_in_other_data(self, other: Position) -> bool:
        """Check whether the two are known to be in different data."""
        # What one of them does not know says nothing: older files lack hashes, and so do loaders of all batches.
        pairs = ((self.first_batch, other.first_batch), (self.batches, other.batches))
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)

    def after(self, earlier: Position) -> Position:
        """Add what an earlier part of the pass has used: batches read, and those that failed."""
        # An empty list stands for nothing used, by any number of processes.
        used = [a + b for a, b in zip_longest(earlier.used, self.used, fillvalue=0)]
        return replace(self, used=used, bad_batches=earlier.bad_batches + self.bad_batches)
