"""The ideal timeline of instruction lists: what the order itself costs, with given durations.

Every rank group computes one thing at a time; a message leaves when its SEND is reached and
arrives a transfer time later; nothing else takes time and nothing contends. `raypar simulate` and
the planners use richer models on the same lists.

``python -m raypar.schedules.timing`` prints the bubbles of the built-in schedules.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raypar.errors import ScheduleError
from raypar.schedules.instructions import COMPUTE, RECV, SEND, Instruction, Kind


@dataclass(frozen=True, slots=True)
class Durations:
    """Times of one microbatch, per stage, in any one unit; a whole backward takes I + W.

    Attributes:
        forward: F of every stage.
        backward_input: I of every stage.
        backward_weight: W of every stage.
    """

    forward: tuple[float, ...]
    backward_input: tuple[float, ...]
    backward_weight: tuple[float, ...]

    @classmethod
    def uniform(
        cls,
        n_stages: int,
        forward: float = 1,
        backward_input: float = 1,
        backward_weight: float = 1,
    ) -> Durations:
        """The same times for every stage."""
        return cls(
            (forward,) * n_stages, (backward_input,) * n_stages, (backward_weight,) * n_stages
        )

    def fused(self, splits: Sequence[bool]) -> Durations:
        """With W moved into I for the stages whose backward does not divide."""
        both = list(zip(self.backward_input, self.backward_weight, splits, strict=True))
        return Durations(
            self.forward,
            tuple(i if split else i + w for i, w, split in both),
            tuple(w if split else 0.0 for _, w, split in both),
        )

    def of(self, instruction: Instruction) -> float:
        """How long `instruction` computes; 0 for what is no compute."""
        stage = instruction.stage
        if stage is None or instruction.kind not in COMPUTE:
            return 0.0
        if instruction.kind is Kind.FORWARD:
            return self.forward[stage]
        if instruction.kind is Kind.BACKWARD_INPUT:
            return self.backward_input[stage]
        if instruction.kind is Kind.BACKWARD_WEIGHT:
            return self.backward_weight[stage]
        return self.backward_input[stage] + self.backward_weight[stage]


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of compute on the timeline."""

    instruction: Instruction
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """When every rank group computes what.

    Attributes:
        spans: For every rank group its compute, in order.
        makespan: When the last compute ends; the first starts at 0.
    """

    spans: tuple[tuple[Span, ...], ...]
    makespan: float

    @property
    def busy(self) -> tuple[float, ...]:
        """For every rank group, the time it computes."""
        return tuple(sum(span.end - span.start for span in spans) for spans in self.spans)

    @property
    def bubble(self) -> tuple[float, ...]:
        """For every rank group, the time it is idle between 0 and the makespan."""
        return tuple(self.makespan - busy for busy in self.busy)


Transfer = Callable[[Instruction], float]


def ideal_timeline(
    lists: Sequence[Sequence[Instruction]],
    durations: Durations,
    transfer: float | Transfer = 0.0,
) -> Timeline:
    """Plays the lists in time.

    Args:
        lists: One list per rank group.
        durations: Times per stage.
        transfer: Time from a SEND to the arrival of its message: one number for all, or a
            function of the SEND instruction.

    Raises:
        ScheduleError: The lists deadlock (`check_lists` says how).
    """
    cost: Transfer = transfer if callable(transfer) else lambda _: float(transfer)
    arrivals: dict[tuple[object, ...] | None, float] = {}
    at = [0] * len(lists)
    clock = [0.0] * len(lists)
    spans: list[list[Span]] = [[] for _ in lists]
    moving = True
    while moving:
        moving = False
        for rank, program in enumerate(lists):
            while at[rank] < len(program):
                ins = program[at[rank]]
                if ins.kind in RECV:
                    if ins.message not in arrivals:
                        break
                    clock[rank] = max(clock[rank], arrivals[ins.message])
                elif ins.kind in SEND:
                    arrivals[ins.message] = clock[rank] + cost(ins)
                elif ins.kind in COMPUTE:
                    end = clock[rank] + durations.of(ins)
                    spans[rank].append(Span(ins, clock[rank], end))
                    clock[rank] = end
                at[rank] += 1
                moving = True
    stuck = [r for r, program in enumerate(lists) if at[r] < len(program)]
    if stuck:
        waiting = ", ".join(f"rank group {r} at {lists[r][at[r]]}" for r in stuck)
        raise ScheduleError(f"the lists deadlock: {waiting}; check_lists() shows the grid")
    makespan = max((row[-1].end for row in spans if row), default=0.0)
    return Timeline(tuple(tuple(row) for row in spans), makespan)


def _figures(stages: int, chunks: int, microbatches: int) -> list[tuple[str, float, float, int]]:
    """(schedule, makespan, bubble per rank group, peak in flight) at F = I = W = 1 per rank."""
    from raypar.schedules.check import check_lists
    from raypar.schedules.compile import compile_schedule
    from raypar.schedules.io import Edge, StageIO
    from raypar.schedules.registry import schedule_names

    rows = []
    for name in schedule_names():
        parts = chunks if name.startswith("interleaved") else 1
        n = stages * parts
        edges = tuple(Edge(f"x{s}", s, (s + 1,), True, 1) for s in range(n - 1))
        io = StageIO(n, tuple(s % stages for s in range(n)), edges, (True,) * n)
        lists = compile_schedule(name, io, microbatches)
        report = check_lists(lists, io, microbatches)
        part = 1 / parts
        timeline = ideal_timeline(lists, Durations.uniform(n, part, part, part))
        peak = max(report.peak_saved_bytes((1,) * n))
        shown = f"{name} ×{parts}" if parts > 1 else name
        rows.append((shown, timeline.makespan, max(timeline.bubble), peak))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Prints bubbles and peaks of every registered schedule at equal F, I and W."""
    parser = argparse.ArgumentParser(
        prog="python -m raypar.schedules.timing", description=main.__doc__
    )
    parser.add_argument("--stages", type=int, nargs="*", default=[2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--microbatches", type=int, help="default: twice the stages")
    parser.add_argument(
        "--chunks", type=int, default=2, help="chunks per rank of interleaved schedules"
    )
    args = parser.parse_args(argv)
    print("F = I = W = 1 per rank group, transfers free; peak: (stage, microbatch) pairs alive")
    print(
        f"{'S':>2} {'M':>4}  {'schedule':<28} {'step':>7} {'bubble':>7} {'of 1f1b':>8} {'peak':>5}"
    )
    for stages in args.stages:
        microbatches = args.microbatches or 2 * stages
        rows = _figures(stages, args.chunks, microbatches)
        base = next((bubble for name, _, bubble, _ in rows if name == "1f1b"), 0.0)
        for name, step, bubble, peak in rows:
            ratio = f"{bubble / base:8.2f}" if base else f"{'-':>8}"
            figures = f"{step:>7g} {bubble:>7g} {ratio} {peak:>5}"
            print(f"{stages:>2} {microbatches:>4}  {name:<28} {figures}")


if __name__ == "__main__":
    main()
