"""Orders by greedy list scheduling in unit time, under limits of microbatches in flight.

The limits make the schedule: with the right ones the greedy walk is 1F1B or zero-bubble H1
exactly, and it stays defined when rank groups hold several stages anywhere in the chain.

It cannot get stuck. Let m be the lowest microbatch that is not finished, so that every lower one
has left all stages. Its next action is a forward on a stage where nothing is held (forwards are
ascending), which every limit lets pass, or a backward, which no limit holds back.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from raypar.schedules.base import Action, Placement
from raypar.schedules.instructions import Kind


@dataclass(frozen=True, slots=True)
class Limits:
    """What holds a forward back.

    Attributes:
        in_flight: For every stage, most microbatches between forward and input gradient.
        held: For every stage, most microbatches whose saved values are alive (until the weight
            gradient is done).
        budget: For every rank group, most (stage, microbatch) pairs held at once; one is always
            kept for each of its stages, so it counts as at least the number of stages.
        forward_first: No backward before the last forward of the rank group.
    """

    in_flight: Sequence[int]
    held: Sequence[int]
    budget: Sequence[int]
    forward_first: bool = False


class _Walk:
    def __init__(
        self, placement: Placement, microbatches: int, splits: Sequence[bool] | None, limits: Limits
    ) -> None:
        n = placement.n_stages
        self.placement = placement
        self.microbatches = microbatches
        self.splits = splits
        self.limits = limits
        self.orders: list[list[Action]] = [[] for _ in placement.stages]
        # How many microbatches every stage has started and finished, per kind: microbatches of one
        # stage and kind go in ascending order, so that a count says which ones.
        self.started = {kind: [0] * n for kind in _KINDS}
        self.finished = {kind: [0] * n for kind in _KINDS}
        self.last = n - 1
        # Every block takes equally long, however many stages it is made of.
        blocks = placement.blocks
        whole = math.lcm(*(len(block) for block in blocks))
        self.slot = [whole // len(block) for block in blocks for _ in block]

    def allowed(self, stage: int, rank: int) -> bool:
        """Whether the limits let `stage` take in one more microbatch."""
        forward = self.started[Kind.FORWARD]
        if (
            forward[stage] - self.finished[Kind.BACKWARD_INPUT][stage]
            >= self.limits.in_flight[stage]
        ):
            return False
        weight = self.finished[Kind.BACKWARD_WEIGHT]
        held = forward[stage] - weight[stage]
        if held == 0:
            return True
        if held >= self.limits.held[stage]:
            return False
        counted = sum(max(1, forward[s] - weight[s]) for s in self.placement.stages[rank])
        return counted < self.limits.budget[rank]

    def choose(self, rank: int) -> Action | None:
        """The next action of an idle rank group: forward, else input half, else weight half."""
        stages = self.placement.stages[rank]
        started, finished = self.started, self.finished
        forward = started[Kind.FORWARD]
        for stage in reversed(stages):  # the deepest stage holds the oldest microbatch
            mb = forward[stage]
            if mb == self.microbatches:
                continue
            if stage and finished[Kind.FORWARD][stage - 1] <= mb:
                continue
            if self.allowed(stage, rank):
                return Action(Kind.FORWARD, stage, mb)
        if self.limits.forward_first and any(forward[s] < self.microbatches for s in stages):
            return None
        ready: list[tuple[int, int]] = []
        for stage in stages:
            mb = started[Kind.BACKWARD_INPUT][stage]
            if finished[Kind.FORWARD][stage] <= mb:
                continue
            if stage == self.last or finished[Kind.BACKWARD_INPUT][stage + 1] > mb:
                ready.append((mb, -stage))
        if ready:
            mb, stage = min(ready)
            return Action(Kind.BACKWARD_INPUT, -stage, mb)
        late = [
            (started[Kind.BACKWARD_WEIGHT][s], -s)
            for s in stages
            if finished[Kind.BACKWARD_INPUT][s] > started[Kind.BACKWARD_WEIGHT][s]
        ]
        if late:
            mb, stage = min(late)
            return Action(Kind.BACKWARD_WEIGHT, -stage, mb)
        return None

    def finish(self, action: Action, rank: int) -> None:
        kind, stage, mb = action
        self.finished[kind][stage] += 1
        if kind is not Kind.BACKWARD_INPUT:
            return
        if self.splits is not None and self.splits[stage]:
            return
        # Nothing is left for the weight half: it only lets the saved values go.
        self.started[Kind.BACKWARD_WEIGHT][stage] += 1
        self.finished[Kind.BACKWARD_WEIGHT][stage] += 1
        if self.splits is not None:
            self.orders[rank].append(Action(Kind.BACKWARD_WEIGHT, stage, mb))

    def run(self) -> list[list[Action]]:
        clock = 0
        running: list[tuple[int, int, Action]] = []
        idle = [True] * len(self.orders)
        while True:
            for rank, free in enumerate(idle):
                action = self.choose(rank) if free else None
                if action is None:
                    continue
                kind, stage, mb = action
                self.started[kind][stage] += 1
                whole = kind is Kind.BACKWARD_INPUT and not (self.splits and self.splits[stage])
                shown = Kind.BACKWARD if whole and self.splits is None else kind
                self.orders[rank].append(Action(shown, stage, mb))
                heapq.heappush(running, (clock + self.slot[stage] * (1 + whole), rank, action))
                idle[rank] = False
            if not running:
                return self.orders
            clock = running[0][0]
            while running and running[0][0] == clock:
                _, rank, action = heapq.heappop(running)
                self.finish(action, rank)
                idle[rank] = True


_KINDS = (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)


def list_schedule(
    placement: Placement, microbatches: int, splits: Sequence[bool] | None, limits: Limits
) -> list[list[Action]]:
    """Runs the greedy walk.

    A forward, an input half and a weight half of a block take one slot each, an undivided backward
    takes two; the stages of a block share its time equally.

    Args:
        placement: Where the stages sit.
        microbatches: M.
        splits: For every stage whether its backward divides; None for whole backwards everywhere
            (then BACKWARD is emitted, else BACKWARD_INPUT and BACKWARD_WEIGHT).
        limits: What holds a forward back.

    Returns:
        The order of actions of every rank group.
    """
    return _Walk(placement, microbatches, splits, limits).run()


def block_depths(placement: Placement, microbatches: int) -> list[int]:
    """For every stage, the blocks from its own to the last one, at most M.

    It is the number of microbatches that must be in flight there for the chain to flow without a
    gap when every block takes equally long: 1F1B's warm-up (S - s for stage s of S).
    """
    blocks = placement.blocks
    depths = [0] * placement.n_stages
    for index, block in enumerate(blocks):
        for stage in block:
            depths[stage] = min(microbatches, len(blocks) - index)
    return depths


def rank_groups_in_use(placement: Placement) -> int:
    """Number of rank groups that hold a stage."""
    return sum(1 for group in placement.stages if group)
