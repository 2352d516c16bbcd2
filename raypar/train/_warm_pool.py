"""Warm processes on the devices of a cluster, which load one plan after the other.

The pool grows with the devices that plans name, and heals: a process that died, or that does not
answer any more, is replaced on the same bundle when the next plan asks for its device.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from raypar.errors import ClusterError, RayparError
from raypar.mesh.bundles import BundleRange
from raypar.mesh.cluster import Cluster
from raypar.mesh.device_mesh import DeviceMesh
from raypar.mesh.placement import acquire, check_nodes, release
from raypar.search.cost.stage_job import StageJob
from raypar.search.measure import ProfiledStage
from raypar.stages.actor import ActorInfo, Joining, actor_class
from raypar.stages.faults import Failure, Positions, RankInfo, failure_of, to_exception
from raypar.stages.orphans import of_this_process, remove_orphans
from raypar.stages.rescue import ACTOR_LOST, await_exit, lost_call
from raypar.stages.run import merge_reports
from raypar.stages.spec import RankSpec
from raypar.stages.worker import RunnerFactory, info_of
from raypar.train._warm_actor import Held, Turn, WarmActor
from raypar.train.quiet import Step

_GRACE_S = 1.0  # for the failures of other ranks, once one has failed
_HEAL_S = 5.0  # for a rank that failed to come to its end, before its process is killed
_UNLOAD_S = 30.0  # the same for one that is well
_LOOK_S = 1.0


@dataclass(frozen=True)
class PoolSettings:
    """How the processes are brought up.

    Attributes:
        use_gpu: Whether a device is a GPU, else CPU cores.
        cpus_per_rank: CPUs reserved for each device.
        transfer_timeout_s: Deadline of every transfer between ranks, in seconds.
        start_timeout_s: Deadline of starting processes, and of loading a plan, in seconds.
        placement_timeout_s: Deadline of reserving devices, in seconds.
    """

    use_gpu: bool = False
    cpus_per_rank: float = 1.0
    transfer_timeout_s: float = 60.0
    start_timeout_s: float = 120.0
    placement_timeout_s: float = 30.0


@dataclass(frozen=True)
class _Process:
    device: int
    actor: Any
    at: ActorInfo


@dataclass
class Loaded:
    """A plan whose ranks lie in the pool.

    Attributes:
        world: Name of its group of ranks.
        infos: What its ranks are called.
        done: Steps that it has run.
    """

    world: str
    infos: list[RankInfo]
    processes: tuple[_Process, ...] = field(repr=False)
    done: int = 0


class WarmPool:
    """Processes, one for each device in use, that hold any number of plans at a time.

    Not safe for several threads.

    Args:
        cluster: What the devices of plans refer to.
        tensors: The batch that every step trains on.
        settings: How the processes are brought up.
    """

    def __init__(
        self, cluster: Cluster, tensors: Sequence[torch.Tensor], settings: PoolSettings
    ) -> None:
        self._cluster = cluster
        self._tensors = list(tensors)
        self._settings = settings
        self._name = f"measure-{secrets.token_hex(3)}"
        self._batch: Any = None
        self._groups: list[BundleRange] = []
        self._seats: dict[int, tuple[BundleRange, int]] = {}
        self._starting: dict[int, Any] = {}
        self._processes: dict[int, _Process] = {}
        self._patience_s = settings.placement_timeout_s
        self._numbers = itertools.count()

    # ---- plans ----------------------------------------------------------------------------

    def load(self, specs: Sequence[RankSpec], runner: RunnerFactory | None = None) -> Loaded:
        """Puts the ranks of a plan onto its devices, from their seed on.

        Args:
            specs: One per rank, by rank; one rank per device.
            runner: Makes every rank's runner; None for the interpreter.

        Raises:
            ClusterError: The devices are not to be had.
            RayparError: A rank could not be built, as `Run.start` raises it.
        """
        infos = [info_of(spec, needs_gpu=self._settings.use_gpu) for spec in specs]
        processes = self._open([spec.device for spec in specs])
        loaded = Loaded(f"measured-{next(self._numbers)}", infos, processes)
        address = None
        if len(processes) > 1:
            address = self._gather(loaded, [processes[0].actor.serve.remote()], "serve")[0]
        s = self._settings
        joining = Joining(
            "nccl" if s.use_gpu else "gloo",
            address,
            loaded.world,
            s.start_timeout_s,
            s.transfer_timeout_s,
        )
        refs = [
            process.actor.load.remote(joining, spec, runner)
            for process, spec in zip(processes, specs, strict=True)
        ]
        self._gather(loaded, refs, "load the plan")
        return loaded

    def run(self, loaded: Loaded, count: int, deadline_s: float) -> list[Step]:
        """Trains `count` steps; fewer, where one was not finite.

        Raises:
            RayparError: A rank failed or died, or `deadline_s` passed; the plan is unloaded.
        """
        began = loaded.done
        refs = [p.actor.run.remote(loaded.world, began, count) for p in loaded.processes]
        turns: list[Turn] = self._gather(loaded, refs, f"run {count} steps", deadline_s)
        loaded.done += count
        rows = zip(*(pickle.loads(turn.reply.reports) for turn in turns), strict=False)
        disturbed = _disturbed(loaded.processes, turns)
        results = [merge_reports(row) for row in rows]
        return [Step(r.seconds, disturbed, r.ranks) for r in results if r.applied]

    def held(self, loaded: Loaded) -> list[Held]:
        """Bytes that every rank of a plan holds, by rank."""
        refs = [p.actor.held.remote(loaded.world) for p in loaded.processes]
        return self._gather(loaded, refs, "tell what it holds")

    def unload(self, loaded: Loaded) -> None:
        """Drops a plan; processes that do not obey are ended. Safe to call twice."""
        self._unload(loaded, _UNLOAD_S)

    def _unload(self, loaded: Loaded, patience_s: float) -> None:
        there = [p for p in loaded.processes if self._processes.get(p.device) is p]
        refs = {p.actor.unload.remote(loaded.world): p for p in there}
        if not refs:
            return
        done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=patience_s)
        for ref, process in refs.items():
            if ref not in done or not _answered_well(ref):
                self._kill(process)

    def profile(self, device: int, job: StageJob, deadline_s: float) -> ProfiledStage:
        """Runs the programs of one stage alone in the process of a device.

        Args:
            device: Of the cluster.
            job: The stage.
            deadline_s: A process that takes longer is ended.

        Raises:
            RayparError: They did not run, or not in time.
        """
        (process,) = self._open([device])
        ref = process.actor.profile.remote(job, self._settings.use_gpu)
        done, _ = ray.wait([ref], timeout=deadline_s + self._settings.start_timeout_s)
        found = _value(ref, 0) if done else None
        if isinstance(found, ProfiledStage):
            return found
        if found is None:
            text = f"programs of a stage did not end within {deadline_s:g} s; raise step_timeout_s"
            found = Failure(0, None, "TrainingError", text)
        if not done or found.died:
            self._kill(process)
        raise to_exception([found], [RankInfo(0, device=device)], Positions())

    # ---- processes ------------------------------------------------------------------------

    def begin(self, devices: Sequence[int]) -> None:
        """Begins to start the processes of `devices`, where there is room, and does not wait."""
        if ray.is_initialized():
            # Devices that others hold are waited for when a plan asks for them.
            with contextlib.suppress(ClusterError):
                self._start(devices, _LOOK_S)

    def _open(self, devices: Sequence[int]) -> tuple[_Process, ...]:
        """The processes of `devices`; those that are missing are started."""
        if not ray.is_initialized():
            raise ClusterError(
                "this process is not connected to Ray: call ray.init() or "
                "raypar.train.session.connect(address) first"
            )
        self._start(devices, self._patience_s)
        self._await([d for d in devices if d in self._starting])
        return tuple(self._processes[device] for device in devices)

    def _start(self, devices: Sequence[int], patience_s: float) -> None:
        self._reserve([d for d in devices if d not in self._seats], patience_s)
        if self._batch is None:
            self._batch = ray.put(self._tensors)
        make = actor_class(WarmActor, {"control": 2})
        for device in devices:
            if device not in self._processes and device not in self._starting:
                group, position = self._seats[device]
                options = group.actor_options(position)
                name = f"{self._name}/device-{device}-{next(self._numbers)}"
                self._starting[device] = make.options(**options, name=name).remote(self._batch)

    def _await(self, devices: Sequence[int]) -> None:
        """Waits for processes that were begun; all of them are given up if one does not come."""
        if not devices:
            return
        begun = {device: self._starting.pop(device) for device in devices}
        try:
            at = self._answers({actor.info.remote(): device for device, actor in begun.items()})
            check_nodes({device: info.node_id for device, info in at.items()}, self._cluster)
        except BaseException:
            for actor in begun.values():
                ray.kill(actor, no_restart=True)
            raise
        for device, info in at.items():
            self._processes[device] = _Process(device, begun[device], info)

    def _answers(self, refs: dict[Any, int]) -> dict[int, ActorInfo]:
        seconds = self._settings.start_timeout_s
        done, late = ray.wait(list(refs), num_returns=len(refs), timeout=seconds)
        if late:
            raise RayparError(
                f"{self._name}: no answer from the processes of devices "
                f"{sorted(refs[ref] for ref in late)} within {seconds:g} s; is the cluster "
                "overloaded? search.measure: 0 and search.profile: 0 plan without running any"
            )
        found: dict[int, ActorInfo] = {}
        for ref in done:
            try:
                found[refs[ref]] = ray.get(ref)
            except RayError as error:
                info = RankInfo(0, device=refs[ref])
                raise to_exception([lost_call(error, 0, None)], [info], Positions()) from error
        return found

    def _reserve(self, devices: Sequence[int], patience_s: float) -> None:
        if not devices:
            return
        remove_orphans()
        holder = of_this_process(self._name)
        name = f"raypar/{holder}/devices-{devices[0]}-to-{devices[-1]}"
        mesh = DeviceMesh(name, tuple(devices), (len(devices),))
        request = mesh.request(self._cluster, cpus_per_device=self._settings.cpus_per_rank)
        try:
            (group,) = acquire([request], patience_s)
        except ClusterError:
            if patience_s == self._patience_s:
                self._patience_s = min(patience_s, _LOOK_S)  # not the same wait for every plan
            raise
        bundles = BundleRange.own(name, group)
        self._groups.append(bundles)
        self._seats.update({device: (bundles, i) for i, device in enumerate(devices)})

    def _kill(self, process: _Process) -> None:
        if self._processes.get(process.device) is process:
            del self._processes[process.device]
        with contextlib.suppress(RayError):
            ray.kill(process.actor, no_restart=True)
        self._await_exit([process])

    def _await_exit(self, processes: Sequence[_Process]) -> None:
        here = ray.util.get_node_ip_address()
        await_exit([p.at.pid for p in processes if p.at.ip == here])

    def close(self) -> None:
        """Ends all processes and gives the devices back; safe to call twice."""
        processes, self._processes = list(self._processes.values()), {}
        starting, self._starting = list(self._starting.values()), {}
        groups, self._groups = self._groups, []
        self._seats, self._batch = {}, None
        if not ray.is_initialized():
            return
        for actor in [*starting, *(process.actor for process in processes)]:
            with contextlib.suppress(RayError):
                ray.kill(actor, no_restart=True)
        release([group.group for group in groups])
        self._await_exit(processes)

    # ---- answers --------------------------------------------------------------------------

    def _gather(
        self, loaded: Loaded, refs: list[Any], doing: str, deadline_s: float | None = None
    ) -> list[Any]:
        """The answers of a plan's ranks to one call each, by rank.

        Raises:
            RayparError: A rank failed, or not all answered in time; the plan is unloaded then.
        """
        seconds = self._settings.start_timeout_s if deadline_s is None else deadline_s
        left = {ref: rank for rank, ref in enumerate(refs)}
        values: dict[int, Any] = {}
        failures: list[Failure] = []
        end = time.monotonic() + seconds
        while left and time.monotonic() < end:
            look = max(0.0, min(_LOOK_S, end - time.monotonic()))
            done, _ = ray.wait(list(left), num_returns=1, timeout=look)
            for ref in done:
                rank = left.pop(ref)
                values[rank] = value = _value(ref, rank)
                failure = _failure_in(value)
                if failure is not None:
                    failures.append(failure)
                    end = min(end, time.monotonic() + _GRACE_S)
        if not failures and not left:
            return [values[rank] for rank in range(len(refs))]
        if not failures:
            late = ", ".join(str(loaded.infos[rank]) for rank in left.values())
            text = f"did not {doing} within {seconds:g} s: {late}"
            failures.append(Failure(None, None, "TrainingError", text))
        positions = self._where(loaded, list(left.values()))
        self._drop(loaded, failures[0].message)
        raise to_exception(failures, loaded.infos, positions)

    def _where(self, loaded: Loaded, ranks: Sequence[int]) -> Positions:
        """Where the ranks stand that have not answered."""
        found = Positions()
        refs = {loaded.processes[r].actor.positions.remote(loaded.world): r for r in ranks}
        if refs:
            done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=_GRACE_S)
            for ref in done:
                with contextlib.suppress(RayError):
                    found.at[refs[ref]] = ray.get(ref)
        return found

    def _drop(self, loaded: Loaded, reason: str) -> None:
        """Ends what a plan still does, and unloads it; processes that hang or died are dropped."""
        refs = [p.actor.abort.remote(loaded.world, reason) for p in loaded.processes]
        ray.wait(refs, num_returns=len(refs), timeout=_GRACE_S)
        self._unload(loaded, _HEAL_S)


def _value(ref: Any, rank: int) -> Any:
    try:
        return ray.get(ref)
    except ACTOR_LOST as error:
        return lost_call(error, rank, None)
    except RayError as error:
        return failure_of(error, rank)


def _failure_in(value: Any) -> Failure | None:
    if isinstance(value, Turn):
        return value.reply.failure
    return value if isinstance(value, Failure) else None


def _answered_well(ref: Any) -> bool:
    try:
        return ray.get(ref) is None
    except RayError:
        return False


def _disturbed(processes: Sequence[_Process], turns: Sequence[Turn]) -> float:
    """Share of a node's cores that other programs took, on the node where it was most."""
    shares = []
    for node in {p.at.node_id for p in processes}:
        here = [t for p, t in zip(processes, turns, strict=True) if p.at.node_id == node]
        cores = max(t.cores for t in here)
        others = max(t.busy_s for t in here) - sum(t.cpu_s for t in here)
        shares.append(max(0.0, others) / (cores * max(max(t.wall_s for t in here), 1e-9)))
    return max(shares)
