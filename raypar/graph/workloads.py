"""`read_workload`: the one door to workload files as published with other planners.

The formats are told apart by their keys; each has a module of its own that reads it.
"""

from __future__ import annotations

from pathlib import Path

from raypar.errors import PlanError
from raypar.graph._workloads_json import load_object
from raypar.graph._workloads_piper import (
    Layer,
    LayerEdge,
    LayerVariant,
    LayerWorkload,
    is_layer_workload,
    parse_layer_workload,
)
from raypar.graph._workloads_placement import (
    PlacementNode,
    PlacementWorkload,
    is_placement_workload,
    parse_placement_workload,
)

__all__ = [
    "Layer",
    "LayerEdge",
    "LayerVariant",
    "LayerWorkload",
    "PlacementNode",
    "PlacementWorkload",
    "read_workload",
]


def read_workload(path: str | Path) -> LayerWorkload | PlacementWorkload:
    """Reads a published workload.

    Args:
        path: A JSON file: profiled layers (nodes with ``TMPCs``), or an operator graph with its
            devices (``maxFPGAs``, ``maxCPUs``, ``maxSizePerFPGA``).

    Raises:
        PlanError: The file is unreadable or of no known format; something in it is missing,
            unknown, negative or given twice; or its graph has a cycle.
    """
    raw = load_object(path)
    try:
        if is_layer_workload(raw):
            return parse_layer_workload(raw)
        if is_placement_workload(raw):
            return parse_placement_workload(raw)
    except PlanError as error:
        raise PlanError(f"workload file {str(path)!r}: {error}") from None
    raise PlanError(
        f"workload file {str(path)!r} is of no known format; its keys are "
        f"{', '.join(raw) or '(none)'}. Known: nodes with TMPCs (profiled layers); "
        "maxFPGAs, maxCPUs and maxSizePerFPGA (an operator graph and its devices)"
    )
