"""A plan as text: what it says by itself, without graph or cluster."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raypar.graph.opgraph import OpGraph
    from raypar.plan import MeshSlice, Plan

WIDTH = 100
"""Columns of a terminal that reports keep within."""
Column = tuple[str, Sequence[str]]
_SHOWN = 5
_LEAST_CELL = 12  # a cell is not shortened below this


def plan_text(plan: Plan, graph: OpGraph | None = None) -> str:
    """All that a plan says by itself, and what keeps its graph from being split further."""
    notes = [] if graph is None else graph_notes(graph)
    return joined([plan_lines(plan), table(plan_columns(plan)), alternative_lines(plan), notes])


def joined(sections: Sequence[Sequence[str]]) -> str:
    """Sections of lines with an empty line between them; empty ones are left out, long lines cut.

    A line of more than `WIDTH` columns goes on below, indented further.
    """
    kept = (lines for lines in sections if lines)
    return "\n\n".join("\n".join(p for line in lines for p in _pieces(line)) for lines in kept)


def _pieces(line: str) -> list[str]:
    if len(line) <= WIDTH:
        return [line]
    indent = line[: len(line) - len(line.lstrip(" "))]
    return textwrap.wrap(
        line.lstrip(" "), WIDTH, initial_indent=indent, subsequent_indent=f"{indent}    "
    )


def plan_lines(plan: Plan, *, predicted: str = "predicted") -> list[str]:
    """The facts of the whole plan, one a line.

    Args:
        plan: The plan.
        predicted: What its planner's figures are called; empty leaves them out.
    """
    groups = len({group for group, _ in plan.schedule.placement})
    per_node = " + ".join(map(str, plan.cluster))
    lines = [
        f"plan by {plan.planner}: {count_of(len(plan.stages), 'stage')} on "
        f"{count_of(groups, 'rank group')} × {count_of(plan.replicas, 'replica')} = "
        f"{count_of(len(plan.devices), 'device')} of {per_node} ({plan.device})",
        f"batch {plan.global_batch} = {count_of(plan.microbatches, 'microbatch')} × "
        f"{count_of(plan.replicas, 'replica')} × {count_of(plan.local_batch, 'sample')}",
        f"schedule {plan.schedule.name}, torch {plan.torch}, "
        f"graph {plan.graph_hash[:12]}, parameters {plan.params_hash[:12]}",
    ]
    if plan.predicted and predicted:
        figures = ", ".join(f"{_title(k)} {figure(k, v)}" for k, v in plan.predicted.items())
        lines.append(f"{predicted}: {figures}")
    return [*lines, *certificate_lines(plan)]


def certificate_lines(plan: Plan) -> list[str]:
    """How good the plan can be told to be, in one line; none where nothing is known."""
    gap, bound = plan.certificate.get("gap"), plan.certificate.get("lower_bound_s")
    if gap is None or bound is None:
        return []
    return [
        f"at most {100 * gap:.1f} % from the best possible under this cost model "
        f"(no plan takes less than {duration(bound)})"
    ]


def plan_columns(plan: Plan, *, predicted: bool = True) -> list[Column]:
    """The table of stages, column by column.

    Args:
        plan: The plan.
        predicted: With what the planner predicted of every stage.
    """
    stages = plan.stages
    columns: list[Column] = [
        ("stage", [str(s) for s in range(len(stages))]),
        ("first op", [stage.first for stage in stages]),
        ("last op", [stage.last for stage in stages]),
        ("devices", [span(stage.mesh.devices) for stage in stages]),
    ]
    if any(stage.mesh.inner for stage in stages):
        columns.append(("mesh", [mesh_text(stage.mesh) for stage in stages]))
    if any(chunk for _, chunk in plan.schedule.placement):
        columns.append(("chunk", [str(chunk) for _, chunk in plan.schedule.placement]))
    columns.append(("recompute", [stage.memory.recompute for stage in stages]))
    if any(stage.memory.zero for stage in stages):
        columns.append(("ZeRO", [str(stage.memory.zero) for stage in stages]))
    for key in dict.fromkeys(k for s in stages for k in s.predicted if predicted):
        cells = [figure(key, s.predicted[key]) if key in s.predicted else "" for s in stages]
        columns.append((_title(key), cells))
    return columns


def alternative_lines(plan: Plan) -> list[str]:
    """The plans that came after this one in the search, with what they lose against it."""
    own = plan.predicted.get("step_s")
    if not plan.alternatives or not own:
        return []
    lines = [f"runner-up plans, by predicted step ({duration(own)} for this one):"]
    ordered = sorted(plan.alternatives.items(), key=lambda item: item[1])
    for words, step in ordered[:_SHOWN]:
        lines += textwrap.wrap(
            f"{100 * (step / own - 1):+5.1f} %  {duration(step):>8}  {words}",
            WIDTH,
            initial_indent="  ",
            subsequent_indent=" " * 21,
        )
    return lines


def mesh_text(mesh: MeshSlice) -> str:
    """``data 2 × x 4``."""
    return " × ".join(f"{name} {size}" for name, size in mesh.named)


def span(numbers: Sequence[int]) -> str:
    """``0-7``, ``0,2`` or ``0,2,4,6,... (9)``."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 1 and tuple(numbers) == tuple(range(first, last + 1)):
        return f"{first}-{last}"
    shown = ",".join(map(str, numbers[:4]))
    return shown if len(numbers) <= 4 else f"{shown},... ({len(numbers)})"


def size(nbytes: float) -> str:
    """Bytes with a unit: ``1.02 kB``, ``85.9 GB``."""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        nbytes /= 1000
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
    return f"{nbytes / 1000:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds with a unit: ``0 s``, ``12.3 us``, ``7.21 ms``, ``3.5 s``."""
    if not seconds:
        return "0 s"
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.4g} s"


def throughput(samples_per_s: float) -> str:
    """``3.14 samples/s``, ``39.9 samples/s``, ``13,040 samples/s``."""
    digits = 0 if samples_per_s >= 99.95 else 1 if samples_per_s >= 9.995 else 2
    return f"{samples_per_s:,.{digits}f} samples/s"


def figure(key: str, value: float) -> str:
    """A predicted figure with the unit that the end of its key says."""
    if key.endswith("_s"):
        return duration(value)
    if key.endswith("_bytes"):
        return size(value)
    return f"{value:.1%}" if key == "bubble" else f"{value:.4g}"


def _title(key: str) -> str:
    return key.removesuffix("_s").removesuffix("_bytes").replace("_", " ")


def graph_notes(graph: OpGraph) -> list[str]:
    """What keeps a model from being split further, one a line."""
    notes = []
    blockers = graph.analysis.blockers
    if graph.max_replicas == 1 and blockers:
        notes.append("one replica only, since these ops mix samples or have no batch rule:")
        notes += [f"  {op}: {reason}" for op, reason in blockers[:_SHOWN]]
        if len(blockers) > _SHOWN:
            notes.append(f"  and {len(blockers) - _SHOWN} more")
    if graph.feels_microbatches:
        notes.append(
            "the result depends on the number of microbatches: it belongs to the training recipe, "
            "and no planner changes it"
        )
    return notes


def table(columns: Sequence[Column]) -> list[str]:
    """Columns side by side; cells that are numbers stand to the right.

    Where the rows would be wider than `WIDTH`, the widest cells are shortened in the middle.
    """
    widths = [max(len(title), *(len(cell) for cell in cells)) for title, cells in columns]
    limit = WIDTH - 2 * (len(columns) - 1)
    while sum(widths) > limit and max(widths) > _LEAST_CELL:
        widest = widths.index(max(widths))
        if len(columns[widest][0]) >= widths[widest]:
            break
        widths[widest] -= 1
    texts = []
    for (title, cells), width in zip(columns, widths, strict=True):
        right = all(cell[:1].isdigit() or not cell for cell in cells)
        short = [_shortened(cell, width) for cell in (title, *cells)]
        texts.append([c.rjust(width) if right else c.ljust(width) for c in short])
    return ["  ".join(row).rstrip() for row in zip(*texts, strict=True)]


def _shortened(text: str, width: int) -> str:
    """``model.la…/linear#0``: the end tells more than the middle."""
    if len(text) <= width:
        return text
    front = (width - 1) // 3
    return f"{text[:front]}…{text[len(text) - (width - 1 - front) :]}"


def count_of(count: int, noun: str) -> str:
    """``1 stage``, ``2 replicas``, ``4 microbatches``."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"
