"""Runs a lowered graph on threads, one for each rank, and puts the results together again."""

from __future__ import annotations

import itertools
import operator
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from raypar.comm.local import LocalWorld
from raypar.comm.mesh import MeshGroups
from raypar.graph.replay import replay
from raypar.sharding.collectives import join, set_context
from raypar.sharding.lower import lower
from raypar.sharding.rules.base import Strategy
from raypar.sharding.spec import P, ShardingSpec, is_shard
from raypar.sharding.strategies import strategies, whole


@dataclass
class Result:
    """Loss and gradients by placeholder id."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def random_strategies(
    graph: fx.Graph, mesh: Sequence[int], seed: int, share: float = 0.8
) -> dict[fx.Node, Strategy]:
    """One strategy for every op."""
    rng = random.Random(seed)
    chosen = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        options = strategies(node, mesh)
        cut = len(options) > 1 and rng.random() < share
        chosen[node] = rng.choice(options[1:]) if cut else whole(node, len(mesh))
    return chosen


def run_whole(graph: fx.Graph, values: Mapping[str, torch.Tensor]) -> Result:
    """One process, autograd."""
    return _run(graph, values)


def _run(graph: fx.Graph, values: Mapping[str, torch.Tensor]) -> Result:
    holders = {n: values[n.meta["id"]] for n in graph.nodes if n.op == "placeholder"}
    holders = {
        n: v.detach().clone().requires_grad_(n.meta["id"].startswith("param:"))
        for n, v in holders.items()
    }
    loss = replay(graph, holders)[0]
    loss.sum().backward()
    grads = {
        n.meta["id"]: torch.zeros_like(v) if v.grad is None else v.grad
        for n, v in holders.items()
        if v.requires_grad
    }
    return Result(loss.detach(), grads)


def run_lowered(
    graph: fx.Graph,
    chosen: Mapping[fx.Node, Strategy],
    axes: Sequence[tuple[str, int]],
    values: Mapping[str, torch.Tensor],
    held: Mapping[str, ShardingSpec],
) -> Result:
    """Every rank on a thread of its own; gradients are joined as their state says."""
    lowered = lower(graph, chosen, axes, held=held)
    sizes = [n for _, n in axes]
    coordinates = list(itertools.product(*map(range, sizes)))
    world = LocalWorld(len(coordinates), timeout_s=30.0)
    worlds = [world.group(i) for i in range(len(coordinates))]
    results: list[Result | None] = [None] * len(coordinates)
    errors: list[BaseException] = []

    def rank(i: int) -> None:
        try:
            set_context(MeshGroups(worlds[i], [tuple(axes)], [0], 0))
            mine = {
                k: _part(v, held.get(k.removeprefix("param:")), sizes, coordinates[i])
                for k, v in values.items()
            }
            results[i] = _run(lowered.graph, mine)
        except BaseException as error:
            errors.append(error)
            worlds[i].abort(repr(error))

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(len(coordinates))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    done = [r for r in results if r is not None]
    for r in done:
        torch.testing.assert_close(r.loss, done[0].loss, rtol=1e-12, atol=1e-12)
    gradients = {}
    for key in done[0].gradients:
        spec = held[key.removeprefix("param:")].gradient()
        gradients[key] = _joined([r.gradients[key] for r in done], spec, sizes)
    return Result(done[0].loss, gradients)


def _part(
    value: torch.Tensor, spec: ShardingSpec | None, sizes: Sequence[int], at: Sequence[int]
) -> torch.Tensor:
    if spec is None:
        return value
    for dim, ranges in enumerate(spec.ranges(value.shape, sizes, at)):
        value = torch.cat([value.narrow(dim, a, b - a) for a, b in ranges], dim)
    return value


def _joined(parts: list[torch.Tensor], spec: ShardingSpec, sizes: Sequence[int]) -> torch.Tensor:
    """The whole of what the ranks of a mesh (row-major) hold, rightmost axis first."""
    for axis in reversed(range(len(sizes))):
        size, state = sizes[axis], spec[axis]
        grouped = [parts[i : i + size] for i in range(0, len(parts), size)]
        if state == P:
            parts = [torch.stack(g).sum(0) for g in grouped]
        elif is_shard(state):
            parts = [join(g, state) for g in grouped]
        else:
            for g in grouped:
                for other in g[1:]:
                    torch.testing.assert_close(other, g[0], rtol=1e-12, atol=1e-12)
            parts = [g[0] for g in grouped]
    return parts[0]
