"""What conversions leave on a rank looks as their fake kernels say: programs are written by it."""

from __future__ import annotations

import pytest
import torch

from raypar.compat import fake_mode
from raypar.sharding.convert import Step, conversion
from raypar.sharding.spec import ShardingSpec
from raypar.testing.mesh_threads import ThreadMesh

INPUTS = {
    "contiguous": torch.randn(4, 6, 2, 8),
    "transposed": torch.randn(4, 2, 6, 8).transpose(1, 2),
    "channels last": torch.randn(4, 6, 2, 8).to(memory_format=torch.channels_last),
    "expanded": torch.randn(4, 1, 2, 8).expand(4, 6, 2, 8),
    "sliced": torch.randn(4, 12, 2, 8)[:, ::2],
}
WAYS = [
    ("R", "Rg"), ("R", "S1"), ("R", "P"), ("S1", "P"), ("S1", "R"), ("S1", "S3"), ("P", "R"),
    ("P", "S0"), ("S0/2", "R"), ("R", "S3/2"),
]  # fmt: skip


def _convert(x: torch.Tensor, step: Step) -> torch.Tensor:
    return torch.ops.raypar.convert(x, step.forward, step.backward, step.cut, step.to, "x", 2)


@pytest.mark.parametrize("way", WAYS, ids="→".join)
@pytest.mark.parametrize("name", INPUTS)
def test_strides_are_those_of_the_fake_kernel(name: str, way: tuple[str, str]) -> None:
    (step,) = conversion(*(ShardingSpec((state,)) for state in way))
    x = INPUTS[name]
    with fake_mode() as mode:
        wanted = _convert(mode.from_tensor(x), step)
    if step.forward == "none":  # left out of programs: the value itself is read on
        assert wanted.stride() == x.stride()
        return
    for found in ThreadMesh([("x", 2)]).run(lambda rank: _convert(x, step)):
        assert found.shape == wanted.shape
        assert found.stride() == wanted.stride()
