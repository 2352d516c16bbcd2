"""Cost models `analytic_once` and `analytic_rings`: the analytic one, for deep models.

Deep models have many stages with the same ops on meshes of the same form: one of them is traced.
The second has collectives over several nodes go in rings (`_rings.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from raypar.compat import pytree
from raypar.search.cost.analytic import AnalyticCost
from raypar.search.cost.base import StageCode, StageCost, register_cost_model
from raypar.search.cost.machine import MeshMachine
from release._rings import rings

_PIECES: dict[object, StageCode] = {}


@register_cost_model
class AnalyticOnce(AnalyticCost):
    """Prices one of several stages that are alike."""

    name = "analytic_once"

    def stage_cost(
        self, stage: StageCode, machine: MeshMachine, *, optimizer_states: int = 2
    ) -> StageCost:
        """What `stage` costs; see `CostModel`."""
        # A stage that is alike stands in: its trace is in the analytic model's cache.
        stand_in = _PIECES.setdefault(_look(stage), stage)
        return super().stage_cost(stand_in, machine, optimizer_states=optimizer_states)


@register_cost_model
class AnalyticRings(AnalyticOnce):
    """The same, with rings."""

    name = "analytic_rings"

    def stage_cost(
        self, stage: StageCode, machine: MeshMachine, *, optimizer_states: int = 2
    ) -> StageCost:
        """What `stage` costs; see `CostModel`."""
        return super().stage_cost(stage, rings(machine), optimizer_states=optimizer_states)


def _look(stage: StageCode) -> object:
    """What the cost of a stage depends on: its ops in order, and who reads what."""
    number: dict[fx.Node, int] = {}
    rows: list[object] = []
    for node in stage.graph.nodes:
        leaves = pytree.tree_leaves((node.args, node.kwargs))
        row: list[object] = [node.op, str(node.target) if node.op == "call_function" else ""]
        row += [number.get(a, -1) if isinstance(a, fx.Node) else str(a) for a in leaves]
        row.append(_values(node.meta.get("val")))
        if node.op == "placeholder":
            row.append(_role(str(node.meta["id"]), stage))
        number[node] = len(number)
        rows.append(tuple(row))
    return tuple(rows), stage.recompute, stage.outputs_with_grad, stage.axes


def _role(key: str, stage: StageCode) -> object:
    kind, _, name = key.partition(":")
    wanted = name in stage.trainable or name in stage.differentiable or name in stage.changing
    return kind, wanted, stage.layouts.get(name) if kind == "param" else None


def _values(value: Any) -> object:
    items = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(
        (tuple(v.shape), v.dtype, v.stride()) if isinstance(v, torch.Tensor) else str(type(v))
        for v in items
    )
