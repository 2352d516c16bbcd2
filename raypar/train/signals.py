"""Ctrl-C and SIGTERM while a run is under way: clean up first, then end as asked.

Also kept back meanwhile is what a DataLoader raises in the main thread, wherever that stands, when
one of its worker processes dies: whoever reads from that loader is told as well, and tells the
batch.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from raypar.compat import take_loader_signal
from raypar.train.data.workers import worker_died

_PATIENCE = 3


class Terminated(BaseException):
    """SIGTERM came; like KeyboardInterrupt it is no ordinary error."""


class Signals:
    """Ctrl-C and SIGTERM of one run; see `terminating`."""

    def __init__(self) -> None:
        self._seen = 0
        self._softly: Callable[[BaseException], None] | None = None
        self._before: dict[int, object] = {}
        if threading.current_thread() is threading.main_thread():
            take_loader_signal()  # now, so that no loader sets its handler during the run
            taken = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
            self._before = {n: signal.getsignal(n) for n in taken}

    def take(self) -> None:
        """Takes the signals (again: ``ray.init`` replaces the handler of SIGTERM)."""
        if not self._before:
            return
        signal.signal(signal.SIGTERM, self._on_term)
        interrupt = self._before[signal.SIGINT]
        # Ray Tune leaves its own handler behind, which would do nothing but note the signal.
        if interrupt is signal.default_int_handler or _is_of_ray(interrupt):
            signal.signal(signal.SIGINT, self._on_interrupt)
        signal.signal(signal.SIGCHLD, self._on_child)

    @contextmanager
    def softly(self, stop: Callable[[BaseException], None]) -> Iterator[None]:
        """Inside, the first signal calls `stop` with the exception that is to be raised later.

        `stop` runs between two instructions of the main thread, and so must wait for nothing.
        """
        self._softly = stop
        try:
            yield
        finally:
            self._softly = None

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        self._note(Terminated())

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._note(KeyboardInterrupt())

    def _on_child(self, number: int, frame: FrameType | None) -> None:
        own = self._before[signal.SIGCHLD]
        try:
            if callable(own):
                own(number, frame)
        except RuntimeError as error:
            if not worker_died(error):
                raise

    def _note(self, error: BaseException) -> None:
        # os.write and not print: a handler must not wait for a lock that the main thread holds.
        if self._softly is not None:
            stop, self._softly = self._softly, None
            os.write(2, b"stopping after this step, with a checkpoint; once more: at once\n")
            stop(error)
            return
        self._seen += 1
        if self._seen == 1 or self._seen > _PATIENCE:
            raise error
        os.write(2, b"stopping: actors and devices are being released\n")

    def hand_back(self) -> None:
        """Sets the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    def end(self) -> None:
        """Ends as SIGTERM asks: by the handler that was there before, else with status 143.

        Raises:
            SystemExit: There was none, or it returned.
        """
        own = self._before.get(signal.SIGTERM)
        if callable(own) and not _is_of_ray(own):
            signal.signal(signal.SIGTERM, own)
            signal.raise_signal(signal.SIGTERM)
        raise SystemExit(128 + signal.SIGTERM) from None


def _is_of_ray(handler: object) -> bool:
    return str(getattr(handler, "__module__", None)).startswith("ray.")


@contextmanager
def terminating() -> Iterator[Signals]:
    """Inside, SIGTERM raises in the main thread, so that ``finally`` blocks run.

    Afterwards a handler that the user had set gets the signal; without one the process ends with
    status 143. While that, or Ctrl-C, is being cleaned up, the next two of either are noted and no
    more, so that an impatient second Ctrl-C leaves nothing behind; a third one ends at once.
    Outside of the main thread, where Python handles no signals, all this does nothing.
    """
    signals = Signals()
    signals.take()
    try:
        yield signals
    except Terminated:
        signals.end()
    finally:
        signals.hand_back()
