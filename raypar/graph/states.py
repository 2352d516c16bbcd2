"""How one value relates to the samples of the batch.

Let the global batch be cut into N equal parts (microbatches × replicas). A value computed on one
part relates to the value computed on the whole batch in one of these ways:

* `Const`: the same on every part, up to the factor N**power.
* `Batch`: holds one row per sample along a dim; the whole is the rows of all parts, times N**power.
* `Reduced`: the whole is the sum over the parts, times N**power (power 0: a sum over samples;
  power -1: a mean).
* `Ramp`: the numbers 0, step, 2·step, ... along the batch dim; useful only as an index.
* `Mixed`: anything else; a model that lets such a value reach its loss feels how the batch is cut.

`power` comes from Python numbers that grow with the batch, such as a division by ``len(x)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Const:
    """The same on every part, up to the factor N**power."""

    power: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """One row per sample.

    Attributes:
        dim: The dim that holds the samples (non-negative).
        outer: The dim's size is ``outer * samples * inner``, samples in the middle.
        power: See the module's text.
    """

    dim: int
    outer: int = 1
    power: int = 0


@dataclass(frozen=True, slots=True)
class Reduced:
    """The whole is the sum over the parts, times N**power."""

    power: int = 0


@dataclass(frozen=True, slots=True)
class Ramp:
    """The numbers 0, step, 2·step, ... along the batch dim."""

    dim: int = 0
    step: int = 1


@dataclass(frozen=True, slots=True)
class Mixed:
    """Samples meet each other.

    Attributes:
        op: Canonical id of the op where it happened first.
        reason: Why, in words.
    """

    op: str
    reason: str


State = Const | Batch | Reduced | Ramp | Mixed
States = State | tuple["State", ...]


def scaled(state: State, power: int) -> State:
    """The state of the value times a number that grows like N**-power as parts get smaller."""
    if power == 0 or isinstance(state, (Mixed, Ramp)):
        return state
    return replace(state, power=state.power + power)
