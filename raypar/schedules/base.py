"""What a schedule is: one decision, the order in which every rank group computes.

A schedule does not see tensors, transfers or memory. `raypar.schedules.compile` turns its orders
into instruction lists; a third party's schedule subclasses `Schedule`, is registered by
`raypar.schedules.registry.register`, and can run the suite in `raypar.testing.schedules`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from raypar.errors import ScheduleError
from raypar.schedules.instructions import Kind
from raypar.schedules.io import StageIO


class Action(NamedTuple):
    """One piece of compute.

    Attributes:
        kind: FORWARD, BACKWARD, BACKWARD_INPUT or BACKWARD_WEIGHT.
        stage: The stage.
        microbatch: The microbatch, 0-based.
    """

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Placement:
    """Which stages every rank group holds.

    Attributes:
        stages: For every rank group its stages, ascending; a group may hold none.
    """

    stages: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, rank_of: Sequence[int]) -> Placement:
        """From the rank group of every stage."""
        groups: list[list[int]] = [[] for _ in range(max(rank_of, default=-1) + 1)]
        for stage, rank in enumerate(rank_of):
            groups[rank].append(stage)
        return cls(tuple(tuple(group) for group in groups))

    @property
    def n_stages(self) -> int:
        """Number of stages of the plan."""
        return sum(len(group) for group in self.stages)

    @property
    def rank_of(self) -> tuple[int, ...]:
        """For every stage its rank group."""
        ranks = [0] * self.n_stages
        for rank, group in enumerate(self.stages):
            for stage in group:
                ranks[stage] = rank
        return tuple(ranks)

    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """The longest runs of neighbouring stages on one rank group, in stage order.

        A block is what one stage is in the papers: its stages follow each other without a
        transfer. S stages on S rank groups give S blocks.
        """
        runs: list[list[int]] = []
        last = -1
        for stage, rank in enumerate(self.rank_of):
            if rank == last:
                runs[-1].append(stage)
            else:
                runs.append([stage])
            last = rank
        return tuple(tuple(run) for run in runs)


class Schedule(ABC):
    """The order of compute on every rank group.

    The contract of `orders`:

    * every stage does every microbatch once: one forward, and either one backward or one input
      half and one weight half, in that order; forwards of one stage come in ascending microbatch
      order (buffers are updated in that order);
    * the orders can be executed when the forward of (s, m) waits for the forward of (s-1, m), and
      the backward (or its input half) of (s, m) for that of (s+1, m). Edges only lead from lower
      to higher stages, so this chain covers skip connections of every length too.
    """

    name: ClassVar[str]
    trains: ClassVar[bool] = True
    """Whether there are backwards; without them, only forwards are asked for."""
    rounds_under_way: ClassVar[int] = 1
    """A pipeline is full once so many microbatches per rank group are on their way, or fewer."""

    def check(self, placement: Placement, microbatches: int) -> None:
        """Says whether this schedule can run such a plan.

        The built-in schedules run every placement with every number of microbatches; a schedule
        that cannot overrides this.

        Args:
            placement: Where the stages sit.
            microbatches: M.

        Raises:
            ScheduleError: It cannot; the text names the constraint and a value that works.
        """
        if placement.n_stages < 1:
            raise ScheduleError(f"schedule {self.name!r} needs at least 1 stage, found 0")
        if microbatches < 1:
            raise ScheduleError(
                f"schedule {self.name!r} needs microbatches >= 1, found {microbatches}: "
                "set train.microbatches to 1 or more"
            )

    @abstractmethod
    def orders(
        self, placement: Placement, microbatches: int, splits: Sequence[bool]
    ) -> list[list[Action]]:
        """The order of compute, one list per rank group.

        Args:
            placement: Where the stages sit; `check` has accepted it.
            microbatches: M ≥ 1.
            splits: For every stage, whether its backward divides into two halves; where it does
                not, the input half does all the work and the weight half is empty.
        """


def check_io(io: StageIO) -> None:
    """Checks that a `StageIO` is well formed.

    Raises:
        ScheduleError: Lengths differ, an edge leads nowhere or backwards, a name is used twice or
            cannot be printed.
    """

    def fail(text: str) -> None:
        raise ScheduleError(f"stage description is malformed: {text}")

    if len(io.rank_of) != io.n_stages or len(io.splits) != io.n_stages:
        fail(
            f"n_stages is {io.n_stages}, but rank_of has {len(io.rank_of)} and splits "
            f"{len(io.splits)} entries"
        )
    if any(rank < 0 for rank in io.rank_of):
        fail(f"rank_of {io.rank_of} holds a negative rank group")
    names: set[str] = set()
    for edge in io.edges:
        if edge.name in names:
            fail(f"two edges are named {edge.name!r}")
        names.add(edge.name)
        if not edge.name or edge.name.startswith("grad:") or any(c in "[]<>\n" for c in edge.name):
            fail(f"edge name {edge.name!r} is empty, starts with 'grad:' or holds one of []<>")
        if not edge.targets or list(edge.targets) != sorted(set(edge.targets)):
            fail(f"targets {edge.targets} of edge {edge.name!r} are not ascending")
        if not 0 <= edge.source < edge.targets[0] or edge.targets[-1] >= io.n_stages:
            fail(
                f"edge {edge.name!r} leads from stage {edge.source} to {edge.targets}; targets "
                f"lie above the source and below {io.n_stages}"
            )


def check_orders(
    name: str,
    orders: Sequence[Sequence[Action]],
    placement: Placement,
    microbatches: int,
    *,
    trains: bool = True,
) -> None:
    """Checks what a schedule returned: every action is there once, on the right rank group.

    Args:
        name: The schedule's name.
        orders: What it returned.
        placement: Where the stages sit.
        microbatches: M.
        trains: Whether every forward has its backward; if not, there is none.

    Raises:
        ScheduleError: An action is missing, twice, misplaced, or before what it follows on the
            same stage.
    """

    def fail(text: str) -> None:
        raise ScheduleError(f"schedule {name!r} broke its contract: {text}")

    if len(orders) != len(placement.stages):
        fail(f"{len(orders)} orders for {len(placement.stages)} rank groups")
    for rank, (order, stages) in enumerate(zip(orders, placement.stages, strict=True)):
        done: set[Action] = set()
        for action in order:
            kind, stage, mb = action
            if stage not in stages or not 0 <= mb < microbatches:
                fail(f"{action} on rank group {rank}, stages {stages}, {microbatches} microbatches")
            if action in done:
                fail(f"{action} comes twice")
            before = {
                Kind.FORWARD: mb and Action(Kind.FORWARD, stage, mb - 1),
                Kind.BACKWARD: Action(Kind.FORWARD, stage, mb),
                Kind.BACKWARD_INPUT: Action(Kind.FORWARD, stage, mb),
                Kind.BACKWARD_WEIGHT: Action(Kind.BACKWARD_INPUT, stage, mb),
            }.get(kind)
            if before is None:
                fail(f"{action} is no compute action")
            if before and before not in done:
                fail(f"{action} comes before {before}")
            if kind is Kind.BACKWARD_INPUT and Action(Kind.BACKWARD, stage, mb) in done:
                fail(f"{action} after a whole backward")
            if kind is Kind.BACKWARD and Action(Kind.BACKWARD_INPUT, stage, mb) in done:
                fail(f"{action} after its input half")
            done.add(action)
            if kind is not Kind.FORWARD and not trains:
                fail(f"{action} in a schedule without backwards")
        for stage in stages:
            if not trains and Action(Kind.FORWARD, stage, microbatches - 1) not in done:
                fail(f"stage {stage} never does the forward of microbatch {microbatches - 1}")
            for mb in range(microbatches if trains else 0):
                whole = Action(Kind.BACKWARD, stage, mb) in done
                if not whole and Action(Kind.BACKWARD_WEIGHT, stage, mb) not in done:
                    fail(f"stage {stage} never finishes the backward of microbatch {mb}")
