"""Random shardings: every strategy of every op has to train exactly like the unsplit model."""

from __future__ import annotations

import dataclasses
import math
import operator
import random
from collections.abc import Sequence

from raypar.errors import PlanError
from raypar.fit import check_plan, stage_ranges
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import DATA, MemoryPolicy, MeshSlice, Plan, StagePlan
from raypar.sharding.blocks import annotate_blocks
from raypar.sharding.strategies import strategies

AXES = ("x", "y", "z", "u", "v", "w")
"""Names that meshes' inner axes get, in order."""

MESHES: tuple[tuple[int, ...], ...] = ((), (2,), (4,), (2, 2), (2, 2, 2))


def random_sharding(
    graph: OpGraph,
    plan: Plan,
    cluster: Cluster,
    *,
    seed: int = 0,
    meshes: Sequence[tuple[int, ...]] = MESHES,
    share: float = 0.8,
    zero: Sequence[int] = (0, 1, 2, 3),
) -> Plan:
    """Gives every rank group of a plan a random mesh, and its ops random strategies.

    The replicas stay; the axes that are drawn come on top of them.

    Args:
        graph: The captured model.
        plan: A plan whose meshes have only the ``data`` axis (`raypar.testing.random_plan`).
        cluster: Has the devices for it.
        seed: Equal seeds give equal plans.
        meshes: Inner mesh shapes to draw from; one that does not fit into what the cluster has
            left is not drawn.
        share: Probability that an op that has a choice does not run whole on every rank.
        zero: ZeRO levels to draw from.

    Raises:
        PlanError: No mesh of `meshes` fits the cluster.
    """
    rng = random.Random(f"raypar random sharding {seed}")
    groups = max(group for group, _ in plan.schedule.placement) + 1
    shapes = _draw(rng, meshes, groups, plan.replicas, cluster.n_devices)
    devices = iter(rng.sample(range(cluster.n_devices), cluster.n_devices))
    slices = []
    for shape in shapes:
        taken = tuple(next(devices) for _ in range(plan.replicas * math.prod(shape)))
        slices.append(MeshSlice(taken, (plan.replicas, *shape), (DATA, *AXES[: len(shape)])))
    clean = graph.local(plan.local_batch)
    annotate_blocks(clean.graph)
    stages: list[StagePlan] = []
    for stage, (first, end), (group, _) in zip(
        plan.stages, stage_ranges(plan, graph), plan.schedule.placement, strict=True
    ):
        sizes = [size for _, size in slices[group].inner]
        chosen = {}
        for node in clean.ops[first:end]:
            if node.target is operator.getitem or not sizes:
                continue
            options = strategies(node, sizes)
            if len(options) > 1 and rng.random() < share:
                chosen[node.meta["id"]] = str(rng.choice(options[1:]))
        memory = MemoryPolicy(stage.memory.recompute, rng.choice(zero))
        stages.append(
            dataclasses.replace(stage, mesh=slices[group], sharding=chosen, memory=memory)
        )
    result = dataclasses.replace(
        plan,
        stages=tuple(stages),
        cluster=cluster.shape,
        planner=f"{plan.planner} + random_sharding(seed={seed})",
    )
    check_plan(result, graph, cluster)
    return result


def _draw(
    rng: random.Random,
    meshes: Sequence[tuple[int, ...]],
    groups: int,
    replicas: int,
    devices: int,
) -> list[tuple[int, ...]]:
    """A mesh for every rank group, so that what is left is enough for the groups to come."""
    least = min(math.prod(shape) for shape in meshes) * replicas
    if least * groups > devices:
        raise PlanError(
            f"{groups} rank groups × {replicas} replicas on the smallest of the meshes "
            f"{list(meshes)} need {least * groups} devices, the cluster has {devices}"
        )
    found = []
    for at in range(groups):
        free = devices - least * (groups - at - 1)
        fitting = [shape for shape in meshes if math.prod(shape) * replicas <= free]
        found.append(rng.choice(fitting))
        devices -= math.prod(found[-1]) * replicas
    return found
