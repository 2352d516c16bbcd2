"""What a rank has of every parameter, and how gradients get from programs to the optimizer.

Three parts of a parameter matter on a rank: what programs *take* (`taken_ranges`), what the
optimizer holds of it (*stored*, always inside what programs take), and what the rank *reports* as
its share of the model (`reports`). The way between the first two, once per step:

| taken | stored | gradient | parameter |
|---|---|---|---|
| ``Rg`` | ``R`` | all-reduced | |
| ``Rg`` | ``S`` | reduce-scattered | all-gathered |
| ``R`` | ``S`` | own part kept | all-gathered |
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from raypar.errors import PlanError
from raypar.sharding.layout import Axes, ParamLayout
from raypar.sharding.pieces import Piece, local_piece, piece_of
from raypar.sharding.spec import RG, Ranges, ShardingSpec, is_shard
from raypar.stages.spec import RankSpec


@dataclass(frozen=True)
class Way:
    """How one parameter's gradient gets to the optimizer on one rank, and the parameter back.

    Attributes:
        taken: Shape of the part that programs take.
        own: The stored part, inside the taken one.
        scatter: Axes over which the gradient is reduce-scattered.
        reduce: Axes over which it is then all-reduced.
        gather: Axes over which the stored parts are put together again.
        shares: The part that every rank along `scatter` keeps, in rank order.
        parts: The stored part of every rank along `gather`, in rank order.
    """

    taken: tuple[int, ...]
    own: Piece
    scatter: tuple[str, ...]
    reduce: tuple[str, ...]
    gather: tuple[str, ...]
    shares: tuple[Piece, ...]
    parts: tuple[Piece, ...]

    @property
    def cut(self) -> bool:
        """Whether the optimizer holds less than programs take."""
        return self.own.shape != self.taken


def taken_states(layout: ParamLayout) -> ShardingSpec:
    """How programs take a parameter."""
    return layout.stored if layout.in_program else layout.held


def taken_ranges(layout: ParamLayout, axes: Axes, coordinate: Sequence[int]) -> tuple[Ranges, ...]:
    """The `[start, stop)` ranges of the parameter that this rank's memory holds for programs."""
    return taken_states(layout).ranges(layout.shape, _sizes(axes), coordinate)


def stored_piece(layout: ParamLayout, axes: Axes, coordinate: Sequence[int]) -> Piece:
    """The part of the whole parameter that a rank's optimizer holds."""
    return piece_of(layout.stored.ranges(layout.shape, _sizes(axes), coordinate))


@lru_cache(maxsize=1 << 14)
def way_of(layout: ParamLayout, axes: Axes, coordinate: tuple[int, ...]) -> Way:
    """The way of a parameter on the rank at `coordinate`.

    Raises:
        PlanError: What the optimizer holds is not part of what programs take.
    """
    taken = taken_states(layout)
    cut = [
        i
        for i, (_, size) in enumerate(axes)
        if size > 1 and is_shard(layout.stored[i]) and not is_shard(taken[i])
    ]
    whole = [
        i
        for i, (_, size) in enumerate(axes)
        if size > 1 and not is_shard(layout.stored[i]) and taken[i] == RG
    ]
    scatter = [i for i in cut if taken[i] == RG]
    outer = taken_ranges(layout, axes, coordinate)

    def part(at: Sequence[int]) -> Piece:
        found = local_piece(outer, layout.stored.ranges(layout.shape, _sizes(axes), at))
        if found is None:
            raise PlanError(
                f"a parameter of shape {layout.shape} is stored as {layout.stored} on a mesh of "
                f"{dict(axes)}, which is not part of {taken}, as programs take it; cut another "
                "dim, or set zero to 0 for its stage"
            )
        return found

    def along(moving: Sequence[int]) -> tuple[Piece, ...]:
        return tuple(part(at) for at in _line(axes, coordinate, moving))

    def names(indices: Sequence[int]) -> tuple[str, ...]:
        return tuple(axes[i][0] for i in indices)

    return Way(
        taken=taken.local_shape(layout.shape, _sizes(axes)),
        own=part(coordinate),
        scatter=names(scatter),
        reduce=() if layout.in_program else names(whole),
        gather=names(cut),
        shares=along(scatter),
        parts=along(cut),
    )


def _line(
    axes: Axes, coordinate: Sequence[int], moving: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """Coordinates of the ranks that differ along some axes, in rank order."""
    choices = [range(size) if i in moving else (coordinate[i],) for i, (_, size) in enumerate(axes)]
    return itertools.product(*choices)


def reports(spec: RankSpec, name: str) -> bool:
    """Whether this rank speaks for its stored part of a parameter.

    It does where it is first along every axis over which the part is replicated, and its rank
    group is the first that holds the parameter; so every element of the model is reported once.
    """
    layout = spec.params.get(name)
    if layout is None:  # used by no stage: whole on its owner
        return name in spec.owned_params
    if name in spec.shared and spec.shared[name][0] != spec.group:
        return False
    pairs = zip(layout.stored, spec.coordinate, strict=True)
    return all(at == 0 for state, at in pairs if not is_shard(state))


def reported_names(spec: RankSpec) -> list[str]:
    """The parameters of which this rank reports its stored part."""
    return [n for n in dict.fromkeys((*spec.params, *spec.owned_params)) if reports(spec, n)]


def is_view(way: Way) -> bool:
    """Whether the stored part is a contiguous view of what programs take, without own memory."""
    if len(way.own.boxes) != 1:
        return False
    cut = False
    for have, want in zip(way.taken, way.own.shape, strict=True):
        if cut and want != have:
            return False
        cut = cut or want != 1
    return True


def _sizes(axes: Axes) -> list[int]:
    return [size for _, size in axes]
