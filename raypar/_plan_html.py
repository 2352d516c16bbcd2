"""How plans look in a notebook, and what other notebook views are made of.

Small HTML that needs nothing else; ``_repr_html_`` methods come here when they are shown, so that
importing their classes costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from raypar._plan_text import count_of, duration, mesh_text, size, span

if TYPE_CHECKING:
    from raypar.plan import Plan

_GOLDEN = 137.508
"""Degrees between the hues of neighbouring rank groups: any few of them differ well."""
_MOST_STAGES = 24
_STYLE = (
    "font:13px/1.45 system-ui,sans-serif;border:1px solid #8884;border-radius:8px;"
    "padding:10px 14px;max-width:min(900px,100%);box-sizing:border-box;display:inline-block;"
    "overflow-x:auto"
)
# Told to inherit: in pages without a doctype tables do not.
_TABLE = "border-collapse:collapse;color:inherit;font:inherit"
_CELL = "padding:3px 12px 3px 0;text-align:left;vertical-align:top"


def hue(group: int) -> float:
    """The hue of a rank group, in degrees."""
    return round((210 + group * _GOLDEN) % 360, 1)


def plan_html(plan: Plan) -> str:
    """A plan: its stages as a strip and as a table."""
    words = (
        f"{count_of(len(plan.stages), 'stage')} on {count_of(len(plan.devices), 'device')} "
        f"({plan.device}), {count_of(plan.replicas, 'replica')}, "
        f"{count_of(plan.microbatches, 'microbatch')} of a batch of {plan.global_batch}, schedule "
        f"{plan.schedule.name}, planner {plan.planner}"
    )
    figures = []
    if "step_s" in plan.predicted:
        figures.append(f"predicted step {duration(plan.predicted['step_s'])}")
    if "gap" in plan.certificate:
        figures.append(f"at most {max(plan.certificate['gap'], 0.0):.1%} from the best possible")
    shown = plan.stages[:_MOST_STAGES]
    rows = []
    for index, stage in enumerate(shown):
        rows.append(
            (
                str(index),
                f"{stage.first} … {stage.last}",
                span(stage.mesh.devices),
                mesh_text(stage.mesh).replace(" ", "\N{NO-BREAK SPACE}"),
                f"recompute {stage.memory.recompute}, ZeRO-{stage.memory.zero}",
                *_stage_figures(stage.predicted),
            )
        )
    titles = ("stage", "ops", "devices", "mesh", "memory", "forward", "backward", "peak")
    left = len(plan.stages) - len(shown)
    more = f"<p>{count_of(left, 'more stage')}</p>" if left else ""
    return card_html(
        "Plan", [words, ", ".join(figures)], _strip(plan) + table_html(titles, rows) + more
    )


def table_html(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; columns in which nothing stands are left out."""
    kept = [at for at in range(len(titles)) if any(row[at] for row in rows)]
    head = "".join(f'<th style="{_CELL}">{escape(titles[at])}</th>' for at in kept)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{escape(row[at])}</td>' for at in kept) + "</tr>"
        for row in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if any(titles) else ""
    return f'<table style="{_TABLE}">{head}<tbody>{body}</tbody></table>'


def card_html(title: str, lines: Sequence[str], inside: str) -> str:
    """A box: its title, lines of text (escaped; empty ones are left out), and HTML below them."""
    text = "".join(f"<div>{escape(line)}</div>" for line in lines if line)
    return f'<div style="{_STYLE}"><b>{escape(title)}</b>{text}{inside}</div>'


def _stage_figures(predicted: dict[str, float]) -> tuple[str, str, str]:
    return (
        duration(predicted["forward_s"]) if "forward_s" in predicted else "",
        duration(predicted["backward_s"]) if "backward_s" in predicted else "",
        size(predicted["peak_bytes"]) if "peak_bytes" in predicted else "",
    )


def _strip(plan: Plan) -> str:
    """The stages from first to last, as wide as they take, in the colours of their rank groups."""
    parts = []
    for stage, (group, _) in zip(plan.stages, plan.schedule.placement, strict=True):
        took = sum(stage.predicted.get(key, 0.0) for key in ("forward_s", "backward_s"))
        parts.append((took, group))
    whole = sum(took for took, _ in parts)
    boxes = "".join(
        f'<span style="flex:{(took / whole if whole else 1 / len(parts)):.4f};height:14px;'
        f'background:hsl({hue(group)} 50% 58%);border-radius:3px"></span>'
        for took, group in parts
    )
    return f'<div style="display:flex;gap:1px;margin:6px 0">{boxes}</div>'
