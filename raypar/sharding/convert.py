"""From one sharding of a value to another: which collectives, forward and backward.

The value moves from one state to another, and its gradient moves back between the states that
belong to them (`raypar.sharding.spec.gradient_state`), so a single table gives both directions:

| from → to | collective | |
|---|---|---|
| R → S | ``shard`` | no communication |
| R → P | ``mask`` | no communication: all but coordinate 0 become zero |
| S → P | ``pad`` | no communication: zeros around the own part |
| S → R | ``all_gather`` | |
| S → S' | ``all_to_all`` | |
| P → R | ``all_reduce`` | |
| P → S | ``reduce_scatter`` | |

Reading a replicated value for a partial gradient (R → Rg) is nothing forward and R ← P, an
all-reduce, backward; S → Rg is the all-gather and reduce-scatter of ZeRO; and so on.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from raypar.sharding.spec import (
    P,
    R,
    ShardingSpec,
    State,
    gradient_state,
    is_shard,
    shard_dim,
    value_state,
)

NONE = "none"
SHARD, MASK, PAD = "shard", "mask", "pad"
ALL_GATHER, ALL_TO_ALL = "all_gather", "all_to_all"
ALL_REDUCE, REDUCE_SCATTER = "all_reduce", "reduce_scatter"
ALL_MAX = "all_max"
COLLECTIVES = (ALL_GATHER, ALL_TO_ALL, ALL_REDUCE, REDUCE_SCATTER, ALL_MAX)
"""The kinds that communicate."""


class Step(NamedTuple):
    """One conversion over one mesh axis.

    Attributes:
        axis: Index of the mesh axis.
        forward: What happens to the value.
        backward: What happens to its gradient.
        cut: State of the cut that is made or gathered, or empty; for an all-to-all the one before
            it (forward).
        to: For an all-to-all the state after it, else empty.
    """

    axis: int
    forward: str
    backward: str
    cut: State
    to: State


def collective_of(source: State, target: State) -> str:
    """What brings a value from `source` to `target` (both S, R or P)."""
    if source == target:
        return NONE
    if source == R:
        return SHARD if is_shard(target) else MASK
    if source == P:
        return REDUCE_SCATTER if is_shard(target) else ALL_REDUCE
    if target == R:
        return ALL_GATHER
    return ALL_TO_ALL if is_shard(target) else PAD


def state_after(step: Step, state: State) -> State:
    """How the value lies on the step's axis once it went forward, where it lay as `state`."""
    if step.forward in (SHARD, REDUCE_SCATTER):
        return step.cut
    if step.forward == ALL_TO_ALL:
        return step.to
    if step.forward in (MASK, PAD):
        return P
    return R if step.forward in (ALL_GATHER, ALL_REDUCE) else state


def _step(axis: int, source: State, target: State) -> Step | None:
    forward = collective_of(value_state(source), value_state(target))
    backward = collective_of(gradient_state(target), gradient_state(source))
    if forward == NONE and backward == NONE:
        return None
    cuts = [s for s in (source, target) if is_shard(s)]
    return Step(axis, forward, backward, cuts[0] if cuts else "", cuts[1] if cuts[1:] else "")


@lru_cache(maxsize=1 << 16)
def conversion(source: ShardingSpec, target: ShardingSpec) -> tuple[Step, ...]:
    """The steps from one sharding to another.

    Where a dim is cut over several axes, an axis may be gathered (or cut) only while no axis to
    its right cuts the same dim; those to the right are gathered first and cut again.

    Args:
        source: How the value lies.
        target: How a reader wants it; may hold ``Rg``.
    """
    now = list(source)
    steps: list[Step] = []

    def go(axis: int, state: State) -> None:
        step = _step(axis, now[axis], state)
        if step is not None:
            steps.append(step)
        now[axis] = state

    axes = range(len(now))
    for axis in reversed(axes):
        if not is_shard(now[axis]) or not _must_leave(axis, now, target):
            continue
        wanted = target[axis]
        if wanted == now[axis]:
            go(axis, R)  # only out of the way of an axis to the left; cut again below
        elif not is_shard(wanted) or _alone(axis, now, target):
            go(axis, wanted)
        else:
            go(axis, R)
    for axis in axes:
        if now[axis] != target[axis]:
            go(axis, target[axis])
    return tuple(steps)


def _dims(*states: State) -> set[int]:
    return {shard_dim(s) for s in states if is_shard(s)}


def _must_leave(axis: int, now: list[State], target: ShardingSpec) -> bool:
    if now[axis] != target[axis]:
        return True
    dim = shard_dim(now[axis])
    return any(
        now[left] != target[left] and dim in _dims(now[left], target[left]) for left in range(axis)
    )


def _alone(axis: int, now: list[State], target: ShardingSpec) -> bool:
    """Whether an all-to-all keeps leftmost axes cutting first, now and in the steps to come."""
    held = _dims(now[axis], target[axis])
    if len(held) == 1:
        return False  # the same dim in other blocks
    for i, (has, wants) in enumerate(zip(now, target, strict=True)):
        if i < axis and has != wants and held & _dims(has, wants):
            return False
        if i > axis and held & _dims(has):
            return False
    return True
