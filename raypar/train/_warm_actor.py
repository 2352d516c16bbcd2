"""A process on one device that holds ranks of any plans, one after the other or side by side."""

from __future__ import annotations

import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from raypar.stages.actor import ActorInfo, Built, Joining, Reply, StageActor
from raypar.stages.faults import Failure, failure_of


@dataclass(frozen=True)
class Turn:
    """What some steps in a row came to on one rank.

    Attributes:
        reply: The reports of the finished steps, and what the rank raised.
        wall_s: Seconds from the first step to the last.
        cpu_s: CPU seconds of this process meanwhile.
        busy_s: CPU seconds of all programs of the machine meanwhile.
        cores: Cores of the machine.
    """

    reply: Reply
    wall_s: float
    cpu_s: float
    busy_s: float
    cores: int


@dataclass(frozen=True)
class Held:
    """Bytes of one rank.

    Attributes:
        resident: From step to step: parameters, gradients, the optimizer's states.
        peak: The most at any time since it was loaded, where the device tells (a GPU); else 0.
        free: Bytes of the device (on CPUs: of the machine) that nobody uses.
    """

    resident: int
    peak: int
    free: int


class WarmActor:
    """Starting a process and importing torch takes seconds; this is paid once, not per plan.

    A plain class: the pool makes a Ray actor of it. Every loaded rank is a `StageActor`, which is
    plain as well.

    Args:
        tensors: The batch that every step of every plan trains on.
    """

    def __init__(self, tensors: list[Any]) -> None:
        self._tensors = tensors
        self._ranks: dict[str, Any] = {}  # of StageActor, whose methods Ray has marked
        self._here = StageActor()
        self._address: Any = None
        self._lean = False
        self._before = 0  # bytes of the device in use before the last load

    def info(self) -> ActorInfo:
        """Where this process is."""
        return self._here.info()

    def serve(self) -> Any:
        """The address at which the ranks of plans whose rank 0 is here meet."""
        if self._address is None:
            self._address = self._here.serve()
        return self._address

    def load(self, joining: Joining, spec: Any, runner: Any) -> Built | Failure:
        """Joins the world `joining.name` as the rank of `spec`, and builds its programs."""
        from functools import partial

        from raypar.stages.batch import RepeatFeed

        self._before = _restart_peak()
        rank = self._ranks[joining.name] = StageActor()
        return rank.setup(joining, spec, partial(RepeatFeed, tensors=self._tensors), runner)

    def run(self, world: str, first: int, count: int) -> Turn:
        """Runs steps ``first`` to ``first + count - 1`` of a loaded rank."""
        from raypar.train.quiet import machine_busy_s

        began, cpu, busy = time.perf_counter(), time.process_time(), machine_busy_s()
        reply = self._ranks[world].run(first, count, first + count)
        return Turn(
            reply,
            time.perf_counter() - began,
            time.process_time() - cpu,
            machine_busy_s() - busy,
            os.cpu_count() or 1,
        )

    def profile(self, job: Any, use_gpu: bool) -> Any:
        """Runs the programs of a `StageJob` a few times: a `ProfiledStage`, or a `Failure`."""
        import torch

        from raypar.search.cost.profiled import profile_job
        from raypar.search.profiler import REPEATED_S

        try:
            device = torch.device("cuda" if use_gpu else "cpu")
            return profile_job(job, device, budget_s=REPEATED_S)
        except BaseException as error:
            return failure_of(error, None)
        finally:
            _return_memory()

    def held(self, world: str) -> Held | Failure:
        """What a rank holds; ask before the next `load`, for the sake of `Held.peak`."""
        found = self._ranks[world].call("memory", ())
        if isinstance(found, Failure):
            return found
        return Held(found["total"], max(0, _peak() - self._before), _free())

    def unload(self, world: str) -> Failure | None:
        """Drops a rank with all that it holds; also one that is not there."""
        rank = self._ranks.pop(world, None)
        try:
            if rank is not None:
                rank.close()
            del rank
            gc.collect()  # programs and their graphs point at each other
            if not self._ranks and not self._lean:
                gc.freeze()  # what is left are modules: later collections need not look at them
                self._lean = True
            _return_memory()
        except BaseException as error:
            return failure_of(error, None)
        return None

    @ray.method(concurrency_group="control")
    def positions(self, world: str) -> str:
        """Where a rank stands."""
        rank = self._ranks.get(world)
        return "not loaded" if rank is None else str(rank.positions())

    @ray.method(concurrency_group="control")
    def abort(self, world: str, reason: str) -> None:
        """Ends the step of a rank that is under way."""
        rank = self._ranks.get(world)
        if rank is not None:
            rank.abort(reason)


def _restart_peak() -> int:
    """Bytes of the device in use now, from which `_peak` counts on."""
    import torch

    if not torch.cuda.is_initialized():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def _peak() -> int:
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_initialized() else 0


def _free() -> int:
    import torch

    if torch.cuda.is_initialized():
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):  # nobody tells: as much as anyone could want
        return 1 << 62


def _return_memory() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
