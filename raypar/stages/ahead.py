"""Programs that are compiled at their first call are called once before the first step.

A compiler may take minutes. Within a step it would be one stage after the other, since each waits
for what the one before makes; ahead of it all ranks compile at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Set

import torch

from raypar.programs.products import Gradient
from raypar.programs.wire import communicates, inputs_of
from raypar.schedules.instructions import Kind
from raypar.stages.compiled import CompiledProgram
from raypar.stages.holdings import HeldStage

_MADE_UP = {"edge": 0, "in": 0, "global": 1}
"""Kind of argument that there is in a step alone → its values; globals are counts, and divisors."""
_log = logging.getLogger(__name__)


def compile_ahead(
    stage: HeldStage,
    kinds: Set[Kind],
    device: torch.device,
    argument: Callable[[str], torch.Tensor],
) -> None:
    """Calls the programs of a stage that its instructions use; what they give is dropped.

    Shapes and strides are those of a step, for which alone compiled programs are made. A stage is
    left to the first step whose programs exchange values, for which all its ranks would have to be
    here, or that cannot run on values that are made up.

    Args:
        stage: The stage, its programs as the rank's engine runs them.
        kinds: Which instructions its rank has for it.
        device: Where values are made up.
        argument: Gives what forward takes that a rank holds, by its id.
    """
    wire = stage.spec.nodes["graph"]
    if not isinstance(stage.program.forward, CompiledProgram) or communicates(wire):
        return
    box = []
    for key, shape, dtype in inputs_of(wire):
        value = _MADE_UP.get(key.partition(":")[0])
        if value is None:
            box.append(argument(key))
        else:
            box.append(torch.full(shape, value, dtype=dtype, device=device))
    try:
        _call(stage, kinds, box)
    except Exception as error:
        _log.info("stage %d is compiled in the first step: %s", stage.spec.index, error)


def _call(stage: HeldStage, kinds: Set[Kind], box: list[torch.Tensor]) -> None:
    program = stage.program
    kept = [box[i] for i in program.kept]
    results = program.forward(box)
    tangents = [torch.zeros_like(results[i]).contiguous() for i in program.tangent_outputs]
    held = [*kept, *results[program.n_outputs :], *tangents]
    if not tangents:
        return
    halves = Kind.BACKWARD_INPUT in kinds
    if Kind.BACKWARD in kinds or (halves and not program.input_gradients):
        program.backward(list(held), _drop)
    if halves and program.input_gradients:
        later = [held[i] for i in program.weight_kept]
        between = program.backward_input(held)[program.n_inputs_grad :]
        program.backward_weight([*later, *between], _drop)


def _drop(index: int, gradient: Gradient) -> None:
    """Where gradients of no step go."""
