"""Parameters of a stage on one device: bytes, and what moves them once per step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from raypar.search.cost.base import Collective, StageCode
from raypar.search.cost.machine import MeshMachine
from raypar.search.cost.work import Work
from raypar.sharding.convert import COLLECTIVES, REDUCE_SCATTER, conversion, state_after
from raypar.sharding.layout import Axes, ParamLayout
from raypar.sharding.spec import RG, S, ShardingSpec, is_shard, shard_dim

BUCKET_BYTES = 4 << 20
"""Gradients travel in buckets of about this size (`raypar.comm.buckets`)."""


ADDING = "add_gradients"
"""Class of the additions of gradients to those of earlier microbatches; rates are those of plain
element-wise ops."""


class Move(NamedTuple):
    """A collective before its time is known: axis, kind, bytes of the larger side."""

    axis: str
    kind: str
    nbytes: int


class ParamCost(NamedTuple):
    """What the parameters of a stage take on one device.

    Attributes:
        param_bytes: As programs take them, and the optimizer's own copies of parts.
        gradient_bytes: Accumulated gradients.
        state_bytes: One optimizer state of them all.
        optimized_bytes: Parameters that this device's optimizer steps over.
        optimized: How many tensors these are.
        gather: Once per step: stored → held.
        sync: Once per step: gradients of held → of stored.
        rounds: After every microbatch: the same where no rank keeps whole gradients (ZeRO-2).
        uncut: (name, bytes) of the gradients whose sums lie as the programs make them, not in
            parts.
    """

    param_bytes: int
    gradient_bytes: int
    state_bytes: int
    optimized_bytes: int
    optimized: int
    gather: tuple[Move, ...]
    sync: tuple[Move, ...]
    rounds: tuple[Move, ...]
    uncut: tuple[tuple[str, int], ...] = ()


def moves(
    source: ShardingSpec,
    target: ShardingSpec,
    shape: tuple[int, ...],
    itemsize: int,
    axes: Axes,
    *,
    backward: bool = False,
) -> list[Move]:
    """The collectives of a conversion (or of its gradient, in the order they run)."""
    sizes = [size for _, size in axes]
    now = list(source)
    found: list[Move] = []
    for step in conversion(source, target):
        before = _bytes(now, shape, itemsize, sizes)
        now[step.axis] = state_after(step, now[step.axis])
        after = _bytes(now, shape, itemsize, sizes)
        kind = step.backward if backward else step.forward
        if kind in COLLECTIVES and sizes[step.axis] > 1:
            found.append(Move(axes[step.axis][0], kind, max(before, after)))
    return found[::-1] if backward else found


def _bytes(states: Iterable[str], shape: tuple[int, ...], itemsize: int, sizes: list[int]) -> int:
    return math.prod(ShardingSpec(states).local_shape(shape, sizes)) * itemsize


def bundle(found: Iterable[Move]) -> tuple[Move, ...]:
    """Moves of equal axis and kind as buckets: their latency is paid once per bucket."""
    sums: dict[tuple[str, str], int] = {}
    for move in found:
        sums[move.axis, move.kind] = sums.get((move.axis, move.kind), 0) + move.nbytes
    buckets: list[Move] = []
    for (axis, kind), total in sums.items():
        count = max(1, round(total / BUCKET_BYTES))
        buckets += [Move(axis, kind, total // count)] * count
    return tuple(buckets)


def timed(found: Iterable[Move], machine: MeshMachine) -> tuple[Collective, ...]:
    """Moves with their seconds on a mesh."""
    known: dict[Move, Collective] = {}  # a large model has a hundred thousand equal buckets
    made: list[Collective] = []
    for move in found:
        one = known.get(move)
        if one is None:
            one = known[move] = Collective(*move, machine.collective_s(*move))
        made.append(one)
    return tuple(made)


def additions(params: ParamCost, products: Mapping[str, Work]) -> Counter[Work]:
    """What adding one microbatch's gradients to those of the microbatches before changes.

    Args:
        params: The parameters of a stage.
        products: Those whose gradient programs deliver as a product (`raypar.programs.products`),
            and what makes it. Where the sum is not cut, the product is added to it while it is
            made, and reads the sum besides: it takes the place of the one that only writes (whose
            count is negative). Others read two gradients and write one, in a call of their own.
    """
    found: Counter[Work] = Counter()
    fused = [(products[name], nbytes) for name, nbytes in params.uncut if name in products]
    for product, nbytes in fused:
        found[product] -= 1
        found[product._replace(nbytes=product.nbytes + nbytes)] += 1
    others = params.optimized - len(fused)
    if others:
        left = params.gradient_bytes - sum(nbytes for _, nbytes in fused)
        found[Work(0.0, 3.0 * left / others, kind=ADDING)] += others
    return found


def accumulation_s(params: ParamCost, machine: MeshMachine, products: Mapping[str, Work]) -> float:
    """Seconds of `additions`."""
    return sum(n * work.seconds(machine) for work, n in additions(params, products).items())


def param_cost(stage: StageCode) -> ParamCost:
    """What the parameters of a stage take."""
    held = gradients = states = optimized = count = 0
    gather: list[Move] = []
    sync: list[Move] = []
    rounds: list[Move] = []
    uncut: list[tuple[str, int]] = []
    for node in stage.graph.find_nodes(op="placeholder"):
        key = str(node.meta["id"])
        if not key.startswith("param:"):
            continue
        value: torch.Tensor = node.meta["val"]
        name, trainable = key[6:], key[6:] in stage.trainable
        layout = stage.layouts.get(name)
        own = value.numel() * value.element_size()
        part = summed = own
        if layout is not None:
            part = _stored_bytes(layout, value.element_size(), stage.axes)
            if not layout.in_program:
                arguments = (
                    layout.stored,
                    layout.held,
                    layout.shape,
                    value.element_size(),
                    stage.axes,
                )
                gather += moves(*arguments)
                back = moves(*arguments, backward=True)
                for move in back if trainable else ():
                    every = layout.zero >= 2 and move.kind == REDUCE_SCATTER
                    (rounds if every else sync).append(move)
                if all(move.kind != REDUCE_SCATTER for move in back):
                    summed = part  # each rank's own part of the gradient needs no other's
        held += own + (part if _has_copy(layout) else 0)
        if trainable:
            gradients += part if layout is not None and layout.zero >= 2 else summed
            states += part
            optimized += part
            count += 1
            if part == own or (layout is not None and _lies_whole(layout, own, stage.axes)):
                uncut.append((name, own))
    once, often = bundle(sync), bundle(rounds)
    return ParamCost(
        held, gradients, states, optimized, count, bundle(gather), once, often, tuple(uncut)
    )


def _stored_bytes(layout: ParamLayout, itemsize: int, axes: Axes) -> int:
    sizes = [size for _, size in axes]
    return math.prod(layout.stored.local_shape(layout.shape, sizes)) * itemsize


def _lies_whole(layout: ParamLayout, nbytes: int, axes: Axes) -> bool:
    """Whether a gradient that is reduce-scattered is summed in a bucket that is all its own.

    See `raypar.comm.scatter`: the bucket's rows are then the parts of dim 0, or those of the
    columns of a matrix. The latter holds for products alone; nobody asks about others.
    """
    if layout.zero != 1 or nbytes < BUCKET_BYTES:
        return False
    states = zip(layout.stored, layout.held, axes, strict=True)
    cut = [(s, h) for s, h, (_, n) in states if n > 1 and is_shard(s) and not is_shard(h)]
    dims = [(S(0), RG)] if len(layout.shape) != 2 else [(S(0), RG), (S(1), RG)]
    return len(set(cut)) <= 1 and all(pair in dims for pair in cut)


def _has_copy(layout: ParamLayout | None) -> bool:
    """Whether the optimizer's part is a tensor of its own: a part that is not contiguous."""
    if layout is None or layout.in_program or layout.stored == layout.held.value():
        return False
    extra = [s for s, h in zip(layout.stored, layout.held, strict=True) if s != h and is_shard(s)]
    return any(math.prod(layout.shape[: shard_dim(s)]) > 1 for s in extra)
