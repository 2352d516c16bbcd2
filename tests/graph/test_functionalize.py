"""In-place writes, also through views, give a pure graph that computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import raypar
from raypar.compat import is_mutable
from raypar.errors import CaptureError
from raypar.graph.passes.emit import is_op
from raypar.graph.replay import replay


def _whole(h):
    h += 1
    h.relu_()
    return h


def _columns(h):
    h[..., 0] = 0
    h[:, 1:3] *= 2
    h[:, ::2] = h[:, 1::2]
    return h


def _views(h):
    h.t()[1].zero_()
    h.view(-1, 2, 3)[:, 1, :].tanh_()
    h.unsqueeze(0)[0, :, 2].sub_(1)
    return h


def _halves(h):
    left, right = h[:, :3], h[:, 3:]
    left.mul_(0.5)
    right.add_(left)
    return left * right + h[:, 3:]


def _masked(h):
    h[h > 0.5] = 0.3
    h.masked_fill_(h < 0, 2.0)
    return h


def _read_between(h):
    view = h[:, 0]
    before = view * 2
    h.add_(1)
    return (view + before)[:, None] * h


def _diagonal(h):
    h[:6].diagonal().fill_(3.0)
    return h


def _out(h):
    torch.mul(h, 2, out=h)
    return h


def _unsqueezed(h):
    h.unsqueeze_(1)
    h.transpose_(1, 2)
    return h.squeeze(2)


WRITES = [
    _whole, _columns, _views, _halves, _masked, _read_between, _diagonal, _out, _unsqueezed
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_writes_become_pure(write):
    class Model(nn.Module):
        def forward(self, x):
            return (write(x * 1.0) * torch.arange(1.0, 7.0)[: write(x * 1.0).shape[-1]]).sum()

    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    clean = raypar.capture(Model, (x,)).clean
    assert not any(is_op(n) and is_mutable(n.target) for n in clean.ops)
    values = {clean.inputs[0]: x.clone(), clean.rng: torch.zeros(3, dtype=torch.int64)}
    values.update(dict(clean.constants.values()))
    (loss,) = replay(clean.graph, values)
    with torch.no_grad():
        assert torch.allclose(loss, Model()(x))
    assert torch.equal(values[clean.inputs[0]], x)  # the input is not written


def test_a_buffer_written_through_a_view_is_an_update():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.zeros(4, 6))

        def forward(self, x):
            self.table[1].add_(x.mean(0))
            return self.table.sum() + x.sum()

    graph = raypar.capture(Model, (torch.ones(8, 6),))
    assert list(graph.clean.updates) == ["table"]


def test_writing_a_parameter_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            self.layer.weight.data.clamp_(-1, 1)
            return self.layer(x).sum()

    with pytest.raises(CaptureError, match=r"parameter 'layer\.weight' in place"):
        raypar.capture(Model, (torch.ones(8, 6),))
