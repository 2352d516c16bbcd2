"""Recurrent layers as one op each."""

from __future__ import annotations

import pytest
import torch

from raypar.compat import TorchDispatchMode
from raypar.programs.recurrent import KINDS


class _Watching(TorchDispatchMode):  # type: ignore[misc]
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_that_is_watched_gives_the_same(kind: str) -> None:
    """As where the bytes of a stage are counted while it is profiled."""
    gates = {"lstm": 4, "gru": 3}.get(kind, 1)
    torch.manual_seed(0)
    input, hidden = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    params = [torch.randn(4 * gates, 3), torch.randn(4 * gates, 4)]
    states = [hidden] * (1 + (kind == "lstm"))
    grads = [torch.randn(5, 2, 4), *(torch.randn(1, 2, 4) for _ in states)]
    wanted = [True] * (3 + len(states))

    def backward() -> list[torch.Tensor]:
        return torch.ops.raypar.recurrent_backward(
            kind, grads, input, states, params, False, 1, False, False, wanted
        )

    alone = backward()
    with _Watching():
        watched = backward()
    assert len(alone) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
