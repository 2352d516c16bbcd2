"""What the walk of `raypar.schedules.check` keeps per rank group, and shows of it in errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from raypar.schedules.instructions import Instruction, Kind

_WHOLE_GRID = 4000  # instructions; longer schedules are shown around the place of the fault
_AROUND = 12


@dataclass(slots=True)
class Rank:
    """One rank group during the walk.

    Attributes:
        index: Its number.
        program: Its list.
        stages: Stages it holds.
        at: The next instruction.
        values: (edge, microbatch) → targets here that have read the activation.
        grads: (edge, microbatch) → target stages whose gradients are summed up here.
        counts: Microbatches alive, per held stage.
        edge_bytes: Bytes of `values` and `grads`.
        states: See `LifetimeReport.states`.
        synced: Stages whose GRAD_SYNC is done.
        done: GLOBALS, NORM, OPTIMIZER as far as done.
    """

    index: int
    program: Sequence[Instruction]
    stages: tuple[int, ...]
    at: int = 0
    values: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    grads: dict[tuple[str, int], frozenset[int]] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    edge_bytes: int = 0
    states: dict[tuple[int, ...], int] = field(default_factory=dict)
    synced: set[int] = field(default_factory=set)
    done: list[Kind] = field(default_factory=list)

    def note(self, extra: int = 0) -> None:
        """Records what is alive now, and `extra` bytes for a moment."""
        counts, held = tuple(self.counts), self.edge_bytes + extra
        if held > self.states.get(counts, -1):
            self.states[counts] = held


def grid(ranks: Sequence[Rank], marked: Sequence[Rank]) -> str:
    """All lists, one line each, the marked ranks' current cells as ``>>cell<<``."""
    whole = sum(len(rank.program) for rank in ranks) <= _WHOLE_GRID
    lines = []
    for rank in ranks:
        first = 0 if whole else max(0, rank.at - _AROUND)
        end = len(rank.program) if whole else min(len(rank.program), rank.at + _AROUND)
        words = [str(ins) for ins in rank.program[first:end]]
        if any(rank is m for m in marked):
            if rank.at < len(rank.program):
                words[rank.at - first] = f">>{words[rank.at - first]}<<"
            else:
                words.append(">>end<<")
        dots = "... " if first else ""
        more = " ..." if end < len(rank.program) else ""
        lines.append(f"{rank.index}: {dots}{' '.join(words)}{more}")
    return "\n".join(lines)
