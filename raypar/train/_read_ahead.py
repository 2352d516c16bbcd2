"""A thread that reads the batches of steps to come."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from raypar.errors import CommAbortedError, DataError
from raypar.train.data.position import DataPosition
from raypar.train.data.stream import Mark
from raypar.train.data.workers import advice

Inputs = Mapping[str, torch.Tensor]
Reading = tuple[Inputs, Mark | DataPosition]

_JOIN_S = 1.0
_KEPT = 8  # positions that are remembered behind the step under way


@dataclass(frozen=True)
class _Item:
    step: int
    reading: Reading | BaseException | None


class ReadAhead:
    """Reads steps in order, in a thread, as far ahead as is allowed.

    Args:
        read: Reads one step, in the thread; None at the end of the data. What it raises is raised
            by `take` of that step.
        start: The position before the first step that is asked for.
        depth: Steps that may lie ready.
        name: Name of the thread.
    """

    def __init__(
        self,
        read: Callable[[int], Reading | None],
        start: DataPosition,
        *,
        depth: int,
        name: str = "raypar-data",
    ) -> None:
        self._read = read
        self._depth = depth
        self._turn = threading.Condition()
        self._ready: deque[_Item] = deque()
        self._next: int | None = None  # the step to be read next
        self._until = 0
        self._ended: str | None = None
        self._start = start
        self._marks: dict[int, Mark | DataPosition] = {}  # after the batch of a step
        self._first: int | None = None
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)

    def extend(self, until: int) -> None:
        """Steps below `until` will be asked for."""
        with self._turn:
            self._until = max(self._until, until)
            self._turn.notify_all()

    def prefetch(self, step: int, until: int) -> None:
        """Reads from `step` on before it is asked for, and returns once all that may is ready.

        A loader just as fast as the training then has a lead that outlasts their unevenness; it
        would never gain one. What goes wrong is told by `take`.
        """
        with self._turn:
            self._until = max(self._until, until)
            self._begin(step)
            self._turn.notify_all()
            wanted = min(self._depth, self._until - step)
            self._turn.wait_for(
                lambda: (
                    self._ended is not None
                    or len(self._ready) >= wanted
                    or (self._ready and not isinstance(self._ready[-1].reading, tuple))
                )
            )

    def _begin(self, step: int) -> None:
        if self._next is None and self._ended is None:
            self._next = self._first = step
            self._thread.start()

    def take(self, step: int) -> Inputs | None:
        """The inputs of `step`, waiting for them; None where the data ended before it."""
        with self._turn:
            self._begin(step)
            self._turn.wait_for(lambda: self._ready or self._ended is not None)
            if not self._ready:
                raise CommAbortedError(f"step {step}: waiting for its batch: {self._ended}")
            item = self._ready[0]
            if item.step != step:
                raise DataError(
                    f"the batch of step {step} was asked for, the next one is that of {item.step}: "
                    "steps are run in order"
                )
            if not isinstance(item.reading, tuple):
                if isinstance(item.reading, BaseException):
                    raise item.reading
                return None  # the end stays where it is, however often it is asked for
            self._ready.popleft()
            self._marks.pop(step - _KEPT, None)
            self._turn.notify_all()
        return item.reading[0]

    def data_state(self, step: int) -> dict[str, Any] | None:
        """The position after the batch of ``step - 1``, in plain form; not of what is read ahead.

        Raises:
            DataError: That step is not under way or just over.
        """
        with self._turn:
            if self._first is None or step == self._first:
                return self._start.to_json()
            mark = self._marks.get(step - 1)
            held = sorted(self._marks)
        if mark is None:
            raise DataError(
                f"the position in the data before step {step} is not known here; known are those "
                f"after steps {held}"
            )
        return (mark.position() if isinstance(mark, Mark) else mark).to_json()

    def abort(self, reason: str) -> None:
        """Wakes a `take` that waits."""
        with self._turn:
            self._ended = self._ended or reason
            self._turn.notify_all()

    def close(self) -> None:
        """Ends the thread, unless it stands in the user's own code: it is a daemon."""
        self.abort("the feed was closed")
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)

    def _serve(self) -> None:
        while (step := self._claim()) is not None:
            try:
                reading: Reading | BaseException | None = self._read(step)
            except BaseException as error:
                reading = error
            with self._turn:
                if isinstance(reading, tuple):
                    self._marks[step] = reading[1]
                self._ready.append(_Item(step, reading))
                self._turn.notify_all()
            if not isinstance(reading, tuple):
                return

    def _claim(self) -> int | None:
        """Waits until the next step may be read; None when the run is over."""
        with self._turn:
            assert self._next is not None
            step = self._next
            self._turn.wait_for(
                lambda: (
                    self._ended is not None
                    or (step < self._until and len(self._ready) < self._depth)
                )
            )
            if self._ended is not None:
                return None
            self._next = step + 1
            return step


def told(error: BaseException, step: int) -> BaseException:
    """An error of the user's data code as the one to raise."""
    if isinstance(error, DataError):
        return error
    failed = DataError(
        f"reading the batch of step {step} failed with {type(error).__name__}: {error}"
        f"{advice(error)}"
    )
    failed.__cause__ = error
    return failed
