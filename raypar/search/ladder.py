"""Plans for every size that a cluster may shrink or grow to, made beforehand.

With one plan for each number of devices at hand, losing a node costs a lookup instead of a search:
after Jang et al. 2023, "Oobleck: Resilient Distributed Training of Large Models Using Pipeline
Templates", section 4.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from raypar._plan_text import size
from raypar.errors import ConfigError, PlanError, RayparError
from raypar.fit import check_plan
from raypar.graph.opgraph import OpGraph
from raypar.lowered import lower_plan
from raypar.mesh.calibration_files import load_calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.interop.contest import entry_of
from raypar.search.need import need_of
from raypar.search.plan import Found, search
from raypar.search.record import INTERRUPTED
from raypar.search.rungs import Ladder, Rung
from raypar.search.simulate import simulate

__all__ = ["Ladder", "Rung", "ladder", "part_of", "sizes_of"]

_PART = re.compile(r"(\d+)(?:\.\.(\d+)(?::(\d+))?)?")

Search = Callable[[OpGraph, Cluster, SearchConfig], Found]


def ladder(
    graph: OpGraph,
    cluster: Cluster,
    sizes: Sequence[int],
    config: SearchConfig | None = None,
    *,
    search: Search = search,
    progress: Callable[[Rung], None] | None = None,
) -> Ladder:
    """Plans for clusters of several sizes, from one capture of the model.

    A cluster of n devices is the first n of `cluster` (`part_of`). What was worked out for one size
    serves the others: captures at every microbatch size, units, costs and shardings of meshes. A
    plan for fewer devices runs on more as well, so it is taken where nothing faster is found:
    more devices are never slower.

    Args:
        graph: The captured model.
        cluster: The largest cluster.
        sizes: Numbers of devices.
        config: The search for each size; its budget is that of one size.
        search: Finds one plan.
        progress: Is told of every size.

    Raises:
        ConfigError: A size below 1 or above the cluster's, or a wrong option.
    """
    config = config or SearchConfig()
    began = time.perf_counter()
    rungs: list[Rung] = []
    stopped = ""
    for count in sorted(set(sizes)):
        try:
            rung, interrupted = _rung_of(graph, part_of(cluster, count), config, search, rungs)
        except KeyboardInterrupt:
            if not rungs:
                raise
            stopped = f"interrupted before a plan for {count} devices was found"
            break
        rungs.append(rung)
        if progress is not None:
            progress(rung)
        if interrupted:
            stopped = f"interrupted: {count} devices have the best found by then, larger sizes none"
            break
    return Ladder(tuple(rungs), time.perf_counter() - began, stopped)


def _rung_of(
    graph: OpGraph, part: Cluster, config: SearchConfig, search: Search, below: Sequence[Rung]
) -> tuple[Rung, bool]:
    """The plan for one size, or that of a smaller size; whether the user stopped the search."""
    began = time.perf_counter()
    found: Plan | None = None
    reason, interrupted = "", False
    try:
        made, record = search(graph, part, config)
        found = _foreseen(made, graph, part, config)
        interrupted = record.stopped == INTERRUPTED
    except ConfigError:
        raise
    except RayparError as error:
        reason = str(error)
    rung = Rung(part.n_devices, part.shape, found, reason, 0, time.perf_counter() - began)
    best = min((r for r in below if r.plan is not None), key=lambda r: r.step_s, default=None)
    if best is None or best.step_s >= rung.step_s or best.plan is None:
        return rung, interrupted
    carried = replace(best.plan, cluster=part.shape, device=part.kind, certificate={})
    bound = found.certificate.get("lower_bound_s", 0.0) if found else 0.0
    if bound > 0:
        gap = best.step_s / bound - 1
        carried = replace(carried, certificate={"lower_bound_s": bound, "gap": gap})
    try:
        check_plan(carried, graph, part)
    except PlanError:  # a fixed option that the smaller size did not have
        return rung, interrupted
    source = best.carried_from or best.devices
    reason = reason or f"the plan for {source} devices is faster than what was found for this size"
    return replace(rung, plan=carried, reason=reason, carried_from=source), interrupted


def _foreseen(made: Plan, graph: OpGraph, part: Cluster, config: SearchConfig) -> Plan:
    """A plan with the time of its step, which planners that are told the shape do not foresee.

    Raises:
        PlanError: It does not fit the memory, which these do not look at either.
    """
    if "step_s" in made.predicted:
        return made
    lowered = lower_plan(graph, made)
    played = simulate(
        graph,
        made,
        part,
        calibration=load_calibration(part),
        lowered=lowered,
        optimizer_states=config.optimizer_states,
    )
    entry = entry_of(made, played, memory_fraction=1.0)
    if entry.overfull > 1.0:
        need = need_of(made, lowered, played)
        raise PlanError(
            f"the shape that was asked for does not fit: a rank needs {size(need.nbytes)} of "
            f"{size(need.limit)}, and what binds is {need.binding}"
        )
    return entry.plan


def part_of(cluster: Cluster, devices: int) -> Cluster:
    """The first `devices` devices: whole nodes in their order, then a part of the next one.

    Raises:
        ConfigError: The cluster has fewer.
    """
    if not 1 <= devices <= cluster.n_devices:
        raise ConfigError(
            f"a ladder's size is {devices}, the cluster has {cluster.n_devices} devices "
            f"({cluster.describe()}): take 1 to {cluster.n_devices}"
        )
    shape: list[int] = []
    for node in cluster.nodes:
        if devices > 0:
            shape.append(min(node.devices, devices))
            devices -= shape[-1]
    return cluster.take(tuple(shape))


def sizes_of(text: str, most: int) -> tuple[int, ...]:
    """Sizes as people write them: ``2..16``, every second with ``2..16:2``, or ``2,4,8..16:4``.

    Args:
        text: The sizes.
        most: Devices of the cluster.

    Raises:
        ConfigError: Something else, or sizes that the cluster does not have.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ConfigError(
                f"--ladder {text}: {part.strip()!r} is no size and no range of sizes; give for "
                "example 2..16, 2..16:2 (every second) or 2,4,8"
            )
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        step = int(match[3]) if match[3] else 1
        if last < first:
            raise ConfigError(
                f"--ladder {text}: {part.strip()} counts down; give {last}..{first}, the smaller "
                "size first"
            )
        if step < 1:
            raise ConfigError(f"--ladder {text}: a step of {step} goes nowhere; give 1 or more")
        if first < 1 or last > most:
            wrong = first if first < 1 else last
            raise ConfigError(
                f"--ladder {text}: {wrong} devices are asked for, the cluster has {most}; give "
                f"sizes from 1 to {most}, for example --ladder {max(1, min(2, most))}..{most}, or "
                "a larger cluster with --cluster FILE or mesh.num_workers"
            )
        found.update(range(first, last + 1, step))
    return tuple(sorted(found))
