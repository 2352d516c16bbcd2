"""How a parameter lies on a mesh: as programs take it, and as the optimizer holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raypar.sharding.spec import R, S, ShardingSpec, State, is_shard

Axes = tuple[tuple[str, int], ...]
"""(name, size) of every axis of a mesh; ranks are numbered row-major. ``data``, the axis of the
replicas, comes first where there is one."""


@dataclass(frozen=True)
class ParamLayout:
    """How one parameter lies on the mesh of one rank group.

    Attributes:
        shape: Shape of the whole parameter.
        held: How programs take it, over all axes of the mesh: cut, ``R`` (every rank computes the
            whole gradient) or ``Rg`` (the gradient is a partial sum over the axis).
        stored: How the optimizer holds it: like `held`, but cut over further axes under ZeRO; never
            ``Rg``.
        zero: ZeRO level: 0, 1 (optimizer state follows `stored`), 2 (gradients too), 3 (the
            parameter too: programs take the stored part and gather it where they read it).
    """

    shape: tuple[int, ...]
    held: ShardingSpec
    stored: ShardingSpec
    zero: int = 0

    @property
    def in_program(self) -> bool:
        """Whether programs take the stored part and gather it themselves."""
        return self.zero == 3 and self.stored != self.held.value()


def layout_of(shape: Sequence[int], held: ShardingSpec, axes: Axes, zero: int) -> ParamLayout:
    """The layout of a parameter under a ZeRO level (Rajbhandari et al. 2020, "ZeRO", section 5).

    Every axis on which it is held whole cuts one more dim that divides: dim 0 if it does, since its
    parts are contiguous memory, else the one with the largest part. A dim that an axis further
    right cuts already is left alone, so that gathering stays in order. What does not divide stays
    whole.

    Args:
        shape: Shape of the whole parameter.
        held: How programs take it, over all `axes`.
        axes: (name, size) of every mesh axis.
        zero: 0 to 3.
    """
    sizes = [size for _, size in axes]
    stored: list[State] = list(held.value())
    if zero:
        for axis, state in enumerate(stored):
            if is_shard(state) or sizes[axis] == 1:
                continue
            cut = _best_cut(shape, stored, sizes, axis)
            stored[axis] = R if cut is None else S(cut)
    spec = ShardingSpec(stored)
    return ParamLayout(tuple(shape), held, spec, zero if spec != held.value() else 0)


def _best_cut(
    shape: Sequence[int], stored: Sequence[State], sizes: Sequence[int], axis: int
) -> int | None:
    right = {dim for i, dim in ShardingSpec(stored).shards() if i > axis}
    local = ShardingSpec(stored).local_shape(shape, sizes)
    for dim in sorted(range(len(shape)), key=lambda d: (d != 0, -local[d])):
        tried = ShardingSpec([*stored[:axis], S(dim), *stored[axis + 1 :]])
        if dim not in right and tried.fits(shape, sizes):
            return dim
    return None
