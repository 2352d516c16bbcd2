"""One run at a time in a folder: what two would write there would be neither's."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
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

# The system's locks are a process's: they tell its threads nothing, and end with any closed file.
_OWN: dict[Path, int] = {}
_TURN = threading.Lock()


@contextmanager
def locked(
    folder: Path,
    patience_s: float | None = None,
    tell: Callable[[Path, str], str] | None = None,
) -> Iterator[None]:
    """Inside, no other run trains in `folder`.

    The system lets go of the lock when its holder ends, also by SIGKILL; processes that the holder
    has forked (a DataLoader's) do not hold it. File systems without locks have none.

    Args:
        folder: The run's folder.
        patience_s: How long to wait for a run that is just ending, in seconds; default: 5.
        tell: Words the error, of the folder and of who holds it; default: as of a run's folder.

    Raises:
        ConfigError: Another run trains there; tells whose it is.
    """
    patience_s = _PATIENCE_S if patience_s is None else patience_s
    place, end = folder.resolve(), time.monotonic() + patience_s

    def wait(holder: str) -> None:
        if time.monotonic() >= end:
            raise ConfigError((tell or _under_way)(folder, holder))
        time.sleep(_PAUSE_S)

    while not _reserved(place):
        wait(f"this process ({os.getpid()})")
    try:
        with _locked_file(folder, wait):
            yield
    finally:
        with _TURN:
            _OWN.pop(place, None)


def _reserved(place: Path) -> bool:
    """Takes a folder for this thread; False where another of this process has it."""
    with _TURN:
        if _OWN.get(place) == os.getpid():
            return False
        _OWN[place] = os.getpid()  # one that was forked has its parent's table, and none of its
        return True


@contextmanager
def _locked_file(folder: Path, wait: Callable[[str], None]) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    file = os.open(folder / _FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while not _taken(file):
            holder = os.pread(file, 300, 0).decode(errors="replace")
            wait(holder or "another process")
        yield
    finally:
        os.close(file)


def _taken(file: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _HELD  # else: a file system without locks
    with contextlib.suppress(OSError):  # a full disk: the lock holds without it
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return True


def _under_way(folder: Path, holder: str) -> str:
    return (
        f"run {folder.name!r} in {str(folder.parent)!r} is under way: {holder} trains there. Wait "
        f"for its end or stop it, or set another run name, for example {folder.name + '-2'!r}"
    )
