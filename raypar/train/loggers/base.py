"""What all loggers share: they work beside the run, and nothing that fails in them ends it."""

from __future__ import annotations

import contextlib
import importlib
import queue
import threading
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from raypar.errors import ConfigError
from raypar.train.callbacks import Callback, RunFacts
from raypar.train.dashboards.table import numbered

_MOST_WAITING = 10_000
_MOST_FAILURES = 3
_CLOSE_S = 20.0


def imported(module: str, logger: str, extra: str) -> Any:
    """A package that is no dependency of raypar.

    Raises:
        ConfigError: It is not installed; names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"run.loggers has {logger!r}, which needs package {module.partition('.')[0]!r}, and it "
            f"cannot be imported here ({error}): pip install 'raypar[{extra}]', or take "
            f"{logger!r} out of run.loggers"
        ) from None


class Logger(Callback):
    """A callback whose work is done in a thread of its own, in order.

    A service that is slow or away holds nothing up: after three failures in a row, or ten thousand
    entries that wait, the logger gives up. What went wrong first is told once, as a warning.

    Args:
        name: What it is called in messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._failures = 0
        self._warned = False
        self._given_up = False
        self._started = False

    # -- what a logger does -------------------------------------------------------------------

    @abstractmethod
    def _open(self, run: RunFacts) -> None:
        """Begins a run, or goes on with it where ``run.first_step`` is above 0."""

    @abstractmethod
    def _write(self, line: dict[str, Any]) -> None:
        """Takes a line of a step or an evaluation; ``steps_done`` is its place in time."""

    def _note(self, text: str, step: int) -> None:
        """Takes an event in words."""

    @abstractmethod
    def _close(self, result: dict[str, Any]) -> None:
        """Ends the run; `result` has ``error`` where it failed."""

    # -- how it is called ---------------------------------------------------------------------

    def on_start(self, run: RunFacts) -> None:
        """See `Callback.on_start`; of several attempts the first one opens the run."""
        if not self._started:
            self._started = True
            self._put(lambda: self._open(run))

    def on_step(self, line: dict[str, Any]) -> None:
        """See `Callback.on_step`."""
        self._put(lambda: self._write(numbered(line)))

    def on_evaluation(self, line: dict[str, Any]) -> None:
        """See `Callback.on_evaluation`."""
        own = {"time": time.time(), **line}
        self._put(lambda: self._write(numbered(own)))

    def on_checkpoint(self, path: str, step: int) -> None:
        """See `Callback.on_checkpoint`."""
        self._put(lambda: self._note(f"checkpoint {path}", step))

    def on_event(self, event: dict[str, Any]) -> None:
        """See `Callback.on_event`."""
        text = f"{event.get('kind', 'event')}: {event.get('text', '')}"
        step = event.get("step")
        self._put(lambda: self._note(text, step if isinstance(step, int) else 0))

    def on_end(self, result: dict[str, Any]) -> None:
        """See `Callback.on_end`; waits some seconds for what is still to be written."""
        if not self._started:
            return
        self._put(lambda: self._close(result))
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._jobs.put(None, timeout=_CLOSE_S)
            self._thread.join(_CLOSE_S)
            if self._thread.is_alive():
                self._warn(f"did not finish within {_CLOSE_S:g} s: its last entries may be lost")
        self._thread = None
        self._started = False

    # -- inside -------------------------------------------------------------------------------

    def _put(self, job: Callable[[], None]) -> None:
        if self._given_up:
            return
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._serve, name=f"logger {self._name}", daemon=True
            )
            self._thread.start()
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._given_up = True
            self._warn(f"{_MOST_WAITING} entries wait to be written; it is given up")

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._given_up:
                continue
            try:
                job()
                self._failures = 0
            except Exception as error:
                self._failures += 1
                self._given_up = self._failures >= _MOST_FAILURES
                self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            message = f"logger {self._name!r}: {text} (told once; training goes on)"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
