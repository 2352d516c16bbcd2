"""What a model needs where it does not fit: the leanest plan known, and what binds in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from raypar._plan_text import count_of, size
from raypar.errors import ConfigError, PlanError
from raypar.graph.costs import is_view, size_of
from raypar.graph.opgraph import OpGraph
from raypar.graph.passes.emit import is_op
from raypar.lowered import LoweredPlan, lower_plan
from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.bounds.memory import usable_bytes
from raypar.search.config import SearchConfig
from raypar.search.simulate import Simulation, simulate
from raypar.search.simulation import LaneReport, MemoryTimeline

_HELD = ("parameters", "gradients", "optimizer")
_CROSSING = ("edges", "transit")
_MOST_STAGES = 128
"""Of a pipeline that is tried: more, of which each has its microbatches, take minutes to lower."""


@dataclass(frozen=True)
class Need:
    """The memory of the rank that a plan fills most, against what it may fill.

    Attributes:
        plan: The plan.
        nbytes: Most bytes that the rank holds at once.
        limit: Bytes that its device has.
        overhead: What of it no plan can change (libraries, fragmentation).
        binding: Which stage it is, what it holds then, and the largest tensor of that.
    """

    plan: Plan
    nbytes: int
    limit: int
    overhead: int
    binding: str


def need_of(plan: Plan, lowered: LoweredPlan, played: Simulation) -> Need:
    """What the fullest rank of a simulated plan needs."""
    lane, memory = max(
        zip(played.lanes, played.memory, strict=True),
        key=lambda pair: pair[1].peak_bytes / pair[0].memory_limit,
    )
    overhead = memory.peak_parts.get("overhead", 0)
    words = binding(lane, memory, lowered)
    return Need(plan, memory.peak_bytes, lane.memory_limit, overhead, words)


def binding(lane: LaneReport, memory: MemoryTimeline, lowered: LoweredPlan) -> str:
    """Which stages bind, most of what they hold, and its largest tensor, in words."""
    parts = {k: n for k, n in memory.peak_parts.items() if n}
    most = sorted(parts.items(), key=lambda item: -item[1])[:3]
    stages = f"stage{'s' * (len(lane.stages) > 1)} {', '.join(map(str, lane.stages))}"
    own = {k: n for k, n in parts.items() if k != "overhead"}
    text = f"{stages} ({', '.join(f'{k} {size(n)}' for k, n in most)})"
    if not own:
        return text
    kind = max(own, key=lambda k: own[k])
    largest = max(_tensors(kind, lane, lowered), default=None)
    if largest is None:
        return text
    nbytes, name, shape = largest
    what = "parameter" if kind in _HELD else "value"
    return f"{text}; the largest {what} there is {name} {list(shape)} ({size(nbytes)})"


def _tensors(
    kind: str, lane: LaneReport, lowered: LoweredPlan
) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """(bytes, name, shape) on one rank of what a part of the memory is made of."""
    for s in lane.stages:
        for node in lowered.stages[s].graph.nodes:
            value = node.meta.get("val")
            shape = tuple(getattr(value, "shape", ()))
            key = str(node.meta.get("id", ""))
            if not all(isinstance(n, int) for n in shape):
                continue
            if node.op == "placeholder":
                wanted = "param:" if kind in _HELD else "edge:" if kind in _CROSSING else "\0"
                if key.startswith(wanted):
                    yield size_of(value), key.partition(":")[2], shape
            elif is_op(node) and not is_view(node) and kind not in _HELD:
                # A conversion is named after what it converts: `param:w>S0~1`, a gathered weight.
                yield size_of(value), key.split(">")[0].split("~")[0].removeprefix("param:"), shape


def leanest(
    graph: OpGraph, cluster: Cluster, config: SearchConfig, calibration: Calibration
) -> Need | None:
    """The least memory that any of `frugal_plans` needs on its fullest device.

    Returns:
        None where none of these can be made of the model.
    """
    found = []
    for plan in frugal_plans(graph, cluster, config):
        lowered = lower_plan(graph, plan)
        played = simulate(
            graph,
            plan,
            cluster,
            calibration=calibration,
            lowered=lowered,
            optimizer_states=config.optimizer_states,
        )
        found.append(need_of(plan, lowered, played))
    return min(found, key=lambda need: need.nbytes / need.limit, default=None)


def frugal_plans(graph: OpGraph, cluster: Cluster, config: SearchConfig) -> Iterator[Plan]:
    """A few plans that hold little, whatever they take; they keep to no options.

    All devices are used, parameters are cut over replicas (ZeRO-3), forward passes are computed
    again, and microbatches are as small as they get: as one stage, as a pipeline of one device a
    stage (of as many stages as are still planned soon), and half-way. What cannot be made of the
    model is left out.
    """
    count = cluster.n_devices
    most = max(n for n in range(1, _MOST_STAGES + 1) if count % n == 0)
    for stages in sorted({1, 2 ** (int(math.log2(count)) // 2), most}):
        try:
            yield _frugal(graph, cluster, config, stages)
        except PlanError:
            continue


def _frugal(graph: OpGraph, cluster: Cluster, config: SearchConfig, stages: int) -> Plan:
    from raypar.search.planners.base import get_planner

    options = replace(
        config,
        planner="uniform",
        stages=stages,
        replicas="auto",
        tensor="auto",
        chunks=1,
        microbatches=1,
        schedule="auto",
        recompute="full",
        zero=3,
        manual=None,
    )
    plan = get_planner("uniform").plan(graph, cluster, options)
    if graph.feels_microbatches:
        given = 1 if config.microbatches == "auto" else config.microbatches
        return replace(plan, microbatches=given)
    return replace(plan, microbatches=graph.global_batch // plan.replicas)


def does_not_fit(
    graph: OpGraph, cluster: Cluster, config: SearchConfig, calibration: Calibration
) -> PlanError:
    """The error for a search that found no plan that fits the memory."""
    try:
        need = leanest(graph, cluster, config, calibration)
    except (PlanError, ConfigError):
        need = None
    fraction = config.memory_fraction
    if need is None:
        memory = min(cluster.memory(d) for d in range(cluster.n_devices))
        return PlanError(
            f"no plan fits into {cluster.n_devices} devices of {size(memory)}, of which "
            f"search.memory_fraction {fraction} may be filled. Use more devices, search.zero: 3, "
            "search.recompute: full or smaller microbatches (train.microbatches: auto)"
        )
    plan = need.plan
    lean = (
        f"{count_of(len(plan.stages), 'stage')} × {count_of(plan.replicas, 'replica')} × "
        f"{count_of(plan.microbatches, 'microbatch')}, recompute full, ZeRO-3"
    )
    allowed = fraction * need.limit
    if need.nbytes <= allowed:
        return PlanError(
            f"no plan fits under the given options: search.memory_fraction {fraction} leaves "
            f"{size(allowed)} of each device's {size(need.limit)}. The model fits as {lean}, which "
            f"needs {size(need.nbytes)}: set search.planner: uniform, search.stages: "
            f"{len(plan.stages)}, search.replicas: {plan.replicas}, train.microbatches: "
            f"{plan.microbatches}, search.recompute: full, search.zero: 3"
        )
    own, room = need.nbytes - need.overhead, allowed - need.overhead
    change = f"Use larger devices ({size(need.overhead)} are overhead that more do not save)"
    if room > 0:
        count = math.ceil(cluster.n_devices * own / room)
        change = f"Use more devices (about {count} of this kind) or larger ones"
    share = need.nbytes / need.limit
    raised = f", or set search.memory_fraction: {share:.2f}" if share < 1.0 else ""
    return PlanError(
        f"the model does not fit: the smallest memory that was found for it is "
        f"{size(need.nbytes)} on each of {cluster.n_devices} devices ({lean}); "
        f"search.memory_fraction {fraction} leaves {size(allowed)} of their {size(need.limit)}. "
        f"What binds is {need.binding}. {change}{raised}"
        f"{_smaller(plan, graph)}"
    )


def check_state(
    graph: OpGraph, cluster: Cluster, config: SearchConfig, calibration: Calibration
) -> None:
    """Refuses a model of which not even what every plan keeps has room on all devices together.

    When the optimizer begins, every part of a parameter, of its gradient and of the optimizer's
    states is held at least once, however the plan cuts and replicates.

    Raises:
        PlanError: It has none; no search is needed to know.
    """
    state, room = state_bytes(graph, config), sum(usable_bytes(cluster, calibration, config))
    if state <= room:
        return
    sizes = [(n, name, tuple(graph.params[name][0])) for name, n in _param_bytes(graph).items()]
    params, largest = sum(n for n, *_ in sizes), max(sizes)
    count = cluster.n_devices
    change = "larger devices"
    if room > 0:
        change = f"more devices (at least {math.ceil(count * state / room)} of this kind) or larger"
    nbytes, name, shape = largest
    states = lighter = ""
    if config.optimizer_states:
        states = f" and {count_of(config.optimizer_states, 'optimizer state')} of each"
        lighter = ", or an optimizer that keeps less"
    raise PlanError(
        f"the model does not fit: parameters ({size(params)}), their gradients{states} are "
        f"{size(state)}, cut as finely as may be; search.memory_fraction {config.memory_fraction} "
        f"leaves {size(room)} on {count_of(count, 'device')} together. The largest parameter is "
        f"{name} {list(shape)} ({size(nbytes)}). Use {change}{lighter}"
    )


def state_bytes(graph: OpGraph, config: SearchConfig) -> int:
    """Bytes of all parameters, and of the gradients and optimizer states of those that learn."""
    learns = 1 + config.optimizer_states
    return sum(
        nbytes * (1 + learns * graph.params[name][2])
        for name, nbytes in _param_bytes(graph).items()
    )


def _param_bytes(graph: OpGraph) -> dict[str, int]:
    return {
        name: math.prod(shape) * getattr(torch, dtype.removeprefix("torch.")).itemsize
        for name, (shape, dtype, _) in graph.params.items()
    }


def _smaller(plan: Plan, graph: OpGraph) -> str:
    if plan.local_batch > 1 or graph.feels_microbatches:
        return ", or a smaller data.global_batch (or more train.microbatches)"
    return ""
