"""The figures at the head of the page, each with what it means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from raypar._plan_text import count_of, duration, size, throughput
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.record import SearchRecord
from raypar.search.simulation import Simulation

_PATH = {
    "F": ("k-F", "forward"),
    "B": ("k-B", "backward"),
    "I": ("k-I", "backward, input half"),
    "W": ("k-W", "backward, weight half"),
    "O": ("k-O", "optimizer"),
    "G": ("k-G", "counting the batch"),
    "transfer": ("k-comm", "transfers between stages"),
    "sync": ("k-sync", "sums of gradients, updated parameters"),
    "norm": ("k-norm", "the norm over all ranks"),
}

_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: its name, its value with unit, what it means, and ``warn`` where it is bad."""

    name: str
    value: str
    meaning: str
    mood: str = ""


@dataclass(frozen=True, slots=True)
class ShareBar:
    """One bar: its name, its length between 0 and 1, its value in words, and its style class."""

    name: str
    share: float
    text: str
    style: str = ""


def headline(
    plan: Plan,
    graph: OpGraph,
    cluster: Cluster,
    played: Simulation,
    record: SearchRecord | None,
) -> list[Figure]:
    """What one looks at first.

    Args:
        plan: The plan.
        graph: The graph it is for.
        cluster: The cluster it is for.
        played: Its simulated step.
        record: What the search did, where that is known.
    """
    count = sum(math.prod(shape) for shape, _, _ in graph.params.values())
    return [
        Figure(
            "step time",
            duration(played.step_s),
            f"predicted time of one optimizer step over {count_of(plan.global_batch, 'sample')}; "
            f"costs: {played.source}",
        ),
        Figure(
            "throughput",
            throughput(played.samples_per_s),
            f"{count_of(plan.global_batch, 'sample')} a step",
        ),
        Figure(
            "bubble",
            f"{played.bubble:.1%}",
            "share of device time in which devices wait for somebody who has not sent yet",
        ),
        _peak(played),
        _certificate(plan, played, record),
        _origin(plan, record),
        Figure(
            "devices",
            f"{len(plan.devices)} of {cluster.n_devices}",
            f"{cluster.kind}; {count_of(len(plan.stages), 'stage')}, "
            f"{count_of(plan.replicas, 'replica')}, "
            f"{count_of(plan.microbatches, 'microbatch')} a step, "
            f"schedule {plan.schedule.name}",
        ),
        Figure(
            "model",
            f"{_short(count)} parameters",
            f"{len(graph.ops)} operators, {count_of(len(graph.layers), 'layer')}",
        ),
    ]


def path_bars(shares: Mapping[str, float]) -> list[ShareBar]:
    """Shares of the critical path (`Simulation.path_shares`), in their order."""
    found = []
    for kind, share in shares.items():
        style, name = _PATH.get(kind, ("k-comm", kind))
        found.append(ShareBar(name, share, f"{share:.1%}", style))
    return found


def _peak(played: Simulation) -> Figure:
    pairs = list(zip(played.peak_bytes, played.lanes, strict=True))
    nbytes, lane = max(pairs, key=lambda pair: pair[0] / pair[1].memory_limit)
    full = nbytes / lane.memory_limit
    return Figure(
        "peak memory",
        size(nbytes),
        f"on the fullest device, {full:.0%} of the {size(lane.memory_limit)} that it has "
        f"({lane.label})",
        "warn" if full > 1.0 else "",
    )


def _certificate(plan: Plan, played: Simulation, record: SearchRecord | None) -> Figure:
    bound = plan.certificate.get("lower_bound_s", 0.0)
    if bound <= 0 and record is not None:
        bound = record.bound_s
    if bound <= 0:
        return Figure(
            "certificate", "none", "no lower bound is known of this plan's model and cluster"
        )
    gap = plan.certificate.get("gap", played.step_s / bound - 1)
    if gap < -_ROUNDING:
        return Figure(
            "certificate",
            "none",
            f"the search's lower bound ({duration(bound)}) rests on other costs than this step",
        )
    return Figure(
        "certificate",
        f"≤ {max(gap, 0.0):.1%} from best",
        f"at most {max(gap, 0.0):.1%} from the best possible under this cost model: no plan takes "
        f"less than {duration(bound)}",
    )


def _origin(plan: Plan, record: SearchRecord | None) -> Figure:
    if record is None or len(record.trials) < 2:
        took = "" if record is None else f" in {duration(record.seconds)}"
        return Figure("proposed by", plan.planner, f"the planner that made the plan{took}")
    sampler = f", sampler {record.sampler}" if record.sampler else ""
    measured = f", {duration(record.measured_s)} of it measuring" if record.measured_s else ""
    return Figure(
        "proposed by",
        record.proposer or plan.planner,
        f"of {count_of(len(record.trials), 'trial')} by {record.planner}{sampler}, "
        f"seed {record.seed}, in {duration(record.seconds)}{measured}",
    )


def _short(count: float) -> str:
    for unit in ("", " k", " M", " G"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} T"
