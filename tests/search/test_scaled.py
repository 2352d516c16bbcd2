"""Short graphs at other batch sizes, written from two captures, are those of a capture there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raypar import capture
from raypar.graph.opgraph import OpGraph
from raypar.search.interop import scaled
from raypar.search.interop.scaled import short_at
from raypar.search.interop.units import find_units, shorten


class _Layer(nn.Module):
    """Attention and dropout, with shapes written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            t.view(batch, length, 2, width // 2).transpose(1, 2)
            for t in self.mix(self.norm(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch * length, width)
        return x + self.drop(y.view(batch, length, width))


class _Model(nn.Module):
    def __init__(self, uneven: bool) -> None:
        super().__init__()
        self.uneven = uneven
        self.table = nn.Embedding(11, 8, padding_idx=0)
        self.layers = nn.ModuleList(_Layer(8) for _ in range(5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x)
        if self.uneven:
            x = x + x.new_ones(x.shape[0] // 3).sum()
        return x.mean(1)


def _captured(uneven: bool = False) -> OpGraph:
    tokens, labels = torch.zeros(8, 4, dtype=torch.long), torch.zeros(8, dtype=torch.long)
    return capture(lambda: _Model(uneven), (tokens, labels), F.cross_entropy)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_scaled_graph_is_the_captured_one(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _captured()
    units = find_units(graph)
    monkeypatch.setattr(scaled, "FEW_OPS", 0)
    with monkeypatch.context() as patch:  # written, not captured
        patch.setattr(type(graph), "local", None)
        written, members = short_at(graph, units, size)
    expected, theirs = shorten(graph.local(size), units)
    assert [[n.meta["id"] for n in ops] for ops in members] == [
        [n.meta["id"] for n in ops] for ops in theirs
    ]
    for mine, like in zip(written.nodes, expected.nodes, strict=True):
        assert (mine.op, mine.meta.get("id")) == (like.op, like.meta.get("id"))
        for a, b in zip(mine.args, like.args, strict=True):
            if isinstance(b, (int, float, str)):
                assert a == b, mine
        value, wanted = mine.meta.get("val"), like.meta.get("val")
        if isinstance(wanted, torch.Tensor):
            assert (value.shape, value.dtype, value.stride()) == (
                wanted.shape,
                wanted.dtype,
                wanted.stride(),
            )


def test_what_does_not_grow_evenly_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _captured(uneven=True)
    units = find_units(graph)
    monkeypatch.setattr(scaled, "FEW_OPS", 0)
    written, _ = short_at(graph, units, 2)
    expected, _ = shorten(graph.local(2), units)
    assert str(written) == str(expected)  # x.shape[0] // 3 of 8 and 16 tells nothing of 2
