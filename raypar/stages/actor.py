"""The stage actor: one rank of a run, in its own process on its own device.

Methods of the ``control`` group answer while a step runs in the default group. The class is plain
Python: the driver makes a Ray actor of it, with ``max_restarts=0`` and ``max_task_retries=0``,
because Ray would otherwise run a step twice.
"""

from __future__ import annotations

import importlib
import os
import pickle
import time
from dataclasses import dataclass, field
from typing import Any

import ray

from raypar.comm.network import NetworkSettings
from raypar.errors import RayparError
from raypar.stages.faults import Failure, failure_of


@dataclass(frozen=True)
class ActorInfo:
    """Where an actor runs.

    Attributes:
        node_id: Ray's node id (hex).
        ip: Address of the node.
        pid: Process id.
        gpus: Ids of the GPUs that Ray gave it.
    """

    node_id: str
    ip: str
    pid: int
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Reply:
    """What a call of `StageActor.run` answers; small, and readable without torch.

    Attributes:
        reports: The pickled step reports, in step order.
        finished: Number of them.
        stopped: The rank takes no further steps.
        failure: What it raised, if it did.
    """

    reports: bytes
    finished: int
    stopped: bool
    failure: Failure | None


@dataclass(frozen=True)
class Built:
    """What an actor answers once its rank is ready.

    Attributes:
        seconds: Seconds of each part of it.
        note: What users should know of how the rank was built, or None.
    """

    seconds: dict[str, float]
    note: str | None = None


@dataclass(frozen=True)
class Joining:
    """How an actor joins the world.

    Attributes:
        backend: Name of the comm backend (``gloo``, ``nccl``).
        address: Where the ranks meet (`raypar.comm.rendezvous.Address`), None for one rank.
        name: The world's name.
        start_timeout_s: Deadline of connecting, in seconds.
        timeout_s: Deadline of every transfer, in seconds.
        network: Interface, ports and NCCL's environment (`raypar.comm.network.NetworkSettings`).
    """

    backend: str
    address: Any
    name: str
    start_timeout_s: float
    timeout_s: float
    network: NetworkSettings = field(default_factory=NetworkSettings)


def actor_class(cls: type, groups: dict[str, int]) -> Any:
    """The Ray actor class of `cls`, with concurrency groups of so many threads."""
    make: Any = ray.remote(concurrency_groups=groups)  # type: ignore[call-overload]
    return make(cls)


class StageActor:
    """Holds one rank. `setup` once, then `run` any number of times."""

    def __init__(self) -> None:
        self._worker: Any = None
        self._world: Any = None
        self._rendezvous: Any = None
        self._standing = "starting"
        # torch and the interpreter take a second to load: all actors do it now, at once, and not
        # one after the other when the first calls reach them.
        importlib.import_module("raypar.stages.interpreter")

    def info(self) -> ActorInfo:
        """Where this actor is."""
        context = ray.get_runtime_context()
        return ActorInfo(
            context.get_node_id(),
            ray.util.get_node_ip_address(),
            os.getpid(),
            tuple(map(str, context.get_accelerator_ids().get("GPU", []))),
        )

    def serve(self, network: NetworkSettings | None = None) -> Any:
        """Opens the rendezvous of the run here.

        Returns:
            Its address, or a Failure.
        """
        from raypar.comm.rendezvous import Rendezvous

        try:
            here, network = ray.util.get_node_ip_address(), network or NetworkSettings()
            self._rendezvous = Rendezvous(network.host(here), network.port_range)
        except RayparError as error:
            return failure_of(error, 0)
        return self._rendezvous.address

    def setup(self, joining: Joining, spec: Any, feed: Any, runner: Any) -> Built | Failure:
        """Joins the world and builds this rank's programs.

        Returns:
            That it is built, or what went wrong.
        """
        began = time.perf_counter()
        try:
            import torch

            from raypar.comm.registry import get_backend
            from raypar.stages.worker import RankWorker

            if spec.threads is not None:
                torch.set_num_threads(spec.threads)
            imported = time.perf_counter()
            self._standing = "joining the other ranks"
            here = ray.util.get_node_ip_address()
            joining.network.apply_environment(here)
            backend: Any = get_backend(joining.backend)
            self._world = backend.create(
                joining.name,
                spec.rank,
                spec.world,
                joining.address,
                host=here,
                timeout_s=joining.start_timeout_s,
                network=joining.network,
            )
            self._world.timeout_s = joining.timeout_s
            joined = time.perf_counter()
            self._standing = "building its programs"
            self._worker = RankWorker(spec, self._world, feed=feed, runner=runner)
            self._standing = ""
        except BaseException as error:
            return failure_of(error, spec.rank)
        seconds = {
            "import": imported - began,
            "join": joined - imported,
            "programs": time.perf_counter() - joined,
        }
        return Built(seconds, self._worker.note)

    def run(self, first: int, count: int, until: int) -> Reply:
        """Runs steps ``first`` to ``first + count - 1``; see `RankWorker.run`."""
        chunk = self._worker.run(first, count, until)
        return Reply(
            pickle.dumps(chunk.reports, pickle.HIGHEST_PROTOCOL),
            len(chunk.reports),
            chunk.stopped,
            chunk.failure,
        )

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        """What a method of this rank answers (`RankWorker.call`), or a Failure."""
        try:
            return self._worker.call(method, *args)
        except BaseException as error:
            return failure_of(error, None)

    def close(self) -> None:
        """Lets go of the rank; the process stays, and `setup` may be called again."""
        worker, world = self._worker, self._world
        self._worker = self._world = None
        self._standing = "closed"
        if worker is not None:
            worker.close()
        elif world is not None:
            world.close()

    @ray.method(concurrency_group="control")
    def ping(self) -> int:
        """Number of the step after the last finished one."""
        return 0 if self._worker is None else int(self._worker.completed)

    @ray.method(concurrency_group="control")
    def positions(self) -> str:
        """Where the rank stands."""
        return str(self._standing or self._worker.positions())

    @ray.method(concurrency_group="control")
    def hold(self) -> int:
        """See `RankWorker.hold`."""
        return -1 if self._worker is None else int(self._worker.hold())

    @ray.method(concurrency_group="control")
    def end_at(self, step: int | None) -> None:
        """See `RankWorker.end_at`."""
        if self._worker is not None:
            self._worker.end_at(step)

    @ray.method(concurrency_group="control")
    def abort(self, reason: str) -> None:
        """Ends the step under way."""
        if self._worker is not None:
            self._worker.abort(reason)
        elif self._world is not None:
            self._world.abort(reason)
