"""Every part of a random value is that part of what the whole op draws."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from raypar.graph.passes.randomness import SEEDED
from raypar.sharding.lower import lower
from raypar.sharding.rules.random import sample_dim
from raypar.sharding.strategies import find_strategy, whole
from tests.sharding.one_op import OneOp

CPU = torch.device("cpu")
RNG = torch.tensor([7, 3, 5])
LAYOUTS = {
    "samples first": ([8, 4, 4], 8, 1, True),
    "samples second": ([4, 8, 4], 8, 4, True),
    "two rows each": ([8, 4, 4], 4, 1, True),
    "one sample": ([8, 4, 4], 1, 1, True),
    "shared": ([8, 4, 4], 8, 1, False),
    "whole rows": ([8, 1, 4], 2, 1, True),
    "samples inside a dim": ([16, 4], 4, 2, True),
}


def _op(name: str, kind: str = "uniform") -> OneOp:
    shape, samples, before, keyed = LAYOUTS[name]
    return OneOp(SEEDED, RNG, 12, shape, samples, before, keyed, kind, 0.5, torch.float64, CPU)


@pytest.mark.parametrize("kind", ["uniform", "bernoulli"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_draw_what_the_whole_draws(name: str, kind: str) -> None:
    op = _op(name, kind)
    op.check()
    assert op.texts() == [f"R > S{d}" for d, n in enumerate(LAYOUTS[name][0]) if n > 1]


def _drawn(op: OneOp, mesh: tuple[int, ...], text: str) -> list[fx.Node]:
    calls = [n for n in op.graph.nodes if n.op == "call_function"]
    chosen = {n: whole(n, len(mesh)) for n in calls}
    chosen[op.node] = find_strategy(op.node, mesh, text)
    lowered = lower(op.graph, chosen, tuple(zip("xy", mesh, strict=False)))
    return [n for n in lowered.graph.nodes if n.target is SEEDED]


def test_a_part_of_the_samples_draws_only_its_own() -> None:
    (node,) = _drawn(_op("samples first"), (4,), "R > S0")
    assert node.args[2] == [2, 4, 4]
    assert node.args[3] == 2
    (node,) = _drawn(_op("samples first"), (2, 2), "R,R > S0,S0")
    assert node.args[2] == [2, 4, 4]
    (node,) = _drawn(_op("samples second"), (2, 2), "R,R > S1,S2")
    assert node.args[2] == [4, 4, 4], "a cut of a sample's own row is taken after drawing"
    (node,) = _drawn(_op("shared"), (2,), "R > S0")
    assert node.args[2] == [8, 4, 4], "parts that all see the same numbers draw all of them"


def test_which_dim_holds_the_samples() -> None:
    assert sample_dim([8, 4], 8, 1) == 0
    assert sample_dim([4, 8], 8, 4) == 1
    assert sample_dim([16, 4], 4, 2) is None, "each of two blocks has a part of every sample"
    assert sample_dim([8, 4], 1, 1) is None
