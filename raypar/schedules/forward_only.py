"""Forwards alone: how a plan evaluates and predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from raypar.schedules.base import Action, Placement, Schedule
from raypar.schedules.instructions import Kind


class ForwardOnly(Schedule):
    """A greedy pipeline in unit time: each rank group does the deepest stage that is ready.

    With one stage on each rank group this is the fill and the flow of every pipeline schedule.
    Where a rank group holds several stages, the deepest first lets a microbatch that is on its way
    leave before another one enters. It is none of the schedules that a plan may name: it does not
    train.
    """

    name = "forward_only"
    trains: ClassVar[bool] = False

    def orders(
        self, placement: Placement, microbatches: int, splits: Sequence[bool]
    ) -> list[list[Action]]:
        """Every forward once. See `Schedule.orders`."""
        orders: list[list[Action]] = [[] for _ in placement.stages]
        done = [0] * placement.n_stages  # microbatches that each stage has finished
        left = placement.n_stages * microbatches
        while left:
            # What is finished in this turn can be used from the next one on. The first stage that
            # still has work is always ready, so that every turn gets something done.
            ready = [
                n < microbatches and (stage == 0 or n < done[stage - 1])
                for stage, n in enumerate(done)
            ]
            for order, stages in zip(orders, placement.stages, strict=True):
                stage = max((s for s in stages if ready[s]), default=None)
                if stage is not None:
                    order.append(Action(Kind.FORWARD, stage, done[stage]))
                    done[stage] += 1
                    left -= 1
        return orders
