"""Peak memory of a stretch of work."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def reset_peak() -> None:
    """Count the peak from here. On a CPU that needs Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _STATUS.exists():
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not allowed in some containers: then the process's peak is the answer
            return


def peak_bytes() -> int:
    """Read the peak since `reset_peak`: allocated on the GPU if there is one, else resident memory; 0 if unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if not _STATUS.exists():
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024 if found else 0
