"""In which states values may come in and go out, given how their readers (or makers) ask."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from raypar.sharding.spec import RG, P, R, ShardingSpec, State, is_shard


def held_options(
    wanted: Iterable[ShardingSpec], shape: Sequence[int], mesh: Sequence[int]
) -> list[ShardingSpec]:
    """How a parameter with several readers may be held (`raypar.sharding.lower.held_spec`)."""
    return _products(
        [{_normal(w[a]) for w in wanted} | {RG} for a in range(len(mesh))], shape, mesh
    )


def may_hold(held: ShardingSpec, wanted: ShardingSpec) -> bool:
    """Whether one reader lets a parameter be held so: its own state, or ``Rg``, on every axis."""
    return all(h in (RG, _normal(w)) for h, w in zip(held, wanted, strict=True))


def arrival_options(
    wanted: Iterable[ShardingSpec], shape: Sequence[int], mesh: Sequence[int]
) -> list[ShardingSpec]:
    """How a received value may arrive (`raypar.sharding.lower.arrival_spec`)."""
    axes = range(len(mesh))
    return _products([{R} | {w[a] for w in wanted if is_shard(w[a])} for a in axes], shape, mesh)


def may_arrive(spec: ShardingSpec, wanted: ShardingSpec) -> bool:
    """Whether one reader lets a value arrive so: whole, or cut as it asks, on every axis."""
    return all(s in (R, w) for s, w in zip(spec, wanted, strict=True))


def _normal(state: State) -> State:
    return R if state == P else state


def _products(
    states: Sequence[set[State]], shape: Sequence[int], mesh: Sequence[int]
) -> list[ShardingSpec]:
    found = (ShardingSpec(c) for c in itertools.product(*(sorted(s) for s in states)))
    return [spec for spec in found if spec.fits(shape, mesh)]
