"""Instruction lists as text, and as a picture over time."""

from __future__ import annotations

import re
from collections.abc import Sequence

from raypar.errors import ScheduleError
from raypar.schedules.instructions import COMPUTE, Instruction
from raypar.schedules.timing import Durations, ideal_timeline

_WORDS = re.compile(r"[^\s\[\]]+(?:\[[^\[\]]*\])?|\S+")  # a value's name may hold spaces
_LINE = re.compile(r"^(\d+):(.*)$")


def format_lists(lists: Sequence[Sequence[Instruction]]) -> str:
    """One line per rank group, ``rank: word word ...``; `parse_lists` gives back the same lists."""
    lines = (f"{rank}: {' '.join(map(str, program))}" for rank, program in enumerate(lists))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def parse_lists(text: str) -> list[list[Instruction]]:
    """Reads what `format_lists` wrote; blank lines and lines that start with ``#`` are skipped.

    Raises:
        ScheduleError: A line has no rank group in front, the rank groups are not 0, 1, 2, ... in
            order, or a word is no instruction.
    """
    lists: list[list[Instruction]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None or int(match.group(1)) != len(lists):
            raise ScheduleError(
                f"line {number}: expected '{len(lists)}: ' and the instructions of rank group "
                f"{len(lists)}, found {line[:60]!r}"
            )
        try:
            lists.append([Instruction.parse(word) for word in _WORDS.findall(match.group(2))])
        except ScheduleError as error:
            raise ScheduleError(f"line {number}: {error}") from None
    return lists


def draw(
    lists: Sequence[Sequence[Instruction]],
    durations: Durations | None = None,
    transfer: float = 0.0,
    max_slots: int = 400,
) -> str:
    """A grid with one row per rank group and one column per time slot.

    ``2F0`` begins a piece of compute, ``-`` goes on with it, ``.`` is idle time.

    Args:
        lists: One list per rank group.
        durations: Times per stage; without them F, I and W take one slot each and B two.
        transfer: Transfer time, in the unit of `durations`.
        max_slots: Where the shortest piece of compute would need more columns than this, slots
            are widened; pieces that begin in one slot then share it, the last one shown.

    Raises:
        ScheduleError: The lists deadlock.
    """
    if durations is None:
        stages = [ins.stage for program in lists for ins in program if ins.stage is not None]
        durations = Durations.uniform(max(stages, default=-1) + 1)
    timeline = ideal_timeline(lists, durations, transfer)
    lengths = [span.end - span.start for row in timeline.spans for span in row]
    slot = min((length for length in lengths if length > 0), default=1.0)
    slot = max(slot, timeline.makespan / max_slots)
    slots = max(1, round(timeline.makespan / slot))
    words = [str(ins) for program in lists for ins in program if ins.kind in COMPUTE]
    width = max(map(len, words), default=1)
    side = len(str(len(lists) - 1))
    rows = []
    for rank, spans in enumerate(timeline.spans):
        cells = ["."] * slots
        for span in spans:
            first, end = round(span.start / slot), round(span.end / slot)
            if span.end == span.start:
                continue  # an empty weight half takes no room
            first = min(first, slots - 1)
            cells[first] = str(span.instruction)
            cells[first + 1 : end] = ["-"] * (min(end, slots) - first - 1)
        rows.append(f"{rank:>{side}} | " + " ".join(cell.ljust(width) for cell in cells).rstrip())
    return "\n".join(rows) + "\n"
