"""A convolution's backward does each half of its work in its own half."""

from __future__ import annotations

import torch
from torch import fx, nn

import raypar
from raypar.programs.joint import trace_joint
from raypar.programs.partition import partition
from raypar.programs.policy import recomputable
from raypar.programs.slicing import slice_stages


def _convolutions(nodes: list[fx.Node]) -> list[list[bool]]:
    wanted = torch.ops.aten.convolution_backward.default
    return [list(n.args[-1]) for n in nodes if n.target is wanted]  # type: ignore[call-overload]


def test_each_half_makes_its_own_gradients_only() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))

    def loss(y: torch.Tensor) -> torch.Tensor:
        return y.square().mean()

    graph = raypar.capture(model, torch.zeros(2, 3, 8, 8), lambda y: loss(y))
    clean = graph.local(2)
    cut = graph.index["1/relu#0"]
    _, second = slice_stages(clean, [(0, cut), (cut, len(clean.ops))], graph.cloneable, {})[0]
    keys = [n.meta["id"] for n in second.graph.nodes if n.op == "placeholder"]
    edges = [i for i, key in enumerate(keys) if key.startswith("edge:")]
    params = [i for i, key in enumerate(keys) if key.startswith("param:")]
    joint = trace_joint(second.graph, [*edges, *params], [0])
    parts = partition(joint, recomputable("none"), set(edges))
    assert _convolutions(parts.backward_input.nodes) == [[True, False, False]]
    assert _convolutions(parts.backward_weight.nodes) == [[False, True, True]]
    whole = partition(trace_joint(second.graph, [*edges, *params], [0]), recomputable("none"), [])
    assert _convolutions(whole.backward.nodes) == [[True, True, True]]
