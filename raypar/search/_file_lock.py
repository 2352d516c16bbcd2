"""A file that one process at a time holds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Inside, no other process holds the file; waits for the one that does.

    The lock is the kernel's: it is gone when its process is, and a system without such locks has
    none. The file is made where it is missing, and stays: who deletes it lets two in.

    Raises:
        OSError: Nothing can be written there, or the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
