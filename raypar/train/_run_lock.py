"""One run at a time in a folder: what two would write there would be neither's."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from raypar.errors import ConfigError

_FILE = ".lock"
_PATIENCE_S = 5.0
_PAUSE_S = 0.1
_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(folder: Path, patience_s: float = _PATIENCE_S) -> Iterator[None]:
    """Inside, no other run trains in `folder`.

    The system lets go of the lock when its holder ends, also by SIGKILL. File systems without
    locks have none.

    Args:
        folder: The run's folder.
        patience_s: How long to wait for a run that is just ending, in seconds.

    Raises:
        ConfigError: Another run trains there; tells whose it is.
    """
    if fcntl is None:
        yield
        return
    file = os.open(folder / _FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _take(file, folder, patience_s)
        yield
    finally:
        os.close(file)


def _take(file: int, folder: Path, patience_s: float) -> None:
    end = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                return  # a file system without locks
        else:
            with contextlib.suppress(OSError):  # a full disk: the lock holds without it
                os.ftruncate(file, 0)
                os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return
        if time.monotonic() >= end:
            holder = os.pread(file, 300, 0).decode(errors="replace") or "another process"
            raise ConfigError(
                f"run {folder.name!r} in {str(folder.parent)!r} is under way: {holder} trains "
                "there. Wait for its end or stop it, or set another run name, for example "
                f"{folder.name + '-2'!r}"
            )
        time.sleep(_PAUSE_S)
