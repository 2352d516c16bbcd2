"""Interleaved stages in long rounds, which leave transfers time to arrive.

Megatron-LM has such rounds as ``--microbatch-group-size-per-virtual-pipeline-stage``.
"""

from __future__ import annotations

from raypar.schedules.interleaved_zero_bubble import InterleavedZeroBubble


class InterleavedEager(InterleavedZeroBubble):
    """`interleaved_zero_bubble` with more microbatches on their way.

    On n rank groups, what leaves the last group is wanted by the first one n turns after it began
    its round there: at once, where rounds are of n microbatches. Here they are of q, about 1.5 n,
    so that it has q - n turns to arrive. A group of v chunks holds (q - n)(v - 1) turns' worth of
    saved values more.
    """

    name = "interleaved_eager"
    rounds_under_way = 2

    def round_size(self, rank_groups: int, microbatches: int) -> int:
        """About 1.5 times the rank groups, in rounds of equal size."""
        rounds = max(1, 2 * microbatches // (3 * rank_groups))
        return max(rank_groups, -(-microbatches // rounds))
