"""What a step would take on a cluster with more devices, other links or other memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from raypar._plan_text import count_of, size
from raypar.errors import RayparError
from raypar.graph.opgraph import OpGraph
from raypar.lowered import lower_plan
from raypar.mesh.calibration import Calibration
from raypar.mesh.calibration_files import load_calibration
from raypar.mesh.cluster import Cluster, Node
from raypar.mesh.devices import Link
from raypar.plan import DATA, MemoryPolicy, MeshSlice, Plan
from raypar.search.config import SearchConfig
from raypar.search.interop.contest import in_words
from raypar.search.planners.base import get_planner
from raypar.search.simulate import Simulation, simulate

AS_IT_IS = "as it is"
_NO_TIME = "; there was no time to try more"
_LEANER = (("full", 0), ("full", 1), ("full", 3))
"""(recomputation, least ZeRO level) tried in turn where a plan does not fit half the memory."""
_FULLER = ("none", "selective")
"""Recomputation tried where there is more memory, the fastest first."""


@dataclass(frozen=True, slots=True)
class WhatIf:
    """One change of the cluster, and what it does to a step.

    Attributes:
        change: The change in a few words: ``2 × devices``.
        detail: What exactly is different.
        before_s: Seconds of a step of the plan without the change.
        kept_s: Seconds of a step of the plan, carried over; None where it does not run there.
        kept: How it was carried over, or why it does not run.
        replanned_s: Seconds of a step of a plan made anew; None where none was made.
        replanned: That plan in words, or why there is none.
        planner: Who made it; empty where nobody was asked.
    """

    change: str
    detail: str
    before_s: float
    kept_s: float | None
    kept: str
    replanned_s: float | None = None
    replanned: str = ""
    planner: str = ""

    @property
    def best_s(self) -> float | None:
        """The faster of both, in seconds; None where neither runs."""
        known = [s for s in (self.kept_s, self.replanned_s) if s is not None]
        return min(known, default=None)


Carried = tuple[Plan, str]
"""A plan for a changed cluster, and how it differs from the one it was made of."""


@dataclass(frozen=True)
class _Change:
    name: str
    detail: str
    cluster: Cluster
    carried: Callable[[Plan], Iterator[Carried]]
    first_fits: bool = True
    """Whether the ways to carry a plan over come fastest first."""
    memory_only: bool = False
    """Whether a step takes as long as before: just what fits is different."""


def what_if(
    graph: OpGraph,
    plan: Plan,
    cluster: Cluster,
    *,
    config: SearchConfig | None = None,
    calibration: Calibration | None = None,
    optimizer_states: int = 2,
    memory_fraction: float = 0.9,
    cores: int | None = None,
    limit_s: float = 60.0,
) -> tuple[WhatIf, ...]:
    """Plays a plan on changed clusters, and plans anew for them where it is told how.

    The changes are twice the devices, half and twice the bandwidth of all links, and half and twice
    the memory. The plan is carried over as it is where it fits; twice the devices it takes by twice
    the replicas, and where memory is less or more it recomputes and shards more or less.

    Args:
        graph: The captured model.
        plan: Its plan.
        cluster: The cluster of the plan.
        config: How to plan anew; None: that is not done. A planner that takes seconds is best.
        calibration: What the cluster reaches; default: what was measured on it, else the table.
        optimizer_states: Tensors that the optimizer keeps per parameter (Adam: 2).
        memory_fraction: Share of a device's memory that a plan may fill.
        cores: As in `raypar.search.simulate.simulate`.
        limit_s: After so many seconds no new plan is begun, and of the ways to carry the plan over
            only the first is looked at.

    Raises:
        PlanError: The plan does not fit the graph or the cluster.
        ConfigError: No such planner.
    """
    calibration = calibration or load_calibration(cluster)
    player = _Player(graph, plan, cluster, calibration, optimizer_states, memory_fraction, cores)
    deadline = time.monotonic() + limit_s
    found = []
    for change in _changes(graph, cluster):
        row = player.carry(change, deadline)
        if config is not None:
            used_up = time.monotonic() > deadline
            why = f"not tried: {limit_s:g} s were used up"
            row = replace(row, replanned=why) if used_up else player.plan_anew(row, change, config)
            row = replace(row, planner=config.chosen_planner)
        found.append(row)
    return tuple(found)


class _Player:
    """Plays a plan, and what is made of it, on changed clusters."""

    def __init__(
        self,
        graph: OpGraph,
        plan: Plan,
        cluster: Cluster,
        calibration: Calibration,
        optimizer_states: int,
        memory_fraction: float,
        cores: int | None,
    ) -> None:
        self.graph, self.calibration, self.cores = graph, calibration, cores
        self.optimizer_states, self.memory_fraction = optimizer_states, memory_fraction
        self.plan, self.lowered = plan, lower_plan(graph, plan)
        self.before = self.play(plan, cluster)

    def carry(self, change: _Change, deadline: float) -> WhatIf:
        """The fastest of the ways to carry the plan over that run and fit.

        After the deadline only the first way is looked at, and what needs no simulation.
        """
        found: list[tuple[float, str]] = []
        reason = "it does not run there"
        for i, (carried, how) in enumerate(change.carried(self.plan)):
            known = carried is self.plan and change.memory_only
            if i and not known and time.monotonic() > deadline:
                reason = f"{reason.removesuffix(_NO_TIME)}{_NO_TIME}"
                continue
            try:
                played = self.before if known else self.play(carried, change.cluster)
            except RayparError as error:
                reason = str(error)
                continue
            over = self.over(played, change.cluster)
            if over:
                reason = f"{how}: {over}"
                continue
            found.append((played.step_s, how))
            if change.first_fits:
                break
        best: tuple[float | None, str] = min(found, default=(None, reason))
        return WhatIf(change.name, change.detail, self.before.step_s, *best)

    def plan_anew(self, row: WhatIf, change: _Change, config: SearchConfig) -> WhatIf:
        """The row with what a planner makes for the changed cluster."""
        planner = get_planner(config.chosen_planner)
        try:
            made = planner.plan(self.graph, change.cluster, config)
            played = self.play(made, change.cluster)
        except RayparError as error:
            return replace(row, replanned=str(error))
        over = self.over(played, change.cluster)
        if over:
            return replace(row, replanned=over)
        return replace(row, replanned_s=played.step_s, replanned=in_words(made))

    def play(self, plan: Plan, cluster: Cluster) -> Simulation:
        """A step of a plan."""
        return simulate(
            self.graph,
            plan,
            cluster,
            calibration=self.calibration,
            lowered=self.lowered if plan is self.plan else lower_plan(self.graph, plan),
            cores=self.cores,
            optimizer_states=self.optimizer_states,
        )

    def over(self, played: Simulation, cluster: Cluster) -> str:
        """What does not fit the memory of a cluster, in words; empty where all does."""
        limits = [min(cluster.memory(d) for d in lane.devices) for lane in played.lanes]
        peak, limit = max(
            zip(played.peak_bytes, limits, strict=True), key=lambda pair: pair[0] / pair[1]
        )
        if peak <= self.memory_fraction * limit:
            return ""
        return f"needs {size(peak)} of {size(self.memory_fraction * limit)} that it may fill"


def _changes(graph: OpGraph, cluster: Cluster) -> Iterator[_Change]:
    nodes = count_of(len(cluster.nodes), "node")
    copies = tuple(replace(n, name=f"{n.name} again", id="") for n in cluster.nodes)
    yield _Change(
        "2 × devices",
        f"{nodes} more of the same: {2 * cluster.n_devices} devices",
        replace(cluster, nodes=(*cluster.nodes, *copies)),
        lambda plan: _twice_the_replicas(plan, graph, cluster),
        first_fits=False,
    )
    for name, factor in (("½ × bandwidth", 0.5), ("2 × bandwidth", 2.0)):
        detail = f"every link inside and between nodes has {factor:g} times its bandwidth"
        yield _Change(name, detail, _with_bandwidth(cluster, factor), _unchanged)
    yield _Change(
        "½ × memory",
        "every device has half its memory",
        _with_memory(cluster, 1, 2),
        lambda plan: _with_policies(plan, leaner=True),
        memory_only=True,
    )
    yield _Change(
        "2 × memory",
        "every device has twice its memory",
        _with_memory(cluster, 2, 1),
        lambda plan: _with_policies(plan, leaner=False),
        memory_only=True,
    )


def _with_bandwidth(cluster: Cluster, factor: float) -> Cluster:
    def other(link: Link) -> Link:
        return replace(link, bandwidth=link.bandwidth * factor)

    return replace(
        cluster,
        nodes=tuple(
            replace(node, inside=other(node.inside), across=other(node.across))
            for node in cluster.nodes
        ),
    )


def _with_memory(cluster: Cluster, times: int, over: int) -> Cluster:
    def other(node: Node) -> Node:
        kind = replace(node.device, memory=node.device.memory * times // over)
        return replace(node, device=kind, host_memory=node.host_memory * times // over)

    return replace(cluster, nodes=tuple(other(node) for node in cluster.nodes))


def _unchanged(plan: Plan) -> Iterator[Carried]:
    yield plan, AS_IT_IS


def _twice_the_replicas(plan: Plan, graph: OpGraph, cluster: Cluster) -> Iterator[Carried]:
    """The plan beside a copy of itself on the new nodes; else on half of the devices."""
    replicas, found = 2 * plan.replicas, False
    doubled = replace(
        plan,
        cluster=(*cluster.shape, *cluster.shape),
        stages=tuple(
            replace(stage, mesh=_doubled(stage.mesh, cluster.n_devices)) for stage in plan.stages
        ),
    )
    if replicas <= graph.max_replicas and plan.global_batch % replicas == 0:
        share = plan.global_batch // replicas
        if share % plan.microbatches == 0:
            found = True
            yield doubled, f"{replicas} replicas, microbatches of half the samples"
        fewer = plan.microbatches // 2
        if fewer and share % fewer == 0 and not graph.feels_microbatches:
            found = True
            how = f"{replicas} replicas, {count_of(fewer, 'microbatch')} each"
            yield replace(doubled, microbatches=fewer), how
    if not found:
        yield replace(plan, cluster=doubled.cluster), "as it is, on half of the devices"


def _doubled(mesh: MeshSlice, more: int) -> MeshSlice:
    devices = (*mesh.devices, *(d + more for d in mesh.devices))
    if DATA in mesh.axes:
        return MeshSlice(devices, (2 * mesh.shape[0], *mesh.shape[1:]), mesh.axes)
    return MeshSlice(devices, (2, *mesh.shape), (DATA, *mesh.axes))


def _with_policies(plan: Plan, *, leaner: bool) -> Iterator[Carried]:
    """The plan with other memory policies: as it is first (leaner) or last (not)."""
    if leaner:
        yield plan, AS_IT_IS
        for recompute, zero in _LEANER:
            made = _policies(plan, recompute, zero)
            if made.stages != plan.stages:
                more = f", ZeRO-{zero} at least" if zero else ""
                yield made, f"recompute {recompute}{more} on every stage"
        return
    for recompute in _FULLER:
        made = _policies(plan, recompute, 0)
        if made.stages != plan.stages:
            yield made, f"recompute {recompute} on every stage"
        else:
            break  # what it does already: the rest would only recompute more
    yield plan, AS_IT_IS


def _policies(plan: Plan, recompute: str, least_zero: int) -> Plan:
    return replace(
        plan,
        stages=tuple(
            replace(s, memory=MemoryPolicy(recompute, max(s.memory.zero, least_zero)))
            for s in plan.stages
        ),
    )
