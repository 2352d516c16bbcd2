"""Temporary folders that know whose they are, so that those of killed processes can be removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from pathlib import Path

_PREFIX = "rp-"
_OWNER = "raypar-owner"


def make(base: str) -> str:
    """Makes a folder of this process in `base` and returns its path."""
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir=base)
    (Path(folder) / _OWNER).write_text(f"{_namespace()}\n{_identity(os.getpid())}")
    return folder


def remove_stale(base: str) -> list[str]:
    """Removes the folders that `make` made in `base` for processes that are gone.

    Only folders of this user, and of processes that this one could see (containers may share a
    folder and not their processes), are looked at. A process number that another process has by
    now counts as gone.

    Returns:
        The paths that were removed.
    """
    removed = []
    for folder in Path(base).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            namespace, owner = (folder / _OWNER).read_text().split("\n")
            if namespace == _namespace() and _identity(int(owner.split()[0])) != owner:
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(str(folder))
    return removed


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _identity(pid: int) -> str:
    """A text that no other process has: the number and, where the system tells, its start time."""
    try:
        # The name in field 2 may hold spaces and brackets; field 22 is the start time (proc(5)).
        stat = Path(f"/proc/{pid}/stat").read_text()
        return f"{pid} {stat.rpartition(')')[2].split()[19]}"
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "" if Path("/proc/self").exists() else f"{pid} running"
