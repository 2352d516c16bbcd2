"""Transfers between stages on unequal meshes: whole schedules on threads, without programs."""

from __future__ import annotations

import threading
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch

from raypar.comm.group import Group, TensorSpec, Work
from raypar.comm.local import LocalWorld
from raypar.comm.reshard import ALIKE, LinkCosts
from raypar.schedules.compile import compile_schedule
from raypar.schedules.instructions import RECV, SEND, Instruction
from raypar.schedules.io import Edge, StageIO
from raypar.sharding.spec import ShardingSpec
from raypar.stages.spec import Axes, RankSpec, coordinate_of
from raypar.stages.transfers import Transfers, posting_plan
from tests.stages.fakes import fake_specs

SHAPE = (6, 12, 8)
MICROBATCHES = 3
SLOW_ACROSS = LinkCosts(0.0, 1.0, 0.0, 1e-3)

Mesh = tuple[tuple[int, ...], str]  # sizes of the inner axes, and how every edge lies on them


def specs_of(meshes: Sequence[Mesh], replicas: int, schedule: str) -> list[RankSpec]:
    """Ranks of a pipeline with a skip from its first to its last stage, one stage a mesh."""
    n = len(meshes)
    edges = [Edge(f"e{i}", i, (i + 1,), True, 1) for i in range(n - 1)]
    edges.append(Edge("skip", 0, tuple(range(1, n)), False, 1))
    io = StageIO(n, tuple(range(n)), tuple(edges), (False,) * n)
    lists = compile_schedule(schedule, io, MICROBATCHES)
    axes: list[Axes] = [
        (("data", replicas), *((f"a{i}", size) for i, size in enumerate(sizes)))
        for sizes, _ in meshes
    ]
    counts = [replicas * int(torch.tensor(sizes).prod()) for sizes, _ in meshes]
    bases = tuple(accumulate(counts[:-1], initial=0))
    template = fake_specs(1)[0]
    return [
        replace(
            template,
            rank=bases[group] + position,
            world=sum(counts),
            group=group,
            replica=position * replicas // counts[group],
            replicas=replicas,
            microbatches=MICROBATCHES,
            instructions=tuple(lists[group]),
            posts=posting_plan(lists, group),
            edges=tuple(edges),
            rank_group_of=tuple(range(n)),
            shapes={edge.name: (SHAPE, "float64") for edge in edges},
            meshes=tuple(axes),
            bases=bases,
            edge_specs={
                (edge.name, g): ShardingSpec.parse(meshes[g][1])
                for edge in edges
                for g in (edge.source, *edge.targets)
            },
        )
        for group in range(n)
        for position in range(counts[group])
    ]


def local_value(spec: RankSpec, now: Instruction) -> torch.Tensor:
    """What this rank holds of the value (or gradient) that an instruction moves.

    Every value differs: by name, microbatch, replica and direction.
    """
    assert now.value is not None
    key = (now.value, now.microbatch, spec.replica, now.kind.value[1])
    generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
    value = torch.rand(SHAPE, dtype=torch.float64, generator=generator)
    sizes = tuple(size for _, size in spec.axes[1:])
    held = spec.edge_specs[now.value, spec.group].ranges(
        SHAPE, sizes, coordinate_of(spec.rank - spec.bases[spec.group], spec.axes)[1:]
    )
    for dim, ranges in enumerate(held):
        rows = torch.cat([torch.arange(start, stop) for start, stop in ranges])
        value = value.index_select(dim, rows)
    return value


class Listening:
    """A rank's world that writes down the order of its messages."""

    def __init__(self, world: Group, log: dict[tuple[int, int, str], list[str]]) -> None:
        self._world = world
        self._log = log
        self.rank = world.rank

    def isend(self, tensor: torch.Tensor, to: int, tag: str) -> Work:
        self._log[self.rank, to, "sent"].append(tag)
        return self._world.isend(tensor, to, tag)

    def irecv(self, spec: TensorSpec, source: int, tag: str) -> Work:
        self._log[source, self.rank, "posted"].append(tag)
        return self._world.irecv(spec, source, tag)

    def subgroup(self, ranks: Sequence[int], name: str) -> Group | None:
        return self._world.subgroup(ranks, name)


def walk(spec: RankSpec, world: Any, costs: LinkCosts) -> int:
    """Walks an instruction list twice as the interpreter does; returns how much was received."""
    transfers = Transfers(spec, world, costs)
    received = 0
    for _ in range(2):
        for position, now in enumerate(spec.instructions):
            transfers.post(position)
            if now.kind in RECV:
                found = transfers.receive(now)
                assert found.is_contiguous()
                assert torch.equal(found, local_value(spec, now)), f"rank {spec.rank}: {now}"
                received += 1
            elif now.kind in SEND:
                transfers.send(now, local_value(spec, now))
        transfers.finish()
    return received


MESHES: dict[str, list[Mesh]] = {
    "pair to one": [((2,), "S1"), ((1,), "R")],
    "turned": [((1, 2), "R,S2"), ((2, 1), "S0,R")],
    "equal meshes, other cut": [((2,), "S0"), ((2,), "S1/3")],
    "gathered": [((2,), "R"), ((4,), "R")],
    "three stages": [((2,), "R"), ((1, 2), "S1,S1"), ((3,), "S0")],
    "nested": [((2, 2), "S1,S1"), ((2, 2), "R,S1/3")],
    "no inner axes": [((), ""), ((2,), "S2")],
}


@pytest.mark.parametrize("costs", [ALIKE, SLOW_ACROSS], ids=["alike", "slow across"])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", list(MESHES))
def test_values_and_gradients_arrive_as_they_lie(
    name: str, replicas: int, costs: LinkCosts
) -> None:
    specs = specs_of(MESHES[name], replicas, "1f1b")
    world = LocalWorld(len(specs), timeout_s=20.0)
    log: dict[tuple[int, int, str], list[str]] = defaultdict(list)
    received: list[int] = [0] * len(specs)
    errors: list[BaseException] = []

    def work(spec: RankSpec) -> None:
        try:
            received[spec.rank] = walk(spec, Listening(world.group(spec.rank), log), costs)
        except BaseException as error:
            errors.append(error)
            world.abort(str(error))

    threads = [threading.Thread(target=work, args=(spec,)) for spec in specs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    wanted = [2 * sum(now.kind in RECV for now in spec.instructions) for spec in specs]
    assert received == wanted
    assert all(wanted)
    pairs = {(a, b) for a, b, _ in log}
    for a, b in pairs:  # NCCL matches the messages of a pair of ranks by order alone
        assert log[a, b, "sent"] == log[a, b, "posted"]
