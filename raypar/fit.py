"""Does a plan fit a graph and a cluster? Every way in which it may not has a message of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from raypar._plan_text import count_of
from raypar.errors import PlanError, RayparError, did_you_mean
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import DATA, RECOMPUTE_POLICIES, MeshSlice, Plan, StagePlan
from raypar.schedules.base import Placement
from raypar.schedules.registry import get_schedule
from raypar.sharding.strategies import pattern_of

_MOST_SAMPLES = 1 << 31  # what is looked for among the divisors of a batch must be found soon


def check_plan(plan: Plan, graph: OpGraph | None = None, cluster: Cluster | None = None) -> None:
    """Checks a plan in itself, then against a graph, then against a cluster.

    Raises:
        PlanError: With what was asked, what was found and what to change.
    """
    _check_alone(plan)
    if graph is not None:
        _check_graph(plan, graph)
    if cluster is not None:
        _check_cluster(plan, cluster)


def stage_ranges(plan: Plan, graph: OpGraph) -> list[tuple[int, int]]:
    """Op positions ``[first, end)`` of every stage.

    Raises:
        PlanError: Unknown ops, or stages that do not cover every op once, in order.
    """
    ranges = []
    expected = 0
    for s, stage in enumerate(plan.stages):
        for key in (stage.first, stage.last):
            if key not in graph.index:
                raise PlanError(
                    f"stages[{s}]: the graph has no op {key!r}.{did_you_mean(key, graph.index)}"
                )
        first, last = graph.index[stage.first], graph.index[stage.last]
        if first != expected or last < first:
            found = graph.ops[expected].id if expected < len(graph.ops) else "the end"
            raise PlanError(
                f"stages[{s}] spans ops {first} to {last}, but the next op to place is {expected} "
                f"({found!r}): stages must cover all {len(graph.ops)} ops once, in order"
            )
        ranges.append((first, last + 1))
        expected = last + 1
    if expected != len(graph.ops):
        raise PlanError(
            f"the last stage ends at op {expected - 1} of {len(graph.ops)}: set its 'last' to "
            f"{graph.ops[-1].id!r}"
        )
    return ranges


def _check_alone(plan: Plan) -> None:
    if not plan.stages:
        raise PlanError("the plan has no stages")
    if plan.microbatches < 1:
        raise PlanError(f"microbatches is {plan.microbatches}; it is at least 1")
    if not 1 <= plan.global_batch <= _MOST_SAMPLES:
        raise PlanError(
            f"global_batch is {plan.global_batch}; it is at least 1 and at most {_MOST_SAMPLES}"
        )
    _check_meshes(plan)
    parts = plan.microbatches * plan.replicas
    if plan.global_batch % parts:
        batch = plan.global_batch
        if batch % plan.replicas:
            near = _nearest_divisor(batch, plan.replicas)
            hint = f"replicas={near} works (search.replicas)"
        else:
            near = _nearest_divisor(batch // plan.replicas, plan.microbatches)
            hint = f"microbatches={near} works (train.microbatches)"
        other = parts * max(1, round(batch / parts))
        raise PlanError(
            f"a global batch of {batch} does not divide into {parts} equal parts, that is "
            f"{count_of(plan.microbatches, 'microbatch')} × {count_of(plan.replicas, 'replica')}; "
            f"{hint}, or a global batch of {other} (data.global_batch)"
        )
    for s, stage in enumerate(plan.stages):
        policy = stage.memory.recompute
        if policy not in RECOMPUTE_POLICIES:
            raise PlanError(
                f"stages[{s}].memory.recompute is {policy!r}; valid are "
                f"{', '.join(RECOMPUTE_POLICIES)}.{did_you_mean(policy, RECOMPUTE_POLICIES)}"
            )
        if stage.memory.zero not in range(4):
            raise PlanError(
                f"stages[{s}].memory.zero is {stage.memory.zero}; valid are 0 (nothing is cut), 1 "
                "(optimizer state), 2 (gradients too), 3 (parameters too)"
            )
        if stage.sharding and not stage.mesh.inner:
            raise PlanError(
                f"stages[{s}].sharding is set, but its mesh has only a data axis: replicas need "
                "no sharding. Give the mesh another axis, for example shape "
                f"(1, {len(stage.mesh.devices)}), axes ('data', 'x'), or leave sharding empty"
            )
    _check_placement(plan)


def _nearest_divisor(number: int, wanted: int) -> int:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return min({*small, *(number // d for d in small)}, key=lambda d: (abs(d - wanted), d))


def _check_meshes(plan: Plan) -> None:
    for s, stage in enumerate(plan.stages):
        mesh = stage.mesh
        if not mesh.devices or len(set(mesh.devices)) != len(mesh.devices):
            raise PlanError(f"stages[{s}].mesh.devices is {mesh.devices}; name each device once")
        if any(d < 0 for d in mesh.devices):
            raise PlanError(f"stages[{s}].mesh.devices is {mesh.devices}; indices start at 0")
        _check_axes(s, mesh)
        if mesh.replicas != plan.replicas:
            raise PlanError(
                f"stages[{s}] has {mesh.replicas} replicas (its 'data' axis), stages[0] has "
                f"{plan.replicas}; all stages have equally many"
            )
        for t, other in enumerate(plan.stages[:s]):
            if set(mesh.devices) & set(other.mesh.devices) and mesh != other.mesh:
                raise PlanError(
                    f"the mesh slices of stages {t} ({_words(other.mesh)}) and {s} "
                    f"({_words(mesh)}) overlap; slices are equal or disjoint"
                )


def _words(mesh: MeshSlice) -> str:
    axes = " × ".join(f"{name} {size}" for name, size in mesh.named)
    return f"devices {', '.join(map(str, mesh.devices))} as {axes}"


def _check_axes(s: int, mesh: MeshSlice) -> None:
    if len(mesh.axes) != len(mesh.shape) or math.prod(mesh.shape) != len(mesh.devices):
        raise PlanError(
            f"stages[{s}].mesh has {len(mesh.devices)} devices, shape {mesh.shape} and axes "
            f"{mesh.axes}: the shape's product must be the number of devices, with a name for "
            f"every axis; for example shape ({len(mesh.devices)},), axes ('data',)"
        )
    if any(size < 1 for size in mesh.shape):
        raise PlanError(f"stages[{s}].mesh.shape is {mesh.shape}; every size is at least 1")
    if len(set(mesh.axes)) < len(mesh.axes) or DATA in mesh.axes[1:]:
        raise PlanError(
            f"stages[{s}].mesh.axes is {mesh.axes}; names are different, and {DATA!r} comes first "
            "where it is there"
        )
    if any(not name.isidentifier() for name in mesh.axes):
        raise PlanError(f"stages[{s}].mesh.axes is {mesh.axes}; a name is letters and digits")


def _check_placement(plan: Plan) -> None:
    placement = plan.schedule.placement
    if len(placement) != len(plan.stages):
        raise PlanError(
            f"schedule.placement names {len(placement)} stages, the plan has {len(plan.stages)}"
        )
    groups: dict[int, MeshSlice] = {}
    chunks: dict[int, int] = {}
    for s, (group, chunk) in enumerate(placement):
        mesh = plan.stages[s].mesh
        if groups.setdefault(group, mesh) != mesh:
            raise PlanError(
                f"schedule.placement puts stages on {_words(groups[group])} and {_words(mesh)} "
                f"into one rank group {group}; a rank group has one mesh slice"
            )
        if chunk != chunks.get(group, 0):
            raise PlanError(
                f"schedule.placement[{s}] is chunk {chunk} of rank group {group}; chunks count up "
                f"from 0, so it must be {chunks.get(group, 0)}"
            )
        chunks[group] = chunk + 1
    if sorted(groups) != list(range(len(groups))):
        raise PlanError(
            f"schedule.placement uses rank groups {sorted(groups)}; number them 0 to "
            f"{len(groups) - 1}"
        )
    if len(set(groups.values())) != len(groups):
        raise PlanError("two rank groups of schedule.placement share a mesh slice; merge them")
    try:
        schedule = get_schedule(plan.schedule.name)
        schedule.check(Placement.of(tuple(g for g, _ in placement)), plan.microbatches)
    except PlanError:
        raise
    except RayparError as error:
        raise PlanError(f"schedule: {error}") from None


def _check_graph(plan: Plan, graph: OpGraph) -> None:
    if plan.graph_hash != graph.hash:
        same = plan.params_hash == graph.params_hash
        what = (
            "the same parameters, but other ops, shapes or batch size"
            if same
            else "other parameters"
        )
        raise PlanError(
            f"the plan was made for another graph ({plan.graph_hash[:8]} there, "
            f"{graph.hash[:8]} here: {what}); plan again, or rebind it with plan.rebind(graph)"
        )
    if plan.global_batch != graph.global_batch:
        raise PlanError(
            f"the plan is for a global batch of {plan.global_batch}, the example batch has "
            f"{graph.global_batch}"
        )
    if plan.batch_dims != graph.batch_dims:
        raise PlanError(f"the plan's batch_dims {plan.batch_dims} are not {graph.batch_dims}")
    ranges = stage_ranges(plan, graph)
    for s, (first, end) in enumerate(ranges):
        _check_sharding(s, plan.stages[s], [op.id for op in graph.ops[first:end]])
    cuts = set(graph.cuts)
    for s, (_, end) in enumerate(ranges[:-1]):
        if end not in cuts:
            near = min(cuts, key=lambda c: abs(c - end), default=None)
            hint = (
                "this model has no place to cut"
                if near is None
                else (f"the nearest cut is behind {graph.ops[near - 1].id!r}")
            )
            raise PlanError(
                f"stages[{s}] ends at {graph.ops[end - 1].id!r}, where the graph cannot be cut "
                f"(a several-output op, a data-dependent size or a changing buffer); {hint}"
            )
    if plan.replicas > graph.max_replicas:
        op, reason = graph.analysis.blockers[0]
        raise PlanError(
            f"the plan has {plan.replicas} replicas, but samples meet at {op!r} ({reason}), so "
            f"only replicas=1 trains exactly like the unsplit model"
        )


def _check_sharding(s: int, stage: StagePlan, ids: Sequence[str]) -> None:
    if not stage.sharding:
        return
    known = {*ids, *(pattern_of(key) for key in ids)}
    for key in stage.sharding:
        if key not in known:
            raise PlanError(
                f"stages[{s}].sharding names {key!r}, which is no op of the stage (nor a pattern "
                f"of one, with * for numbers).{did_you_mean(key, known)}"
            )


def _check_cluster(plan: Plan, cluster: Cluster) -> None:
    if max(plan.devices) >= cluster.n_devices:
        raise PlanError(
            f"the plan uses device {max(plan.devices)}, the cluster has {cluster.n_devices} "
            f"devices (0 to {cluster.n_devices - 1}); plan again for this cluster"
        )
    if plan.cluster != cluster.shape:
        raise PlanError(
            f"the plan was made for a cluster with devices per node {plan.cluster}, this one has "
            f"{cluster.shape}; plan again for this cluster"
        )
