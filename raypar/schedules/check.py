"""The walk over all instruction lists together, before anything runs.

It follows the conventions of `raypar.schedules.compile` and finds what would hang (a receive
whose message never comes, ranks that wait for each other), what would compute the wrong thing (a
value used before it is there or after it was freed, an incomplete gradient, a microbatch left
out), and what would leak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from raypar.errors import ScheduleError
from raypar.schedules._walk import Walk
from raypar.schedules.base import check_io
from raypar.schedules.instructions import Instruction
from raypar.schedules.io import StageIO


@dataclass(frozen=True, slots=True)
class LifetimeReport:
    """What the walk learned about memory.

    Attributes:
        peak_in_flight: For every stage, the most microbatches whose saved values are alive at
            once on one replica (from F until B or W has ended).
        peak_edge_bytes: For every rank group, most bytes of activations and gradients of edges
            held at once, on one replica. A receive counts from the place of its RECV (posted
            earlier, its buffer lives longer); a value being sent counts until its FREE.
        stages: For every rank group, the stages it holds.
        states: For every rank group, the distinct counts of microbatches alive per held stage
            that occurred, each with the most edge bytes held at that time.
    """

    peak_in_flight: tuple[int, ...]
    peak_edge_bytes: tuple[int, ...]
    stages: tuple[tuple[int, ...], ...]
    states: tuple[dict[tuple[int, ...], int], ...] = field(repr=False)

    def peak_saved_bytes(self, saved_bytes_per_stage: Sequence[int]) -> tuple[int, ...]:
        """For every rank group, most bytes saved between forward and backward at once.

        Args:
            saved_bytes_per_stage: For every stage, bytes that one microbatch's forward keeps.
        """
        return self._peaks(saved_bytes_per_stage, edges=False)

    def peak_bytes(self, saved_bytes_per_stage: Sequence[int]) -> tuple[int, ...]:
        """As `peak_saved_bytes`, with the edge values that are held at the same time."""
        return self._peaks(saved_bytes_per_stage, edges=True)

    def _peaks(self, saved: Sequence[int], edges: bool) -> tuple[int, ...]:
        if len(saved) != len(self.peak_in_flight):
            raise ScheduleError(
                f"saved_bytes_per_stage has {len(saved)} entries for "
                f"{len(self.peak_in_flight)} stages"
            )
        peaks = []
        for stages, states in zip(self.stages, self.states, strict=True):
            sizes = [saved[s] for s in stages]
            peaks.append(
                max(
                    sum(n * size for n, size in zip(counts, sizes, strict=True)) + edges * held
                    for counts, held in states.items()
                )
            )
        return tuple(peaks)


def check_lists(
    lists: Sequence[Sequence[Instruction]],
    io: StageIO,
    microbatches: int,
    *,
    trains: bool = True,
) -> LifetimeReport:
    """Walks all lists together.

    Sends never block; a receive waits for its message. The result does not depend on the order in
    which ranks advance.

    Args:
        lists: One list per rank group, as `compile_schedule` makes them.
        io: The plan's stages.
        microbatches: M.
        trains: Whether they train; lists that only evaluate hold nothing behind a forward.

    Returns:
        Peaks of what is alive.

    Raises:
        ScheduleError: The lists cannot run, compute the wrong thing, or leak. The text shows the
            grid with the failing cell marked ``>>so<<``, and who waits for whom.
    """
    check_io(io)
    walk = Walk(lists, io, microbatches, trains=trains)
    walk.run()
    return LifetimeReport(
        tuple(walk.peaks),
        tuple(max(rank.states.values()) for rank in walk.ranks),
        tuple(rank.stages for rank in walk.ranks),
        tuple(rank.states for rank in walk.ranks),
    )
