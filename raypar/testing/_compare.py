"""Whether a value is what it should be, in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from raypar.errors import PlanError
from raypar.sharding.spec import ShardingSpec
from raypar.testing.mesh_threads import ThreadMesh, collect

Compare = Callable[[torch.Tensor, torch.Tensor], str | None]
"""``compare(found, wanted)``: what is wrong, in words, or None."""
SMALL = 1e-2
"""Differences count relative to the tensor, or to this share of the largest one of its kind."""


def comparer(bound: float, largest: float) -> Compare:
    """Compares within a bound.

    Args:
        bound: On max|Δ| over the scale of the tensor.
        largest: Largest number of any tensor of its kind.
    """

    def compare(found: torch.Tensor, wanted: torch.Tensor) -> str | None:
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            form = f"{tuple(found.shape)} {found.dtype}"
            return f"is {form}, not {tuple(wanted.shape)} {wanted.dtype}"
        if not wanted.numel() or torch.equal(found, wanted):
            return None
        if not (wanted.is_floating_point() or wanted.is_complex()):
            return f"differs in {int((found != wanted).sum())} of {wanted.numel()} elements"
        wide = torch.complex128 if wanted.is_complex() else torch.float64
        gap = (found.to(wide) - wanted.to(wide)).abs().nan_to_num(float("inf"))
        both_inf = (found == wanted) | (found.isnan() & wanted.isnan())
        gap = gap.masked_fill(both_inf, 0.0)
        finite = wanted.to(wide).abs().nan_to_num(0.0, 0.0, 0.0)
        scale = max(float(finite.max()), SMALL * largest, torch.finfo(wide).tiny)
        worst = float(gap.max())
        if worst <= bound * scale:
            return None
        return f"differs by {worst:.3e} ({worst / scale:.1e} of its scale {scale:.1e})"

    return compare


def compare_joined(
    pieces: Sequence[torch.Tensor],
    spec: ShardingSpec,
    axes: Sequence[tuple[str, int]],
    wanted: torch.Tensor,
    compare: Compare,
) -> str | None:
    """Compares a value, given as its parts on the ranks of one replica, with what it should be."""
    try:
        value = collect(list(pieces), spec, ThreadMesh(axes))
    except (PlanError, RuntimeError) as error:
        return f"cannot be joined as {spec}: {error}"
    return compare(value, wanted)
