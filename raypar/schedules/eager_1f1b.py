"""Eager 1F1B: 1F1B with longer warm-ups, which leave transfers time to arrive.

Zhuang et al. 2023, "On Optimizing the Communication of Model Parallelism" (arXiv:2211.05322),
section 4.
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


class EagerOneFOneB(Schedule):
    """Stage s of S takes 2 (S - s) - 1 microbatches in, then does one backward per forward.

    In 1F1B a microbatch comes back to stage s just in time: each transfer on its way there and
    back makes the stage wait, as often as it takes a microbatch in. With twice as many on their
    way, a transfer that takes no longer than a forward and a backward is hidden. The bubble is
    1F1B's; the first stage holds almost twice as many saved values.
    """

    name = "eager_1f1b"
    rounds_under_way = 2

    def orders(
        self, placement: Placement, microbatches: int, splits: Sequence[bool]
    ) -> list[list[Action]]:
        """Long warm-up, one forward per backward, drain. See `Schedule.orders`."""
        depths = [2 * d - 1 for d in block_depths(placement, microbatches)]
        n = rank_groups_in_use(placement)
        blocks = [0] * len(placement.stages)
        for block in placement.blocks:
            blocks[placement.rank_of[block[0]]] += 1
        budget = [
            len(stages) * 2 * (n * v + n - 1) // max(v, 1)
            for stages, v in zip(placement.stages, blocks, strict=True)
        ]
        return list_schedule(placement, microbatches, None, Limits(depths, depths, budget))
