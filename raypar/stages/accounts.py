"""What parameters cost a rank in memory: predicted from layouts, and measured on tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from raypar.sharding.layout import Axes, ParamLayout
from raypar.stages.layouts import is_view, way_of


def predicted_memory(
    layouts: Mapping[str, ParamLayout],
    axes: Axes,
    optimizer_states: int,
    *,
    itemsize: int | Mapping[str, int] = 4,
    trainable: Iterable[str] | None = None,
    bucket_bytes: int = 4 << 20,
) -> dict[str, int]:
    """Bytes that one rank keeps for its parameters from step to step.

    Left out: scalars (step counts), and what a gather of updated parameters holds while it runs
    (two buckets at most).

    Args:
        layouts: Every parameter of the rank group, in the order in which gradients become ready.
        axes: Its mesh.
        optimizer_states: Tensors of a parameter's size that the optimizer keeps for each (AdamW
            2, SGD with momentum 1, without 0).
        itemsize: Bytes of an element, for all or by name.
        trainable: Parameters that receive a gradient; default: all.
        bucket_bytes: Size of the gradient buckets; ZeRO-2 keeps two uncut ones.

    Returns:
        ``parameters``, ``gradients``, ``optimizer`` and their sum, ``total``.
    """
    origin = (0,) * len(axes)
    wanted = set(layouts if trainable is None else trainable)
    found = dict.fromkeys(("parameters", "gradients", "optimizer"), 0)
    passing: list[int] = []
    for name, layout in layouts.items():
        way = way_of(layout, axes, origin)
        size = itemsize if isinstance(itemsize, int) else itemsize[name]
        taken, stored = math.prod(way.taken) * size, way.own.numel * size
        found["parameters"] += taken + (stored if way.cut and not is_view(way) else 0)
        if name not in wanted:
            continue
        found["optimizer"] += optimizer_states * stored
        if way.scatter and layout.zero >= 2:
            passing.append(taken)
            found["gradients"] += stored
        else:
            found["gradients"] += taken if way.scatter else stored
    found["gradients"] += 2 * _longest_bucket(passing, bucket_bytes)
    return {**found, "total": sum(found.values())}


def measured_memory(**tensors: Iterable[torch.Tensor]) -> dict[str, int]:
    """Bytes of real storages, each counted once, under the first name that has it.

    Returns:
        Bytes by name, and their sum, ``total``.
    """
    known: set[int] = set()
    found = dict.fromkeys(tensors, 0)
    for name, members in tensors.items():
        for tensor in members:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                found[name] += storage.nbytes()
    return {**found, "total": sum(found.values())}


def _longest_bucket(sizes: Sequence[int], bucket_bytes: int) -> int:
    longest = filled = 0
    for size in sizes:
        filled += size
        longest = max(longest, filled)
        if filled >= bucket_bytes:
            filled = 0
    return longest
