"""The groups of one rank's mesh: what `raypar::convert` runs on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from raypar.comm.group import Group
from raypar.errors import CommError
from raypar.sharding.collectives import join, part_of
from raypar.sharding.convert import (
    ALL_GATHER,
    ALL_MAX,
    ALL_REDUCE,
    ALL_TO_ALL,
    REDUCE_SCATTER,
)
from raypar.sharding.spec import State

Axes = Sequence[tuple[str, int]]


def lines(axes: Axes, wanted: Sequence[str]) -> list[list[int]]:
    """The positions of a mesh that differ along the `wanted` axes alone.

    Args:
        axes: (name, size) of every axis; positions are row-major.
        wanted: Names of some axes.

    Returns:
        One list of positions for every choice of the other axes' coordinates, ascending.
    """
    sizes = [size for _, size in axes]
    names = [name for name, _ in axes]
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    along = [i for i, name in enumerate(names) if name in wanted]
    others = [i for i in range(len(names)) if i not in along]
    found = []
    for fixed in itertools.product(*(range(sizes[i]) for i in others)):
        base = sum(c * strides[i] for c, i in zip(fixed, others, strict=True))
        moves = itertools.product(*(range(sizes[i]) for i in along))
        found.append(
            [base + sum(c * strides[i] for c, i in zip(m, along, strict=True)) for m in moves]
        )
    return found


class MeshGroups:
    """Subgroups of the world along the axes of every rank group's mesh.

    Every rank of the world makes all of them, in the same order.

    Args:
        world: All ranks.
        meshes: Axes of every rank group's mesh.
        bases: First rank of every rank group.
        group: The own rank group.
    """

    def __init__(
        self, world: Group, meshes: Sequence[Axes], bases: Sequence[int], group: int
    ) -> None:
        self._world = world
        self._meshes = meshes
        self._bases = bases
        self._own = group
        self._made: dict[frozenset[str], Group | None] = {}
        self._axes = dict(meshes[group])
        names = dict.fromkeys(name for axes in meshes for name, _ in axes)
        for name in names:
            self.along((name,))
        self._at: dict[str, int] = {}
        position = world.rank - bases[group]
        for name, size in reversed(list(meshes[group])):
            position, self._at[name] = divmod(position, size)

    def along(self, names: Sequence[str]) -> Group | None:
        """The ranks of the own mesh that differ from this one along `names` alone.

        Every rank of the world calls it with the same names, in the same order.

        Returns:
            None where that is this rank alone.
        """
        key = frozenset(names)
        if key not in self._made:
            own: Group | None = None
            for group, axes in enumerate(self._meshes):
                for line in lines(axes, names):
                    if len(line) == 1:
                        continue
                    ranks = [self._bases[group] + position for position in line]
                    label = f"{'×'.join(names)} of rank group {group}, ranks {ranks[0]}..."
                    made = self._world.subgroup(ranks, label)
                    own = own if made is None else made
            self._made[key] = own
        return self._made[key]

    def coordinate(self, axis: str) -> int:
        """Where this rank is on an axis."""
        return self._at[axis]

    def collective(
        self, kind: str, x: torch.Tensor, cut: State, to: State, axis: str
    ) -> torch.Tensor:
        """Runs one collective over an axis; see `raypar.sharding.collectives.MeshContext`."""
        group = self._made.get(frozenset((axis,)))
        if group is None:
            raise CommError(
                f"{kind} over axis {axis!r}, which rank group {self._own} does not have"
            )
        size = group.size
        if kind in (ALL_REDUCE, ALL_MAX):
            result = x.clone(memory_format=torch.contiguous_format)
            group.all_reduce(result, op="max" if kind == ALL_MAX else "sum", name=axis).wait()
            return result
        if kind == ALL_GATHER:
            return join(group.all_gather(x.contiguous(), name=axis), cut)
        if kind == REDUCE_SCATTER:
            parts = [part_of(x, cut, i, size).contiguous() for i in range(size)]
            return group.reduce_scatter(parts, name=axis)
        if kind == ALL_TO_ALL:
            parts = [part_of(x, to, i, size).contiguous() for i in range(size)]
            return join(group.all_to_all(parts, name=axis), cut)
        raise CommError(f"{kind!r} is no collective")
