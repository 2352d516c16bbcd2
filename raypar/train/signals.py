"""Ctrl-C and SIGTERM while a run is under way: clean up first, then end as asked."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_PATIENCE = 3


class Terminated(BaseException):
    """SIGTERM came; like KeyboardInterrupt it is no ordinary error."""


@contextmanager
def terminating() -> Iterator[Callable[[], None]]:
    """Inside, SIGTERM raises in the main thread, so that ``finally`` blocks run.

    Afterwards a handler that the user had set gets the signal; without one the process ends with
    status 143. While that, or Ctrl-C, is being cleaned up, the next two of either are noted and no
    more, so that an impatient second Ctrl-C leaves nothing behind; a third one ends at once.
    Outside of the main thread, where Python handles no signals, all this does nothing.

    Yields:
        A function that takes the signals again: ``ray.init`` replaces the handler of SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    patience = _Patience()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def arm() -> None:
        signal.signal(signal.SIGTERM, patience.on_term)
        if before[signal.SIGINT] is signal.default_int_handler:
            signal.signal(signal.SIGINT, patience.on_interrupt)

    arm()
    try:
        yield arm
    except Terminated:
        own = before[signal.SIGTERM]
        if callable(own) and not getattr(own, "__module__", "").startswith("ray."):
            signal.signal(signal.SIGTERM, own)
            signal.raise_signal(signal.SIGTERM)
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class _Patience:
    """Raises at the first signal, and again only when somebody insists."""

    def __init__(self) -> None:
        self._seen = 0

    def on_term(self, number: int, frame: FrameType | None) -> None:
        self._note(Terminated())

    def on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._note(KeyboardInterrupt())

    def _note(self, error: BaseException) -> None:
        self._seen += 1
        if self._seen == 1 or self._seen > _PATIENCE:
            raise error
        # os.write and not print: a handler must not wait for a lock that the main thread holds.
        os.write(2, b"stopping: actors and devices are being released\n")
