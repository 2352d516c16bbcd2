"""How many bytes a stage holds for its backward, step by step along an instruction list."""

from __future__ import annotations

from collections.abc import Sequence

from raypar.errors import ScheduleError
from raypar.schedules.instructions import Instruction, Kind

# What an instruction adds to the counts of (whole microbatches, halves) that a stage holds.
_CHANGE = {
    Kind.FORWARD: (1, 0),
    Kind.BACKWARD: (-1, 0),
    Kind.BACKWARD_INPUT: (-1, 1),
    Kind.BACKWARD_WEIGHT: (0, -1),
}


def peak_saved_per_stage(
    lists: Sequence[Sequence[Instruction]],
    saved_bytes: Sequence[int],
    half_bytes: Sequence[int],
) -> tuple[int, ...]:
    """For every stage, the most bytes held for backward at once on one replica.

    Exact for split backwards, where the weight half holds other values than forward left: the
    activations that it multiplies with, and the gradients that the input half made.

    Args:
        lists: One instruction list per rank group.
        saved_bytes: For every stage, bytes one microbatch keeps from F until B or the input half.
        half_bytes: For every stage, bytes one microbatch keeps from the input to the weight half.

    Raises:
        ScheduleError: The two sequences are not of equal length.
    """
    if len(saved_bytes) != len(half_bytes):
        raise ScheduleError(
            f"saved_bytes has {len(saved_bytes)} stages, half_bytes has {len(half_bytes)}"
        )
    peaks = [0] * len(saved_bytes)
    for instructions in lists:
        counts: dict[int, tuple[int, int]] = {}
        for now in instructions:
            if now.kind not in _CHANGE or now.stage is None:
                continue
            stage = now.stage
            whole, half = counts.get(stage, (0, 0))
            more = _CHANGE[now.kind]
            counts[stage] = whole, half = whole + more[0], half + more[1]
            peaks[stage] = max(peaks[stage], whole * saved_bytes[stage] + half * half_bytes[stage])
    return tuple(peaks)
