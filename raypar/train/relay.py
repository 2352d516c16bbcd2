"""The user's data on their way to the processes that read them.

What can be pickled is put into the object store once, and opened where it is read. A generator, an
open file or a loader with a lock in it cannot be sent to another process. Then a thread of the
user's process reads it, and hands references to the batches over through a small queue actor; rank
0 fetches each batch from the object store.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.queue import Full, Queue

from raypar.errors import DataError
from raypar.graph.batchspec import BatchSpec
from raypar.train.data import Data, DataPosition, Opened, SampledBatches
from raypar.train.feed import AHEAD, Batches, RemadeBatches, Source

_PUT_S = 0.5
_JOIN_S = 2.0
_FRESH = DataPosition()


def shipped(
    data: Data,
    opened: Opened,
    seed: int,
    steps: int,
    stack: ExitStack,
    *,
    start: DataPosition = _FRESH,
    epochs: int | None = None,
) -> Source:
    """What the processes that read open.

    Args:
        data: What the user passed.
        opened: The same, opened here.
        seed: Seed of the loader's random order.
        steps: Batches that are needed.
        stack: Closed at the end of the run; a relay's thread and queue end with it.
        start: Where in the data the run begins.
        epochs: The data end after so many passes.
    """
    if opened.batches is not data or not opened.one_shot:
        try:
            ref = ray.put(data)
            ray.get(ref)
        except Exception:  # it holds something of this process: a lock, a file, a generator
            pass
        else:
            return StoredBatches(ref, seed, opened.accumulate, opened.batch_dims, opened.by_rows)
    relay = _Relay(opened, steps, start, epochs)
    stack.callback(relay.close)
    return relay.source


class StoredBatches(RemadeBatches):
    """Data in the object store: written once, however many ranks read them."""

    def _given(self) -> Data:
        found: Data = ray.get(self._data)
        return found


class RelayedBatches:
    """Rank 0's end of a relay."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    @property
    def sampled(self) -> SampledBatches | None:
        """See `raypar.train.feed.Source`: the user's process reads."""
        return None

    def read(self, size: int, start: DataPosition = _FRESH, epochs: int | None = None) -> Batches:
        """The batches as they arrive, from where the relay was told to begin."""
        while True:
            kind, value = self._queue.get()
            if kind == "error":
                raise DataError(value)
            if kind == "end":
                return
            yield ray.get(value)


class _Relay:
    """The user's end: a thread that reads."""

    def __init__(self, opened: Opened, steps: int, start: DataPosition, epochs: int | None) -> None:
        self._queue = Queue(maxsize=AHEAD, actor_options={"num_cpus": 0})
        self.source = RelayedBatches(self._queue)
        self._opened = opened
        self._steps = steps
        self._start = start
        self._epochs = epochs
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="raypar-relay", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            size = BatchSpec.of(self._opened.example, self._opened.batch_dims).size
            batches = self._opened.read(size, self._start, self._epochs)
            for _ in range(self._steps):
                found = next(batches, None)
                if found is None:
                    self._put("end", None)
                    return
                # All of it by reference: the queue's actor would import torch to hold any.
                if not self._put("batch", ray.put(found)):
                    return
        except DataError as error:
            self._put("error", str(error))
        except RayError:
            pass  # the run is over, or its cluster is
        except BaseException as error:
            self._put("error", f"reading the data failed with {type(error).__name__}: {error}")

    def _put(self, kind: str, value: Any) -> bool:
        """Hands one item over, waiting for room; False when the run is over."""
        while not self._ended.is_set():
            try:
                self._queue.put((kind, value), timeout=_PUT_S)
                return True
            except Full:
                continue
            except RayError:
                return False
        return False

    def close(self) -> None:
        """Ends the thread and the queue's actor."""
        self._ended.set()
        self._thread.join(_JOIN_S)
        if ray.is_initialized():
            self._queue.shutdown(force=True)
