"""What a plan would do: time, memory and traffic of one step, before anything is started.

The very instruction lists that stage actors execute are played in time (`_sim_run`), with the
costs of the stages (`raypar.search.cost`), and with ports and cores that are shared
(`_sim_fabric`). Steps are separated by the meeting of all ranks in NORM, so that the time from one
NORM to the next is the period of a run of steps, whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from raypar.graph.opgraph import OpGraph
from raypar.lowered import LoweredPlan, lower_plan
from raypar.mesh.calibration import Calibration, table_calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.schedules.instructions import COMPUTE, Instruction, Kind
from raypar.search._sim_build import Built, Setting, build
from raypar.search._sim_memory import MOVING, MemoryTimeline, memory_of
from raypar.search._sim_path import Link, critical_path
from raypar.search._sim_program import DRAIN, GATHER, MEET, OPTIMIZE, TAKE
from raypar.search._sim_run import Played, play
from raypar.search._sim_setting import setting_of

__all__ = [
    "MOVING",
    "LaneReport",
    "Link",
    "LinkUse",
    "MemoryTimeline",
    "Message",
    "Simulation",
    "Span",
    "simulate",
    "simulate_lists",
]


@dataclass(frozen=True, slots=True)
class Span:
    """Something that a lane does for a while.

    Attributes:
        name: The instruction as text; ``OPTIMIZER`` and ``GATHER`` begin the step.
        kind: ``F``, ``B``, ``I``, ``W``, ``O`` (optimizer), ``G`` (parameters are gathered, counts
            of the batch), ``wait`` (nothing to do yet), ``comm`` (what it waits for is under way).
        start: Seconds from the beginning of the step.
        end: The same.
    """

    name: str
    kind: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Message:
    """One value that moved between lanes.

    Attributes:
        value: The edge, or ``grad:`` and the edge.
        microbatch: Which microbatch.
        source: Sending lane.
        target: Receiving lane.
        sent: When it was handed over, in seconds from the beginning of the step.
        started: When it got the link.
        arrived: When it was there.
        nbytes: Its bytes, all ranks of the lane together.
    """

    value: str
    microbatch: int
    source: int
    target: int
    sent: float
    started: float
    arrived: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class LaneReport:
    """Ranks that go in step, and how they spend a step. The three shares add up to 1.

    Attributes:
        group: Their rank group.
        replica: Their replica, or None where all replicas go in step.
        devices: Their devices.
        stages: The stages they hold.
        compute: Share of the step in which they compute.
        communication: Share in which they are in collectives, or wait for what is under way.
        idle: Share in which they wait for somebody who has not yet sent: the bubble.
        memory_limit: Bytes that the smallest of the devices may fill.
    """

    group: int
    replica: int | None
    devices: tuple[int, ...]
    stages: tuple[int, ...]
    compute: float
    communication: float
    idle: float
    memory_limit: int

    @property
    def label(self) -> str:
        """Name for reports."""
        own = f"rank group {self.group}"
        return own if self.replica is None else f"{own}, replica {self.replica}"


@dataclass(frozen=True, slots=True)
class LinkUse:
    """What one device sends to one tier in a step.

    Attributes:
        device: The device.
        tier: ``inside`` its node or ``across`` nodes.
        nbytes: Bytes sent.
        busy: Share of the step for which its port is needed at full speed.
    """

    device: int
    tier: str
    nbytes: int
    busy: float


@dataclass(frozen=True)
class Simulation:
    """One step of a run of steps, from NORM to NORM.

    Attributes:
        step_s: Seconds of a step.
        global_batch: Samples of a step.
        lanes: Ranks that go in step.
        links: What devices send.
        calibrated: Whether the figures rest on measurements.
        source: Where they come from, in words.
    """

    step_s: float
    global_batch: int
    lanes: tuple[LaneReport, ...]
    links: tuple[LinkUse, ...]
    calibrated: bool
    source: str
    _lists: Sequence[Sequence[Instruction]] = field(repr=False)
    _setting: Setting = field(repr=False)
    _built: Built = field(repr=False)
    _played: Played = field(repr=False)

    @property
    def samples_per_s(self) -> float:
        """Throughput."""
        return self.global_batch / self.step_s if self.step_s > 0 else 0.0

    @property
    def bubble(self) -> float:
        """Share of device time in which devices are idle."""
        ranks = [len(lane.devices) for lane in self.lanes]
        idle = sum(n * lane.idle for n, lane in zip(ranks, self.lanes, strict=True))
        return idle / sum(ranks)

    @cached_property
    def memory(self) -> tuple[MemoryTimeline, ...]:
        """Per lane what each of its ranks holds over time."""
        return tuple(
            memory_of(i, self._list(i), self._setting, self._built, self._played)
            for i in range(len(self.lanes))
        )

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """Per lane the most that one of its ranks holds, in bytes."""
        return tuple(timeline.peak_bytes for timeline in self.memory)

    @cached_property
    def critical_path(self) -> tuple[Link, ...]:
        """The chain of work and transfers that the step's length is made of, first piece first."""
        return tuple(critical_path(self._built, self._played))

    def describe(self, link: Link) -> str:
        """The instruction of a piece of the critical path, as text."""
        return self._name(link.lane, link.position)

    def path_shares(self) -> dict[str, float]:
        """Kind of work → share of the critical path, largest first.

        Kinds are those of `Span` (``F``, ``B``, …) and ``transfer``, ``sync``, ``norm``.
        """
        found: dict[str, float] = {}
        for link in self.critical_path:
            what = link.what
            if what == "work":
                what = self._kind(link.lane, link.position)
            found[what] = found.get(what, 0.0) + link.seconds
        whole = sum(found.values()) or 1.0
        return {k: v / whole for k, v in sorted(found.items(), key=lambda item: -item[1])}

    def spans(self, lane: int) -> list[Span]:
        """What a lane does, in order; zero-time instructions are left out."""
        found: list[Span] = []
        program, ends = self._built.program, self._played.ends[lane]
        start = 0.0
        for at, end in enumerate(ends):
            position = program.labels[lane][at]
            if end > start:
                kinds = self._op_spans(lane, at, start, end)
                for kind, a, b in kinds:
                    found.append(Span(self._name(lane, position), kind, a, b))
            start = end
        return _joined(found)

    def messages(self) -> list[Message]:
        """Everything that moved between lanes, in order of sending."""
        found: list[Message] = []
        program, played = self._built.program, self._played
        for lane, ops in enumerate(program.ops):
            for at, op in enumerate(ops):
                if op[0] != TAKE:
                    continue
                now = self._list(lane)[program.labels[lane][at]]
                way = program.ways[program.way_of[op[1]]]
                assert now.value is not None and now.microbatch is not None
                name = now.value if now.kind is Kind.RECV_FORWARD else f"grad:{now.value}"
                found.append(
                    Message(
                        name,
                        now.microbatch,
                        way.source,
                        way.target,
                        played.sent[op[1]],
                        played.started[op[1]],
                        played.arrived[op[1]],
                        way.nbytes,
                    )
                )
        return sorted(found, key=lambda m: (m.sent, m.source, m.target))

    # -- inside -----------------------------------------------------------------------------

    def _list(self, lane: int) -> Sequence[Instruction]:
        return self._lists[self.lanes[lane].group]

    def _name(self, lane: int, position: int) -> str:
        names = {OPTIMIZE: "OPTIMIZER", GATHER: "GATHER"}
        return names.get(position) or str(self._list(lane)[position])

    def _kind(self, lane: int, position: int) -> str:
        if position == OPTIMIZE:
            return "O"
        now = None if position == GATHER else self._list(lane)[position]
        return now.kind.value if now is not None and now.kind in COMPUTE else "G"

    def _op_spans(
        self, lane: int, at: int, start: float, end: float
    ) -> list[tuple[str, float, float]]:
        """What one operation is made of: (kind, from, to)."""
        program, played = self._built.program, self._played
        op = program.ops[lane][at]
        if op[0] == TAKE:
            handed = min(max(played.sent[op[1]], start), end)
            return _split(start, handed, end)
        if op[0] == MEET:
            return _split(start, played.met[op[1]][0], end)
        if op[0] == DRAIN:
            return [("comm", start, end)]
        return [(self._kind(lane, program.labels[lane][at]), start, end)]


def simulate(
    graph: OpGraph,
    plan: Plan,
    cluster: Cluster,
    *,
    calibration: Calibration | None = None,
    cost: str = "analytic",
    lowered: LoweredPlan | None = None,
    cores: int | None = None,
    optimizer_states: int = 2,
) -> Simulation:
    """Plays one step of a plan on a cluster. Starts nothing and needs no Ray.

    Args:
        graph: The captured model.
        plan: A plan for it.
        cluster: The devices.
        calibration: What they reach; default: the device table.
        cost: Name of the cost model (`raypar.search.cost`).
        lowered: The lowered plan, where it is at hand.
        cores: Cores that the ranks of each CPU node share, where there are fewer cores than CPU
            devices; None: every device is a core.
        optimizer_states: Tensors that the optimizer keeps per parameter (Adam: 2).

    Raises:
        PlanError: The plan does not fit the graph or the cluster.
        ScheduleError: Its lists deadlock.
        ConfigError: There is no such cost model.
        ClusterError: `cores` is not positive.
    """
    calibration = calibration or table_calibration(cluster)
    lowered = lowered or lower_plan(graph, plan)
    setting = setting_of(graph, plan, lowered, cluster, calibration, cost, cores, optimizer_states)
    return simulate_lists(lowered.lists, setting, global_batch=plan.global_batch)


def simulate_lists(
    lists: Sequence[Sequence[Instruction]], setting: Setting, *, global_batch: int = 0
) -> Simulation:
    """Plays instruction lists with given costs.

    Args:
        lists: One list per rank group, as `raypar.schedules.compile` makes them.
        setting: Stages, costs and cluster.
        global_batch: Samples of a step.

    Raises:
        PlanError: Rank groups differ in their number of replicas.
        ScheduleError: The lists deadlock.
    """
    built = build(lists, setting)
    played = play(built.program)
    lanes = tuple(
        _lane_report(i, lists[lane.group], setting, built, played)
        for i, lane in enumerate(built.lanes)
    )
    step = played.step
    links = tuple(
        LinkUse(
            device, tier, int(nbytes), built.busy_s.get((device, tier), 0.0) / step if step else 0.0
        )
        for (device, tier), nbytes in sorted(built.sent_bytes.items())
    )
    calibration = setting.calibration
    return Simulation(
        step,
        global_batch,
        lanes,
        links,
        calibration.measured,
        calibration.note or ("calibrated" if calibration.measured else "device table"),
        lists,
        setting,
        built,
        played,
    )


def _lane_report(
    lane: int,
    program: Sequence[Instruction],
    setting: Setting,
    built: Built,
    played: Played,
) -> LaneReport:
    compute = comm = 0.0
    start = 0.0
    labels = built.program.labels[lane]
    for at, (op, end) in enumerate(zip(built.program.ops[lane], played.ends[lane], strict=True)):
        took = end - start
        if took > 0.0:
            if op[0] == TAKE:
                comm += end - min(max(played.sent[op[1]], start), end)
            elif op[0] == MEET:
                comm += end - played.met[op[1]][0]
            elif op[0] == DRAIN or labels[at] == GATHER:
                comm += took
            else:
                share = _comm_share(lane, labels[at], program, built)
                comm += took * share
                compute += took * (1.0 - share)
        start = end
    whole = played.step or 1.0
    devices = built.lane_devices[lane]
    compute, comm = compute / whole, comm / whole
    return LaneReport(
        built.lanes[lane].group,
        built.lane_replicas[lane],
        devices,
        tuple(setting.stages_of(built.lanes[lane].group)),
        compute,
        comm,
        max(0.0, 1.0 - compute - comm),
        min(setting.cluster.memory(d) for d in devices),
    )


def _comm_share(lane: int, position: int, program: Sequence[Instruction], built: Built) -> float:
    if position < 0:
        return 0.0
    now = program[position]
    if now.stage is None or now.kind not in COMPUTE:
        return 0.0
    return built.comm_share[lane, now.stage, now.kind]


def _split(start: float, handed: float, end: float) -> list[tuple[str, float, float]]:
    parts = [("wait", start, handed), ("comm", handed, end)]
    return [part for part in parts if part[2] > part[1]]


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Neighbouring spans of one instruction and kind as one."""
    found: list[Span] = []
    for span in spans:
        last = found[-1] if found else None
        if last and (last.name, last.kind, last.end) == (span.name, span.kind, span.start):
            found[-1] = Span(span.name, span.kind, last.start, span.end)
        else:
            found.append(span)
    return found
