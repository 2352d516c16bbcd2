"""Rules of ops whose strategies depend most on shapes, on random shapes."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.testing.rules import check_rule
from tests._tiers import examples

aten = torch.ops.aten
SIZES = st.sampled_from([1, 2, 3, 4, 6])
MESH = st.sampled_from([(2,), (3,), (2, 2)])
EXAMPLES = settings(max_examples=examples(8, 25), deadline=None)


def _real(shape: tuple[int, ...] | list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


@st.composite
def _broadcastable(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    full = draw(st.lists(SIZES, min_size=1, max_size=3))
    shapes = []
    for _ in range(2):
        own = [n if draw(st.booleans()) else 1 for n in full]
        shapes.append(own[draw(st.integers(0, len(own))) :])
    return shapes[0], shapes[1]


@EXAMPLES
@given(shapes=_broadcastable(), mesh=MESH)
def test_pointwise(shapes: tuple[list[int], list[int]], mesh: tuple[int, ...]) -> None:
    a, b = map(_real, shapes)
    for target in (aten.add.Tensor, aten.mul.Tensor, aten.atan2.default):
        check_rule(target, (a, b), meshes=[mesh], most=8)


@EXAMPLES
@given(
    batch=_broadcastable(), sizes=st.tuples(SIZES, SIZES, SIZES), mesh=MESH, vector=st.booleans()
)
def test_matmul(
    batch: tuple[list[int], list[int]],
    sizes: tuple[int, int, int],
    mesh: tuple[int, ...],
    vector: bool,
) -> None:
    rows, inner, columns = sizes
    left = _real([inner] if vector else [*batch[0], rows, inner])
    check_rule(
        aten.matmul.default, (left, _real([*batch[1], inner, columns])), meshes=[mesh], most=8
    )


@st.composite
def _two_shapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of as many elements, made of common factors in the same order."""
    factors = draw(st.lists(SIZES, min_size=1, max_size=5))

    def grouped() -> list[int]:
        shape, current = [], 1
        for n in factors:
            current *= n
            if draw(st.booleans()):
                shape.append(current)
                current = 1
        return [*shape, current]

    return grouped(), grouped()


@EXAMPLES
@given(shapes=_two_shapes(), mesh=MESH)
def test_reshape(shapes: tuple[list[int], list[int]], mesh: tuple[int, ...]) -> None:
    check_rule(aten.reshape.default, (_real(shapes[0]), shapes[1]), meshes=[mesh], most=12)


@EXAMPLES
@given(
    source=st.lists(SIZES, min_size=1, max_size=3),
    swap=st.booleans(),
    blocks=st.sampled_from([2, 3]),
    mesh=MESH,
)
def test_reshape_without_common_factors(
    source: list[int], swap: bool, blocks: int, mesh: tuple[int, ...]
) -> None:
    target = [source[-1], *source[:-1]] if swap else [math.prod(source)]
    check_rule(
        aten.reshape.default,
        (_real(source), target),
        meshes=[mesh],
        most=12,
        blocks={0: (blocks,)},
        input_blocks={0: {len(source) - 1: (blocks,)}},
    )


@EXAMPLES
@given(
    equation=st.sampled_from(
        ["ij,jk->ik", "bij,bjk->bik", "bec,bd->ecd", "...ij,jk->...ik", "ij,kj", "bi,bi,bj->j",
         "i,j->ij", "bhd->bdh", "bhd->bd", "ii->i", "ij,j->", "gsec,gsm->egcm"]
    ),
    data=st.data(),
    mesh=MESH,
)  # fmt: skip
def test_einsum(equation: str, data: st.DataObject, mesh: tuple[int, ...]) -> None:
    sizes = {letter: data.draw(SIZES) for letter in sorted(set(equation)) if letter.isalpha()}
    terms = equation.split("->")[0].split(",")
    tensors = [
        _real([2] * (3 if i == 0 else 0) * ("." in t) + [sizes[c] for c in t if c.isalpha()])
        for i, t in enumerate(terms)
    ]
    check_rule(aten.einsum.default, (equation, tensors), meshes=[mesh], most=10)
