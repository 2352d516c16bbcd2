"""Data that only the user's own process can read: relayed to rank 0, batch by batch.

A generator, an open file or a loader with a lock in it cannot be sent to another process. Then a
thread of the user's process reads it, and hands references to the batches over through a small
queue actor; rank 0 fetches each batch from the object store.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.util.queue import Full, Queue

from raypar.errors import DataError
from raypar.train.data import Data, Opened, all_epochs
from raypar.train.feed import AHEAD, RemadeBatches

_PUT_S = 0.5
_JOIN_S = 2.0


def shipped(data: Data, opened: Opened, seed: int, steps: int, stack: ExitStack) -> Any:
    """What rank 0 opens to read the batches.

    Args:
        data: What the user passed.
        opened: The same, opened here.
        seed: Seed of the loader's random order.
        steps: Batches that are needed.
        stack: Closed at the end of the run; a relay's thread and queue end with it.
    """
    if opened.batches is not data or not opened.one_shot:
        try:
            cloudpickle.loads(cloudpickle.dumps(data))
        except Exception:  # it holds something of this process: a lock, a file, a generator
            pass
        else:
            return RemadeBatches(data, seed)
    relay = _Relay(opened, steps)
    stack.callback(relay.close)
    return relay.source


class RelayedBatches:
    """Rank 0's end of a relay."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def open(self) -> Iterable[Any]:
        """The batches, as they arrive."""
        return self._receive()

    def _receive(self) -> Iterator[Any]:
        while True:
            kind, value = self._queue.get()
            if kind == "error":
                raise DataError(value)
            yield ray.get(value)


class _Relay:
    """The user's end: a thread that reads."""

    def __init__(self, opened: Opened, steps: int) -> None:
        self._queue = Queue(maxsize=AHEAD, actor_options={"num_cpus": 0})
        self.source = RelayedBatches(self._queue)
        self._opened = opened
        self._steps = steps
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="raypar-relay", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            self._opened.random.set()
            batches = all_epochs(self._opened.batches)
            for _ in range(self._steps):
                if not self._put("batch", ray.put(next(batches))):
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
