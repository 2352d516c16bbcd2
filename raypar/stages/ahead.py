"""Programs that are compiled at their first call are called once before the first step.

A compiler may take minutes. Within a step other stages would wait that long for what a stage
makes, and miss the deadline of transfers.
"""

from __future__ import annotations

from collections.abc import Callable, Set

import torch

from raypar.programs.products import Gradient
from raypar.programs.wire import inputs_of
from raypar.schedules.instructions import Kind
from raypar.stages.holdings import HeldStage

Argument = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor]
"""Makes the forward argument of an id, a shape and a dtype."""


def call_once(stage: HeldStage, kinds: Set[Kind], argument: Argument) -> None:
    """Calls the programs of a stage that its instructions use; what they give is dropped.

    The ranks of a mesh do this together, since programs hold collectives. Shapes and strides are
    those of a step, for which alone compiled programs are made.

    Args:
        stage: The stage, its programs as the rank's engine runs them.
        kinds: Which instructions its rank has.
        argument: Makes the arguments of forward.

    Raises:
        PlanError: A program cannot be compiled.
    """
    program = stage.program
    inputs = inputs_of(stage.spec.nodes["graph"])
    box = [argument(key, shape, dtype) for key, shape, dtype in inputs]
    kept = [box[i] for i in program.kept]
    results = program.forward(box)
    if not program.tangent_outputs or not kinds & _BACKWARD:
        return
    tangents = [torch.zeros_like(results[i]).contiguous() for i in program.tangent_outputs]
    held = [*kept, *results[program.n_outputs :], *tangents]
    del kept, results, tangents
    if Kind.BACKWARD_INPUT not in kinds or not program.input_gradients:
        program.backward(held, _drop)
        return
    later = [held[i] for i in program.weight_kept]
    halves = program.backward_input(held)
    program.backward_weight([*later, *halves[program.n_inputs_grad :]], _drop)


_BACKWARD = {Kind.BACKWARD, Kind.BACKWARD_INPUT}


def _drop(index: int, gradient: Gradient) -> None:
    """Where gradients of no step go."""
