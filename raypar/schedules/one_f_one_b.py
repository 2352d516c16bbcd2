"""1F1B: one forward, one backward in turn.

Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1; first in PipeDream, arXiv:1806.03377,
section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

from raypar.schedules._list_scheduling import (
    Limits,
    block_depths,
    list_schedule,
    rank_groups_in_use,
)
from raypar.schedules.base import Action, Placement, Schedule


class OneFOneB(Schedule):
    """Stage s of S takes S - s microbatches in, then does one backward per forward.

    The bubble is GPipe's, (S - 1)(F + B), but stage s holds at most S - s microbatches, not M.
    Neighbouring stages of one rank group act as one stage. A rank group with v such blocks in
    several places of the chain works as v 1F1B stages in turn, the oldest microbatch first; their
    warm-ups together would be long, so that it also keeps to the nv + n - 1 blocks' worth of
    saved values that interleaved 1F1B takes on n rank groups (section 2.2.2 of the paper).
    """

    name = "1f1b"

    def orders(
        self, placement: Placement, microbatches: int, splits: Sequence[bool]
    ) -> list[list[Action]]:
        """Warm-up, one forward per backward, drain. See `Schedule.orders`."""
        depths = block_depths(placement, microbatches)
        n = rank_groups_in_use(placement)
        blocks = [0] * len(placement.stages)
        rank_of = placement.rank_of
        for block in placement.blocks:
            blocks[rank_of[block[0]]] += 1
        budget = [
            len(stages) * (n * v + n - 1) // max(v, 1)
            for stages, v in zip(placement.stages, blocks, strict=True)
        ]
        return list_schedule(placement, microbatches, None, Limits(depths, depths, budget))
