"""The command line in several processes that `torchrun` or `accelerate launch` has started: one of them speaks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_init.collection.team import Team


def launched_rank() -> int | None:
    """Give the number of this process among those started together; None if it was started alone."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(os.environ.get(name) for name in names) or os.environ["WORLD_SIZE"] == "1":
        return None
    return int(os.environ["RANK"])


def silence() -> None:
    """Let nothing more be written to stdout and stderr by this process: the first one says the same."""
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


@contextmanager
def launched_team() -> Iterator[Team]:
    """Join the processes that were started together. Whatever goes wrong inside, in any of them, all say and end.

    Yields:
        The processes; this one alone if it was started alone.
    """
    from lora_init.collection.team import Team

    if launched_rank() is None:
        yield Team(alone=True)
        return
    import torch

    # Only statistics travel, and they travel by gloo, also between GPUs.
    torch.distributed.init_process_group("gloo")
    try:
        with Team() as team:
            yield team
    finally:
        torch.distributed.destroy_process_group()
