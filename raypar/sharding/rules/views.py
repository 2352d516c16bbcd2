"""Ops that see the same elements in another shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import fx

from raypar.graph.passes.emit import aten
from raypar.sharding.rules.base import (
    Choice,
    LocalCall,
    OpView,
    Strategy,
    combination,
    localiser,
    rule,
)
from raypar.sharding.rules.labels import cut_choices, is_float, linear_choices
from raypar.sharding.spec import P, R, S, cut_of, is_shard

_RESHAPES = (
    "reshape", "view", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "squeeze",
    "unsqueeze", "view_as", "reshape_as", "ravel",
)  # fmt: skip


class _Factor(NamedTuple):
    """A run of elements that is whole in a dim of the input and in a dim of the result.

    Both dims are products of factors; `before_in` and `before_out` are the products of those to
    the left of this one, inside its dim.
    """

    size: int
    dim_in: int
    before_in: int
    dim_out: int
    before_out: int


@rule(*_RESHAPES)
def reshape(op: OpView, size: int) -> Iterator[Choice]:
    """Every factor that dims of the input and the result have in common, and partial sums.

    Where the factor is not the leftmost in its dim, the dim is cut in blocks:
    ``(B, T, 3·H·D) → (B, T, 3, H, D)`` with the heads cut is ``S2/3 → S3``.
    """
    others = tuple(R for _ in op.shapes[1:])  # of view_as only the shape is read
    for factor in _factors(op.shapes[0], op.out):
        for within in _splits(op, factor):
            cut_in = S(factor.dim_in, factor.before_in * within)
            cut_out = S(factor.dim_out, factor.before_out * within)
            yield Choice((cut_in, *others), (cut_out,))
    if is_float(op.tensors[0]):
        yield Choice((P, *others), (P,))


def _splits(op: OpView, factor: _Factor) -> list[int]:
    """In how many blocks the factor itself may be cut, so that readers or makers are served."""
    found = {1}
    asked = [(g, factor.before_out) for g in op.blocks(factor.dim_out)]
    asked += [(g, factor.before_in) for g in op.input_blocks(0, factor.dim_in)]
    for blocks, before in asked:
        within = blocks // before
        if blocks % before == 0 and 1 <= within < factor.size and factor.size % within == 0:
            found.add(within)
    return sorted(found)


def _factors(before: Sequence[int], after: Sequence[int]) -> list[_Factor]:
    """The finest common factors of two shapes of the same elements."""
    if math.prod(before) != math.prod(after) or math.prod(before) == 0:
        return []
    ends_in, ends_out = _ends(before), _ends(after)
    found = []
    i = o = 0
    start = 1
    in_start = out_start = 1
    while i < len(ends_in) and o < len(ends_out):
        (end_in, dim_in), (end_out, dim_out) = ends_in[i], ends_out[o]
        end = min(end_in, end_out)
        if end % start or end_in % end or end_out % end:
            # No common factor here: go on where both shapes have an end again.
            common = [e for e, _ in ends_in[i:] if any(e == x for x, _ in ends_out[o:])]
            start = in_start = out_start = common[0]
            i = next(k for k, (e, _) in enumerate(ends_in) if e == start) + 1
            o = next(k for k, (e, _) in enumerate(ends_out) if e == start) + 1
            continue
        found.append(_Factor(end // start, dim_in, start // in_start, dim_out, start // out_start))
        if end == end_in:
            i, in_start = i + 1, end
        if end == end_out:
            o, out_start = o + 1, end
        start = end
    return found


def _ends(shape: Sequence[int]) -> list[tuple[int, int]]:
    """(elements up to the end of a dim, dim), for all dims longer than 1."""
    found = []
    count = 1
    for dim, n in enumerate(shape):
        count *= n
        if n > 1:
            found.append((count, dim))
    return found


@combination(*_RESHAPES)
def reshape_axis_by_axis(op: OpView, strategy: Strategy, mesh: Sequence[int]) -> bool:
    """Blocks are counted in what the axes to the left have left over."""
    before, after = list(op.shapes[0]), list(op.out)
    for source, target, n in zip(strategy.inputs[0], strategy.outputs[0], mesh, strict=True):
        if not is_shard(source):
            continue
        (dim_in, blocks_in), (dim_out, blocks_out) = cut_of(source), cut_of(target)
        if not any(
            (f.dim_in, f.dim_out) == (dim_in, dim_out)
            and blocks_in * f.before_out == blocks_out * f.before_in
            and blocks_in % f.before_in == 0
            and f.size % (blocks_in // f.before_in * n) == 0
            for f in _factors(before, after)
        ):
            return False
        before[dim_in] //= n
        after[dim_out] //= n
    return True


@localiser(*_RESHAPES)
def local_reshape(call: LocalCall) -> fx.Node:
    """To the local shape of the result."""
    return call.emit(aten.reshape.default, call.args[0], call.local_out())


@rule("expand", "broadcast_to", "expand_as")
def expand(op: OpView, size: int) -> Iterator[Choice]:
    """Dims that are there; new ones, each coordinate having its own copies; partial sums."""
    shift = len(op.out) - len(op.shapes[0])
    labels = [None if n != op.out[d + shift] else d + shift for d, n in enumerate(op.shapes[0])]
    others = [[None] * len(shape) for shape in op.shapes[1:]]
    for choice in cut_choices(op, [labels, *others], [list(range(len(op.out)))]):
        yield Choice((choice.inputs[0], *(R for _ in others)), choice.outputs)
    if is_float(op.tensors[0]):
        yield Choice((P, *(R for _ in others)), (P,))


@localiser("expand", "broadcast_to", "expand_as")
def local_expand(call: LocalCall) -> fx.Node:
    """To the local sizes."""
    return call.emit(aten.expand.default, call.args[0], call.local_out())


@rule("repeat", "tile")
def repeat(op: OpView, size: int) -> Iterator[Choice]:
    """Dims that are not repeated (new and lengthened ones: a copy for each coordinate)."""
    shift = len(op.out) - len(op.shapes[0])
    labels: list[object] = [
        None if n != op.out[d + shift] else d + shift for d, n in enumerate(op.shapes[0])
    ]
    ones = {d + shift for d, n in enumerate(op.shapes[0]) if n == 1}
    kept = {x for x in labels if x is not None}
    free = [d for d in range(len(op.out)) if d < shift or d in ones or d in kept]
    yield from cut_choices(op, [labels], [[d if d in free else None for d in range(len(op.out))]])
    yield from linear_choices(op, [0] if is_float(op.tensors[0]) else [])


@localiser("repeat", "tile")
def local_repeat(call: LocalCall) -> fx.Node:
    """As often as the local result is longer than the local input."""
    have = call.strategy.inputs[0].local_shape(call.op.shapes[0], call.mesh)
    out = call.local_out()
    shift = len(out) - len(have)
    times = [*out[:shift], *(n // max(m, 1) for n, m in zip(out[shift:], have, strict=True))]
    return call.emit(aten.repeat.default, call.args[0], times)


@rule("repeat_interleave")
def repeat_interleave(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim, the repeated one too: the copies of an element lie side by side."""
    times, dim = op.bound["repeats"], op.bound["dim"]
    if not isinstance(times, int) or dim is None:
        return
    dim %= len(op.out)
    others: list[object] = [None if d == dim else d for d in range(len(op.out))]
    yield from cut_choices(op, [others], [others])
    for g in {*op.blocks(dim), *op.input_blocks(0, dim)}:
        yield Choice((S(dim, g),), (S(dim, g),))
    yield from linear_choices(op, [0] if is_float(op.tensors[0]) else [])


@rule(
    "permute", "transpose", "t", "numpy_T", "mT", "mH", "adjoint", "movedim", "moveaxis",
    "swapaxes", "swapdims",
)  # fmt: skip
def permute(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim, wherever it goes; partial sums."""
    order = _order(op)
    yield from cut_choices(op, [list(range(len(order)))], [order])
    yield from linear_choices(op, [0] if is_float(op.tensors[0]) else [])


def _order(op: OpView) -> list[int]:
    """Which dim of the input every dim of the result is."""
    rank = len(op.out)
    order = list(range(rank))
    if op.name == "permute":
        return [int(d) % rank for d in op.bound["dims"]]
    if op.name in ("t", "numpy_T"):
        return order[::-1]
    if op.name in ("mT", "mH", "adjoint"):
        return [*order[:-2], rank - 1, rank - 2]
    if op.name in ("movedim", "moveaxis"):
        source, target = op.bound["source"], op.bound["destination"]
        source = [source] if isinstance(source, int) else source
        target = [target] if isinstance(target, int) else target
        goes = {int(t) % rank: int(s) % rank for s, t in zip(source, target, strict=True)}
        rest = iter([d for d in order if d not in goes.values()])
        return [goes[d] if d in goes else next(rest) for d in order]
    names = ("dim0", "dim1") if "dim0" in op.bound else ("axis0", "axis1")
    if not order:
        return []
    a, b = (int(op.bound[name]) % rank for name in names)
    order[a], order[b] = order[b], order[a]
    return order


@rule("diagonal", "unfold")
def along_one(op: OpView, size: int) -> Iterator[Choice]:
    """Dims that stay as they are, to the left of what is made; partial sums."""
    names = ("dim1", "dim2") if op.name == "diagonal" else ("dimension",)
    rank = len(op.shapes[0])
    taken = {int(op.bound[name]) % rank for name in names}
    before: list[object] = [None if d in taken else d for d in range(rank)]
    kept = [x for d, x in enumerate(before) if op.name == "unfold" or d not in taken]
    yield from cut_choices(op, [before], [[*kept, None]])
    yield from linear_choices(op, [0] if is_float(op.tensors[0]) else [])


@rule("view_as_complex", "view_as_real")
def complex_parts(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim but the pair of real and imaginary part; partial sums."""
    labels = list(range(min(len(op.shapes[0]), len(op.out))))
    ends = [[*labels, None] if len(s) > len(labels) else labels for s in (op.shapes[0], op.out)]
    yield from cut_choices(op, ends[:1], ends[1:])
    yield from linear_choices(op, [0])
