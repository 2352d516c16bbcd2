"""GPipe: all forwards, then all backwards (Huang et al. 2019, arXiv:1811.06965, section 2.3)."""

from __future__ import annotations

from collections.abc import Sequence

from raypar.schedules._list_scheduling import Limits, list_schedule
from raypar.schedules.base import Action, Placement, Schedule


class GPipe(Schedule):
    """Every rank group does all its forwards before its first backward.

    Holds all M microbatches at once; the reference that is easiest to read. Backwards go in
    ascending microbatch order, as in the other schedules, so that gradients are summed in the
    same order.
    """

    name = "gpipe"

    def orders(
        self, placement: Placement, microbatches: int, splits: Sequence[bool]
    ) -> list[list[Action]]:
        """All forwards, then all backwards. See `Schedule.orders`."""
        many = [microbatches] * placement.n_stages
        budget = [microbatches * len(stages) for stages in placement.stages]
        limits = Limits(many, many, budget, forward_first=True)
        return list_schedule(placement, microbatches, None, limits)
