"""How much memory this machine lets a program use."""

from __future__ import annotations

import os
from pathlib import Path

_FALLBACK = 4 * 2**30
_CGROUP_FILES = (
    "/sys/fs/cgroup/memory.max",  # version 2
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",  # version 1
)


def machine_memory() -> int:
    """Bytes of main memory: the machine's, or the container's limit where that is lower."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        total = _FALLBACK
    for file in _CGROUP_FILES:
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # "max" where there is no limit
            total = min(total, int(text))
    return total
