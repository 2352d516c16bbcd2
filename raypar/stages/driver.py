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
import math
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from raypar.comm.network import NetworkSettings
from raypar.errors import RayparError
from raypar.stages.actor import ActorInfo, Built, Joining, StageActor, actor_class
from raypar.stages.faults import Failure, Positions, RankInfo, failure_of
from raypar.stages.rescue import Calls, Replies, await_exit, lost_call, rescue
from raypar.stages.seats import Seats, SeatSettings

_WINDOW = 3
_CALL_S = 1.5  # wall time that a call should take: shorter costs the driver, longer hides progress
_MOST_STEPS = 512
_STOP_S = 10.0


@dataclass(frozen=True)
class DriverSettings:
    """How a run is brought up.

    Attributes:
        name: Unique name of the run.
        backend: Comm backend of the ranks.
        timeout_s: Deadline of every transfer, in seconds.
        start_timeout_s: Deadline of bringing all ranks up and together, in seconds.
        build_timeout_s: Deadline of their building what they hold, in seconds.
        seats: What to reserve on the cluster.
        network: Interface, ports and NCCL's environment of every rank.
        steps_per_call: Steps in one actor call; None to fit calls of about 1.5 s.
    """

    name: str
    backend: str
    timeout_s: float
    start_timeout_s: float
    build_timeout_s: float
    seats: SeatSettings
    network: NetworkSettings = field(default_factory=NetworkSettings)
    steps_per_call: int | None = None


@dataclass(frozen=True)
class RunFailure:
    """A run that failed: everyone's failure, and where everyone stood."""

    failures: tuple[Failure, ...]
    positions: Positions = field(default_factory=Positions)
    infos: tuple[RankInfo, ...] = ()


@dataclass(frozen=True)
class Started:
    """A run that is up.

    Attributes:
        infos: Who is where.
        seconds: Seconds of each part of the start.
        notes: What each rank has to tell of how it was built, or None, by rank.
    """

    infos: tuple[RankInfo, ...]
    seconds: dict[str, float]
    notes: tuple[str | None, ...] = ()


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
        self._stop = threading.Event()
        self._turn = threading.Lock()  # all ranks are let go, or all told where to end
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
            return self._failed(error)

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
            serving = self._actors[0].serve.remote(self._settings.network)
            [address] = self._answers([serving], "no rendezvous")
            if isinstance(address, Failure):
                return RunFailure((address,), infos=tuple(self._infos))
        clock.mark("actors")
        s = self._settings
        joining = Joining(s.backend, address, "world", s.start_timeout_s, s.timeout_s, s.network)
        calls = Calls()
        for rank, actor in enumerate(self._actors):
            calls.add(actor.setup.remote(joining, specs[rank], feeds[rank], runners[rank]), rank)
        built, failure = self._await_setup(calls)
        if failure is not None:
            return failure
        clock.mark("ranks")
        for name in ("import", "join", "programs"):
            clock.seconds[f"ranks.{name}"] = max(b.seconds[name] for b in built.values())
        notes = tuple(built[rank].note for rank in sorted(built))
        return Started(tuple(self._infos), clock.seconds, notes)

    def _answers(self, refs: list[Any], what: str) -> list[Any]:
        try:
            return list(ray.get(refs, timeout=self._settings.start_timeout_s))
        except GetTimeoutError:
            raise RayparError(
                f"{self._settings.name}: {what} from {len(refs)} stage actors within "
                f"{self._settings.start_timeout_s:g} s; is the cluster overloaded? "
                f"{_longer(self._settings.start_timeout_s)}"
            ) from None
        except RayError:
            for rank, ref in enumerate(refs):  # whose error was it?
                try:
                    ray.get(ref, timeout=0)
                except GetTimeoutError:
                    continue
                except RayError as error:
                    raise _RankLost(lost_call(error, rank, None)) from None
            raise

    def _await_setup(self, calls: Calls) -> tuple[dict[int, Built], RunFailure | None]:
        deadline = time.monotonic() + self._settings.build_timeout_s
        built: dict[int, Built] = {}
        failures: list[Failure] = []
        while calls and not failures:
            self._check_open()
            for _, rank, value in calls.ready():
                if isinstance(value, Failure):
                    failures.append(value)
                else:
                    built[rank] = value
            if time.monotonic() > deadline:
                late = sorted(set(range(len(self._actors))) - set(built))
                text = (
                    f"of {len(self._actors)} ranks {late} did not build their parts of the model "
                    f"within {self._settings.build_timeout_s:g} s. "
                    f"{_longer(self._settings.build_timeout_s)}"
                )
                failures.append(Failure(None, None, "TrainingError", text))
        return built, self._fail(calls, failures, {}) if failures else None

    # ---- steps ----------------------------------------------------------------------------

    def train(self, first: int, steps: int, horizon: int) -> None:
        """Runs steps ``first`` to ``first + steps - 1``; events are read with `poll`.

        Args:
            first: First step.
            steps: How many.
            horizon: Steps below it will follow, so data may be read ahead.
        """
        cpu, began = time.process_time(), time.perf_counter()
        try:
            with self._turn:
                if self._stop.is_set():
                    self._stop.clear()
                    ray.get([actor.call.remote("go_on", ()) for actor in self._actors])
            failure = self._drive(first, first + steps, max(horizon, first + steps))
        except BaseException as error:
            self._release()
            failure = self._failed(error)
        self._events.put(Ended(failure, time.process_time() - cpu, time.perf_counter() - began))

    def _drive(self, first: int, end: int, horizon: int) -> RunFailure | None:
        calls = Calls()
        rows: Replies = {}
        counts: dict[int | None, int] = {}
        pace = _Pace(self._settings.steps_per_call)
        following, stopping = first, False
        while calls or (following < end and not stopping):
            stopping = stopping or self._stop.is_set()
            while following < end and len(rows) < _WINDOW and not stopping:
                count = min(pace.count, end - following)
                for rank, actor in enumerate(self._actors):
                    calls.add(actor.run.remote(following, count, horizon), rank, following)
                rows[following] = {}
                counts[following] = count
                following += count
            failures: list[Failure] = []
            for start, rank, value in calls.ready():
                if isinstance(value, Failure):
                    failures.append(value)
                    continue
                rows[start][rank] = value
                stopping = stopping or value.stopped
                if value.failure is not None:
                    failures.append(value.failure)
            if failures:
                return self._fail(calls, failures, rows)
            for start in self._emit(rows):
                pace.finished(counts.pop(start))
        return None

    def _fail(self, calls: Calls, failures: list[Failure], rows: Replies) -> RunFailure:
        """Ends the run: learns what can be learned, stops every rank, releases everything."""
        if self._closing.is_set():
            return RunFailure((Failure(None, None, "TrainingError", "the run was closed"),))
        positions = rescue(self._actors, calls, failures, rows)
        self._emit(rows)
        self._release()
        return RunFailure(tuple(failures), positions, tuple(self._infos))

    def _failed(self, error: BaseException) -> RunFailure:
        """What this actor itself raised, or met at a stage actor outside of steps."""
        if isinstance(error, _RankLost):
            known = error.failure
        elif isinstance(error, RayError):
            known = lost_call(error, None, None)
        else:
            known = failure_of(error, None)
        return RunFailure((known,), infos=tuple(self._infos))

    def _emit(self, rows: Replies) -> list[int | None]:
        """Takes complete rows out, in step order, and hands them to the client."""
        done: list[int | None] = []
        for start, row in rows.items():  # in the order of the calls
            if len(row) < len(self._actors):
                break  # a later one may be complete already, but must not overtake
            self._events.put(Rows(tuple(row[r].reports for r in range(len(self._actors)))))
            done.append(start)
        for start in done:
            del rows[start]
        return done

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

    def call(self, method: str, args: list[Any]) -> list[Any]:
        """References to what a method of every rank answers; the answers never come here.

        Args:
            method: Its name.
            args: A reference to its arguments, in a list.
        """
        return [actor.call.remote(method, args[0]) for actor in self._actors]

    @ray.method(concurrency_group="control")
    def request_stop(self) -> None:
        """Has the `train` under way end before the first step that no rank has begun."""
        with self._turn:
            self._stop.set()
            end: int | None = None
            with contextlib.suppress(RayError):  # who is dead is found by the calls under way
                begun = ray.get([actor.hold.remote() for actor in self._actors], timeout=_STOP_S)
                end = max(begun) + 1
            # Also where not all answered: nobody may be held for ever.
            told = [actor.end_at.remote(end) for actor in self._actors]
            with contextlib.suppress(RayError):
                ray.get(told, timeout=_STOP_S)  # they may not overtake what lets ranks go

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
            await_exit([at.pid for at in self._where if at.ip == here])
            self._where = []


class _RankLost(RayparError):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def _longer(now_s: float) -> str:
    return (
        "If they are only slow, raise ScalingConfig.start_timeout_s or mesh.start_timeout_s, for "
        f"example to {3 * now_s:g}"
    )


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
            self.count = max(1, min(math.ceil(_CALL_S / each), 4 * self.count, _MOST_STEPS))


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
