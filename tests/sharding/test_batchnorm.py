"""The two halves of batch norm alone."""

from __future__ import annotations

import torch

from raypar.sharding.batchnorm import merge_moments
from tests.sharding.one_op import real


def test_gradients_of_the_halves() -> None:
    x = real(3, 2, 4).requires_grad_()
    weight, bias = real(2).requires_grad_(), real(2, seed=1).requires_grad_()
    moments = torch.stack([real(3, 2), real(3, 2, seed=2).abs() + 1], 1).requires_grad_()
    assert torch.autograd.gradcheck(torch.ops.raypar.moments, (x,))

    def normalised(*args: torch.Tensor) -> torch.Tensor:
        running = (torch.zeros(2, dtype=x.dtype), torch.ones(2, dtype=x.dtype))
        result: torch.Tensor = torch.ops.raypar.batch_norm_by(*args, *running, 0.1, 1e-5, 12)[0]
        return result

    assert torch.autograd.gradcheck(normalised, (x, moments, weight, bias))


def test_moments_of_parts_make_those_of_the_whole() -> None:
    x = real(8, 3, 5) * 2 + 7
    parts = torch.cat([torch.ops.raypar.moments(part) for part in x.chunk(4)])
    mean, var = merge_moments(parts)
    torch.testing.assert_close(mean, x.mean((0, 2)))
    torch.testing.assert_close(var, x.var((0, 2), correction=0))


def test_low_precision_values_have_float32_statistics() -> None:
    x = (real(4, 3, 8) + 5).to(torch.bfloat16)
    moments = torch.ops.raypar.moments(x)
    assert moments.dtype is torch.float32
    running = (torch.zeros(3), torch.ones(3))
    y, *_, new_mean, _ = torch.ops.raypar.batch_norm_by(
        x, moments, torch.ones(3), torch.zeros(3), *running, 0.1, 1e-5, 32
    )
    assert y.dtype is torch.bfloat16
    assert new_mean.dtype is torch.float32
    wanted = torch.nn.functional.batch_norm(x.float(), None, None, training=True)
    torch.testing.assert_close(y.float(), wanted, rtol=0.02, atol=0.02)
