"""Draws the picture of the README: a model, the plan that raypar makes for it, and one step.

    python -m docs.draw_plan docs/plan.svg

Layers, shares of work and times are those of a real plan of the example GPT, for four devices that
are described and need not be there. The chart is the plan's simulated step.
"""

from __future__ import annotations

import math
import sys
from html import escape
from pathlib import Path

import raypar as rp
from examples.data import stdlib_bytes
from examples.models import gpt
from raypar.fit import stage_ranges
from raypar.search.simulate import Simulation, simulate

_WIDTH, _LEFT, _ROW = 900, 165, 30
_COLOURS = ("#4c78a8", "#e4863a", "#54a24b", "#b279a2")
_KINDS = {"F": ("forward", 0.95), "B": ("backward", 0.6), "comm": ("communication", 0.3)}


def picture() -> str:
    """The picture as SVG, with a light background of its own."""
    batch = next(stdlib_bytes(global_batch=32, seq_len=128))
    graph = rp.capture(lambda: gpt(layers=4, width=256, heads=4, seq_len=128), batch)
    cluster = rp.Cluster.virtual(nodes=1, devices_per_node=4, device="A100-40")
    wanted = rp.SearchConfig(stages=2, tensor=2, microbatches=4)
    plan = rp.plan(graph, cluster, wanted)
    model, top = _model(graph, plan)
    bands, top = _bands(graph, plan, top + 34)
    step, top = _step(simulate(graph, plan, cluster), plan, top + 34)
    body = "\n".join([*model, *bands, *step])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top + 16}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img" '
        'aria-label="A model, its plan, and one step of it">\n'
        f'<rect width="100%" height="100%" rx="10" fill="#fbfbfa"/>\n{body}\n</svg>\n'
    )


def _layers(graph: rp.OpGraph, plan: rp.Plan) -> list[tuple[str, float, int]]:
    """(name, FLOPs, stage) of the model's layers in order."""
    found: list[tuple[str, float, int]] = []
    for stage, (first, last) in enumerate(stage_ranges(plan, graph)):
        for op in graph.ops[first:last]:
            path = op.id.partition("/")[0].split(".")
            name = ".".join(path[:2] if path[0] == "blocks" else path[:1])
            if name and found and found[-1][0] == name and found[-1][2] == stage:
                found[-1] = (name, found[-1][1] + op.flops, stage)
            elif name:
                found.append((name, float(op.flops), stage))
    return found


def _model(graph: rp.OpGraph, plan: rp.Plan) -> tuple[list[str], int]:
    """The layers, coloured by the stage that has them."""
    layers = _layers(graph, plan)
    size = sum(math.prod(shape) for shape, _, _ in graph.params.values())
    parts = [*_title("your model", f"{len(graph.ops)} ops, {size / 1e6:.1f} M parameters", 40)]
    wide = (_WIDTH - _LEFT - 20) / len(layers)
    for at, (name, _, stage) in enumerate(layers):
        x = _LEFT + at * wide
        parts.append(_box(x, 24, wide - 5, 38, _COLOURS[stage], 0.9))
        lines = name.split("_")  # two lines where one is too long for the box
        for line, word in enumerate(lines):
            y = 47 - 7 * (len(lines) - 1) + 14 * line
            parts.append(_text(x + (wide - 5) / 2, y, word, "#fff", "middle", 11))
    return parts, 62


def _bands(graph: rp.OpGraph, plan: rp.Plan, top: int) -> tuple[list[str], int]:
    """One line for each stage: its devices, and its share of the work."""
    whole = sum(op.flops for op in graph.ops) or 1
    parts = _title("its plan", f"{plan.microbatches} microbatches, {plan.schedule.name}", top + 16)
    for stage, (first, last) in enumerate(stage_ranges(plan, graph)):
        y = top + stage * (_ROW + 6)
        mesh = plan.stages[stage].mesh
        for at, device in enumerate(mesh.devices):
            x = _LEFT + at * 92
            parts.append(_box(x, y, 86, _ROW, _COLOURS[stage], 0.9))
            parts.append(_text(x + 43, y + 20, f"device {device}", "#fff", "middle", 12))
        work = sum(op.flops for op in graph.ops[first:last]) / whole
        shards = len(mesh.devices) // mesh.replicas
        copies = f"{mesh.replicas} replica{'s' * (mesh.replicas > 1)}"
        words = f"stage {stage}: {work:.0%} of the work, {copies}, ops cut over {shards} devices"
        parts.append(_text(_LEFT + len(mesh.devices) * 92 + 8, y + 20, words))
    return parts, top + len(plan.stages) * (_ROW + 6)


def _step(played: Simulation, plan: rp.Plan, top: int) -> tuple[list[str], int]:
    """The simulated step: a row for each stage's ranks, time from left to right."""
    parts = _title("one step", f"{1e3 * played.step_s:.2f} ms, simulated", top + 16)
    scale = (_WIDTH - _LEFT - 20) / played.step_s
    for row in range(len(played.lanes)):
        y = top + row * (_ROW + 6)
        parts.append(_box(_LEFT, y, played.step_s * scale, _ROW, "#888", 0.12))
        for span in played.spans(row):
            name, strength = _KINDS.get(span.kind, ("", 0.3))
            if span.kind != "wait":
                x, wide = _LEFT + span.start * scale, (span.end - span.start) * scale
                colour = _COLOURS[row] if name in ("forward", "backward") else "#555"
                parts.append(_box(x, y, max(wide - 0.6, 0.4), _ROW, colour, strength, 1))
    y = top + len(played.lanes) * (_ROW + 6)
    legend = "strong: forward, pale: backward, grey: communication and optimizer, light: idle "
    parts.append(_text(_LEFT, y + 12, f"{legend}({played.bubble:.0%})", "#666", size=11))
    return parts, y + 14


def _title(name: str, below: str, y: int) -> list[str]:
    return [_text(18, y, name, "#222", size=15), _text(18, y + 16, below, "#666", size=10)]


def _box(
    x: float, y: float, wide: float, high: float, fill: str, strength: float, radius: int = 4
) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high}" rx="{radius}" '
        f'fill="{fill}" fill-opacity="{strength}"/>'
    )


def _text(
    x: float, y: float, words: str, fill: str = "#333", anchor: str = "start", size: int = 13
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" text-anchor="{anchor}" '
        f'font-size="{size}">{escape(words)}</text>'
    )


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "plan.svg").write_text(picture(), "utf-8")
