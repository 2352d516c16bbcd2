"""Values between meshes: the plans as data, and run over threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.comm.group import Group
from raypar.comm.local import LocalWorld
from raypar.comm.reshard import ALIKE, Layout, LinkCosts, ReshardPlan, reshard_plan
from raypar.comm.resharder import ReplicaGroups, Resharder, ReshardSum
from raypar.errors import CommError
from raypar.sharding.spec import ShardingSpec
from tests._tiers import examples

from .conftest import Processes

MESHES = [(1,), (2,), (3,), (4,), (2, 2), (1, 2), (2, 1), (4, 2), (3, 2), (2, 2, 2)]
SLOW_ACROSS = LinkCosts(across_latency_s=0.0, across_s_per_byte=1.0, inside_s_per_byte=1e-3)
LATENCY = LinkCosts(across_s_per_byte=1e-15, inside_latency_s=1e-9)
COSTS = [ALIKE, SLOW_ACROSS, LATENCY]


def specs_for(shape: Sequence[int], mesh: Sequence[int]) -> list[ShardingSpec]:
    """Every sharding into cuts (in blocks too) and whole axes that fits."""
    states = ["R", *(f"S{d}" for d in range(len(shape))), *(f"S{d}/3" for d in range(len(shape)))]
    found = [ShardingSpec()]
    for _ in mesh:
        found = [ShardingSpec([*spec, state]) for spec in found for state in states]
    return [spec for spec in found if spec.fits(shape, mesh)]


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], first: int) -> Layout:
    mesh = draw(st.sampled_from(MESHES))
    return Layout(draw(st.sampled_from(specs_for(shape, mesh))), mesh, first)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], Layout, Layout]:
    """A shape, and where it lies and is wanted: on meshes apart, or on meshes that overlap."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 5, 12, 24, 36]), max_size=3)))
    source = draw(layouts(shape, 0))
    apart = draw(st.booleans())
    return shape, source, draw(layouts(shape, len(source.ranks) if apart else 0))


def part_of(value: np.ndarray[Any, Any], layout: Layout, rank: int) -> np.ndarray[Any, Any]:
    """What a rank holds, by plain indexing."""
    for dim, ranges in enumerate(layout.parts(value.shape)[rank]):
        index = np.concatenate([np.arange(start, stop) for start, stop in ranges])
        value = value.take(index, axis=dim)
    return value


def on_ranks(size: int, job: Callable[[Group], Any]) -> list[Any]:
    """Runs a function on every rank of a world of threads."""
    world = LocalWorld(size, timeout_s=20.0)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = job(world.group(rank))
        except BaseException as error:
            errors.append(error)
            world.abort(str(error))

    threads = [threading.Thread(target=work, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def check_runs(plan: ReshardPlan) -> None:
    """Runs a plan on threads: every target rank must get exactly its part."""
    value = np.arange(np.prod(plan.shape, dtype=int), dtype=np.float64).reshape(plan.shape)

    def job(group: Group) -> torch.Tensor | None:
        mine = group.rank in plan.source.ranks
        local = torch.tensor(part_of(value, plan.source, group.rank)) if mine else None
        return Resharder(plan, group, torch.float64).run(local, "x")

    size = max(plan.source.ranks[-1], plan.target.ranks[-1]) + 1
    for rank, found in enumerate(on_ranks(size, job)):
        if rank not in plan.target.ranks:
            assert found is None
            continue
        assert found.is_contiguous()
        np.testing.assert_array_equal(found.numpy(), part_of(value, plan.target, rank))


@settings(max_examples=examples(20, 60))
@given(pairs(), st.sampled_from(COSTS))
def test_every_receiver_gets_its_part(
    case: tuple[tuple[int, ...], Layout, Layout], costs: LinkCosts
) -> None:
    shape, source, target = case
    check_runs(reshard_plan(shape, 8, source, target, costs))


@settings(max_examples=examples(50, 200))
@given(pairs(), st.sampled_from(COSTS))
def test_tiles_fill_what_is_sent_once(
    case: tuple[tuple[int, ...], Layout, Layout], costs: LinkCosts
) -> None:
    shape, source, target = case
    plan = reshard_plan(shape, 4, source, target, costs)
    value = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    for rank in target.ranks:
        sent = plan.sent(rank)
        tiles = [t for t in plan.tiles if t.receiver == rank]
        if sent is None:
            assert not tiles
            continue
        filled = np.zeros(sent, dtype=int)
        got = np.full(sent, -1)
        for tile in tiles:
            into = tuple(slice(*ends) for ends in tile.target)
            held = part_of(value, source, tile.sender)
            filled[into] += 1
            got[into] = held[tuple(slice(*ends) for ends in tile.source)]
        assert (filled == 1).all()
        wanted = part_of(value, target, rank)
        if plan.method == "all_gather":
            group = plan.group_of(rank)
            assert group is not None
            start, stop = plan.windows()[group.index(rank)]
            wanted = wanted.take(np.arange(start, stop), axis=plan.dim)
        np.testing.assert_array_equal(got, wanted)
    assert plan.volume() + plan.local_volume() >= plan.lower_bound()
    if source.ranks[-1] < target.first:
        assert plan.lower_bound() == 4 * value.size
        assert plan.volume() >= plan.lower_bound()


def test_across_slow_links_every_element_crosses_once_and_senders_are_even() -> None:
    shape = (64, 48, 96)
    seen = set()
    for mesh, other in [((2, 2), (4, 2)), ((4,), (1,)), ((2, 4), (4, 2)), ((1,), (2, 2))]:
        for source in specs_for(shape, mesh)[::3]:
            for target in specs_for(shape, other)[::3]:
                plan = reshard_plan(
                    shape, 4, Layout(source, mesh), Layout(target, other, 16), SLOW_ACROSS
                )
                assert plan.volume() <= 1.1 * plan.lower_bound(), (source, target)
                assert plan.imbalance() <= 1.25, (source, target, plan.imbalance())
                seen.add(plan.method)
    assert seen == {"direct", "all_gather"}


@pytest.mark.parametrize("spec", ["S0", "R", "S1/3", "S0/2"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_equal_meshes_exchange_position_by_position(spec: str, n: int) -> None:
    layout = ShardingSpec.parse(spec)
    plan = reshard_plan((16, 24), 4, Layout(layout, (n,)), Layout(layout, (n,), n))
    assert plan.method == "direct"
    assert [(t.sender, t.receiver) for t in plan.tiles] == [(r, n + r) for r in range(n)]
    local = layout.local_shape((16, 24), (n,))
    assert all(t.shape == local for t in plan.tiles)


def test_a_whole_part_is_neither_copied_nor_cut() -> None:
    spec = ShardingSpec.parse("S1/3")
    plan = reshard_plan((4, 12), 4, Layout(spec, (2,)), Layout(spec, (2,), 2))
    sent = torch.ones(4, 6)
    memory = []

    class Spy(Group):  # only what a sender uses
        rank = 0

        def isend(self, tensor: torch.Tensor, to: int, tag: str) -> Any:
            memory.append((to, tensor.data_ptr()))

    Spy.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    group: Group = Spy()  # type: ignore[abstract]
    Resharder(plan, group, torch.float32).send(sent, "x")
    assert memory == [(2, sent.data_ptr())]


def test_same_mesh_and_sharding_moves_nothing() -> None:
    at = Layout(ShardingSpec.parse("S0,R"), (2, 2))
    plan = reshard_plan((8, 4), 8, at, at)
    assert plan.volume() == plan.lower_bound() == 0
    assert not plan.messages
    check_runs(plan)


def test_replicated_senders_share_the_work() -> None:
    whole, cut = ShardingSpec.parse("R"), ShardingSpec.parse("S0")
    big = 1 << 20
    plan = reshard_plan((big,), 4, Layout(whole, (4,)), Layout(whole, (1,), 4))
    assert plan.imbalance() == 1.0
    assert len(plan.messages) == 4
    tiny = reshard_plan((4,), 4, Layout(whole, (4,)), Layout(whole, (1,), 4))
    assert len(tiny.messages) == 1  # latency: one message is cheaper than four
    scattered = reshard_plan((big,), 4, Layout(cut, (2,)), Layout(whole, (4,), 2), SLOW_ACROSS)
    assert scattered.method == "all_gather"
    assert scattered.volume() == 4 * big
    assert scattered.replicas == ((2, 3, 4, 5),)
    assert scattered.local_volume() == 3 * 4 * big


def test_tiny_values_are_broadcast_where_inside_is_near() -> None:
    whole = ShardingSpec.parse("R")
    plan = reshard_plan((), 8, Layout(whole, (1,)), Layout(whole, (8,), 1), LATENCY)
    assert plan.method == "broadcast"
    assert len(plan.messages) == 1
    check_runs(plan)


def test_senders_of_the_same_node_come_first() -> None:
    whole = ShardingSpec.parse("R")
    nodes = (0, 1, 1, 0)
    plan = reshard_plan((64,), 4, Layout(whole, (2,)), Layout(whole, (2,), 2), LATENCY, nodes)
    assert set(plan.messages) == {(1, 2), (0, 3)}


def test_plans_move_to_other_ranks() -> None:
    spec = ShardingSpec.parse("S0,R")
    plan = reshard_plan(
        (1 << 16,), 4, Layout(spec, (2, 1), 0), Layout(spec, (1, 2), 4), SLOW_ACROSS
    )
    again = reshard_plan(
        (1 << 16,), 4, Layout(spec, (2, 1), 2), Layout(spec, (1, 2), 6), SLOW_ACROSS
    )
    assert plan.method == "all_gather"
    assert plan.moved(2, 2) == again
    assert plan.moved(2, 2).replicas == again.replicas == ((6, 7),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_meshes", [1, 2, 3])
def test_sums_over_meshes_are_bitwise_equal(dtype: torch.dtype, n_meshes: int) -> None:
    shape = (6, 8)
    all_layouts = [
        Layout(ShardingSpec.parse("S0,R"), (2, 2), 0),
        Layout(ShardingSpec.parse("S1"), (2,), 4),
        Layout(ShardingSpec.parse("R"), (1,), 6),
    ]
    used = all_layouts[:n_meshes]
    torch.manual_seed(0)
    summands = [torch.randn(shape).to(dtype) for _ in used]

    def held(value: torch.Tensor, layout: Layout, rank: int) -> torch.Tensor:
        return torch.tensor(part_of(value.float().numpy(), layout, rank)).to(value.dtype)

    def job(group: Group) -> torch.Tensor | None:
        groups = ReplicaGroups(group)
        total = ReshardSum(shape, dtype, used, group, groups=groups, costs=SLOW_ACROSS)
        for at, summand in zip(used, summands, strict=True):
            if group.rank in at.ranks:
                return total.run(held(summand, at, group.rank), "w")
        with pytest.raises(CommError, match="holds no summand"):
            total.run(summands[0], "w")
        return None

    expected = summands[0].float()
    for summand in summands[1:]:
        expected = expected + summand.float()
    expected = expected.to(dtype)
    results = on_ranks(8, job)
    for at in used:
        for rank in at.ranks:
            assert torch.equal(results[rank], held(expected, at, rank))
    assert results[7] is None


def _over_sockets(group: Group) -> bool:
    """One to two with a local gather, then two to one; module-level, for other processes."""
    whole, cut = ShardingSpec.parse("R"), ShardingSpec.parse("S0/2")
    value = torch.arange(48.0).reshape(8, 6)
    one, two = Layout(whole, (1,), 0), Layout(whole, (2,), 1)
    there = reshard_plan((8, 6), 4, one, two, SLOW_ACROSS)
    assert there.method == "all_gather"
    found = Resharder(there, group, torch.float32).run(value if group.rank == 0 else None, "a")
    back = reshard_plan((8, 6), 4, Layout(cut, (2,), 1), one)
    rows = [[0, 1, 4, 5], [2, 3, 6, 7]]
    mine = None if found is None else found[rows[group.rank - 1]]
    again = Resharder(back, group, torch.float32).run(mine, "b")
    result = again if group.rank == 0 else found
    return result is not None and torch.equal(value, result)


def test_between_processes(processes: Processes) -> None:
    assert processes.run(_over_sockets, 3, 20.0) == [True] * 3


def test_misuse_is_told() -> None:
    cut, whole = ShardingSpec.parse("S0"), ShardingSpec.parse("R")
    with pytest.raises(CommError, match=r"target sharding 'S0' does not divide shape \(5, 2\)"):
        reshard_plan((5, 2), 4, Layout(whole, (2,)), Layout(cut, (2,), 2))
    with pytest.raises(CommError, match=r"holds 'P'.*for example to 'R'"):
        reshard_plan((4,), 4, Layout(ShardingSpec.parse("P"), (2,)), Layout(cut, (2,), 2))
    with pytest.raises(CommError, match=r"1 states.*2 axes.*'R,R'"):
        reshard_plan((4,), 4, Layout(cut, (2, 2)), Layout(cut, (2,), 4))
    plan = reshard_plan((4,), 4, Layout(cut, (2,)), Layout(whole, (1,), 2))
    group = LocalWorld(3).group(0)
    with pytest.raises(CommError, match="itemsize=8"):
        Resharder(plan, group, torch.float64)
    with pytest.raises(CommError, match=r"rank 0 holds shape \(2,\).*given shape \(4,\)"):
        Resharder(plan, group, torch.float32).run(torch.ones(4), "x")
    with pytest.raises(CommError, match="was given nothing"):
        Resharder(plan, group, torch.float32).run(None, "x")
