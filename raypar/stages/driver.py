"""The driver actor: it owns a run's placement groups and stage actors, and says "steps a to b".

Each actor holds its instruction list, so a call says only which steps to run. Calls are made ahead
(a window of them waits at every actor), short steps share a call, and tensors move between stage
actors alone: the driver sees a few hundred bytes per step and is never on the critical path. It
imports no torch.

Faults end in one place: the driver asks every rank where it stands, lets ranks finish the steps
before the failing one, aborts the rest, and releases everything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from raypar.errors import RayparError
from raypar.stages.actor import ActorInfo, Joining, Reply, StageActor, actor_class
from raypar.stages.faults import Failure, Positions, RankInfo, failure_of, root_failure
from raypar.stages.seats import Seats, SeatSettings

_WINDOW = 3
_CALL_S = 0.4  # wall time that a call should take: shorter costs the driver, longer hides progress
_MOST_STEPS = 512
_ANSWER_S = 2.0
_GRACE_S = 1.0
_ABORT_S = 5.0

_Replies = dict[int | None, dict[int, Reply]]  # first step of a call → rank → its answer
_Calls = dict[Any, tuple[int | None, int]]  # a call under way → (its first step, its rank)


@dataclass(frozen=True)
class DriverSettings:
    """How a run is brought up.

    Attributes:
        name: Unique name of the run.
        backend: Comm backend of the ranks.
        timeout_s: Deadline of every transfer, in seconds.
        start_timeout_s: Deadline of bringing all ranks up, in seconds.
        seats: What to reserve on the cluster.
        steps_per_call: Steps in one actor call; None to fit calls of about 0.4 s.
    """

    name: str
    backend: str
    timeout_s: float
    start_timeout_s: float
    seats: SeatSettings
    steps_per_call: int | None = None


@dataclass(frozen=True)
class RunFailure:
    """A run that failed: everyone's failure, and where everyone stood."""

    failures: tuple[Failure, ...]
    positions: Positions = field(default_factory=Positions)
    infos: tuple[RankInfo, ...] = ()


@dataclass(frozen=True)
class Started:
    """A run that is up: who is where, and seconds of each part of the start."""

    infos: tuple[RankInfo, ...]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Rows:
    """Reports of consecutive steps: the pickled list of every rank, by rank."""

    by_rank: tuple[bytes, ...]


@dataclass(frozen=True)
class Ended:
    """The end of a `Driver.train`.

    Attributes:
        failure: Why it failed, if it did.
        cpu_s: CPU time that the driver process used meanwhile, in seconds.
        wall_s: Wall time, in seconds.
    """

    failure: RunFailure | None
    cpu_s: float
    wall_s: float


class Driver:
    """Owns one run. `start` once, `train` any number of times, `close` at the end."""

    def __init__(self, infos: Sequence[RankInfo], settings: DriverSettings) -> None:
        self._infos = list(infos)
        self._settings = settings
        self._seats: Seats | None = None
        self._actors: list[Any] = []
        self._where: list[ActorInfo] = []
        self._events: queue.SimpleQueue[Rows | Ended] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._release_lock = threading.Lock()

    def start(self, specs: list[Any], feeds: list[Any], runners: list[Any]) -> Started | RunFailure:
        """Reserves devices, creates the actors, connects them, and has them build their programs.

        Args:
            specs: A reference to each rank's RankSpec, by rank.
            feeds: A reference to each rank's feed factory (or to None).
            runners: A reference to each rank's runner factory (or to None).
        """
        try:
            return self._start(specs, feeds, runners)
        except BaseException as error:
            self._release()
            return RunFailure((failure_of(error, None),), infos=tuple(self._infos))

    def _start(
        self, specs: list[Any], feeds: list[Any], runners: list[Any]
    ) -> Started | RunFailure:
        clock = _Clock()
        self._seats = Seats.acquire(self._settings.seats)
        clock.mark("placement")
        self._check_open()
        make = actor_class(StageActor, {"control": 2})
        for info in self._infos:
            self._actors.append(
                make.options(
                    **self._seats.options(info.rank),
                    name=f"{self._settings.name}/rank-{info.rank}",
                ).remote()
            )
        self._check_open()
        self._where = self._answers([a.info.remote() for a in self._actors], "no answer")
        self._infos = [
            dataclasses.replace(info, node=at.ip)
            for info, at in zip(self._infos, self._where, strict=True)
        ]
        self._seats.check([at.node_id for at in self._where], self._infos)
        address = None
        if len(self._actors) > 1:
            [address] = self._answers([self._actors[0].serve.remote()], "no rendezvous")
        clock.mark("actors")
        s = self._settings
        joining = Joining(s.backend, address, "world", s.start_timeout_s, s.timeout_s)
        calls: _Calls = {
            actor.setup.remote(joining, specs[rank], feeds[rank], runners[rank]): (None, rank)
            for rank, actor in enumerate(self._actors)
        }
        parts, failure = self._await_setup(calls)
        if failure is not None:
            return failure
        clock.mark("ranks")
        for name in ("import", "join", "programs"):
            clock.seconds[f"ranks.{name}"] = max(part[name] for part in parts)
        return Started(tuple(self._infos), clock.seconds)

    def _answers(self, refs: list[Any], what: str) -> list[Any]:
        try:
            return list(ray.get(refs, timeout=self._settings.start_timeout_s))
        except GetTimeoutError:
            raise RayparError(
                f"{self._settings.name}: {what} from {len(refs)} stage actors within "
                f"{self._settings.start_timeout_s:g} s; is the cluster overloaded? Raise "
                "start_timeout_s"
            ) from None

    def _await_setup(self, calls: _Calls) -> tuple[list[dict[str, float]], RunFailure | None]:
        deadline = time.monotonic() + self._settings.start_timeout_s
        parts: list[dict[str, float]] = []
        failures: list[Failure] = []
        while calls and not failures:
            self._check_open()
            for _, _, value in self._ready(calls):
                if isinstance(value, Failure):
                    failures.append(value)
                else:
                    parts.append(value)
            if time.monotonic() > deadline:
                failures.append(
                    Failure(None, None, "TrainingError", "the ranks did not start in time")
                )
        return parts, self._fail(calls, failures, {}) if failures else None

    # ---- steps ----------------------------------------------------------------------------

    def train(self, first: int, steps: int) -> None:
        """Runs steps ``first`` to ``first + steps - 1``; events are read with `poll`."""
        cpu, began = time.process_time(), time.perf_counter()
        try:
            failure = self._drive(first, first + steps)
        except BaseException as error:
            self._release()
            failure = RunFailure((failure_of(error, None),), infos=tuple(self._infos))
        self._events.put(Ended(failure, time.process_time() - cpu, time.perf_counter() - began))

    def _drive(self, first: int, end: int) -> RunFailure | None:
        calls: _Calls = {}
        rows: _Replies = {}
        counts: dict[int | None, int] = {}
        pace = _Pace(self._settings.steps_per_call)
        following, stopping = first, False
        while calls or (following < end and not stopping):
            while following < end and len(rows) < _WINDOW and not stopping:
                count = min(pace.count, end - following)
                for rank, actor in enumerate(self._actors):
                    calls[actor.run.remote(following, count, end)] = (following, rank)
                rows[following] = {}
                counts[following] = count
                following += count
            failures: list[Failure] = []
            for start, rank, value in self._ready(calls):
                if isinstance(value, Failure):
                    failures.append(value)
                    continue
                rows[start][rank] = value
                stopping = stopping or value.stopped
                if value.failure is not None:
                    failures.append(value.failure)
            if failures:
                return self._fail(calls, failures, rows)
            for start in [s for s, row in rows.items() if len(row) == len(self._actors)]:
                self._emit(rows.pop(start))
                pace.finished(counts.pop(start))
        return None

    def _ready(self, calls: _Calls) -> list[tuple[int | None, int, Any]]:
        """Takes finished calls out of `calls`: (first step, rank, value or Failure)."""
        done, _ = ray.wait(list(calls), num_returns=1, timeout=_ANSWER_S)
        if done and len(calls) > 1:  # the others follow within a moment: one pass for all
            oldest = calls[done[0]][0]
            same = [ref for ref, (start, _) in calls.items() if start == oldest]
            done, _ = ray.wait(same, num_returns=len(same), timeout=0.01)
        found = []
        for ref in done:
            start, rank = calls.pop(ref)
            try:
                value = ray.get(ref)
            except RayError as error:
                value = _lost(error, rank, start)
            found.append((start, rank, value))
        return found

    def _emit(self, row: dict[int, Reply]) -> None:
        self._events.put(Rows(tuple(row[r].reports for r in range(len(self._actors)))))

    # ---- faults ---------------------------------------------------------------------------

    def _fail(
        self,
        calls: _Calls,
        failures: list[Failure],
        rows: _Replies,
    ) -> RunFailure:
        if self._closing.is_set():
            return RunFailure((Failure(None, None, "TrainingError", "the run was closed"),))
        positions, dead = self._ask_positions({f.rank for f in failures if f.died})
        failures += dead
        deadline = time.monotonic() + _GRACE_S
        while calls and time.monotonic() < deadline and not self._may_abort(failures):
            self._take(calls, failures, rows, 0.05)
        reason = root_failure(failures).message
        lost = {f.rank for f in failures if f.died}
        alive = [a for rank, a in enumerate(self._actors) if rank not in lost]
        with contextlib.suppress(RayError):
            ray.wait(
                [a.abort.remote(reason) for a in alive], num_returns=len(alive), timeout=_ANSWER_S
            )
        deadline = time.monotonic() + _ABORT_S
        while calls and time.monotonic() < deadline:
            self._take(calls, failures, rows, 0.2)
        for start in rows:  # in step order, as they were called
            if len(rows[start]) == len(self._actors):
                self._emit(rows[start])
        self._release()
        return RunFailure(tuple(failures), positions, tuple(self._infos))

    def _take(
        self,
        calls: _Calls,
        failures: list[Failure],
        rows: _Replies,
        timeout: float,
    ) -> None:
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=timeout)
        for start, rank, value in (
            self._ready({ref: calls.pop(ref) for ref in done}) if done else ()
        ):
            if isinstance(value, Failure):
                failures.append(value)
            elif isinstance(value, Reply):
                rows.setdefault(start, {})[rank] = value
                if value.failure is not None:
                    failures.append(value.failure)

    def _may_abort(self, failures: list[Failure]) -> bool:
        """Whether waiting longer can tell nothing new.

        So it is where a rank is dead, or all have finished the steps before the failing one.
        """
        root = root_failure(failures)
        if root.severity != 1 or root.step is None:
            return root.severity == 0 or root.step is None
        refs = [actor.ping.remote() for actor in self._actors]
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=_ANSWER_S)
        try:
            return len(done) == len(refs) and min(ray.get(done)) >= root.step
        except RayError:
            return True

    def _ask_positions(self, lost: set[int | None]) -> tuple[Positions, list[Failure]]:
        refs = {
            actor.positions.remote(): rank
            for rank, actor in enumerate(self._actors)
            if rank not in lost
        }
        if not refs:
            return Positions(), []
        done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=_ANSWER_S)
        found, dead = Positions(), []
        for ref in done:
            try:
                found.at[refs[ref]] = ray.get(ref)
            except RayActorError as error:
                dead.append(_lost(error, refs[ref], None))
            except RayError as error:
                found.at[refs[ref]] = f"cannot tell: {_short(error)}"
        return found, dead

    # ---- control --------------------------------------------------------------------------

    @ray.method(concurrency_group="poll")
    def poll(self, timeout: float) -> list[Rows | Ended]:
        """Waits up to `timeout` seconds for events, and returns all there are."""
        found: list[Rows | Ended] = []
        try:
            found.append(self._events.get(timeout=timeout))
            while True:
                found.append(self._events.get_nowait())
        except queue.Empty:
            return found

    def tensors(self, what: str) -> list[Any]:
        """References to every rank's ``state`` or ``gradients``; the tensors never come here."""
        return [actor.tensors.remote(what) for actor in self._actors]

    @ray.method(concurrency_group="control")
    def close(self) -> None:
        """Ends the actors and gives the devices back; in any state, also twice."""
        self._closing.set()
        self._release()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise RayparError("the run was closed while it started")

    def _release(self) -> None:
        with self._release_lock:
            for actor in self._actors:
                with contextlib.suppress(RayError):
                    ray.kill(actor, no_restart=True)
            if self._seats is not None:
                self._seats.release()
            here = ray.util.get_node_ip_address()
            _await_exit([at.pid for at in self._where if at.ip == here])
            self._where = []


class _Pace:
    """How many steps to put into one call, so that it takes about `_CALL_S`."""

    def __init__(self, fixed: int | None) -> None:
        self._fixed = fixed
        self.count = fixed or 1
        self._last = time.perf_counter()

    def finished(self, count: int) -> None:
        now = time.perf_counter()
        each, self._last = max((now - self._last) / count, 1e-6), now
        if self._fixed is None:
            # At most four times as many at once: the first steps of a run are not typical.
            self.count = max(1, min(int(_CALL_S / each), 4 * self.count, _MOST_STEPS))


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def _lost(error: RayError, rank: int, step: int | None) -> Failure:
    died = isinstance(error, RayActorError)
    kind = "StageDiedError" if died else type(error).__name__
    return Failure(rank, step, kind, _short(error), died=died, severity=0 if died else 1)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    for mark in ("Worker exit detail:", "The actor died because", "The actor is dead because"):
        if mark in text:
            text = text[text.index(mark) :].removeprefix("Worker exit detail:").strip()
            break
    return text if len(text) < 240 else text[:237] + "..."


def _await_exit(pids: Sequence[int], seconds: float = 3.0) -> None:
    """Waits until the processes are gone; kills what does not go by itself."""
    deadline = time.monotonic() + seconds
    left = list(pids)
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if _exists(pid)]
        time.sleep(0.01)
    for pid in left:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _exists(pid: int) -> bool:
    """Whether `pid` is still the Ray worker that it was, and no later process of that number."""
    try:
        os.kill(pid, 0)
        if os.path.isdir("/proc/self"):
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                return b"ray::" in file.read()
    except OSError:
        return False
    return True
