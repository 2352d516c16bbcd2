"""When a rank fails: find out who was first, let the others finish what they can, stop the rest.

Everything here works through the stage actors' handles, from the driver actor.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError

from raypar.stages.actor import Reply
from raypar.stages.faults import Failure, Positions, cause_of, root_failure

_ANSWER_S = 2.0
_IDLE_S = 10.0  # between looks at whether the run was closed
_GRACE_S = 1.0
_ABORT_S = 5.0

ACTOR_LOST = (RayActorError, OutOfMemoryError, NodeDiedError)
"""What Ray raises for a call to an actor that is gone."""

Replies = dict[int | None, dict[int, Reply]]
"""First step of a call → rank → its answer."""


class Calls:
    """Actor calls under way."""

    def __init__(self) -> None:
        self._under_way: dict[Any, tuple[int | None, int]] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def add(self, ref: Any, rank: int, step: int | None = None) -> None:
        """Notes a call to `rank`; `step` is its first step, if it runs some."""
        self._under_way[ref] = (step, rank)

    def ready(self, timeout: float = _IDLE_S) -> list[tuple[int | None, int, Any]]:
        """Takes out finished calls, waiting for one: (first step, rank, value or Failure)."""
        if not self._under_way:
            return []
        done, _ = ray.wait(list(self._under_way), num_returns=1, timeout=timeout)
        if done and len(self._under_way) > 1:  # the others follow in a moment: one pass for all
            oldest = self._under_way[done[0]][0]
            same = [ref for ref, (step, _) in self._under_way.items() if step == oldest]
            done, _ = ray.wait(same, num_returns=len(same), timeout=0.01)
        found = []
        for ref in done:
            step, rank = self._under_way.pop(ref)
            try:
                value = ray.get(ref)
            except RayError as error:
                value = lost_call(error, rank, step)
            found.append((step, rank, value))
        return found


def rescue(
    actors: Sequence[Any], calls: Calls, failures: list[Failure], rows: Replies
) -> Positions:
    """Learns where every rank stands, lets ranks finish earlier steps, and aborts them all.

    Args:
        actors: The stage actors, by rank.
        calls: What is under way; empty afterwards, unless a rank cannot be interrupted.
        failures: What is known; what is found is added.
        rows: Answers so far; those that still come are added.
    """
    positions, dead = _ask_positions(actors, {f.rank for f in failures if f.died})
    failures += dead
    deadline = time.monotonic() + _GRACE_S
    while calls and time.monotonic() < deadline and not _may_abort(actors, failures):
        _take(calls, failures, rows, 0.05)
    reason = root_failure(failures).message
    lost = {f.rank for f in failures if f.died}
    alive = [actor for rank, actor in enumerate(actors) if rank not in lost]
    if alive:
        with contextlib.suppress(RayError):
            refs = [actor.abort.remote(reason) for actor in alive]
            ray.wait(refs, num_returns=len(refs), timeout=_ANSWER_S)
    deadline = time.monotonic() + _ABORT_S
    while calls and time.monotonic() < deadline:
        _take(calls, failures, rows, 0.2)
    return positions


def await_exit(pids: Sequence[int], seconds: float = 3.0) -> None:
    """Waits until workers of this machine are gone; kills what does not go by itself."""
    deadline = time.monotonic() + seconds
    left = [pid for pid in pids if _exists(pid)]
    while left and time.monotonic() < deadline:
        time.sleep(0.01)
        left = [pid for pid in left if _exists(pid)]
    for pid in left:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _take(calls: Calls, failures: list[Failure], rows: Replies, timeout: float) -> None:
    for step, rank, value in calls.ready(timeout):
        if isinstance(value, Failure):
            failures.append(value)
        elif isinstance(value, Reply):
            rows.setdefault(step, {})[rank] = value
            if value.failure is not None:
                failures.append(value.failure)


def _may_abort(actors: Sequence[Any], failures: list[Failure]) -> bool:
    """Whether waiting longer can tell nothing new.

    So it is where a rank is dead, or all have finished the steps before the failing one. A broken
    transfer alone is worth the wait: its cause may still be on its way here.
    """
    root = root_failure(failures)
    if root.severity != 1 or root.step is None:
        return root.severity == 0 or root.step is None
    refs = [actor.ping.remote() for actor in actors]
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=_ANSWER_S)
    try:
        return len(done) == len(refs) and min(ray.get(done)) >= root.step
    except RayError:
        return True


def _ask_positions(actors: Sequence[Any], lost: set[int | None]) -> tuple[Positions, list[Failure]]:
    refs = {actor.positions.remote(): rank for rank, actor in enumerate(actors) if rank not in lost}
    if not refs:
        return Positions(), []
    done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=_ANSWER_S)
    found, dead = Positions(), []
    for ref in done:
        try:
            found.at[refs[ref]] = ray.get(ref)
        except ACTOR_LOST as error:
            dead.append(lost_call(error, refs[ref], None))
        except RayError as error:
            found.at[refs[ref]] = f"cannot tell: {cause_of(str(error))[1]}"
    return found, dead


def lost_call(error: RayError, rank: int | None, step: int | None) -> Failure:
    """Describes what Ray raised for a call to `rank` instead of an answer."""
    died = isinstance(error, ACTOR_LOST)
    name, message = cause_of(str(error))
    if died:
        text = f"{name}: {message}" if name else message
        return Failure(rank, step, "StageDiedError", text, died=True, severity=0)
    return Failure(rank, step, name or type(error).__name__, message)


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
