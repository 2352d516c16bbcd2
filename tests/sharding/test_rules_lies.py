"""A strategy with one wrong state does not pass; nor does a wrong localiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raypar.errors import PlanError
from raypar.sharding.rules.base import Strategy
from raypar.sharding.spec import ShardingSpec
from raypar.testing.rules import OpCall, check_strategy

aten = torch.ops.aten


def _x(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _strategy(text: str) -> Strategy:
    left, right = text.split(">")
    specs = [tuple(ShardingSpec.parse(s) for s in side.split()) for side in (left, right)]
    return Strategy(specs[0], specs[1], ("",))


LIES: list[tuple[str, Any, tuple[Any, ...], str, str]] = [
    ("weight read whole", aten.linear.default, (_x(4, 6), _x(4, 6)), "S0 R > S0", "gradient"),
    ("input read whole", aten.linear.default, (_x(4, 6), _x(4, 6)), "R S0 > S1", "gradient"),
    ("sum called whole", aten.linear.default, (_x(4, 6), _x(4, 6)), "S1 S1 > R", "result"),
    ("bias added twice", aten.linear.default, (_x(4, 6), _x(4, 6), _x(4)), "S1 S1 Rg > P",
     "result"),
    ("partial through gelu", aten.gelu.default, (_x(4, 6),), "P > P", "result"),
    ("partial times partial", aten.mul.Tensor, (_x(4, 6), _x(4, 6)), "P P > P", "result"),
    ("factor read whole", aten.mul.Tensor, (_x(4, 6), _x(4, 6)), "P R > P", "gradient"),
    ("number added twice", aten.add.Scalar, (_x(4, 6), 1.0), "P > P", "result"),
    ("maximum of parts", aten.amax.default, (_x(4, 6), [1]), "S1 > P", "result"),
    ("scale read whole", aten.layer_norm.default, (_x(4, 6), [6], _x(6)), "S0 R > S0", "gradient"),
    ("broadcast factor", aten.mul.Tensor, (_x(4, 6), _x(6)), "S0 R > S0", "gradient"),
    ("partial where whole", aten.add.Tensor, (_x(4, 6), _x(4, 6)), "P Rg > P", "result"),
    ("a gradient too many", aten.relu.default, (_x(4, 6),), "Rg > R", "gradient"),
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES, ids=[lie[0] for lie in LIES])
def test_a_lie_is_caught(lie: tuple[str, Any, tuple[Any, ...], str, str]) -> None:
    _, target, args, text, where = lie
    with pytest.raises(AssertionError, match=where):
        check_strategy(OpCall(target, args), _strategy(text), (2,))


def test_a_wrong_local_shape_is_refused_when_the_call_is_written() -> None:
    call = OpCall(aten.cumprod.default, (_x(4, 6), 1))
    with pytest.raises(PlanError, match="rule or localiser of 'cumprod' is wrong"):
        check_strategy(call, _strategy("S0 > S1"), (2,))


@pytest.mark.parametrize("dim", [0, 1])
def test_a_scan_over_its_own_dim_is_caught(dim: int) -> None:
    call = OpCall(aten.cumprod.default, (_x(4, 6), dim))
    with pytest.raises(AssertionError, match="result"):
        check_strategy(call, _strategy(f"S{dim} > S{dim}"), (2,))


def test_blocks_that_are_no_blocks_are_caught() -> None:
    call = OpCall(aten.reshape.default, (_x(2, 12), [2, 3, 4]))
    check_strategy(call, _strategy("S1/3 > S2"), (2,))
    with pytest.raises(AssertionError, match="result"):
        check_strategy(call, _strategy("S1 > S2"), (2,))
