"""Zero-bubble H1: weight gradients fill the bubble (Qi et al., arXiv:2401.10241, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

from raypar.schedules._list_scheduling import (
    Limits,
    block_depths,
    list_schedule,
    rank_groups_in_use,
)
from raypar.schedules.base import Action, Placement, Schedule


class ZeroBubbleH1(Schedule):
    """1F1B with the backward in two halves, at 1F1B's peak memory.

    The input half goes to the previous stage at once; the weight half waits until memory is
    needed or nothing else can run. With equal times the bubble is (S - 1)(F + I - W), against
    1F1B's (S - 1)(F + I + W).

    Memory: plain 1F1B's first stage holds S microbatches, its last stage one. Here every stage may
    hold S, so that the highest peak over the rank groups is the same, and the later ones rise to
    it. With several stages per rank group, n rank groups may hold n microbatches' worth of all
    their stages each: what 1F1B would hold if they were one stage.

    Stages whose backward does not divide do all of it in the input half and the (empty) weight
    half follows at once.
    """

    name = "zero_bubble_h1"

    def orders(
        self, placement: Placement, microbatches: int, splits: Sequence[bool]
    ) -> list[list[Action]]:
        """1F1B with divided backwards. See `Schedule.orders`."""
        depths = block_depths(placement, microbatches)
        n = rank_groups_in_use(placement)
        budget = [n * len(stages) for stages in placement.stages]
        held = [max(depths)] * placement.n_stages
        return list_schedule(placement, microbatches, splits, Limits(depths, held, budget))
