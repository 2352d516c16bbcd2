"""What went wrong on which rank, as plain values that cross processes, and which one was first.

When one rank fails, its neighbours fail too: their transfers break. The root is found by kind: a
dead process outranks an error that code raised, which outranks a broken or late transfer, which
outranks a transfer that was aborted on purpose.

This file imports no torch, so that the driver actor starts fast and stays small.
"""

from __future__ import annotations

import pickle
import re
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from raypar import errors
from raypar.errors import (
    CommAbortedError,
    CommError,
    CommTimeoutError,
    RayparError,
    StageDiedError,
    TrainingError,
)

_TRACE_LINES = 30
_LONGEST = 400
KILLED = " It crashed, or was killed: by someone, or by the system for want of memory (see dmesg)."
"""What may have ended a process that Ray knows no more of."""

_LOW_MEMORY = "due to the node running low on memory"
_MEMORY_USED = re.compile(r"\(IP: ([^,\s]+).*?was ([\d.]+ ?\w+) used / ([\d.]+ ?\w+)", re.DOTALL)
_MEMORY_LIMIT = re.compile(r"threshold of .*?\(?([\d.]+ ?%)", re.DOTALL)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"^([\w.]*(?:Error|Exception|Exit|Interrupt))(?::\s*(.*))?$")


@dataclass(frozen=True)
class RankInfo:
    """What a rank is called.

    Attributes:
        rank: Its number in the run.
        replica: Its replica number.
        replicas: D.
        device: Cluster-wide device index from the plan.
        stages: The stages it holds.
        needs_gpu: Whether its device is a GPU.
        node: Address of its node, once known.
    """

    rank: int
    replica: int = 0
    replicas: int = 1
    device: int = 0
    stages: tuple[int, ...] = ()
    needs_gpu: bool = False
    node: str = ""

    def __str__(self) -> str:
        noun = "stage" if len(self.stages) == 1 else "stages"
        stages = ", ".join(map(str, self.stages)) or "none"
        replica = f" replica {self.replica}" if self.replicas > 1 else ""
        node = f" on node {self.node}" if self.node else ""
        return f"{noun} {stages}{replica} (rank {self.rank}{node})"


@dataclass(frozen=True)
class Failure:
    """One rank's failure.

    Attributes:
        rank: The rank, or None for the run as a whole (placement, the driver).
        step: The step it happened in; None outside of steps.
        type_name: Class name of the error.
        message: Its text.
        trace: The last lines of its traceback.
        original: The pickled error, where it can be pickled.
        died: Whether the rank's process or node is gone.
        severity: 0 for a root cause by its kind, higher for what others' failures bring about.
    """

    rank: int | None
    step: int | None
    type_name: str
    message: str
    trace: str = ""
    original: bytes | None = None
    died: bool = False
    severity: int = 1


@dataclass
class Positions:
    """Where every rank stood when the run failed (rank → text)."""

    at: dict[int, str] = field(default_factory=dict)

    def lines(self, infos: Sequence[RankInfo], without: Iterable[int] = ()) -> str:
        """One indented line for every rank but those in `without`."""
        skip = set(without)
        return "".join(
            f"\n  {info}: {self.at.get(info.rank, 'does not answer')}"
            for info in infos
            if info.rank not in skip
        )


def failure_of(error: BaseException, rank: int | None, step: int | None = None) -> Failure:
    """Describes `error`, raised by `rank` in `step`."""
    return Failure(
        rank=rank,
        step=step,
        type_name=type(error).__name__,
        message=str(error),
        trace="\n".join(
            "".join(traceback.format_exception(error)).rstrip().splitlines()[-_TRACE_LINES:]
        ),
        original=_pickled(error),
        died=isinstance(error, StageDiedError),
        severity=_severity(error),
    )


def cause_of(text: str) -> tuple[str | None, str]:
    """What the text of a Ray error comes down to.

    Ray's first line names the task and the last line of the traceback below it the cause; texts of
    dead workers hold one sentence that matters.

    Returns:
        The class name of the exception behind it, if the text holds one, and a short message.
    """
    if _LOW_MEMORY in text:
        return None, _low_memory(text)
    lines = [line.strip() for line in _COLOUR.sub("", text).splitlines() if line.strip()]
    found = next((m for line in reversed(lines) if (m := _RAISED.match(line))), None)
    if found is not None:
        name, message = found[1].rpartition(".")[2], found[2] or ""
        return name, _shortened(message) + _mend(name, message)
    whole = " ".join(lines)
    for mark in ("Worker exit detail:", "The actor died because", "The actor is dead because"):
        if mark in whole:
            whole = whole[whole.index(mark) :].removeprefix("Worker exit detail:").strip()
            break
    return None, _shortened(whole)


def _low_memory(text: str) -> str:
    """Why Ray's memory monitor killed a process, and what keeps it from doing so."""
    used, limit = _MEMORY_USED.search(text), _MEMORY_LIMIT.search(text)
    node = f"node {used[1]}" if used else "its node"
    numbers = f": {used[2]} of {used[3]} in use" if used else ""
    numbers += f", its limit is {limit[1]}" if used and limit else ""
    return (
        f"Ray killed it, since {node} ran low on memory{numbers}. Have the plan take less, with "
        "search.memory_fraction=0.5, search.recompute=full or a higher train.microbatches, or use "
        "fewer devices of a node; or let Ray use more of it: RAY_memory_usage_threshold=0.98 in "
        "the environment of `ray start`"
    )


def _mend(name: str, message: str) -> str:
    if name not in ("ModuleNotFoundError", "ImportError"):
        return ""
    module = re.search(r"'([^']+)'", message)
    what = repr(module[1]) if module else "it"
    return (
        f": the workers cannot import what this process can. Start in the folder that holds {what} "
        "(with `ray job submit`: --working-dir), pass ray.init(runtime_env={'py_modules': [...]}), "
        "or install it on every node with pip"
    )


def _shortened(text: str) -> str:
    # Ray lists guesses after the fact; the one that a user can act on is kept.
    text = text.split(" If the process was killed by the kernel OOM killer")[0]
    text = re.sub(r" To see information about where this ObjectRef was created.*?`\.", "", text)
    text = re.sub(r" Some common causes include:.*", KILLED, text)
    return text if len(text) < _LONGEST else text[: _LONGEST - 3] + "..."


def root_failure(failures: Iterable[Failure]) -> Failure:
    """The failure that the others follow from: the gravest kind, then the earliest step."""
    return min(
        failures,
        key=lambda f: (f.severity, float("inf") if f.step is None else f.step, f.rank or 0),
    )


def to_exception(
    failures: Sequence[Failure], infos: Sequence[RankInfo], positions: Positions
) -> BaseException:
    """The error to raise for a failed run.

    raypar's own errors come back as they were raised; any other error becomes a TrainingError that
    says which rank raised it in which step, with the original as its ``__cause__`` where it could
    travel. Dead ranks and broken transfers are reported with every other rank's position.
    """
    root = root_failure(failures)
    if root.died:
        return _died([f for f in failures if f.died], infos, positions)
    original = _unpickled(root.original)
    if isinstance(original, RayparError) and not isinstance(original, CommError):
        return original
    where = "" if root.rank is None else f"{infos[root.rank]} "
    when = "during start-up" if root.step is None else f"in step {root.step}"
    if root.severity > 1:
        kind = getattr(errors, root.type_name, CommError)
        text = f"{where}failed {when}: {root.message}\nwhere the ranks stood:"
        failed: BaseException = kind(text + positions.lines(infos))
    else:
        text = f"{where}raised {root.type_name} {when}: {root.message}"
        failed = TrainingError(f"{text}\n{root.trace}" if root.trace else text)
    failed.__cause__ = original
    return failed


def _died(
    dead: Sequence[Failure], infos: Sequence[RankInfo], positions: Positions
) -> StageDiedError:
    ranks = sorted({f.rank for f in dead if f.rank is not None})
    who = "; ".join(str(infos[r]) for r in ranks) or "the driver actor"
    steps = [f.step for f in dead if f.step is not None]
    when = f" in or near step {min(steps)}" if steps else ""
    why = next((f.message for f in dead if f.message), "")
    text = f"lost {who}{when}: {why}" if why else f"lost {who}{when}"
    rest = positions.lines(infos, without=ranks)
    if rest:
        text += f"\nwhere the other ranks stood:{rest}"
    return StageDiedError(text)


def _severity(error: BaseException) -> int:
    if isinstance(error, StageDiedError):
        return 0
    if isinstance(error, CommAbortedError):
        return 4
    if isinstance(error, CommTimeoutError):
        return 3
    return 2 if isinstance(error, CommError) else 1


def _pickled(error: BaseException) -> bytes | None:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # an error may hold anything: locks, sockets, generators
        return None
    return data if len(data) < 1 << 20 else None


def _unpickled(data: bytes | None) -> BaseException | None:
    if data is None:
        return None
    try:
        error = pickle.loads(data)
    except Exception:  # its class may not be importable here
        return None
    return error if isinstance(error, BaseException) else None
