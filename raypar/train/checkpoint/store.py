"""All checkpoints of a run: begun between two steps, finished behind its back, the right ones kept.

A checkpoint is begun in a folder that does not count. When every rank has left its note there, a
thread of this process writes the index and gives the folder its name, in one step; where folders
cannot be renamed (URLs), the index is what makes it count, and is written last. So whatever dies
at whatever byte, the last good checkpoint stays, and what was left behind is swept later.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raypar.errors import CheckpointError, RayparError
from raypar.plan import Plan
from raypar.stages.run import Run
from raypar.train.checkpoint.checkpoint import Checkpoint, folder_name, serial_of
from raypar.train.checkpoint.keeping import Keeping
from raypar.train.checkpoint.pending import Pending
from raypar.train.checkpoint.sealed import plain
from raypar.train.checkpoint.storage import (
    TEMPORARY,
    Storage,
    UnreachableError,
    storage_at,
)
from raypar.train.checkpoint.writing import MARK, FailureJob, ReadyJob, SaveJob
from raypar.train.config import CheckpointConfig
from raypar.train.state import TrainState

_AT_ONCE = 2  # ranks have two buffers: one is written from while the next is copied to
_SHORTEST_S, _LONGEST_S = 0.02, 0.5  # between two looks for notes
_ASK_S = 2.0  # between two questions whether a rank has failed
_TRIES = 10


@dataclass(frozen=True)
class Begun:
    """A checkpoint that is being written.

    Attributes:
        path: Where it will be.
        step: Optimizer steps done.
        bytes: How much is written, over all ranks.
        stall_s: How long training stood still for it, in seconds.
        waited_s: How much of that was for an earlier checkpoint that was still being written.
    """

    path: str
    step: int
    bytes: int
    stall_s: float
    waited_s: float


class CheckpointStore:
    """Writes a run's checkpoints, and keeps the right ones.

    At most two checkpoints are under way: `begin` waits for the older one when a third is due, or
    leaves the third out, as it is told.

    Args:
        storage: Folder for checkpoints, local or an fsspec URL; every rank has to reach it.
        config: Which ones are kept (`num_to_keep`, `score_attribute`, `score_order`).

    Raises:
        CheckpointError: The URL is of no kind that fsspec knows.
    """

    def __init__(self, storage: str | Path, config: CheckpointConfig | None = None) -> None:
        self._storage: Storage = storage_at(storage)
        self._keeping = Keeping(self._storage, config or CheckpointConfig())
        self._turn = threading.Condition()
        self._pending: list[Pending] = []
        self._opening: str | None = None  # the folder of the next one
        self._finished: list[Checkpoint] = []
        self._failures: list[CheckpointError] = []
        self._serial: int | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    # -- writing ----------------------------------------------------------------------------

    def check(self) -> None:
        """Writes and removes something, to tell before training what the first checkpoint would.

        Raises:
            CheckpointError: The storage cannot be written.
        """
        token = secrets.token_hex(8)
        folder = f".{token}{TEMPORARY}"
        self._open(folder, token)
        self._remove_quietly(folder)

    def ignore_present(self) -> None:
        """For a run that begins anew: the checkpoints that are there now are none of its own.

        Raises:
            CheckpointError: The storage does not tell what there is.
        """
        self._keeping.ignore_present()

    def make_ready(self, run: Run) -> None:
        """Has the ranks get ready, so that the first checkpoint stalls no longer than later ones.

        Call it after the first step, when the optimizer has its state; the ranks do it beside the
        next steps.

        Raises:
            StageDiedError: A rank is gone.
        """
        run.call("visit", ReadyJob())

    def begin(
        self,
        run: Run,
        state: TrainState,
        plan: Plan,
        facts: dict[str, Any] | None = None,
        *,
        wait: bool = True,
    ) -> Begun | None:
        """Has every rank copy its part; the rest goes on in the background.

        Call `wait` before the run is closed: what is still to be written dies with the ranks.

        Args:
            run: Started, between steps.
            state: Where it stands.
            plan: What it runs.
            facts: What else is worth keeping, as plain values: the config, say.
            wait: With two checkpoints under way: wait for the older one; else nothing is done.

        Returns:
            What was begun; None where it was left out.

        Raises:
            CheckpointError: The storage cannot be written or is not the ranks' storage too, or
                `facts` cannot be kept; also for an earlier checkpoint that could not be finished.
            StageDiedError: A rank is gone.
        """
        self._raise_failure()
        self._forget_others(run)
        before = time.perf_counter()
        if len(self._pending) >= _AT_ONCE:
            if not wait:
                return None
            self._await(lambda: len(self._pending) < _AT_ONCE, None)
        waited = time.perf_counter() - before
        serial = self._next_serial()
        name, token = folder_name(serial, state.step), secrets.token_hex(8)
        folder = self._storage.begin(name, token)
        held = json.loads(plan.to_json())
        plain(facts, "facts")  # what cannot be kept is told now, not when all has been written
        self._opening = folder
        try:
            self._open(folder, token)
            copied = run.call("visit", SaveJob(self._storage.root, folder, token))
        except BaseException:
            self._remove_quietly(folder)
            raise
        done = time.perf_counter()
        world = len(copied)
        pending = Pending(
            run, name, folder, token, world, state.step, state.to_json(), held, facts or {}
        )
        with self._turn:
            self._pending.append(pending)
            self._turn.notify_all()
        self._start_thread()
        waited += max(c.waited for c in copied)
        total = sum(c.bytes for c in copied)
        return Begun(self._storage.path(name), state.step, total, done - before, waited)

    def poll(self) -> list[Checkpoint]:
        """The checkpoints that were finished since this was last asked, oldest first.

        Raises:
            CheckpointError: One could not be finished.
        """
        self._raise_failure()
        with self._turn:
            found, self._finished = self._finished, []
        return found

    def wait(self, timeout_s: float | None = None) -> list[Checkpoint]:
        """Waits until nothing is under way; returns what `poll` does.

        Raises:
            CheckpointError: One could not be finished, its ranks are gone, or time is up.
        """
        self._await(lambda: not self._pending, timeout_s)
        return self.poll()

    def close(self) -> None:
        """Ends the thread; what is not finished by now is left out. Safe to call twice."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # -- what is there ----------------------------------------------------------------------

    def all(self) -> list[Checkpoint]:
        """Every checkpoint whose index is good, oldest first."""
        return self._keeping.all()

    def latest(self) -> Checkpoint | None:
        """The one that was begun last, of those whose index is good."""
        return self._keeping.latest()

    def best(self) -> Checkpoint | None:
        """The best by ``score_attribute``; without one, the latest."""
        return self._keeping.best()

    # -- helpers of `begin` -----------------------------------------------------------------

    def _next_serial(self) -> int:
        if self._serial is None:
            self._sweep()
            known = [serial_of(n.lstrip(".").split(".")[0]) for n in self._storage.names()]
            self._serial = max((s for s in known if s is not None), default=-1)
        self._serial += 1
        return self._serial

    def _open(self, folder: str, token: str) -> None:
        try:
            self._storage.make_folder(folder)
            self._storage.write(f"{folder}/{MARK}", [token.encode()])
        except OSError as error:
            raise CheckpointError(
                f"cannot write to {self._storage.root!r}: {error}; set storage_path, or "
                "CheckpointConfig.storage (checkpoint.storage), to a folder that this process and "
                "all ranks can write to"
            ) from None

    def _forget_others(self, run: Run) -> None:
        """What another run was writing is not finished any more: that run is over."""
        with self._turn:
            self._pending = [p for p in self._pending if p.run is run]

    def _raise_failure(self) -> None:
        with self._turn:
            if self._failures:
                raise self._failures.pop(0)

    def _await(self, done: Callable[[], bool], timeout_s: float | None) -> None:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._turn:
                left = _ASK_S if end is None else min(_ASK_S, end - time.monotonic())
                self._turn.wait_for(lambda: done() or bool(self._failures), max(left, 0))
                if done() and not self._failures:
                    return
                oldest = self._pending[0] if self._pending else None
            self._raise_failure()
            if end is not None and time.monotonic() >= end:
                raise CheckpointError(f"a checkpoint was not written within {timeout_s:g} s")
            if oldest is not None:
                self._ask(oldest)

    def _ask(self, pending: Pending) -> None:
        """Raises where a rank has failed and could not even leave a note of it."""
        try:
            answers = pending.run.call("visit", FailureJob(pending.token))
        except RayparError as error:
            with self._turn:
                self._pending = [p for p in self._pending if p.run is not pending.run]
            raise CheckpointError(
                f"the run ended while a checkpoint was written, which is left out: {error}"
            ) from error
        failures = [text for text in answers if text is not None]
        if failures:
            self._end(pending, CheckpointError("; ".join(failures)))

    # -- the thread -------------------------------------------------------------------------

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._serve, name="raypar-checkpoints", daemon=True
            )
            self._thread.start()

    def _serve(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._closed or bool(self._pending))
                if self._closed:
                    return
                pending = self._pending[0]
            delay, tries = _SHORTEST_S, 0
            while pending in self._pending:
                outcome: Checkpoint | CheckpointError | None = None
                try:
                    outcome = pending.finish(self._storage)
                except Exception as error:
                    tries += 1
                    where = self._storage.path(pending.name)
                    if isinstance(error, CheckpointError) and not isinstance(
                        error, UnreachableError
                    ):
                        outcome = error
                    elif tries == _TRIES:  # else the storage may be out of reach for a moment
                        text = f"cannot finish {where!r}: {type(error).__name__}: {error}"
                        outcome = CheckpointError(text)
                if outcome is not None:
                    self._end(pending, outcome)
                    break
                with self._turn:
                    if self._turn.wait_for(lambda: self._closed, delay):
                        return
                delay = min(2 * delay, _LONGEST_S)

    def _end(self, pending: Pending, outcome: Checkpoint | CheckpointError) -> None:
        if isinstance(outcome, CheckpointError):
            self._remove_quietly(pending.folder)
        else:
            self._tidy()
        with self._turn:
            if pending in self._pending:
                self._pending.remove(pending)
                if isinstance(outcome, CheckpointError):
                    self._failures.append(outcome)
            if isinstance(outcome, Checkpoint):
                self._finished.append(outcome)
            self._turn.notify_all()

    def _tidy(self) -> None:
        with contextlib.suppress(Exception):  # the next one tidies up again
            self._keeping.drop_worst()
            self._sweep()

    def _sweep(self) -> None:
        """Removes what dead runs, or killed removals, left behind."""
        self._keeping.sweep(self._own)

    def _own(self) -> set[str]:
        """Folders that are being written to."""
        with self._turn:
            return {p.folder for p in self._pending} | {self._opening or ""}

    def _remove_quietly(self, folder: str) -> None:
        with contextlib.suppress(Exception):  # swept later
            self._storage.remove(folder)
