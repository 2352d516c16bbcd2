"""Which failure is the root, and what is raised for it."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayError

from raypar.errors import (
    CommAbortedError,
    CommError,
    CommTimeoutError,
    DataError,
    OptimizerError,
    StageDiedError,
    TrainingError,
)
from raypar.stages.faults import (
    Failure,
    Positions,
    RankInfo,
    cause_of,
    failure_of,
    root_failure,
    to_exception,
)
from raypar.stages.rescue import lost_call

INFOS = [RankInfo(r, stages=(r,), device=r) for r in range(4)]


def test_the_root_is_the_gravest_kind_then_the_earliest_step() -> None:
    aborted = failure_of(CommAbortedError("aborted"), 0, 2)
    broken = failure_of(CommError("broken"), 1, 2)
    late = failure_of(CommTimeoutError("late"), 3, 2)
    raised = failure_of(ValueError("mine"), 2, 3)
    assert root_failure([aborted, late, broken]) is broken
    assert root_failure([aborted, late]) is late
    assert root_failure([aborted, broken, raised]) is raised
    earlier = failure_of(ValueError("earlier"), 3, 1)
    assert root_failure([raised, earlier]) is earlier
    dead = Failure(1, 9, "StageDiedError", "gone", died=True, severity=0)
    assert root_failure([raised, earlier, dead]) is dead


@pytest.mark.parametrize("error", [DataError("no more"), OptimizerError("lr is negative")])
def test_own_errors_come_back_as_they_were(error: Exception) -> None:
    found = to_exception([failure_of(error, 1, 4)], INFOS, Positions())
    assert type(found) is type(error)
    assert str(found) == str(error)


def test_other_errors_say_which_rank_raised_what_when() -> None:
    failure = failure_of(ZeroDivisionError("division by zero"), 2, 7)
    found = to_exception([failure], INFOS, Positions())
    assert isinstance(found, TrainingError)
    assert "stage 2 (rank 2) raised ZeroDivisionError in step 7: division by zero" in str(found)
    assert isinstance(found.__cause__, ZeroDivisionError)


def test_an_error_that_cannot_be_pickled_keeps_its_text() -> None:
    class LocalError(Exception):
        pass

    found = to_exception([failure_of(LocalError("no module has me"), 0, 0)], INFOS, Positions())
    assert "raised LocalError in step 0: no module has me" in str(found)


def test_a_dead_rank_is_named_with_the_positions_of_the_others() -> None:
    dead = Failure(1, 3, "StageDiedError", "worker exited", died=True, severity=0)
    others = [failure_of(CommError("broken"), 0, 3)]
    at = Positions({0: "step 3: 0F1", 2: "step 3: recv"})
    found = to_exception([*others, dead], INFOS, at)
    assert isinstance(found, StageDiedError)
    text = str(found)
    assert "lost stage 1 (rank 1) in or near step 3: worker exited" in text
    assert "stage 0 (rank 0): step 3: 0F1" in text
    assert "stage 3 (rank 3): does not answer" in text
    assert "stage 1 (rank 1):" not in text


def test_a_hang_keeps_its_class_and_lists_everyone() -> None:
    late = failure_of(CommTimeoutError("recv x waited 5 s"), 0, 1)
    found = to_exception([late], INFOS[:2], Positions({0: "recv x", 1: "1F0"}))
    assert type(found) is CommTimeoutError
    assert "recv x waited 5 s" in str(found)
    assert "stage 1 (rank 1): 1F0" in str(found)


IN_SETUP = """\x1b[36mray::StageActor.setup()\x1b[39m (pid=1, ip=10.0.0.1, actor_id=ab, repr=<x>)
  At least one of the input arguments for this task could not be computed:
ray.exceptions.RaySystemError: System error: No module named 'hidden'
traceback: Traceback (most recent call last):
          ^^^^^^^^^^^^^^
ModuleNotFoundError: No module named 'hidden'
"""
DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: StageActor
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit \
detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common causes \
include: (1) the OOM killer, (2) ray stop. If the process was \
killed by the kernel OOM killer (verifiable by checking for OOM in dmesg), consider something."""


def test_the_cause_of_a_ray_error_is_its_last_line_without_colours_and_with_a_mend() -> None:
    name, message = cause_of(IN_SETUP)
    assert name == "ModuleNotFoundError"
    assert message.startswith("No module named 'hidden': the workers cannot import")
    assert "folder that holds 'hidden'" in message
    assert "\x1b" not in message


def test_a_dead_worker_is_told_by_its_exit_detail() -> None:
    assert cause_of(DIED) == (
        None,
        "Worker unexpectedly exits with a connection error code 2. End of file. It crashed, or "
        "was killed: by someone, or by the system for want of memory (see dmesg).",
    )
    killed = "The actor died unexpectedly.\nThe actor is dead because it was killed by `ray.kill`."
    assert cause_of(killed) == (None, "The actor is dead because it was killed by `ray.kill`.")


LOW_MEMORY = """1 worker(s) were killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.7, ID: 84495e6c) was 9.50GB used / 23.54GB limit (0.403543)
OOM kill reason: Memory usage 10126692352B exceeded threshold of 10110604288B (40.0% of \
25276510208B limit)
Object store memory usage: [- objects spillable: 1 - bytes spillable: 7260 - objects u...]"""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            LOW_MEMORY,
            "node 10.0.0.7 ran low on memory: 9.50GB of 23.54GB in use, its limit",
        ),
        ("Task was killed due to the node running low on memory.", "its node ran low on memory"),
    ],
)
def test_a_rank_that_ray_killed_for_memory_is_lost_and_says_what_to_change(
    text: str, told: str
) -> None:
    """So that `max_failures` counts it, as it does the system's own kills."""
    failure = lost_call(OutOfMemoryError(text), 1, 6)
    found = to_exception([failure], INFOS, Positions())
    assert isinstance(found, StageDiedError)
    message = str(found)
    assert message.startswith("lost stage 1 (rank 1) in or near step 6: Ray killed it, since ")
    assert told in message
    for key in ("search.memory_fraction", "search.recompute=full", "RAY_memory_usage_threshold"):
        assert key in message
    assert "spillable" not in message


@pytest.mark.parametrize("error", [NodeDiedError("the node is gone"), ActorDiedError()])
def test_a_node_that_died_took_its_rank_along(error: RayError) -> None:
    assert lost_call(error, 0, 3).died
