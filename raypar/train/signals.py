"""Ctrl-C and SIGTERM while a run is under way: clean up first, then end as asked."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """SIGTERM came; like KeyboardInterrupt it is no ordinary error."""


@contextmanager
def terminating() -> Iterator[None]:
    """Inside, SIGTERM raises in the main thread, so that ``finally`` blocks run.

    Afterwards a handler that the user had set gets the signal; without one the process ends with
    status 143. ``ray.init`` replaces the handler of SIGTERM: enter this after it. Outside of the
    main thread, where Python handles no signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the clean-up
        raise Terminated

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    except Terminated:
        if callable(before) and not getattr(before, "__module__", "").startswith("ray."):
            signal.signal(signal.SIGTERM, before)
            signal.raise_signal(signal.SIGTERM)
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        if signal.getsignal(signal.SIGTERM) is handler:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
