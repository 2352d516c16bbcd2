"""The devices of a run: found anew for every attempt, waited for where an autoscaler runs."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from raypar._plan_text import count_of
from raypar.errors import ClusterError, PlanError
from raypar.mesh.cluster import Cluster, Node
from raypar.plan import Plan
from raypar.train.checkpoint import Checkpoint
from raypar.train.config import ScalingConfig
from raypar.train.settings import Settings
from raypar.train.signals import Signals

Tell = Callable[[str, str], None]
"""Told of what happens: a kind of event, and a text."""


class Devices:
    """The devices that a run may use.

    Args:
        settings: What the trainer was asked for.
        tell: Told what the autoscaler brings.
    """

    def __init__(self, settings: Settings, tell: Tell) -> None:
        self._settings = settings
        self._scaling = settings.scaling
        self._tell = tell
        self._request: Any = None
        self._waited = False
        self._shared = ""

    @property
    def device(self) -> str:
        """What a device is to Ray."""
        return "GPU" if self._scaling.use_gpu else "CPU"

    def connect(self, plan: Plan | None, signals: Signals, stack: ExitStack) -> None:
        """Connects to Ray where the run needs it.

        Args:
            plan: What is to run, if it is known.
            signals: Taken again, since ``ray.init`` takes them.
            stack: Ends the connection, and before that what is asked of the autoscaler.
        """
        if self._scaling.in_process:
            return
        from raypar.mesh.autoscaler import ScaleRequest
        from raypar.train.session import connect

        wanted = self._scaling.most
        needed = wanted if wanted is not None else len(plan.devices) if plan else 0
        session = connect(num_cpus=max(needed, os.cpu_count() or 1, _least(self._settings)))
        stack.callback(session.close)
        signals.take()
        cores = os.cpu_count() or 1
        if session.private and needed > cores:
            self._tell(
                "ray",
                f"{needed} ranks share the {count_of(cores, 'core')} of this machine: steps take "
                "longer than is foreseen, which is for a core each",
            )
        if session.shared_cpus is not None:
            self._shared = (
                f"this run shares the Ray with {session.shared_cpus} CPUs that another run of this "
                "process began for itself; for more, call ray.init(num_cpus=...) before both, with "
                "the devices of both together"
            )
            self._tell("ray", self._shared)
        self._request = stack.enter_context(ScaleRequest())

    def find(self, plan: Plan | None, *, lost: bool = False) -> Cluster:
        """The devices to plan for, as they are now.

        Where there are fewer than asked for, Ray's autoscaler is asked for the rest and waited for
        (`ScalingConfig.scale_up_timeout_s`), if one runs.

        Args:
            plan: What is to run, if it is known.
            lost: Whether devices may have been lost: then fewer than asked for will do.

        Raises:
            ClusterError: There are fewer than the run can do with.
        """
        settings, scaling = self._settings, self._scaling
        if scaling.in_process:
            if plan is not None:
                return _threads_of(plan)
            return Cluster.local(max(os.cpu_count() or 1, _least(settings)))
        if settings.lent is not None:
            return settings.lent.cluster(self.device)[0]
        most, least = self._wanted(plan, lost)
        self._await(most, least)
        there = self._there()
        if 0 < there < least or (not there and self._waited):
            raise self._too_few(least, there)
        cluster = Cluster.from_ray(device=self.device)
        if scaling.most is None or (plan is not None and plan.cluster == cluster.shape):
            return cluster
        return first_devices(cluster, min(scaling.most, cluster.n_devices))

    def settle(self) -> None:
        """The run has its devices: nothing more is asked of the autoscaler."""
        if self._request is not None:
            self._request.clear()

    def _wanted(self, plan: Plan | None, lost: bool) -> tuple[int, int]:
        """How many devices are enough, and how few will do."""
        count = self._scaling.num_workers
        if isinstance(count, tuple):
            return count[1], count[0]
        if isinstance(count, int):
            return count, 1 if lost else count
        most = max(1, len(plan.devices) if plan else _least(self._settings))
        return most, 1  # what does not hold the plan is told with the plan

    def _await(self, most: int, least: int) -> None:
        from raypar.mesh.autoscaler import await_devices, has_autoscaler

        if self._there() >= most or not has_autoscaler():
            return
        bundle = {"CPU": self._scaling.cpus_per_worker}
        if self._scaling.use_gpu:
            bundle["GPU"] = 1.0
        self._request.ask(bundle, most)
        self._waited = True
        limit = self._scaling.scale_up_timeout_s
        waiting = f"waiting up to {limit:g} s for {most} devices ({self.device}) of the autoscaler"
        self._tell("scale_up", waiting)
        waited = await_devices(self._there, most, least, limit)
        self._tell("scale_up", f"{waited.devices} devices after {waited.seconds:.1f} s")

    def _too_few(self, least: int, there: int) -> ClusterError:
        scaling = self._scaling
        waited, longer = "no autoscaler runs that could bring more", ""
        if self._waited:
            limit = scaling.scale_up_timeout_s
            waited = f"Ray's autoscaler brought no more within scale_up_timeout_s={limit:g}"
            longer = f"scale_up_timeout_s={4 * limit:g}, or "
        fewer = f"num_workers={there} or less, or " if there else ""
        change = f"set {fewer}{longer}add nodes" if fewer or longer else "add nodes"
        return ClusterError(
            f"ScalingConfig(num_workers={scaling.num_workers}) needs {count_of(least, 'device')}: "
            f"the cluster has {count_of(there, 'device')} ({self.device}), and {waited}; {change}"
            + (f". Note that {self._shared}" if self._shared else "")
        )

    def _there(self) -> int:
        from raypar.mesh.discover import devices_now

        return devices_now(self.device)


def _least(settings: Settings) -> int:
    """Devices that an explicit search configuration needs."""
    counts = [getattr(settings.search, name, None) for name in ("stages", "replicas", "tensor")]
    return math.prod(n for n in counts if isinstance(n, int))


def plan_of(resume: Checkpoint, settings: Settings) -> Plan | None:
    """The plan of a checkpoint, where it suits what the run is to have now."""
    plan, wanted = resume.plan, settings.scaling.num_workers
    if settings.search is not None and settings.search.chosen_planner != "optuna":
        return None  # the user has said how the model is to be split
    return plan if wanted in (0, "auto", len(plan.devices)) else None


def suits(plan: Plan, cluster: Cluster, settings: Settings) -> bool:
    """Whether a plan is the one to run, on devices that may be others than it was made for.

    One that the user gave is kept as long as the devices hold it; one that was searched is, for a
    range of devices, as long as there are neither fewer nor more to use.
    """
    if plan.devices[-1] >= cluster.n_devices:
        return False
    elastic = settings.plan == "auto" and isinstance(settings.scaling.num_workers, tuple)
    return not elastic or plan.cluster == cluster.shape


def first_devices(cluster: Cluster, count: int) -> Cluster:
    """The first `count` devices of a cluster, as a cluster.

    Raises:
        ClusterError: It has fewer.
    """
    if count > cluster.n_devices:
        raise ClusterError(
            f"ScalingConfig(num_workers={count}): cluster {cluster.name!r} has "
            f"{cluster.n_devices} devices ({cluster.kind}, per node {cluster.shape}); set "
            f"num_workers={cluster.n_devices} or less, or add nodes"
        )
    nodes: list[Node] = []
    for node in cluster.nodes:
        taken = min(node.devices, count)
        count -= taken
        if taken:
            nodes.append(dataclasses.replace(node, devices=taken))
    return dataclasses.replace(cluster, nodes=tuple(nodes))


def check_devices(plan: Plan, cluster: Cluster, scaling: ScalingConfig) -> None:
    """Compares plan, cluster and scaling.

    Raises:
        PlanError: They disagree.
    """
    used = plan.devices
    most = scaling.most
    if most and len(used) > most:
        raise PlanError(
            f"the plan uses {len(used)} devices, ScalingConfig(num_workers="
            f"{scaling.num_workers}) allows {most}: set num_workers={len(used)}, or make a plan "
            "for fewer devices"
        )
    if used[-1] >= cluster.n_devices:
        raise PlanError(
            f"the plan uses device {used[-1]}, the cluster has {cluster.n_devices} devices (0 to "
            f"{cluster.n_devices - 1}; per node {cluster.shape}); the plan was made for "
            f"{plan.cluster}: make a plan for this cluster"
        )


def _threads_of(plan: Plan) -> Cluster:
    """This machine as the cluster of a plan: threads stand for its devices, used or not."""
    own = Cluster.local(sum(plan.cluster)).nodes[0]
    if len(plan.cluster) == 1:
        return Cluster((own,), "local")
    nodes = (
        dataclasses.replace(own, name=f"local{i}", devices=count)
        for i, count in enumerate(plan.cluster)
    )
    return Cluster(tuple(nodes), "local")
