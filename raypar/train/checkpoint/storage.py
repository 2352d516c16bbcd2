"""Where checkpoints lie: a folder of this file system, or a URL that fsspec knows.

All writing goes through a few small steps, so that tests can let any of them fail.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from raypar.errors import CheckpointError, RayparError

Bytes = bytes | bytearray | memoryview
TEMPORARY, TRASH = ".tmp", ".trash"
"""How hidden folders end: those that do not count yet, and those that do not any more."""


class UnreachableError(CheckpointError):
    """A storage does not tell what it holds: it is out of reach, or refuses this process."""

    @classmethod
    def of(cls, place: str, error: Exception) -> UnreachableError:
        """What to tell of an error in looking into a place."""
        return cls(
            f"checkpoint storage {place!r} cannot be looked into: {type(error).__name__}: {error}; "
            "check its address, the network and the rights of this process, or give another one, "
            "for example a local folder such as 'runs'"
        )


class Storage(ABC):
    """A folder of checkpoints; names are relative to it, with ``/`` between folders.

    Attributes:
        root: Its absolute path or URL.
        hides: Whether what is being written lies under another name until it counts. Else it lies
            under its own, and counts once its last file is there.
    """

    root: str
    hides: bool

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Names in a folder; none where it is missing.

        Raises:
            UnreachableError: The storage does not tell.
        """

    @abstractmethod
    def write(self, name: str, chunks: Iterable[Bytes]) -> None:
        """Writes a file, so that it is there as a whole, and durable, or not at all."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: It is missing.
        """

    @abstractmethod
    def read_into(self, name: str, at: int, room: memoryview) -> int:
        """Reads bytes from position `at` on into `room`; returns how many there were."""

    @abstractmethod
    def make_folder(self, name: str) -> None:
        """Makes a folder, and those above it."""

    @abstractmethod
    def begin(self, name: str, token: str) -> str:
        """The folder to write to what is to be called `name`; `token` tells writers apart."""

    @abstractmethod
    def settle(self, folder: str, name: str) -> None:
        """Lets a folder of `begin`, whose last file is there, count: durably, or not at all."""

    @abstractmethod
    def retire(self, name: str, last: str) -> str:
        """Lets a folder stop to count, before any file but the last goes.

        Args:
            name: The folder.
            last: The file that was written last.

        Returns:
            The folder that is left to remove.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file or folder; nothing happens where it is missing."""

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: It is missing.
        """
        room = bytearray(self.size(name))
        return bytes(room[: self.read_into(name, 0, memoryview(room))])

    def path(self, name: str) -> str:
        """Path or URL of a name."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root


class LocalStorage(Storage):
    """A folder of this file system."""

    hides = True

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(os.path.expanduser(root))

    def names(self, folder: str = "") -> list[str]:
        """See `Storage.names`."""
        try:
            return sorted(os.listdir(self.path(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UnreachableError.of(self.path(folder), error) from error

    def write(self, name: str, chunks: Iterable[Bytes]) -> None:
        """See `Storage.write`: under another name first, which is changed once all is on disk."""
        part = self.path(name) + ".part"
        with open(part, "wb", buffering=0) as file:
            for chunk in chunks:
                self._write(file, chunk)
            self._sync(file.fileno())
        self._replace(part, self.path(name))

    def size(self, name: str) -> int:
        """See `Storage.size`."""
        return os.path.getsize(self.path(name))

    def read_into(self, name: str, at: int, room: memoryview) -> int:
        """See `Storage.read_into`."""
        done = 0
        with open(self.path(name), "rb", buffering=0) as file:
            file.seek(at)
            while done < len(room):
                count = file.readinto(room[done:])
                if not count:
                    break
                done += count
        return done

    def make_folder(self, name: str) -> None:
        """See `Storage.make_folder`."""
        os.makedirs(self.path(name), exist_ok=True)

    def begin(self, name: str, token: str) -> str:
        """See `Storage.begin`."""
        return f".{name}.{token}{TEMPORARY}"

    def settle(self, folder: str, name: str) -> None:
        """See `Storage.settle`: renames it."""
        self._rename(folder, name)

    def retire(self, name: str, last: str) -> str:
        """See `Storage.retire`: renames it."""
        trash = f".{name}.{secrets.token_hex(4)}{TRASH}"
        self._rename(name, trash)
        return trash

    def remove(self, name: str) -> None:
        """See `Storage.remove`."""
        path = Path(self.path(name))
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _write(self, file: Any, chunk: Bytes) -> None:
        view = memoryview(chunk)
        while view:  # a write may be cut short, by a signal for example
            view = view[file.write(view) :]

    def _sync(self, number: int) -> None:
        os.fsync(number)

    def _rename(self, old: str, new: str) -> None:
        """Renames a folder, durably."""
        self._sync_folder(old)
        self._replace(self.path(old), self.path(new))
        self._sync_folder("")

    def _replace(self, old: str, new: str) -> None:
        os.rename(old, new) if os.path.isdir(old) else os.replace(old, new)

    def _sync_folder(self, name: str) -> None:
        with contextlib.suppress(OSError):  # some file systems have no such thing
            number = os.open(self.path(name), os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)


class UrlStorage(Storage):
    """A folder behind an fsspec URL (``s3://…``, ``gs://…``, ``memory://…``).

    A file of an object store appears when it is closed. Folders cannot be renamed in one step:
    what is in a folder counts once its last file is there.
    """

    hides = False

    def __init__(self, root: str) -> None:
        self.root = root
        try:
            self._system, self._base = fsspec.core.url_to_fs(root)
        except (ImportError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint storage {root!r}: {error}; give a local folder, for example 'runs', "
                "or install what fsspec needs for that URL"
            ) from None
        # Another process writes here too: what this one has listed before is no news.
        self._system.invalidate_cache()

    def _at(self, name: str) -> str:
        return f"{self._base.rstrip('/')}/{name}" if name else self._base

    def names(self, folder: str = "") -> list[str]:
        """See `Storage.names`."""
        self._system.invalidate_cache()
        try:
            found = self._system.ls(self._at(folder), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as error:  # every kind of storage has its own
            raise UnreachableError.of(self.path(folder), error) from error
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def write(self, name: str, chunks: Iterable[Bytes]) -> None:
        """See `Storage.write`."""
        with _as_os_errors():
            file = self._system.open(self._at(name), "wb")
            try:
                for chunk in chunks:
                    file.write(chunk)
            except BaseException:
                with contextlib.suppress(Exception):
                    file.discard()  # leaving it would make half a file of it
                raise
            file.close()

    def size(self, name: str) -> int:
        """See `Storage.size`."""
        with _as_os_errors():
            return int(self._system.size(self._at(name)))

    def read_into(self, name: str, at: int, room: memoryview) -> int:
        """See `Storage.read_into`."""
        with _as_os_errors():
            data = self._system.cat_file(self._at(name), start=at, end=at + len(room))
        room[: len(data)] = data
        return len(data)

    def make_folder(self, name: str) -> None:
        """See `Storage.make_folder`."""
        with _as_os_errors():
            self._system.makedirs(self._at(name), exist_ok=True)

    def begin(self, name: str, token: str) -> str:
        """See `Storage.begin`."""
        return name

    def settle(self, folder: str, name: str) -> None:
        """See `Storage.settle`: it counts since its last file is there."""

    def retire(self, name: str, last: str) -> str:
        """See `Storage.retire`: removes the last file."""
        self.remove(f"{name}/{last}")
        return name

    def remove(self, name: str) -> None:
        """See `Storage.remove`."""
        with contextlib.suppress(FileNotFoundError):
            self._system.rm(self._at(name), recursive=True)


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Errors that a kind of storage has of its own are told as those of files are."""
    try:
        yield
    except (OSError, RayparError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def storage_at(root: str | Path) -> Storage:
    """The storage of a local path or a URL.

    Raises:
        CheckpointError: fsspec does not know that kind of URL.
    """
    text = str(root)
    if text.startswith("file://"):
        return LocalStorage(text.removeprefix("file://"))
    return UrlStorage(text) if "://" in text else LocalStorage(text)
