"""How one value lies on one mesh: a state for every mesh axis.

States are short texts, so that they hash fast, print as they are, and go into a plan:

* ``S<d>``: dim d is cut into equal contiguous parts, one for each coordinate of the axis. A dim
  that is cut over several axes is cut by the leftmost axis first.
* ``S<d>/<g>``: the same for each of the g equal blocks that dim d consists of: every coordinate
  has a part of each block. A fused q, k, v projection (g = 3) is cut over heads this way.
* ``R``: every coordinate has the whole value; so is its gradient.
* ``P``: the whole is the sum over the coordinates; its gradient is ``R``.
* ``Rg``: every coordinate has the whole value, and the whole gradient is the sum over the
  coordinates. Only a reader asks for it (and parameters are held in it).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Final

from raypar.errors import PlanError

State = str
Ranges = tuple[tuple[int, int], ...]
"""``[start, stop)`` ranges of one dim."""

R: Final = "R"
P: Final = "P"
RG: Final = "Rg"

_CUT = re.compile(r"^S\d+(/\d+)?$")


def S(dim: int, groups: int = 1) -> State:  # noqa: N802 (the field writes it so)
    """The state of a value whose dim `dim`, seen as `groups` equal blocks, is cut."""
    return f"S{dim}" if groups == 1 else f"S{dim}/{groups}"


def is_shard(state: State) -> bool:
    """Whether a dim is cut."""
    return state[0] == "S"


@lru_cache(maxsize=1024)
def cut_of(state: State) -> tuple[int, int]:
    """(dim, blocks) of a cut."""
    dim, _, groups = state[1:].partition("/")
    return int(dim), int(groups or 1)


def shard_dim(state: State) -> int:
    """The dim that is cut."""
    return cut_of(state)[0]


def shift(state: State, by: int) -> State:
    """The same cut, `by` dims further right; other states stay."""
    if not is_shard(state):
        return state
    dim, groups = cut_of(state)
    return S(dim + by, groups)


class ShardingSpec(tuple[State, ...]):
    """One state for every mesh axis, leftmost axis first; prints as ``S0,R``."""

    __slots__ = ()

    def __str__(self) -> str:
        return ",".join(self)

    def __repr__(self) -> str:
        return f"ShardingSpec({str(self)!r})"

    @classmethod
    def parse(cls, text: str) -> ShardingSpec:
        """Reads what `str()` wrote.

        Raises:
            PlanError: A state is none of ``S<d>``, ``R``, ``P``, ``Rg``.
        """
        states = text.split(",") if text else []
        for state in states:
            if state not in (R, P, RG) and not _CUT.match(state):
                raise PlanError(
                    f"{text!r} is not a sharding: {state!r} is none of S<dim>, S<dim>/<blocks>, "
                    "R, P, Rg"
                )
        return cls(states)

    @classmethod
    def replicated(cls, n_axes: int) -> ShardingSpec:
        """Whole on every coordinate of every axis."""
        return cls((R,) * n_axes)

    def shards(self) -> Iterator[tuple[int, int]]:
        """(axis, dim) of every axis that cuts a dim."""
        for axis, state in enumerate(self):
            if state[0] == "S":
                yield axis, cut_of(state)[0]

    def local_shape(self, shape: Sequence[int], mesh: Sequence[int]) -> tuple[int, ...]:
        """Shape of the part that one coordinate holds.

        Args:
            shape: Shape of the whole value.
            mesh: Size of every mesh axis.
        """
        local = list(shape)
        for axis, dim in self.shards():
            local[dim] //= mesh[axis]
        return tuple(local)

    def fits(self, shape: Sequence[int], mesh: Sequence[int]) -> bool:
        """Whether every cut dim exists, is known (not data-dependent), and divides evenly."""
        sizes = list(shape)
        for axis, state in enumerate(self):
            if state[0] != "S":
                continue
            dim, groups = cut_of(state)
            if dim >= len(sizes) or not isinstance(sizes[dim], int):
                return False
            if sizes[dim] % (groups * mesh[axis]):
                return False
            sizes[dim] //= mesh[axis]
        return True

    def ranges(
        self, shape: Sequence[int], mesh: Sequence[int], coordinate: Sequence[int]
    ) -> tuple[Ranges, ...]:
        """What one coordinate holds: for every dim its ``[start, stop)`` ranges, in local order.

        A dim has one range unless it is cut in blocks.
        """
        held: list[Ranges] = [((0, n),) for n in shape]
        for axis, state in enumerate(self):
            if state[0] == "S":
                dim, groups = cut_of(state)
                held[dim] = _cut(held[dim], groups, mesh[axis], coordinate[axis])
        return tuple(held)

    def parts(self, mesh: Sequence[int]) -> int:
        """Into how many different pieces the value is cut."""
        count = 1
        for axis, _ in self.shards():
            count *= mesh[axis]
        return count

    def gradient(self) -> ShardingSpec:
        """How its gradient lies: ``P`` where the value is ``Rg``, ``R`` where it is ``P``."""
        return ShardingSpec(gradient_state(s) for s in self)

    def value(self) -> ShardingSpec:
        """How the value itself lies: ``Rg`` is ``R``."""
        return ShardingSpec(value_state(s) for s in self)


def value_state(state: State) -> State:
    """The state of the value: ``Rg`` is ``R``."""
    return R if state == RG else state


def gradient_state(state: State) -> State:
    """The state of the gradient of a value that is read (or made) in `state`."""
    if state == RG:
        return P
    return R if state == P else state


def _cut(held: Ranges, groups: int, parts: int, index: int) -> Ranges:
    """The ranges that coordinate `index` of `parts` keeps of `held`."""
    block = sum(stop - start for start, stop in held) // groups
    part = block // parts
    found: list[tuple[int, int]] = []
    for group in range(groups):
        first = group * block + index * part
        found += window(held, first, first + part)
    return joined(found)


def joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same elements in the same order, with ranges that follow one another as one."""
    found: list[tuple[int, int]] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def window(held: Ranges, first: int, last: int) -> Ranges:
    """Local positions ``first`` to ``last`` of one dim, as ranges of the whole."""
    found = []
    at = 0
    for start, stop in held:
        low, high = max(first - at, 0), min(last - at, stop - start)
        if low < high:
            found.append((start + low, start + high))
        at += stop - start
    return tuple(found)
