"""Which rows of a global batch each rank and each microbatch sees.

The global batch is cut into M contiguous equal microbatches, and each of those into D contiguous
equal parts, one per replica.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from raypar.comm.group import Group
from raypar.stages.spec import RankSpec


def shard_batch(spec: RankSpec, tensors: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Picks what a rank needs out of a global batch.

    Args:
        spec: The rank.
        tensors: The batch's tensor leaves, in order.

    Returns:
        Input name → this replica's rows of every microbatch, one microbatch after the other along
        the batch dim; the whole tensor where it is broadcast.
    """
    found = {}
    for name in spec.inputs:
        index = int(name.removeprefix("in:"))
        tensor, dim = tensors[index], spec.batch_dims[index]
        if dim is None or spec.replicas == 1:
            found[name] = tensor
            continue
        parts = tensor.unflatten(dim, (spec.microbatches, spec.replicas, -1))
        found[name] = parts.select(dim + 1, spec.replica).flatten(dim, dim + 1).contiguous()
    return found


def microbatch_rows(
    tensor: torch.Tensor, dim: int | None, microbatch: int, microbatches: int
) -> torch.Tensor:
    """One microbatch of what `shard_batch` gave."""
    if dim is None or microbatches == 1:
        return tensor.contiguous()
    size = tensor.shape[dim] // microbatches
    return tensor.narrow(dim, microbatch * size, size).contiguous()


def first_sample(spec: RankSpec, microbatch: int) -> int:
    """Global index of the first sample of a rank's part of a microbatch."""
    per_microbatch = spec.global_batch // spec.microbatches
    return microbatch * per_microbatch + spec.replica * (per_microbatch // spec.replicas)


class RepeatFeed:
    """Gives a rank its rows of one batch, step after step."""

    def __init__(self, spec: RankSpec, world: Group, tensors: Sequence[torch.Tensor]) -> None:
        self._inputs = shard_batch(spec, tensors)

    def extend(self, until: int) -> None:
        """Nothing to read ahead."""

    def take(self, step: int) -> Mapping[str, torch.Tensor]:
        """This rank's rows, the same for every step."""
        return self._inputs

    def abort(self, reason: str) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Drops the rows."""
        self._inputs = {}
