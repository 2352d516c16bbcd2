"""What every stage of a plan does and why it talks: layers, shardings by name, collectives."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import fx

from raypar._plan_text import mesh_text, size, span
from raypar.fit import stage_ranges
from raypar.graph.costs import forward_flops, is_view
from raypar.graph.layers import cluster_layers
from raypar.graph.opgraph import OpGraph
from raypar.graph.passes.emit import op_name
from raypar.lowered import LoweredPlan
from raypar.plan import DATA, MeshSlice, Plan
from raypar.report._forms import WHOLE, form_of
from raypar.report._words import counted, paragraph, percent
from raypar.search.cost.base import Collective, StageCost
from raypar.sharding.listing import collectives_of

_SHOWN_LAYERS = 6
_NEARLY_ALL = 0.95
_NUMBERED = re.compile(r"^(.*\.)?(\d+)$")


def stage_lines(
    plan: Plan, graph: OpGraph, lowered: LoweredPlan, costs: Sequence[StageCost] | None = None
) -> list[str]:
    """A few lines for every stage; stages that do the same share them.

    Args:
        plan: The plan.
        graph: The graph it is for.
        lowered: The lowered plan.
        costs: Cost of every stage: tells its collectives exactly, with their seconds.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for s in range(len(plan.stages)):
        body = [*_shardings(plan, graph, lowered, s), *_parameters(plan, lowered, s)]
        body += _collectives(lowered, s, None if costs is None else costs[s])
        groups.setdefault(tuple(body), []).append(s)
    ranges = stage_ranges(plan, graph)
    lines = []
    for body_lines, stages in groups.items():
        for s in stages:
            first, end = ranges[s]
            mesh = plan.stages[s].mesh
            lines += paragraph(
                f"stage {s} on {_devices(mesh)}: ",
                [layers_text(graph, first, end)],
            )
        lines += body_lines
    return lines


def _devices(mesh: MeshSlice) -> str:
    """``device 0``, or ``devices 0-3 as data 2 × x 2``."""
    if len(mesh.devices) == 1:
        return f"device {mesh.devices[0]}"
    return f"devices {span(mesh.devices)} as {mesh_text(mesh)}"


def layers_text(graph: OpGraph, first: int, end: int) -> str:
    """``tokens, blocks.0-5, norm``: numbered neighbours become a range."""
    found: list[tuple[str, int, int]] = []  # (prefix, first number, last number); -1: not numbered
    for layer in cluster_layers(graph.ops[first:end]):
        match = _NUMBERED.match(layer.name)
        prefix, number = (match[1] or "", int(match[2])) if match else (layer.name, -1)
        if found and found[-1][0] == prefix and found[-1][2] in (number, number - 1):
            found[-1] = (prefix, found[-1][1], number)
        elif prefix or number >= 0:
            found.append((prefix, number, number))
    names = [
        prefix if a < 0 else f"{prefix}{a}" if a == b else f"{prefix}{a}-{b}"
        for prefix, a, b in found
    ]
    names = list(dict.fromkeys(names)) or ["ops outside of any module"]
    if len(names) <= _SHOWN_LAYERS:
        return ", ".join(names)
    half = _SHOWN_LAYERS // 2
    return f"{', '.join(names[:half])}, ... , {', '.join(names[-half:])} ({len(names)} layers)"


def _shardings(plan: Plan, graph: OpGraph, lowered: LoweredPlan, s: int) -> list[str]:
    """One paragraph for every mesh axis."""
    return [
        line
        for axis, parts in axis_forms(plan, graph, lowered, s)
        for line in paragraph(f"  over {axis}: ", parts)
    ]


def axis_forms(
    plan: Plan, graph: OpGraph, lowered: LoweredPlan, s: int
) -> list[tuple[str, list[str]]]:
    """(``x (4)``, what ops are cut over it, the most work first) for every mesh axis of a stage."""
    mesh = plan.stages[s].mesh
    found = []
    if mesh.replicas > 1:
        samples = f"{plan.local_batch} sample{'s' * (plan.local_batch > 1)}"
        found.append((f"{DATA} ({mesh.replicas})", [f"batch, {samples} of each microbatch"]))
    for axis, (name, size_of_axis) in enumerate(mesh.inner):
        if size_of_axis == 1:
            continue
        work: Counter[str] = Counter()
        ops: dict[str, Counter[str]] = {}
        for node, strategy in lowered.chosen[s].items():
            if is_view(node) or node.target is operator.getitem:
                continue
            form = form_of(node, strategy, axis, graph.analysis.states)
            work[form] += forward_flops(node)
            ops.setdefault(form, Counter())[op_name(node)] += 1
        total = max(sum(work.values()), 1)
        ordered = sorted(ops, key=lambda form: (form == WHOLE, -work[form]))
        parts = [f"{form} {percent(work[form] / total)}: {counted(ops[form])}" for form in ordered]
        found.append((f"{name} ({size_of_axis})", parts))
    return found


def _parameters(plan: Plan, lowered: LoweredPlan, s: int) -> list[str]:
    text = parameters_text(plan, lowered, s)
    return paragraph(f"  parameters: {text}", []) if text else []


def parameters_text(plan: Plan, lowered: LoweredPlan, s: int) -> str:
    """How much of its parameters one rank takes, and how much of them its optimizer holds.

    Empty where each rank holds all of them.
    """
    mesh = plan.stages[s].mesh
    group, _ = plan.schedule.placement[s]
    sizes = [n for _, n in mesh.named]
    whole = taken = stored = 0
    for name in lowered.whole[s].keys("param:"):
        layout = lowered.layouts[group].get(name)
        if layout is None:
            continue
        count = _elements(layout.shape)
        whole += count
        taken += count // layout.held.value().parts(sizes)
        stored += count // layout.stored.parts(sizes)
    if stored >= _NEARLY_ALL * whole:
        return ""
    text = f"each rank computes with {_share(taken / whole)} of them"
    level = plan.stages[s].memory.zero
    if level:
        kept = ("optimizer state", "gradients and optimizer state", "all of it")[level - 1]
        text += f"; ZeRO-{level} keeps {kept} for {_share(stored / whole)} of them on each"
    return text


def _collectives(lowered: LoweredPlan, s: int, cost: StageCost | None) -> list[str]:
    """Per program and per step: which collectives, how many, how large."""
    if cost is None:
        forward, backward = graph_collectives(lowered.stages[s].graph)
        programs = [("forward", forward), ("backward", backward)]
    else:
        step = [*cost.gather, *cost.sync]
        programs = [
            ("forward", list(cost.forward_comm)),
            ("backward", list(cost.backward_comm)),
            ("once a step", step),
        ]
    lines = []
    for title, uses in programs:
        if uses:
            lines += paragraph(f"  {title}: ", collective_words(uses), ", ")
    return lines


def graph_collectives(graph: fx.Graph) -> tuple[list[Collective], list[Collective]]:
    """The collectives of a lowered graph, forward and backward, without their seconds."""
    uses = list(collectives_of(graph))
    forward = [Collective(u.axis, u.forward, u.nbytes, 0.0) for u in uses if u.forward]
    backward = [Collective(u.axis, u.backward, u.nbytes, 0.0) for u in uses if u.backward]
    return forward, backward


def collective_words(uses: Iterable[Collective]) -> list[str]:
    """``12 × all_reduce over x (1.2 MB)``: equal kinds together, bytes of all of them."""
    count: Counter[tuple[str, str]] = Counter()
    nbytes: Counter[tuple[str, str]] = Counter()
    for use in uses:
        count[use.kind, use.axis] += 1
        nbytes[use.kind, use.axis] += use.nbytes
    return [
        f"{count[key]} × {key[0]} over {key[1]} ({size(nbytes[key])})"
        for key in sorted(count, key=lambda k: (-nbytes[k], k))
    ]


def _share(share: float) -> str:
    return "all" if share > 0.995 else f"{share:.2g}"


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
