"""Which checkpoints of a run stay."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Collection
from typing import Any

from raypar.errors import CheckpointError
from raypar.train.checkpoint.checkpoint import Checkpoint, serial_of
from raypar.train.checkpoint.format import INDEX
from raypar.train.checkpoint.storage import TEMPORARY, TRASH, Storage
from raypar.train.config import CheckpointConfig


class Keeping:
    """Lists the checkpoints in a storage, and removes those that are not to be kept.

    As Ray's ``CheckpointConfig`` has it: of ``num_to_keep``, the best by ``score_attribute`` (one
    without that metric is worst), or the newest; the newest stays in any case.

    Args:
        storage: Where they are.
        config: Which stay.
    """

    def __init__(self, storage: Storage, config: CheckpointConfig) -> None:
        self._storage = storage
        self._config = config
        self._known: dict[str, Checkpoint] = {}
        self._after = -1  # the last number that is not this run's
        self._lock = threading.RLock()

    def ignore_present(self) -> None:
        """Those that are there now are another run's: they do not count, and nothing drops them."""
        self._after = max(map(_age, self._names()), default=-1)

    def _names(self) -> list[str]:
        found = ((name, serial_of(name)) for name in self._storage.names())
        return [name for name, serial in found if serial is not None and serial > self._after]

    def all(self) -> list[Checkpoint]:
        """Every checkpoint whose index is good, by when it was begun."""
        names = self._names()
        with self._lock:
            found = [self._open(n) for n in sorted(names, key=_age)]
            self._known = {n: c for n, c in self._known.items() if n in names}
        return [c for c in found if c is not None]

    def latest(self) -> Checkpoint | None:
        """The last one begun."""
        names = self._names()
        with self._lock:
            found = (self._open(n) for n in sorted(names, key=_age, reverse=True))
            return next((c for c in found if c is not None), None)

    def best(self) -> Checkpoint | None:
        """The best by score; the last one begun without a score."""
        ranked = sorted(enumerate(self.all()), key=lambda c: (self._score(c[1]), c[0]))
        return ranked[-1][1] if ranked else None

    def drop_worst(self) -> None:
        """Removes what is over ``num_to_keep``."""
        count = self._config.num_to_keep
        if count is None:
            return
        found = self.all()
        ranked = sorted(enumerate(found), key=lambda c: (self._score(c[1]), c[0]))
        for place, checkpoint in ranked[:-count]:
            if place != len(found) - 1:
                self._drop(checkpoint.name)

    def sweep(self, own: Callable[[], Collection[str]]) -> None:
        """Removes what does not count and nobody writes.

        Args:
            own: Gives the folders that are being written to. Asked after looking what there is: a
                folder that is begun in between was not seen, one that was seen is known.
        """
        there = self._storage.names()
        written = own()
        for name in there:
            if name in written:
                continue
            if name.startswith(".") and name.endswith((TEMPORARY, TRASH)):
                self._remove(name)
                continue
            begun = not self._storage.hides and serial_of(name) is not None
            if begun and INDEX not in self._storage.names(name):
                self._remove(name)

    def _drop(self, name: str) -> None:
        """It stops to count before its files go, so that no half of it is taken for a whole."""
        with self._lock:
            self._known.pop(name, None)
        self._remove(self._storage.retire(name, INDEX))

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):  # swept later
            self._storage.remove(name)

    def _open(self, name: str) -> Checkpoint | None:
        if name not in self._known:
            try:
                self._known[name] = Checkpoint(self._storage.path(name))
            except CheckpointError as error:
                if INDEX in self._storage.names(name):  # else it is still being written
                    warnings.warn(f"{error}; it is passed over", stacklevel=3)
                return None
        return self._known[name]

    def _score(self, checkpoint: Checkpoint) -> float:
        """Higher is better."""
        name = self._config.score_attribute
        if name is None:
            return 0.0
        value = _metric(checkpoint.metrics, name)
        if value is None:
            return -math.inf
        return value if self._config.score_order == "max" else -value


def _age(name: str) -> int:
    return serial_of(name) or 0


def _metric(metrics: dict[str, Any], name: str) -> float | None:
    """A metric, also one inside of others (``eval/loss``)."""
    value: Any = metrics.get(name)
    if value is None and "/" in name:
        value = metrics
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        return None
    return float(value)
