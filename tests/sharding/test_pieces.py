"""Pieces of tensors against index lists."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from raypar.sharding.pieces import local_piece, piece_of, within
from raypar.sharding.spec import Ranges, ShardingSpec


@st.composite
def ranges(draw: st.DrawFn, size: int) -> Ranges:
    """Ascending ranges of a dim that do not touch."""
    ends = draw(st.lists(st.integers(0, size), max_size=6, unique=True).map(sorted))
    return tuple((a, b) for a, b in zip(ends[::2], ends[1::2], strict=False))


def _indices(held: Ranges) -> list[int]:
    return [i for start, stop in held for i in range(start, stop)]


def _select(tensor: torch.Tensor, held: tuple[Ranges, ...]) -> torch.Tensor:
    for dim, one in enumerate(held):
        tensor = tensor.index_select(dim, torch.tensor(_indices(one), dtype=torch.int64))
    return tensor


@given(held=st.tuples(ranges(7), ranges(5)))
def test_a_piece_is_what_its_ranges_name(held: tuple[Ranges, ...]) -> None:
    whole = torch.arange(35.0).view(7, 5)
    piece = piece_of(held)
    expected = _select(whole, held)
    assert torch.equal(piece.read(whole), expected)
    assert (piece.shape, piece.numel) == (tuple(expected.shape), expected.numel())
    part = torch.full(piece.shape, 2.0)
    piece.add_into(whole, part)
    assert torch.equal(part, expected + 2)
    piece.copy_into(whole, part)
    assert torch.equal(part, expected)
    back = torch.zeros(7, 5)
    piece.write(back, part)
    assert torch.equal(_select(back, held), expected)
    assert back.sum() == expected.sum()


@given(outer=ranges(9), inner=ranges(9))
def test_ranges_inside_ranges(outer: Ranges, inner: Ranges) -> None:
    have, want = _indices(outer), _indices(inner)
    found = within(outer, inner)
    if set(want) <= set(have):
        assert found is not None
        assert [have[i] for i in _indices(found)] == want
    else:
        assert found is None


@given(
    outer=st.sampled_from(("R,S0", "R,S1", "R,S0/2", "S0,S0", "R,R")),
    inner=st.sampled_from(("S1,S0", "S0,S1", "S1,S0/2", "S0,S0", "S0,R", "S0/2,S0", "R,S0")),
)
def test_a_local_piece_reads_from_the_local_part(outer: str, inner: str) -> None:
    shape, mesh = (8, 8), (2, 2)
    whole = torch.arange(64.0).view(shape)
    for at in itertools.product(range(2), range(2)):
        wide = ShardingSpec.parse(outer).ranges(shape, mesh, at)
        narrow = ShardingSpec.parse(inner).ranges(shape, mesh, at)
        piece = local_piece(wide, narrow)
        inside = all(
            set(_indices(n)) <= set(_indices(w)) for w, n in zip(wide, narrow, strict=True)
        )
        assert (piece is not None) == inside
        if piece is not None:
            assert torch.equal(piece.read(_select(whole, wide)), _select(whole, narrow))
