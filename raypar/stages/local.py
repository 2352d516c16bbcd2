"""A run in this process: threads are the ranks. No Ray."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from raypar.comm.group import DEFAULT_TIMEOUT_S, Group
from raypar.comm.local import LocalWorld
from raypar.errors import RayparError
from raypar.stages.faults import (
    Failure,
    Positions,
    RankInfo,
    failure_of,
    root_failure,
    to_exception,
)
from raypar.stages.run import (
    OnReport,
    Run,
    StepResult,
    merge_notes,
    merge_reports,
    raise_if_not_finite,
)
from raypar.stages.spec import RankSpec, StepReport
from raypar.stages.worker import Chunk, FeedFactory, RankWorker, RunnerFactory, info_of

_GRACE_S = 1.0
_JOIN_S = 5.0
_POLL_S = 0.2


class _Seat:
    """One rank's thread, and the jobs it is given; replies come in the common queue."""

    def __init__(self, spec: RankSpec, replies: queue.SimpleQueue[tuple[int, str, Any]]) -> None:
        self.spec = spec
        self.worker: RankWorker | None = None
        self._replies = replies
        self._jobs: queue.SimpleQueue[tuple[str, Callable[[], Any]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._serve, name=f"rank {spec.rank}", daemon=True)
        self.thread.start()

    def do(self, kind: str, job: Callable[[], Any]) -> None:
        self._jobs.put((kind, job))

    def end(self) -> None:
        self._jobs.put(None)

    def _serve(self) -> None:
        if self.spec.threads is not None:
            torch.set_num_threads(self.spec.threads)
        while (item := self._jobs.get()) is not None:
            kind, job = item
            try:
                self._replies.put((self.spec.rank, kind, job()))
            except BaseException as error:  # whatever it is, the thread that waits must hear of it
                self._replies.put((self.spec.rank, "failed", error))


class LocalRun(Run):
    """Runs a plan's ranks as threads of this process.

    Args:
        specs: One per rank, by rank.
        feed: Makes every rank's input feed; None for programs without inputs.
        runner: Makes every rank's runner; None for the interpreter.
        timeout_s: Deadline of every transfer, in seconds.
    """

    def __init__(
        self,
        specs: Sequence[RankSpec],
        *,
        feed: FeedFactory | None = None,
        runner: RunnerFactory | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        super().__init__(specs)
        self.infos: list[RankInfo] = [info_of(spec) for spec in specs]
        self._feed = feed
        self._runner = runner or _interpreters()
        self._timeout_s = timeout_s
        self._replies: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
        self._seats: list[_Seat] = []
        self._turn = threading.Lock()  # all ranks are let go, or all told where to end
        self._world: LocalWorld | None = None

    def start(self) -> dict[str, float]:
        """Starts the threads and builds every rank's programs; see `Run.start`."""
        began = time.perf_counter()
        self._world = world = LocalWorld(len(self._specs), timeout_s=self._timeout_s)
        self._seats = [_Seat(spec, self._replies) for spec in self._specs]
        for seat in self._seats:
            seat.do("built", partial(self._build, seat, world.group(seat.spec.rank)))
        waiting = set(range(len(self._seats)))
        failures: list[Failure] = []
        while waiting:
            rank, kind, value = self._next()
            waiting.discard(rank)
            if kind == "failed":
                failures.append(failure_of(value, rank))
                self._abort(f"{self.infos[rank]} failed to start")
        self._raise(failures)
        self.notes = merge_notes(
            [seat.worker.note if seat.worker else None for seat in self._seats]
        )
        return {"ranks": time.perf_counter() - began}

    def _build(self, seat: _Seat, group: Group) -> None:
        seat.worker = RankWorker(seat.spec, group, feed=self._feed, runner=self._runner)

    def train(
        self,
        first_step: int,
        steps: int,
        on_report: OnReport | None = None,
        *,
        horizon: int | None = None,
    ) -> int:
        """See `Run.train`."""
        if not self._seats:
            raise RayparError("the run has not been started: call start() first")
        until, following = first_step + steps, first_step
        with self._turn:
            for seat in self._seats:
                assert seat.worker is not None
                seat.worker.go_on()
        for seat in self._seats:
            seat.do("chunk", partial(self._train_rank, seat, first_step, steps, horizon))
        waiting = set(range(len(self._seats)))
        rows: dict[int, dict[int, StepReport]] = {}
        chunks: list[Chunk] = []
        deadline: float | None = None
        hard = float("inf")
        bad: StepResult | None = None
        while waiting:
            item = self._poll()
            if deadline is not None and (
                time.monotonic() > deadline or self._reached(chunks, until)
            ):
                self._abort(root_failure(_failures(chunks)).message)
                deadline, hard = float("inf"), time.monotonic() + _JOIN_S
            if time.monotonic() > hard:
                break  # some rank stands in code that cannot be interrupted
            if item is None:
                continue
            rank, kind, value = item
            if kind == "report":
                row = rows.setdefault(value.step, {})
                row[rank] = value
                if len(row) == len(self._seats):
                    result = merge_reports([row[r] for r in sorted(rows.pop(value.step))])
                    bad = result if result.ends_run else bad
                    following = result.step + 1
                    if on_report is not None:
                        on_report(result)
                continue
            waiting.discard(rank)
            chunks.append(
                value if kind == "chunk" else Chunk([], True, failure_of(value, rank, first_step))
            )
            if _failures(chunks) and deadline is None:
                deadline = time.monotonic() + _GRACE_S
                self._at = self._positions()
        if bad is not None:
            raise_if_not_finite(bad)
        self._raise(_failures(chunks))
        return following

    def request_stop(self) -> None:
        """See `Run.request_stop`."""
        workers = [seat.worker for seat in self._seats if seat.worker is not None]
        if workers:
            with self._turn:
                end = max([worker.hold() for worker in workers]) + 1
                for worker in workers:
                    worker.end_at(end)

    def _reached(self, chunks: Sequence[Chunk], until: int) -> bool:
        """Whether every rank has finished the steps before the failing one."""
        step = root_failure(_failures(chunks)).step
        done = [s.worker.completed for s in self._seats if s.worker is not None]
        return min(done) >= (until if step is None else step)

    def _train_rank(self, seat: _Seat, first: int, steps: int, horizon: int | None) -> Chunk:
        assert seat.worker is not None
        rank = seat.spec.rank
        return seat.worker.run(
            first,
            steps,
            max(horizon or 0, first + steps),
            lambda report: self._replies.put((rank, "report", report)),
        )

    def call(self, method: str, *args: Any) -> list[Any]:
        """See `Run.call`."""
        if not self._seats:
            raise RayparError("the run is not started, or closed: read its state before close()")
        for seat in self._seats:
            assert seat.worker is not None
            seat.do("answer", partial(seat.worker.call, method, *args))
        found: list[Any] = [None for _ in self._seats]
        left, failures = len(self._seats), []
        while left:  # all of them: an answer that is left over would be taken for a later one
            rank, kind, value = self._next()
            if kind == "failed":
                failures.append(failure_of(value, rank))
            elif kind == "answer":
                found[rank] = value
            left -= kind in ("failed", "answer")
        self._raise(failures)
        return found

    def close(self) -> None:
        """Ends the threads; see `Run.close`."""
        seats, self._seats = self._seats, []
        if not seats:
            return
        if self._world is not None:
            for seat in seats:
                if seat.worker is not None:
                    seat.worker.abort("the run was closed")
            self._world.abort("the run was closed")
        for seat in seats:
            if seat.worker is not None:
                seat.do("closed", seat.worker.close)
            seat.end()
        for seat in seats:
            seat.thread.join(_JOIN_S)

    # ---- helpers --------------------------------------------------------------------------

    def _next(self) -> tuple[int, str, Any]:
        while True:
            item = self._poll()
            if item is not None:
                return item

    def _poll(self) -> tuple[int, str, Any] | None:
        try:  # a wait with an end, so that Ctrl-C is noticed everywhere
            return self._replies.get(timeout=_POLL_S)
        except queue.Empty:
            return None

    def _abort(self, reason: str) -> None:
        for seat in self._seats:
            if seat.worker is not None:
                seat.worker.abort(reason)
        if self._world is not None:
            self._world.abort(reason)

    def _positions(self) -> Positions:
        return Positions(
            {s.spec.rank: s.worker.positions() for s in self._seats if s.worker is not None}
        )

    _at: Positions = Positions()

    def _raise(self, failures: list[Failure]) -> None:
        if failures:
            raise to_exception(failures, self.infos, self._at)


def _failures(chunks: Sequence[Chunk]) -> list[Failure]:
    return [c.failure for c in chunks if c.failure is not None]


def _interpreters() -> RunnerFactory:
    """Interpreters that share a workshop."""
    from raypar.stages.holdings import Workshop
    from raypar.stages.interpreter import RankRunner

    return partial(RankRunner, workshop=Workshop())
