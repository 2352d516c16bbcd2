"""Measurements on disk: one file of JSON lines for each kind of cluster and torch version.

Processes append to one file at once, each line whole; a line that a crash cut short is dropped, a
file that is damaged in another way is put aside and what can be read of it goes on.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from raypar.mesh.calibration_files import CACHE_VARIABLE, cache_dir, fingerprint
from raypar.mesh.cluster import Cluster
from raypar.search._file_lock import held
from raypar.search.cost.rows import (
    CollectiveRow,
    StageRow,
    StepRow,
    StoreRow,
    row_from_json,
    row_to_json,
)

_LOG = logging.getLogger(__name__)
STORE_FORMAT = 1
MOST_ROWS = 1500
"""Different measurements of each kind that a file keeps: beyond that, the oldest go."""
MOST_BYTES = 24 << 20
"""Length of a file at which it is written anew, with each measurement once."""


def torch_version() -> str:
    """The torch that measurements are filed under, without what says how it was built."""
    return torch.__version__.partition("+")[0]


class MeasurementStore:
    """What was measured on one kind of cluster.

    Without a path it is kept in memory only. What was read or added is held; `reload` looks for
    what other processes added since. A file that cannot be written is told once, and the store goes
    on in memory.

    Attributes:
        path: Its file, or None.
        notes: What a user should know: a file that was put aside, or cannot be written.
    """

    def __init__(self, path: Path | None = None, *, siblings: Sequence[Path] = ()) -> None:
        """Reads a file if it is there.

        Args:
            path: The file; None: in memory.
            siblings: Files of clusters of the same devices: what they say of stages counts too.
        """
        self.path = path
        self.notes: list[str] = []
        self._siblings = tuple(siblings)
        self._borrowed: dict[str, StageRow] = {}
        self._rows: dict[str, StoreRow] = {}
        self._writable = path is not None
        for sibling in self._siblings:
            if _newer_format(sibling) is not None:
                continue
            own = _read(sibling, self.notes)[0]
            self._borrowed.update((r.key, r) for r in own if isinstance(r, StageRow))
        self.reload()

    @classmethod
    def for_cluster(cls, cluster: Cluster) -> MeasurementStore:
        """The store of a kind of cluster, in the cache folder."""
        folder = cache_dir() / "measurements"
        name = fingerprint(cluster)
        ending = f"-torch{torch_version()}.jsonl"
        path = folder / f"{name}{ending}"
        like = sorted(folder.glob(f"{name.partition('-')[0]}-*{ending}"))
        return cls(path, siblings=[other for other in like if other != path])

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def stages(self) -> list[StageRow]:
        """Measured stages, those of clusters of the same devices included."""
        own = [row for row in self._rows.values() if isinstance(row, StageRow)]
        keys = {row.key for row in own}
        return own + [row for key, row in self._borrowed.items() if key not in keys]

    @property
    def collectives(self) -> list[CollectiveRow]:
        """Measured collectives."""
        return [row for row in self._rows.values() if isinstance(row, CollectiveRow)]

    @property
    def steps(self) -> list[StepRow]:
        """Measured steps."""
        return [row for row in self._rows.values() if isinstance(row, StepRow)]

    def add(self, *rows: StoreRow) -> None:
        """Keeps measurements, on disk where the store has a file.

        Raises:
            ValueError: A figure is not finite, or not positive where it has to be.
        """
        stamped = [row if row.at else replace(row, at=round(time.time(), 3)) for row in rows]
        lines = [row_to_json(row) for row in stamped]
        _merge(self._rows, stamped)
        if self._writable and lines:
            try:
                self._append(lines)
            except OSError as error:
                self._writable = False
                self._note(
                    f"cannot write measurements to {str(self.path)!r}: {error.strerror or error}; "
                    f"they are kept for this run only; set {CACHE_VARIABLE} to a folder that can "
                    "be written"
                )

    def reload(self) -> None:
        """Reads the file again: what other processes added is here then."""
        if self.path is None or not self._writable:
            return
        newer = _newer_format(self.path)
        if newer is not None:
            self._writable = False
            self._rows = {}
            self._note(
                f"the measurements in {str(self.path)!r} have format {newer}, this raypar reads up "
                f"to {STORE_FORMAT}: they are left alone, and what is measured is kept for this "
                "run only; upgrade raypar"
            )
            return
        try:
            with held(self.path.with_suffix(".lock")):
                rows, damaged = _read(self.path, self.notes)
                if damaged:
                    self._put_aside(rows)
        except OSError:  # a folder that may be read only
            rows, _ = _read(self.path, self.notes)
        self._rows = {}
        _merge(self._rows, rows)

    # -- inside -----------------------------------------------------------------------------

    def _note(self, text: str) -> None:
        self.notes.append(text)
        _LOG.warning("%s", text)

    def _append(self, lines: Sequence[str]) -> None:
        assert self.path is not None
        with held(self.path.with_suffix(".lock")):
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                end = _whole_lines(handle)
                os.ftruncate(handle, end)
                os.lseek(handle, end, os.SEEK_SET)
                text = "".join(line + "\n" for line in lines)
                if end == 0:
                    text = self._header() + text
                data = text.encode()
                while data:
                    data = data[os.write(handle, data) :]
            finally:
                os.close(handle)
            if end + len(text) > MOST_BYTES:
                self._compact()

    def _header(self) -> str:
        about = {"format": STORE_FORMAT, "torch": torch_version()}
        return json.dumps(about) + "\n"

    def _compact(self) -> None:
        """Writes the file anew, each measurement once, the oldest left out."""
        assert self.path is not None
        rows, _ = _read(self.path, [])
        merged: dict[str, StoreRow] = {}
        _merge(merged, rows)
        kept, left = [], MOST_BYTES // 2  # so that it is some time until the next
        for row in reversed(merged.values()):
            left -= len(row_to_json(row))
            if left < 0:
                break
            kept.append(row)
        self._write(reversed(kept))

    def _write(self, rows: Iterable[StoreRow]) -> None:
        assert self.path is not None
        text = self._header() + "".join(row_to_json(row) + "\n" for row in rows)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _put_aside(self, rows: Sequence[StoreRow]) -> None:
        assert self.path is not None
        aside = self.path.with_suffix(".bad")
        os.replace(self.path, aside)
        self._note(
            f"the measurements in {str(self.path)!r} were damaged: kept aside as {aside.name}; the "
            f"{len(rows)} that could be read go on"
        )
        if rows:
            self._write(rows)


def _whole_lines(handle: int) -> int:
    """Length of a file up to its last complete line."""
    end = os.lseek(handle, 0, os.SEEK_END)
    at = end
    while at > 0:
        start = max(0, at - 65536)
        os.lseek(handle, start, os.SEEK_SET)
        found = os.read(handle, at - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        at = start
    return 0


def _read(path: Path, notes: list[str]) -> tuple[list[StoreRow], bool]:
    """(rows that can be read, whether the file is damaged)."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], False
    except OSError as error:
        notes.append(f"cannot read measurements {str(path)!r}: {error.strerror or error}")
        return [], False
    # What follows the last line's end was cut short by a crash.
    lines = data.split(b"\n")[:-1]
    if not lines:
        return [], not _HEADER_BEGINS.startswith(data[: len(_HEADER_BEGINS)])
    damaged = not _is_header(lines[0])
    rows: list[StoreRow] = []
    for line in lines[0 if damaged else 1 :]:
        try:
            rows.append(row_from_json(line.decode()))
        except ValueError:
            damaged = True
    return rows, damaged


def _newer_format(path: Path) -> int | None:
    """The format of a file that a later raypar wrote; None for any other file."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.readline(_LONGEST_HEADER))["format"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    newer = isinstance(found, int) and not isinstance(found, bool) and found > STORE_FORMAT
    return int(found) if newer else None


_LONGEST_HEADER = 1 << 16
_HEADER_BEGINS = b'{"format": '


def _is_header(line: bytes) -> bool:
    try:
        found = json.loads(line)
        return bool(found["format"] == STORE_FORMAT)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _merge(known: dict[str, StoreRow], rows: Iterable[StoreRow]) -> None:
    """Adds rows, those of one thing as one; then the oldest beyond `MOST_ROWS` of a kind go."""
    for row in rows:
        old = known.pop(row.key, None)  # comes last again: dicts keep the order
        known[row.key] = row if old is None else old.merged(row)  # type: ignore[arg-type]
    for kind in (StageRow, CollectiveRow, StepRow):
        keys = [key for key, row in known.items() if isinstance(row, kind)]
        for key in keys[: max(0, len(keys) - MOST_ROWS)]:
            del known[key]
