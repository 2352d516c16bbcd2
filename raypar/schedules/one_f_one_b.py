"""1F1B: one forward, one backward in turn (Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1;
first in PipeDream, arXiv:1806.03377, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

from raypar.schedules._list_scheduling import Limits, block_depths, list_schedule
from raypar.schedules.base import Action, Placement, Schedule


class OneFOneB(Schedule):
    """Stage s of S takes S - s microbatches in, then does one backward per forward.

    The bubble is GPipe's, (S - 1)(F + B), but stage s holds at most S - s microbatches, not M.
    Neighbouring stages of one rank group act as one stage; a rank group with stages in several
    places of the chain works as that many 1F1B stages in turn, the oldest microbatch first.
    """

    name = "1f1b"

    def orders(
        self, placement: Placement, microbatches: int, splits: Sequence[bool]
    ) -> list[list[Action]]:
        depths = block_depths(placement, microbatches)
        budget = [sum(depths[s] for s in stages) for stages in placement.stages]
        return list_schedule(placement, microbatches, None, Limits(depths, depths, budget))
