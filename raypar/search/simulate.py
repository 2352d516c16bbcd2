"""What a plan would do: time, memory and traffic of one step, before anything is started.

The very instruction lists that stage actors execute are played in time (`_sim_run`), with the
costs of the stages (`raypar.search.cost`), and with ports and cores that are shared
(`_sim_fabric`). Steps are separated by the meeting of all ranks in NORM, so that the time from one
NORM to the next is the period of a run of steps, whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence

from raypar.graph.opgraph import OpGraph
from raypar.lowered import LoweredPlan, lower_plan
from raypar.mesh.calibration import Calibration, table_calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.schedules.instructions import COMPUTE, Instruction
from raypar.search._sim_build import Built, build
from raypar.search._sim_input import Moved, Setting
from raypar.search._sim_program import AWAIT, DRAIN, MEET, TAKE
from raypar.search._sim_run import Played, play
from raypar.search._sim_setting import setting_of
from raypar.search.cost.base import CostModel
from raypar.search.simulation import LaneReport, LinkUse, Simulation

__all__ = ["Moved", "Setting", "Simulation", "simulate", "simulate_lists"]


def simulate(
    graph: OpGraph,
    plan: Plan,
    cluster: Cluster,
    *,
    calibration: Calibration | None = None,
    cost: str | CostModel = "analytic",
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
        cost: A cost model, or the name of one (`raypar.search.cost`), which is given what is known
            about such a cluster on disk.
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
            elif op[0] == AWAIT:
                comm += end - max(played.met[op[1]][0], start)
            elif op[0] == MEET:
                comm += end - played.met[op[1]][0]
            elif op[0] == DRAIN:
                comm += end - min(max(played.complete[lane], start), end)
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
