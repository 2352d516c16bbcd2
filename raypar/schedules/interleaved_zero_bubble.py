"""Interleaved stages with divided backwards (halves as in Qi et al., arXiv:2401.10241)."""

from __future__ import annotations

from collections.abc import Sequence

from raypar.schedules.base import Action, Placement, Schedule
from raypar.schedules.instructions import Kind
from raypar.schedules.interleaved_1f1b import Passes, lay_out


class InterleavedZeroBubble(Schedule):
    """Interleaved 1F1B whose gradients travel on after the input half of each backward.

    Device d of n does the weight half of a turn d turns later, which fills what interleaved 1F1B
    makes it wait at both ends. With equal times and v chunks the bubble is (n - 1)(F + I - W) / v
    as in zero-bubble H1, against interleaved 1F1B's (n - 1)(F + I + W) / v.

    Memory: device d takes 2d turns less in than device 0 before its first backward, so that the
    d halves that wait there do not raise the highest peak, unless they are twice as large as what
    the forward left. Stages whose backward does not divide do all of it in the input half, and the
    (empty) weight half, which lets the saved values go, follows at once.
    """

    name = "interleaved_zero_bubble"

    def round_size(self, rank_groups: int, microbatches: int) -> int:
        """Microbatches that go through a chunk before the next chunk is theirs."""
        return rank_groups

    def orders(
        self, placement: Placement, microbatches: int, splits: Sequence[bool]
    ) -> list[list[Action]]:
        """That of interleaved 1F1B, each backward in its halves. See `Schedule.orders`."""
        grid = lay_out(placement)
        size = self.round_size(len(grid.rows), microbatches)
        result: list[list[Action]] = [[] for _ in placement.stages]
        for device, rank in enumerate(grid.rows):
            passes = Passes(grid, device, size, microbatches)
            order = result[rank]
            for k in range(passes.turns + passes.warm_up + device):
                order += passes.forward(k)
                turn = k - passes.warm_up
                for action in passes.backward(turn, Kind.BACKWARD_INPUT):
                    order.append(action)
                    if not splits[action.stage]:
                        order.append(action._replace(kind=Kind.BACKWARD_WEIGHT))
                late = passes.backward(turn - device, Kind.BACKWARD_WEIGHT)
                order += [action for action in late if splits[action.stage]]
        return result
