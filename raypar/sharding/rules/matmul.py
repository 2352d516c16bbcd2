"""Matrix products."""

from __future__ import annotations

from collections.abc import Iterator

from raypar.sharding.rules.base import Choice, OpView, rule
from raypar.sharding.spec import RG, P, S


@rule("linear")
def linear(op: OpView, size: int) -> Iterator[Choice]:
    """Rows; output features (column-parallel); input features (row-parallel, a partial sum)."""
    last = len(op.out) - 1
    bias = len(op.tensors) == 3
    for d in range(last):
        yield Choice((S(d), RG, *(RG,) * bias), (S(d),))
    for g in op.blocks(last):
        yield Choice((RG, S(0, g), *(S(0, g),) * bias), (S(last, g),))
    yield Choice((S(last), S(1), *(P,) * bias), (P,))
