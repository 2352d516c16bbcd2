"""Matrix products and einsum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raypar.sharding.rules.base import Choice, OpView, rule
from raypar.sharding.rules.labels import aligned, cut_choices

_ROWS, _COLUMNS, _INNER = "rows", "columns", "inner"


@rule("linear")
def linear(op: OpView, size: int) -> Iterator[Choice]:
    """Rows; output features (column-parallel); input features (row-parallel, a partial sum)."""
    lead: list[object] = list(range(len(op.out) - 1))
    terms: list[list[object]] = [[*lead, _INNER], [_COLUMNS, _INNER], [_COLUMNS]]
    if len(op.shapes[1]) == 1:  # a vector of weights: one output feature, without a dim
        lead = list(range(len(op.out)))
        yield from cut_choices(op, [[*lead, _INNER], [_INNER]], [lead])
        return
    given = terms[: len(op.tensors)]
    yield from cut_choices(op, given, [[*lead, _COLUMNS]], partial=[2])


@rule("mm", "bmm", "matmul", "mv", "dot")
def matmul(op: OpView, size: int) -> Iterator[Choice]:
    """Batch dims, rows, columns, and the inner dim (a partial sum)."""
    left, right, out = _product(op.shapes[0], op.shapes[1])
    yield from cut_choices(op, [left, right], [out])


@rule("addmm", "baddbmm", "addbmm", "addmv")
def add_product(op: OpView, size: int) -> Iterator[Choice]:
    """As the product; what is added is a term of the partial sum."""
    left, right, out = _product(op.shapes[1], op.shapes[2])
    if op.name == "addbmm":  # also summed over the batch
        out = out[1:]
    bias = [
        None if n != op.out[d] else out[d]
        for d, n in zip(range(len(op.out) - len(op.shapes[0]), len(op.out)), op.shapes[0])
    ]
    yield from cut_choices(op, [bias, left, right], [out], partial=[0])


def _product(
    left: Sequence[int], right: Sequence[int]
) -> tuple[list[object], list[object], list[object]]:
    """Labels of both factors and of the product, as `torch.matmul` reads them."""
    batch = max(len(left), len(right)) - 2

    def lead(shape: Sequence[int], other: Sequence[int]) -> list[object]:
        first = batch - (len(shape) - 2)
        found: list[object] = []
        for d, n in enumerate(shape[:-2]):
            at = first + d - (batch - (len(other) - 2))
            broadcast = n == 1 and at >= 0 and len(other) > 2 and other[at] != 1
            found.append(None if broadcast else first + d)
        return found

    a: list[object] = [*lead(left, right), _ROWS, _INNER] if len(left) > 1 else [_INNER]
    b: list[object] = [*lead(right, left), _INNER, _COLUMNS] if len(right) > 1 else [_INNER]
    ends = [_ROWS] * (len(left) > 1) + [_COLUMNS] * (len(right) > 1)
    return a, b, [*range(max(batch, 0)), *ends]


@rule("inner", "vdot")
def inner(op: OpView, size: int) -> Iterator[Choice]:
    """Dims but the last of both, and the last, which they share (a partial sum)."""
    if not op.shapes[0] or not op.shapes[1]:
        return
    left = [f"left{d}" for d in range(len(op.shapes[0]) - 1)]
    right = [f"right{d}" for d in range(len(op.shapes[1]) - 1)]
    yield from cut_choices(op, [[*left, _INNER], [*right, _INNER]], [[*left, *right]])


@rule("einsum")
def einsum(op: OpView, size: int) -> Iterator[Choice]:
    """Any letter of the equation: the letters are the labels."""
    parsed = _equation(op)
    if parsed is not None:
        terms, out = parsed
        yield from cut_choices(op, terms, [out])


def _equation(op: OpView) -> tuple[list[list[object]], list[object]] | None:
    """Labels of an einsum; None for a term that names one letter twice (a diagonal)."""
    text = str(op.bound["equation"]).replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = sorted(x for x in set(left) if x.isalpha() and left.count(x) == 1)
        right = ("..." if "..." in left else "") + "".join(letters)
    wide = max(
        (len(s) - len(t.replace("...", "")) for t, s in zip(terms, op.shapes) if "..." in t),
        default=0,
    )
    sizes: dict[object, int] = {}
    found = []
    for term, shape in zip(terms, op.shapes, strict=True):
        labels = _spread(term, len(shape), wide)
        if len(set(labels)) != len(labels):
            return None
        found.append(labels)
        for label, n in zip(labels, shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), n)
    inputs = [
        [x if n == sizes[x] else None for x, n in zip(labels, shape, strict=True)]
        for labels, shape in zip(found, op.shapes, strict=True)
    ]
    return inputs, _spread(right, len(op.out), wide)


def _spread(term: str, rank: int, wide: int) -> list[object]:
    """Letters of a term; the dims of ``...`` are numbered from the right."""
    before, dots, after = term.partition("...")
    if not dots:
        return list(term)
    middle = rank - len(before) - len(after)
    return [*before, *range(wide - middle, wide), *after]


@rule("broadcast_tensors")
def broadcast_tensors(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim of the common shape."""
    out = list(range(len(op.out)))
    yield from cut_choices(op, aligned(op, op.out), [out] * len(op.results))
