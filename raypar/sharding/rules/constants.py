"""Constants that the graph makes: a coordinate can make just its part."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from raypar.sharding.rules.base import Choice, LocalCall, OpView, localiser, rule
from raypar.sharding.spec import R, S

_FILLED = ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")


@rule(*_FILLED)
def filled(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim; of a tensor argument only the type is read."""
    for d in range(len(op.out)):
        yield Choice((R,) * len(op.tensors), (S(d),))


@localiser(*_FILLED)
def local_filled(call: LocalCall) -> fx.Node:
    """Of the local size."""
    return call.again(size=call.local_out())
