"""Simulated steps against closed forms, and laws that every simulated step keeps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.errors import ClusterError, ConfigError, ScheduleError
from raypar.graph.capture import capture
from raypar.graph.opgraph import OpGraph
from raypar.lowered import lower_plan
from raypar.mesh.calibration import LinkRates, TierRates, table_calibration
from raypar.mesh.cluster import Cluster
from raypar.mesh.devices import Link
from raypar.plan import MeshSlice
from raypar.schedules.compile import compile_schedule
from raypar.schedules.instructions import Instruction, Kind
from raypar.schedules.io import Edge, StageIO
from raypar.schedules.registry import schedule_names
from raypar.schedules.saved import peak_saved_per_stage
from raypar.schedules.timing import Durations, ideal_timeline
from raypar.search._sim_build import build
from raypar.search._sim_fluid import FULL, FluidClock
from raypar.search._sim_program import AWAIT, JOIN, MEET, POST, TAKE, Op, Program
from raypar.search._sim_run import play
from raypar.search.cost.base import Collective, StageCost
from raypar.search.simulate import Moved, Setting, Simulation, simulate, simulate_lists
from raypar.search.simulation import MOVING, MemoryTimeline
from raypar.testing import models, random_plan, random_sharding
from tests._tiers import examples

FREE = Link(1e30, 0.0, "free")
UNIT = StageCost(1.0, 2.0, 1.0, 1.0, saved_bytes=100, half_bytes=60)


def chain(n_stages: int, ranks: int, nbytes: int = 8) -> StageIO:
    """Stages that hand one value on, dealt out to rank groups in turn."""
    edges = tuple(Edge(f"x{s}", s, (s + 1,), True, nbytes) for s in range(n_stages - 1))
    groups = tuple(s % ranks for s in range(n_stages))
    return StageIO(n_stages, groups, edges, (True,) * n_stages)


def one_device_nodes(count: int, across: Link = FREE) -> Cluster:
    return Cluster.virtual(count, 1, "H100", across=across)


def setting_for(
    io: StageIO,
    microbatches: int,
    cluster: Cluster,
    costs: Sequence[StageCost] | StageCost = UNIT,
    **more: object,
) -> Setting:
    """One device per rank group; links reach what the cluster says."""
    groups = range(max(io.rank_of) + 1)
    sizes = {edge.name: edge.nbytes for edge in io.edges}
    exact = TierRates(LinkRates(cluster.nodes[0].across.latency, 1.0))
    tables = replace(table_calibration(cluster), inside=exact, across=exact)
    return Setting(
        io=io,
        meshes=tuple(MeshSlice((g,), (1,)) for g in groups),
        costs=(costs,) * io.n_stages if isinstance(costs, StageCost) else tuple(costs),
        cluster=cluster,
        calibration=tables,
        moves=lambda edge, a, b: Moved(((0, 0, sizes[edge]),)),
        microbatches=microbatches,
        **more,  # type: ignore[arg-type]
    )


def simulated(
    schedule: str,
    ranks: int,
    microbatches: int,
    *,
    chunks: int = 1,
    costs: Sequence[StageCost] | StageCost = UNIT,
    across: Link = FREE,
    nbytes: int = 8,
) -> tuple[Simulation, list[list[Instruction]], StageIO]:
    io = chain(ranks * chunks, ranks, nbytes)
    lists = compile_schedule(schedule, io, microbatches)
    setting = setting_for(io, microbatches, one_device_nodes(ranks, across), costs)
    return simulate_lists(lists, setting, global_batch=microbatches), lists, io


# -- closed forms ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 2), (4, 8), (5, 3)])
def test_equal_stages_idle_as_the_papers_say(schedule: str, ranks: int, microbatches: int) -> None:
    """GPipe (Huang et al. 2019, section 2.3): a bubble of (S - 1) / (M + S - 1)."""
    found, *_ = simulated(schedule, ranks, microbatches)
    assert found.step_s == pytest.approx(3 * (microbatches + ranks - 1))
    assert found.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


def test_zero_bubble_has_a_third_of_the_idle_time() -> None:
    """Qi et al. 2023, "Zero Bubble Pipeline Parallelism", table 2: (S - 1)(F + B - W) for H1."""
    plain, *_ = simulated("1f1b", 4, 8)
    split, *_ = simulated("zero_bubble_h1", 4, 8)
    work = 3 * 8
    assert split.step_s - work == pytest.approx((plain.step_s - work) / 3)


def test_interleaving_divides_the_idle_time_by_the_chunks() -> None:
    """Narayanan et al. 2021, "Efficient Large-Scale Training ...", section 2.2.2."""
    half = StageCost(0.5, 1.0, 0.5, 0.5)
    plain, *_ = simulated("1f1b", 4, 8)
    woven, *_ = simulated("interleaved_1f1b", 4, 8, chunks=2, costs=half)
    work = 3 * 8
    assert woven.step_s - work == pytest.approx((plain.step_s - work) / 2)


@settings(max_examples=examples(8, 25), deadline=None)
@given(
    schedule=st.sampled_from(sorted(schedule_names())),
    ranks=st.integers(1, 4),
    chunks=st.integers(1, 2),
    microbatches=st.integers(1, 6),
    seconds=st.lists(st.tuples(*[st.floats(0.1, 3)] * 3), min_size=8, max_size=8),
    nbytes=st.sampled_from([0, 3, 17]),
)
def test_without_contention_it_is_the_ideal_timeline(
    schedule: str,
    ranks: int,
    chunks: int,
    microbatches: int,
    seconds: list[tuple[float, float, float]],
    nbytes: int,
) -> None:
    """Endless bandwidth, a latency: as `raypar.schedules.timing` plays the same lists."""
    costs = [StageCost(f, i + w, i, w) for f, i, w in seconds[: ranks * chunks]]
    link = Link(1e30, 0.25, "slow to answer")
    found, lists, _ = simulated(
        schedule, ranks, microbatches, chunks=chunks, costs=costs, across=link, nbytes=nbytes
    )
    durations = Durations(
        tuple(c.forward_s for c in costs),
        tuple(c.backward_input_s for c in costs),
        tuple(c.backward_weight_s for c in costs),
    )
    ideal = ideal_timeline(lists, durations, 0.25)
    norm = found.critical_path[-1].seconds if ranks > 1 else 0.0
    assert found.step_s == pytest.approx(ideal.makespan + norm)
    for lane, spans in enumerate(ideal.spans):
        ours = [s for s in found.spans(lane) if s.kind in "FBIW"]
        assert [s.name for s in ours] == [str(s.instruction) for s in spans]
        assert [s.start for s in ours] == pytest.approx([s.start for s in spans])


def test_the_optimizer_of_one_rank_delays_the_next_step() -> None:
    slow = replace(UNIT, optimizer_s=5.0)
    first, *_ = simulated("1f1b", 2, 4, costs=[slow, UNIT])
    last, *_ = simulated("1f1b", 2, 4, costs=[UNIT, slow])
    assert first.step_s == pytest.approx(3 * 5 + 5)
    # The second rank has nothing to do for the first forward's time.
    assert last.step_s == pytest.approx(3 * 5 + 4)


def _repeated(program: Program, steps: int) -> Program:
    """The same program so many times in a row, with messages and meetings of its own each time."""
    messages, meetings = len(program.way_of), len(program.meetings)

    def shifted(op: Op, step: int) -> Op:
        if op[0] in (POST, TAKE):
            return (op[0], op[1] + step * messages)
        return (op[0], op[1] + step * meetings) if op[0] in (JOIN, MEET, AWAIT) else op

    return replace(
        program,
        ops=[[shifted(op, k) for k in range(steps) for op in ops] for ops in program.ops],
        way_of=program.way_of * steps,
        meetings=program.meetings * steps,
    )


@pytest.mark.parametrize("schedule", sorted(schedule_names()))
def test_the_period_of_a_run_of_steps_is_that_of_one(schedule: str) -> None:
    io = chain(3, 3, 500)
    costs = [
        replace(
            UNIT,
            optimizer_s=s,
            backward_s=2 + s,
            gather=(Collective("data", "all_gather", 8, 3 * s),),
        )
        for s in (0.3, 0.1, 0.7)
    ]
    setting = setting_for(io, 5, one_device_nodes(3, Link(1e4, 0.01)), costs)
    built = build(compile_schedule(schedule, io, 5), replace(setting, tied=(((0, 2), 900),)))
    step = play(built.program).step
    many = play(_repeated(built.program, 4))
    for ends in many.ends:
        size = len(ends) // 4
        assert [ends[k * size - 1] for k in range(1, 5)] == pytest.approx(
            [k * step for k in range(1, 5)]
        )


# -- gradients ------------------------------------------------------------------------------


def _synced(backward_s: float, sync: Sequence[Collective]) -> Simulation:
    io = StageIO(1, (0,), (), (False,))
    lists = compile_schedule("1f1b", io, 2)
    cluster = one_device_nodes(2, Link(1e9, 0.0))
    cost = StageCost(1.0, backward_s, 0.0, 0.0, sync=tuple(sync))
    setting = replace(setting_for(io, 2, cluster, cost), meshes=(MeshSlice((0, 1), (2,)),))
    return simulate_lists(lists, setting)


def test_gradients_travel_while_backward_goes_on() -> None:
    nbytes = 40 << 20
    sync = Collective("data", "all_reduce", nbytes, 0.0)  # its seconds are those of the buckets
    alone = nbytes / 1e9  # 2 x half of it for each of two ranks
    found = _synced(10.0, [sync])
    assert 22.0 < found.step_s < 22.0 + alone / 4
    short = _synced(alone / 100, [sync])
    assert short.step_s == pytest.approx(2.0 + alone, rel=0.05)
    assert found.lanes[0].communication < short.lanes[0].communication


def test_gradients_of_the_stage_that_is_through_first_travel_first() -> None:
    """Two stages of one rank group: the later one's travel while the earlier one goes back."""
    nbytes = 40 << 20
    alone = nbytes / 1e9
    io = StageIO(2, (0, 0), (Edge("x", 0, (1,), True, 1),), (False, True))
    sync = (Collective("data", "all_reduce", nbytes, 0.0),)
    costs = (StageCost(1.0, 2 * alone, 0.0, 0.0, sync=sync),) * 2
    setting = setting_for(io, 1, one_device_nodes(2, Link(1e9, 0.0)), costs)
    setting = replace(setting, meshes=(MeshSlice((0, 1), (2,)),))
    found = simulate_lists(compile_schedule("1f1b", io, 1), setting)
    # Only the last bucket of the first stage is left when its backward is over.
    assert 2 + 4 * alone < found.step_s < 2 + 4.2 * alone


def _gathered(gather_s: float) -> Simulation:
    """Two stages of one rank group whose parameters are gathered before they go forward."""
    io = StageIO(2, (0, 0), (Edge("x", 0, (1,), True, 1),), (False, True))
    gather = (Collective("data", "all_gather", 1000, gather_s),) if gather_s else ()
    costs = (StageCost(10.0, 1.0, 0.0, 0.0, gather=gather, optimizer_s=1.0),) * 2
    setting = setting_for(io, 1, one_device_nodes(2), costs)
    setting = replace(setting, meshes=(MeshSlice((0, 1), (2,)),))
    return simulate_lists(compile_schedule("1f1b", io, 1), setting)


def test_parameters_arrive_while_earlier_stages_go_forward() -> None:
    without = _gathered(0.0).step_s
    assert _gathered(4.0).step_s == pytest.approx(without + 4.0)  # the second stage's are hidden
    long = _gathered(25.0)  # the second stage waits as well, until both are through
    assert long.step_s == pytest.approx(without + 2 * 25.0 - 10.0)
    assert long.lanes[0].communication * long.step_s == pytest.approx(25.0 + 15.0)
    waits = [span.name for span in long.spans(0) if span.kind == "comm"]
    assert waits == ["0F0", "1F0"]
    # What arrives lies beside what is there until its stage takes it.
    transit = long.memory[0].moving[MOVING.index("transit")]
    assert [n for n, m in itertools.groupby(transit) if n] == [2000, 1000]


def test_a_parameter_of_two_rank_groups_is_summed_once_both_have_it() -> None:
    io = chain(2, 2)
    lists = compile_schedule("gpipe", io, 2)
    setting = setting_for(io, 2, one_device_nodes(2, Link(1e9, 0.0)))
    plain = simulate_lists(lists, setting)
    shared = simulate_lists(lists, replace(setting, tied=(((0, 1), 10**9),)))
    assert shared.step_s - plain.step_s == pytest.approx(1.0, rel=1e-6)
    assert {link.what for link in shared.critical_path} >= {"sync"}
    # The last stage is through first; until the first stage is, there is nothing to sum.
    assert shared.lanes[1].idle * shared.step_s == pytest.approx(plain.lanes[1].idle * plain.step_s)


# -- links ----------------------------------------------------------------------------------


def _fan_out(targets: Sequence[int], nbytes: int = 10**9) -> Simulation:
    """Stage 0 sends one value to each of `targets` at once."""
    n = len(targets) + 1
    edges = tuple(Edge(f"x{t}", 0, (t,), False, nbytes) for t in range(1, n))
    io = StageIO(n, tuple(range(n)), edges, (False,) * n)
    lists = compile_schedule("gpipe", io, 1)
    cost = StageCost(1.0, 0.0, 0.0, 0.0)
    return simulate_lists(lists, setting_for(io, 1, one_device_nodes(n, Link(1e9, 0.0)), cost))


def test_two_transfers_through_one_port_take_twice_as_long() -> None:
    assert _fan_out([1]).step_s == pytest.approx(1 + 1 + 1)
    assert _fan_out([1, 2]).step_s == pytest.approx(1 + 2 + 1)


def test_messages_of_one_pair_arrive_one_after_the_other() -> None:
    edges = tuple(Edge(f"x{i}", 0, (1,), False, 10**9) for i in range(2))
    io = StageIO(2, (0, 1), edges, (False, False))
    lists = compile_schedule("gpipe", io, 1)
    cost = StageCost(1.0, 0.0, 0.0, 0.0)
    found = simulate_lists(lists, setting_for(io, 1, one_device_nodes(2, Link(1e9, 0.0)), cost))
    assert [m.arrived for m in found.messages()] == pytest.approx([2.0, 3.0])


def test_a_clock_shares_in_proportion_and_catches_up() -> None:
    clock = FluidClock(1)
    ended: dict[str, float] = {}
    for name, work in (("short", 1.0), ("long", 3.0)):
        clock.begin(work, ((0, FULL),), lambda n: ended.__setitem__(n, clock.now), name)
    clock.run()
    assert ended == pytest.approx({"short": 2.0, "long": 4.0})


def test_bytes_sent_are_those_of_the_edges() -> None:
    found, _, io = simulated("1f1b", 3, 5, nbytes=1000, across=Link(1e6, 0.0))
    assert sum(link.nbytes for link in found.links) == 2 * 5 * sum(e.nbytes for e in io.edges)
    assert sum(m.nbytes for m in found.messages()) == sum(link.nbytes for link in found.links)
    busy = {link.device: link.busy * found.step_s for link in found.links}
    assert busy == pytest.approx({0: 0.005, 1: 0.01, 2: 0.005})


@settings(max_examples=examples(10, 30), deadline=None)
@given(
    schedule=st.sampled_from(sorted(schedule_names())),
    ranks=st.integers(2, 4),
    microbatches=st.integers(1, 6),
    bandwidth=st.floats(1, 1e4),
    faster=st.floats(1, 100),
)
def test_a_faster_network_is_never_slower_in_a_chain(
    schedule: str, ranks: int, microbatches: int, bandwidth: float, faster: float
) -> None:
    slow, *_ = simulated(schedule, ranks, microbatches, across=Link(bandwidth, 0.0), nbytes=1000)
    fast, *_ = simulated(
        schedule, ranks, microbatches, across=Link(bandwidth * faster, 0.0), nbytes=1000
    )
    assert fast.step_s <= slow.step_s * (1 + 1e-9)


# -- cores ----------------------------------------------------------------------------------


def test_four_ranks_on_two_cores_take_twice_as_long() -> None:
    io = StageIO(1, (0,), (), (False,))
    lists = compile_schedule("1f1b", io, 2)
    cluster = Cluster.virtual(1, 4, "CPU")
    setting = replace(setting_for(io, 2, cluster), meshes=(MeshSlice((0, 1, 2, 3), (4,)),))
    own = simulate_lists(lists, setting)
    shared = simulate_lists(lists, replace(setting, cores=2))
    idle = own.step_s - 6  # NORM
    assert shared.step_s - idle == pytest.approx(12)


def test_a_pipeline_on_one_core_fills_its_bubbles() -> None:
    io = chain(4, 4)
    lists = compile_schedule("gpipe", io, 4)
    setting = setting_for(io, 4, Cluster.virtual(1, 4, "CPU", inside=FREE))
    assert simulate_lists(lists, setting).step_s == pytest.approx(3 * 7, rel=1e-3)
    one = simulate_lists(lists, replace(setting, cores=1))
    assert one.step_s == pytest.approx(3 * 4 * 4, rel=1e-3)


def test_no_cores_is_refused() -> None:
    io = StageIO(1, (0,), (), (False,))
    setting = setting_for(io, 1, one_device_nodes(1), cores=0)
    with pytest.raises(ClusterError, match="cores"):
        simulate_lists(compile_schedule("1f1b", io, 1), setting)


# -- replicas on unequal devices ------------------------------------------------------------


def test_replicas_on_unequal_devices_go_their_own_pace_until_they_meet() -> None:
    """Each of the two slow devices holds another stage of another replica."""
    io = chain(2, 2)
    lists = compile_schedule("gpipe", io, 3)
    fast, slow = Cluster.virtual(1, 2, "H100"), Cluster.virtual(1, 2, "A100")
    cluster = Cluster((replace(fast.nodes[0], name="a"), replace(slow.nodes[0], name="b")))
    twice = StageCost(2.0, 4.0, 2.0, 2.0)
    setting = replace(
        setting_for(io, 3, cluster, twice),
        meshes=(MeshSlice((0, 2), (2,)), MeshSlice((3, 1), (2,))),
        replica_costs={(0, 0): UNIT, (1, 1): UNIT},
    )
    found = simulate_lists(lists, setting)
    assert [lane.replica for lane in found.lanes] == [0, 1, 0, 1]
    both_slow = simulate_lists(lists, replace(setting, replica_costs={}))
    assert found.step_s < both_slow.step_s


# -- memory ---------------------------------------------------------------------------------


@settings(max_examples=examples(8, 25), deadline=None)
@given(
    schedule=st.sampled_from(sorted(schedule_names())),
    ranks=st.integers(1, 4),
    chunks=st.integers(1, 2),
    microbatches=st.integers(1, 7),
)
def test_saved_bytes_peak_as_the_lists_say(
    schedule: str, ranks: int, chunks: int, microbatches: int
) -> None:
    found, lists, io = simulated(schedule, ranks, microbatches, chunks=chunks)
    peaks = peak_saved_per_stage(lists, [100] * io.n_stages, [60] * io.n_stages)
    ours = {s: n for lane in found.memory for s, n in lane.saved_peak.items()}
    assert ours == dict(enumerate(peaks))
    for lane in found.memory:
        assert not _left(lane)
        assert lane.held.max() == lane.peak_bytes == sum(lane.peak_parts.values())


def _left(lane: MemoryTimeline) -> dict[str, int]:
    """What moves and is still held at the end of a step."""
    return {n: int(row[-1]) for n, row in zip(MOVING, lane.moving, strict=True) if row[-1]}


def test_gradients_exist_from_the_first_backward_on() -> None:
    cost = replace(UNIT, gradient_bytes=1000, saved_bytes=500)
    found, *_ = simulated("gpipe", 1, 2, costs=cost)
    (timeline,) = found.memory
    assert _left(timeline) == {"gradients": 1000}
    gradients = timeline.moving[MOVING.index("gradients")]
    forward = timeline.times < 2 * UNIT.forward_s
    assert set(gradients[forward & (timeline.times > 0.0)]) == {0}
    assert timeline.peak_bytes == 2 * 500 + 1000


def test_a_value_that_is_an_edge_and_saved_counts_once() -> None:
    alone, *_ = simulated("gpipe", 2, 3, nbytes=40)
    both = [replace(UNIT, saved_edges=frozenset({"x0"})), UNIT]
    shared, *_ = simulated("gpipe", 2, 3, costs=both, nbytes=40)
    first, other = shared.memory[0], alone.memory[0]
    assert (first.moving[0] >= 0).all()
    assert first.saved_peak == other.saved_peak

    def held(lane: MemoryTimeline) -> set[int]:
        """Bytes at all times within the first microbatch's forward and sending."""
        return set(lane.moving[:2].sum(axis=0)[lane.times < 1.5].tolist())

    assert max(held(first)) == 100
    assert max(held(other)) == 140


def test_memory_is_made_of_what_is_resident_and_what_moves() -> None:
    cost = replace(
        UNIT, param_bytes=1000, gradient_bytes=1000, optimizer_bytes=2000, buffer_bytes=10,
        forward_peak_bytes=150, backward_peak_bytes=70,
    )  # fmt: skip
    found, *_ = simulated("gpipe", 1, 3, costs=cost)
    (timeline,) = found.memory
    assert timeline.peak_bytes == 4010 + 300 + 70
    assert timeline.peak_parts == {
        "parameters": 1000, "gradients": 0, "optimizer": 2000, "buffers": 10, "overhead": 0,
        "saved": 300, "edges": 0, "transit": 0, "transient": 1070,
    }  # fmt: skip  # the first backward, in which the gradients come to be


def test_a_value_that_arrives_early_takes_memory_from_then_on() -> None:
    late = [replace(UNIT, forward_s=0.1), replace(UNIT, forward_s=10.0)]
    found, *_ = simulated("gpipe", 2, 4, costs=late, nbytes=1000)
    # All four microbatches are there while the first is computed.
    assert found.memory[1].peak_parts["transit"] == 3000


# -- the step as a whole --------------------------------------------------------------------


@settings(max_examples=examples(8, 25), deadline=None)
@given(
    schedule=st.sampled_from(sorted(schedule_names())),
    ranks=st.integers(1, 4),
    chunks=st.integers(1, 2),
    microbatches=st.integers(1, 6),
    bandwidth=st.floats(10, 1e5),
)
def test_shares_and_critical_path_add_up(
    schedule: str, ranks: int, chunks: int, microbatches: int, bandwidth: float
) -> None:
    found, *_ = simulated(
        schedule, ranks, microbatches, chunks=chunks, across=Link(bandwidth, 0.01), nbytes=500
    )
    assert sum(link.seconds for link in found.critical_path) == pytest.approx(found.step_s)
    assert sum(found.path_shares().values()) == pytest.approx(1.0)
    for i, lane in enumerate(found.lanes):
        assert lane.compute + lane.communication + lane.idle == pytest.approx(1.0)
        spans = found.spans(i)
        assert spans[0].start == 0.0
        assert spans[-1].end == pytest.approx(found.step_s)
        assert all(a.end == b.start for a, b in pairwise(spans))


def test_lists_that_deadlock_are_told() -> None:
    io = chain(2, 2)
    lists = compile_schedule("gpipe", io, 1)
    broken = [[now for now in lists[0] if now.kind is not Kind.SEND_FORWARD], lists[1]]
    with pytest.raises(ScheduleError, match="deadlock"):
        simulate_lists(broken, setting_for(io, 1, one_device_nodes(2)))


# -- whole plans ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo() -> dict[str, OpGraph]:
    found = {}
    for name in ("gpt", "cnn", "t5"):
        case = models.case(name)
        found[name] = capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)
    return found


@pytest.mark.parametrize("name", ["gpt", "cnn", pytest.param("t5", marks=pytest.mark.thorough)])
def test_random_plans_play_to_their_end(zoo: dict[str, OpGraph], name: str) -> None:
    cluster = Cluster.local(4)
    for seed in range(examples(1, 2)):
        plan = random_plan(zoo[name], cluster, seed=seed)
        lowered = lower_plan(zoo[name], plan)
        found = simulate(zoo[name], plan, cluster, lowered=lowered)
        assert found.step_s > 0.0
        assert found.samples_per_s == pytest.approx(8 / found.step_s)
        sent = sum(
            sum(group != lowered.io.rank_of[e.source] for group in {
                lowered.io.rank_of[t] for t in e.targets
            }) * e.nbytes * (1 + e.differentiable)
            for e in lowered.io.edges
        ) * plan.microbatches * plan.replicas  # fmt: skip
        assert sum(m.nbytes for m in found.messages()) == sent
        for lane in found.memory:
            assert set(_left(lane)) <= {"gradients"}
            assert lane.moving.min() >= 0


def test_random_shardings_play_on_unequal_meshes(zoo: dict[str, OpGraph]) -> None:
    cluster = Cluster.virtual(2, 4, "A100-80")
    for seed in range(examples(1, 2)):
        plan = random_plan(zoo["gpt"], Cluster.virtual(1, 2, "A100-80"), seed=seed)
        plan = replace(plan, cluster=cluster.shape)
        plan = random_sharding(zoo["gpt"], plan, cluster, seed=seed)
        found = simulate(zoo["gpt"], plan, cluster)
        assert found.step_s > 0.0
        assert sum(link.seconds for link in found.critical_path) == pytest.approx(found.step_s)


def test_stages_of_one_rank_that_share_a_parameter_hold_it_once(zoo: dict[str, OpGraph]) -> None:
    """The zoo's GPT ties its output layer to its embedding."""
    graph, cluster = zoo["gpt"], Cluster.local(1)
    plans = [random_plan(graph, cluster, seed=1, stages=n, replicas=1) for n in (1, 3)]
    (one,), (many,) = (simulate(graph, plan, cluster).memory for plan in plans)
    for part in ("parameters", "optimizer"):
        assert many.resident[part] == one.resident[part]
    assert _left(many) == _left(one)


def test_figures_say_what_they_rest_on(zoo: dict[str, OpGraph]) -> None:
    cluster = Cluster.local(2)
    plan = random_plan(zoo["cnn"], cluster, seed=0)
    tables = simulate(zoo["cnn"], plan, cluster)
    assert not tables.calibrated
    assert "device table" in tables.source
    measured = replace(table_calibration(cluster), measured=True, note="measured here")
    found = simulate(zoo["cnn"], plan, cluster, calibration=measured)
    assert found.calibrated
    assert found.source == "measured here"
    with pytest.raises(ConfigError, match="analytic"):
        simulate(zoo["cnn"], plan, cluster, cost="guess")
