"""How the programs of a stage are run: as they are, compiled, or as CUDA graphs."""

from __future__ import annotations

import logging
from typing import get_args

import torch

from raypar.errors import PlanError, did_you_mean
from raypar.programs.stage import StageProgram
from raypar.programs.wire import Wire, communicates
from raypar.schedules.instructions import Kind
from raypar.stages.compiled import compiled
from raypar.stages.graphed import CudaGraphs, Graphs, graphed, reason_against
from raypar.stages.spec import Engine, RankSpec

ENGINES: tuple[Engine, ...] = get_args(Engine)
_HALVES = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
_log = logging.getLogger(__name__)


def graphs_for(device: torch.device) -> Graphs:
    """What captures graphs on a device.

    Raises:
        PlanError: The device has none.
    """
    if device.type != "cuda":
        raise PlanError(
            f"engine 'cuda_graph' needs ranks on GPUs, and this one is on {device}: set engine to "
            "'eager', or to 'compiled'"
        )
    return CudaGraphs(device)


def engaged(
    program: StageProgram, wire: Wire, name: str, spec: RankSpec, device: torch.device
) -> StageProgram:
    """A stage's programs as the rank's engine runs them.

    A stage that cannot be compiled or graphed runs as it is, and the log says why.

    Args:
        program: As they were compiled; shared among ranks of one process.
        wire: The stage's graph as shipped.
        name: Name in errors.
        spec: The rank.
        device: Where it runs.

    Raises:
        PlanError: There is no such engine, or it does not run on the device.
    """
    if spec.engine == "eager":
        return program
    if spec.engine == "compiled":
        if program.data_dependent:
            _log.warning("%s is not compiled: sizes in it depend on the data", name)
            return program
        return compiled(program, name)
    if spec.engine != "cuda_graph":
        raise PlanError(
            f"unknown engine {spec.engine!r}; there are {', '.join(ENGINES)}."
            f"{did_you_mean(spec.engine, ENGINES)}"
        )
    graphs = graphs_for(device)
    reason = reason_against(
        program,
        halves=any(now.kind in _HALVES for now in spec.instructions),
        exchanges=communicates(wire),
    )
    if reason is not None:
        _log.warning("%s runs without CUDA graphs: %s", name, reason)
        return program
    return graphed(program, graphs, device)
