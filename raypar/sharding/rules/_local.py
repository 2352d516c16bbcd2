"""What localisers of several families need: arguments by name, and which axes cut a dim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from raypar.compat import argument_defaults
from raypar.sharding.rules.base import LocalCall
from raypar.sharding.spec import R, S, ShardingSpec, is_shard, shard_dim


def local_bound(call: LocalCall) -> dict[str, Any]:
    """The call's local arguments by schema name, defaults filled in."""
    names = argument_defaults(call.op.node.target)  # type: ignore[arg-type]
    given = {name: value for (name, _), value in zip(names, call.args, strict=False)}
    return {**dict(names), **given, **call.kwargs}


def per_dim(value: Any, count: int, default: int) -> list[int]:
    """A size option for each of `count` dims, from an int, one for all of them, or none."""
    if isinstance(value, int):
        return [value] * count
    given = list(value or [default])
    return given * count if len(given) == 1 else given


def cutting(spec: ShardingSpec, dim: int) -> list[int]:
    """The axes that cut `dim`."""
    return [axis for axis, found in spec.shards() if found == dim]


def parts_of(spec: ShardingSpec, dim: int, mesh: Sequence[int]) -> int:
    """Into how many parts `dim` is cut."""
    return math.prod(mesh[axis] for axis in cutting(spec, dim))


def only_dim(spec: ShardingSpec, dim: int) -> ShardingSpec:
    """The cut of `dim`, and ``R`` on every other axis."""
    return ShardingSpec(S(dim) if is_shard(s) and shard_dim(s) == dim else R for s in spec)
