"""Plan → rank specs: slices the graph, compiles the schedule, and says who holds what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch

from raypar.errors import PlanError
from raypar.graph.opgraph import OpGraph
from raypar.graph.origins import Path
from raypar.lowered import LoweredPlan, lower_plan
from raypar.plan import Plan
from raypar.programs.slicing import StageGraph
from raypar.programs.wire import pack
from raypar.stages.initial import InitialWeights
from raypar.stages.recipe import Recipe
from raypar.stages.spec import Engine, OptimizerFn, RankSpec, StageSpec
from raypar.stages.transfers import posting_plan


def compile_plan(
    graph: OpGraph,
    plan: Plan,
    *,
    optimizer: OptimizerFn,
    seed: int = 0,
    recipe: Recipe | None = None,
    keep_gradients: bool = False,
    threads: int | None = None,
    accelerator: bool = False,
    engine: Engine = "eager",
    initial: InitialWeights | None = None,
) -> list[RankSpec]:
    """Compiles a plan into one spec per rank, in rank order.

    Args:
        graph: The captured model.
        plan: A plan for it.
        optimizer: Builds the optimizer from parameters.
        seed: Seed of initialisation and of dropout.
        recipe: Clipping, schedule, loss scale, average; default: none of them.
        keep_gradients: Keep a copy of every step's gradients on the ranks.
        threads: torch threads per rank, or None to leave them alone.
        accelerator: Whether ranks run on GPUs.
        engine: How ranks run their programs (`raypar.stages.engines`).
        initial: What the model begins with in place of what the seed makes.

    Raises:
        PlanError: The plan does not fit the graph.
        ScheduleError: The instruction lists do not pass the checker.
    """
    low = lower_plan(graph, plan)
    placement = [group for group, _ in plan.schedule.placement]
    n_groups = max(placement) + 1
    holders = _param_holders(low.stages, placement)
    buffer_owner = _buffer_owners(graph, low.stages, placement)
    shared = {
        name: tuple(groups)
        for name, groups in holders.items()
        if len(groups) > 1 and f"param:{name}" in low.flow
    }
    packed = [_pack_stage(graph, plan, low, s) for s in low.stages]
    slices = {g: plan.stages[s].mesh for s, g in enumerate(placement)}
    meshes = tuple(slices[g].named for g in range(n_groups))
    bases = tuple(accumulate((len(slices[g].devices) for g in range(n_groups - 1)), initial=0))
    specs: list[RankSpec] = []
    for group in range(n_groups):
        own = [s for s in range(len(placement)) if placement[s] == group]
        devices = slices[group].devices
        first = RankSpec(
            rank=bases[group],
            world=sum(len(s.devices) for s in slices.values()),
            group=group,
            replica=0,
            replicas=plan.replicas,
            microbatches=plan.microbatches,
            global_batch=plan.global_batch,
            device=devices[0],
            stages=tuple(packed[s] for s in own),
            instructions=tuple(low.lists[group]),
            posts=posting_plan(low.lists, group),
            edges=low.io.edges,
            rank_group_of=tuple(placement),
            inputs=_inputs([low.stages[s] for s in own]),
            batch_dims=graph.batch_dims,
            shared=shared,
            shared_layouts={n: tuple(low.layouts[g][n] for g in gs) for n, gs in shared.items()},
            shared_dtypes={n: graph.params[n][1].removeprefix("torch.") for n in shared},
            model_fn=graph.model_fn,
            loss_fn=graph.loss_fn,
            optimizer=optimizer,
            owned_params=tuple(n for n in graph.params if holders.get(n, [0])[0] == group),
            owned_buffers=tuple(n for n, g in buffer_owner.items() if g == group),
            constants=_constants(graph, [low.stages[s] for s in own]),
            shapes={v.id: (v.shape, str(v.dtype).removeprefix("torch.")) for v in low.values},
            meshes=meshes,
            bases=bases,
            params=low.layouts[group],
            edge_specs=low.edge_specs,
            link_costs=low.costs,
            recipe=recipe or Recipe(),
            forms=graph.params,
            seed=seed,
            initial=initial,
            default_dtype=str(torch.get_default_dtype()).removeprefix("torch."),
            threads=threads,
            keep_gradients=keep_gradients,
            accelerator=accelerator,
            engine=engine,
        )
        specs += [_at(first, position, device) for position, device in enumerate(devices)]
    return specs


def _at(first: RankSpec, position: int, device: int) -> RankSpec:
    """The spec of another position of the mesh of `first`, which owns what belongs to all."""
    if position == 0:
        return first
    size = math.prod(size for _, size in first.axes)
    return replace(
        first,
        rank=first.rank + position,
        replica=position * first.replicas // size,
        device=device,
        owned_params=(),
        owned_buffers=(),
    )


def loss_scale(graph: OpGraph, plan: Plan) -> float:
    """What the loss of one microbatch on one replica counts in the global loss."""
    power = graph.loss_power
    if power is None:
        if plan.replicas != 1:
            raise PlanError("a model that feels its microbatches has one replica")
        return 1.0 / plan.microbatches
    return float(plan.microbatches * plan.replicas) ** power


def _pack_stage(graph: OpGraph, plan: Plan, low: LoweredPlan, stage: StageGraph) -> StageSpec:
    flow = low.flow
    received = [e for e in stage.keys("edge:") if e in flow]
    with_grad = [i for i, e in enumerate(stage.edges_out) if e in flow]
    scale = None
    nodes: dict[str, Any] = {
        "graph": pack(stage.graph),
        "globals": None if stage.globals_graph is None else pack(stage.globals_graph),
    }
    if stage.has_loss:
        with_grad.append(len(stage.edges_out))
        scale = loss_scale(graph, plan)
        loss_dtype = graph.clean.loss.meta["val"].dtype
        nodes["loss_dtype"] = str(loss_dtype).removeprefix("torch.")
    powers = graph.analysis.globals
    return StageSpec(
        index=stage.index,
        nodes=nodes,
        recompute=plan.stages[stage.index].memory.recompute,
        loss_scale=scale,
        edges_out=stage.edges_out,
        updates=stage.updates,
        globals=tuple((g, powers[g]) for g in stage.globals),
        trainable=tuple(p for p in stage.keys("param:") if f"param:{p}" in flow),
        differentiable=tuple(received),
        outputs_with_grad=tuple(with_grad),
        arrivals=low.lowered[stage.index].arrivals,
        departures=low.lowered[stage.index].departures,
    )


def _param_holders(stages: Sequence[StageGraph], placement: Sequence[int]) -> dict[str, list[int]]:
    """Parameter → rank groups that hold it, the owner first."""
    holders: dict[str, set[int]] = {}
    for stage in stages:
        for name in stage.keys("param:"):
            holders.setdefault(name, set()).add(placement[stage.index])
    return {name: sorted(groups) for name, groups in holders.items()}


def _buffer_owners(
    graph: OpGraph, stages: Sequence[StageGraph], placement: Sequence[int]
) -> dict[str, int]:
    owners = dict.fromkeys(graph.clean.buffers, 0)
    for stage in reversed(stages):
        for name in stage.keys("buffer:"):
            owners[name] = placement[stage.index]
    for stage in stages:
        for name in stage.updates:
            owners[name] = placement[stage.index]
    return owners


def _inputs(stages: Sequence[StageGraph]) -> tuple[str, ...]:
    found: set[str] = set()
    for stage in stages:
        for graph in (stage.graph, stage.globals_graph):
            if graph is not None:
                found |= {
                    n.meta["id"]
                    for n in graph.nodes
                    if n.op == "placeholder" and n.meta["id"].startswith("in:")
                }
    return tuple(sorted(found, key=lambda k: int(k[3:])))


def _constants(graph: OpGraph, stages: Sequence[StageGraph]) -> dict[str, torch.Tensor | Path]:
    wanted = {
        n.meta["id"]
        for stage in stages
        for g in (stage.graph, stage.globals_graph)
        if g is not None
        for n in g.nodes
        if n.op == "placeholder" and n.meta["id"].startswith("const:")
    }
    return {key: graph.constant(key) for key in sorted(wanted)}
