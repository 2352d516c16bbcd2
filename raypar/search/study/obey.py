"""What the user fixed: whether it goes together, and whether a plan has it."""

from __future__ import annotations

from dataclasses import replace

from raypar.errors import PlanError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.interop.space import check_options

INTERLEAVED = ("interleaved_1f1b", "interleaved_zero_bubble", "interleaved_eager")
"""The schedules of several stages per rank group."""


def least_groups(config: SearchConfig) -> int:
    """Fewest rank groups that a plan with the fixed options has."""
    if config.stages != "auto":
        return config.stages // config.chunks
    return 2 if config.chunks > 1 else 1


def check_fixed(graph: OpGraph, cluster: Cluster, config: SearchConfig) -> None:
    """Refuses fixed options that no plan of the study can have.

    Raises:
        PlanError: Names the options, what was found, and values that work.
    """
    if config.chunks == 1:
        check_options(graph, cluster, config)
        return
    _check_chunks(graph, config)
    groups = least_groups(config)
    check_options(graph, cluster, replace(config, chunks=1, stages="auto"))
    replicas = 1 if config.replicas == "auto" else config.replicas
    tensor = 1 if config.tensor == "auto" else config.tensor
    needed = groups * replicas * tensor
    if needed > cluster.n_devices:
        raise PlanError(
            f"{groups} rank groups of search.chunks {config.chunks} stages each × search.replicas "
            f"{replicas} × search.tensor {tensor} need {needed} devices, the cluster has "
            f"{cluster.n_devices}; lower one of them, or set search.chunks: 1"
        )


def _check_chunks(graph: OpGraph, config: SearchConfig) -> None:
    """Checks stages and schedule of a plan with several stages per rank group."""
    chunks, most = config.chunks, len(graph.cuts) + 1
    if chunks < 1:
        raise PlanError(f"search.chunks is {chunks}; it is at least 1")
    if config.schedule not in ("auto", *INTERLEAVED):
        raise PlanError(
            f"search.chunks is {chunks}, and train.schedule {config.schedule} runs one stage per "
            f"rank group: set train.schedule: {' or '.join(INTERLEAVED)}, or search.chunks: 1"
        )
    if config.stages != "auto" and (config.stages < 2 * chunks or config.stages % chunks):
        raise PlanError(
            f"search.stages is {config.stages} with search.chunks {chunks}; interleaving takes two "
            f"rank groups or more: set search.stages to a multiple of {chunks} from {2 * chunks} "
            "on, or search.chunks: 1"
        )
    stages = least_groups(config) * chunks
    if stages > most:
        raise PlanError(
            f"search.chunks {chunks} on two rank groups or more needs {stages} stages, but the "
            f"graph has {len(graph.cuts)} places to cut: {most} stages at most; set search.chunks: "
            f"{max(most // 2, 1)} or less"
        )


def disobeyed(plan: Plan, config: SearchConfig) -> str:
    """Which fixed options a plan does not have, in words; empty where it has all."""
    groups = len({group for group, _ in plan.schedule.placement})
    sizes: set[object] = {len(s.mesh.devices) // plan.replicas for s in plan.stages}
    found: list[tuple[str, object, set[object]]] = [
        ("stages", config.stages, {len(plan.stages)}),
        ("replicas", config.replicas, {plan.replicas}),
        ("tensor", config.tensor, sizes),
        ("microbatches", config.microbatches, {plan.microbatches}),
        ("schedule", config.schedule, {plan.schedule.name}),
        ("recompute", config.recompute, {stage.memory.recompute for stage in plan.stages}),
        ("zero", config.zero, {stage.memory.zero for stage in plan.stages}),
    ]
    if config.chunks != 1:
        found.append(("chunks", config.chunks, {len(plan.stages) / groups}))
    wrong = [
        f"{name} {', '.join(sorted(map(str, has)))} where {wanted} is asked for"
        for name, wanted, has in found
        if wanted != "auto" and has != {wanted}
    ]
    return "; ".join(wrong)
