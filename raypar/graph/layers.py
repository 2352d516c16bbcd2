"""Layer clustering and repeated layers.

Ops cluster by the module that holds them: a layer is what lies under one entry of a numbered
container (``blocks.3``), or under one top-level module. Layers that do the same work, op for op
and shape for shape, form a group, so that a search decides once for all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from raypar.graph.op import Op


@dataclass(frozen=True, slots=True)
class Layer:
    """A run of consecutive ops under one module.

    Attributes:
        name: Path of the module (empty for the root).
        first: Index of the first op.
        last: Index of the last op, inclusive.
        signature: Equal for layers that do the same work.
    """

    name: str
    first: int
    last: int
    signature: str


def layer_name(module: str) -> str:
    """``blocks.3`` for ``blocks.3.attn.proj``; the top-level module where nothing is numbered."""
    parts = module.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return parts[0]


def cluster_layers(ops: Sequence[Op]) -> list[Layer]:
    """Cuts the op sequence into layers."""
    layers: list[Layer] = []
    start = 0
    names = [layer_name(op.module) for op in ops]
    for i in range(1, len(ops) + 1):
        if i == len(ops) or names[i] != names[start]:
            chosen = ops[start:i]
            layers.append(Layer(names[start], start, i - 1, _signature(names[start], chosen)))
            start = i
    return layers


def repeated_layers(layers: Sequence[Layer]) -> dict[str, list[int]]:
    """Signature → indices of the layers that share it, for those that occur more than once."""
    groups: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        groups.setdefault(layer.signature, []).append(i)
    return {key: found for key, found in groups.items() if len(found) > 1}


def _signature(name: str, ops: Sequence[Op]) -> str:
    digest = hashlib.sha256()
    for op in ops:
        where = op.module[len(name) :] if name else op.module
        digest.update(repr((where, op.name, op.arguments, op.shapes, op.dtypes)).encode())
    return digest.hexdigest()[:16]
