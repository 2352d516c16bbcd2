"""Batch norm with statistics that come from outside: what a part of a batch is normalised with.

``raypar::moments`` and ``raypar::batch_norm_by`` are the two halves of batch norm in training; the
moments of all parts are put together between them (Ioffe and Szegedy 2015, algorithm 1; the merge
of moments: Chan, Golub and LeVeque 1979, eq. 2.1 for equal counts).
"""

from __future__ import annotations

from typing import Any

import torch

_LIBRARY = torch.library.Library("raypar", "FRAGMENT")
_LIBRARY.define("moments(Tensor x) -> Tensor")
_LIBRARY.define(
    "batch_norm_by(Tensor x, Tensor moments, Tensor? weight, Tensor? bias, Tensor running_mean, "
    "Tensor running_var, float momentum, float eps, int count) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _wide(x: torch.Tensor) -> torch.dtype:
    """The dtype of statistics: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _dims(x: torch.Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _column(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A value per channel, to meet `x`."""
    return value.reshape([1, -1] + [1] * (x.dim() - 2))


def _moments(x: torch.Tensor) -> torch.Tensor:
    var, mean = torch.var_mean(x.to(_wide(x)), _dims(x), correction=0)
    return torch.stack([mean, var]).unsqueeze(0)


def _moments_fake(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty([1, 2, x.shape[1]], dtype=_wide(x))


def _moments_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _moments_backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    x, moments = ctx.saved_tensors
    count = x.numel() // x.shape[1]
    centred = x.to(moments.dtype) - _column(moments[0, 0], x)
    by_mean, by_var = _column(grad[0, 0], x), _column(grad[0, 1], x)
    return ((by_mean + 2.0 * by_var * centred) / count).to(x.dtype)


def merge_moments(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the whole from those of parts of equal size.

    Args:
        moments: ``[parts, 2, channels]``: mean and (biased) variance.
    """
    means, variances = moments[:, 0], moments[:, 1]
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


def _normalise(
    x: torch.Tensor,
    moments: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    momentum: float,
    eps: float,
    count: int,
) -> tuple[torch.Tensor, ...]:
    """Batch norm of a part of a batch.

    Args:
        x: The part, ``[samples, channels, ...]``.
        moments: ``[parts, 2, channels]`` of all parts.
        weight: Scale per channel.
        bias: Shift per channel.
        running_mean: Before the step.
        running_var: Before the step.
        momentum: Weight of this batch in the running statistics.
        eps: Added to the variance.
        count: Elements per channel in the whole batch.

    Returns:
        The normalised part, mean, 1 / deviation, and the new running mean and variance.
    """
    mean, var = merge_moments(moments)
    scale = rstd = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    y = torch.addcmul(_column(shift, x), x, _column(scale, x)).to(x.dtype)
    unbiased = var * (count / max(count - 1, 1))
    new_mean = torch.lerp(running_mean, mean.to(running_mean.dtype), momentum)
    new_var = torch.lerp(running_var, unbiased.to(running_var.dtype), momentum)
    return y.contiguous(), mean, rstd, new_mean, new_var


def _normalise_fake(
    x: torch.Tensor,
    moments: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    momentum: float,
    eps: float,
    count: int,
) -> tuple[torch.Tensor, ...]:
    per_channel = moments.new_empty([x.shape[1]])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new = (torch.empty_like(running_mean), torch.empty_like(running_var))
    return y, per_channel, torch.empty_like(per_channel), *new


def _context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, moments, weight, bias, *_ = inputs
    ctx.save_for_backward(x, moments, weight, output[1], output[2])
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Gradients of the part, the moments (of this part's sum alone), weight and bias."""
    if grad is None:
        return (None,) * 9
    x, moments, weight, mean, rstd = ctx.saved_tensors
    grad = grad.to(moments.dtype)
    dims = _dims(x)
    normal = (x.to(moments.dtype) - _column(mean, x)) * _column(rstd, x)
    by_bias, by_weight = grad.sum(dims), (grad * normal).sum(dims)
    scale = rstd if weight is None else rstd * weight
    by_x = (grad * _column(scale, x)).to(x.dtype)
    by_mean = -by_bias * scale
    gain = by_weight if weight is None else by_weight * weight
    by_var = -0.5 * gain * rstd.square()
    # var = mean of variances + mean of squared (means - mean): how it moves with every part's own.
    parts = moments.shape[0]
    spread = 2.0 * (moments[:, 0] - mean) * by_var
    by_moments = torch.stack([by_mean + spread, by_var.expand(parts, -1)], 1) / parts
    return (
        by_x,
        by_moments,
        None if weight is None else by_weight.to(weight.dtype),
        by_bias.to(moments.dtype if weight is None else weight.dtype) if ctx.has_bias else None,
        *(None,) * 5,
    )


_LIBRARY.impl("moments", _moments, "CompositeExplicitAutograd")
_LIBRARY.impl("batch_norm_by", _normalise, "CompositeExplicitAutograd")
torch.library.register_fake("raypar::moments", _moments_fake, lib=_LIBRARY)
torch.library.register_fake("raypar::batch_norm_by", _normalise_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "raypar::moments", _moments_backward, setup_context=_moments_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "raypar::batch_norm_by", _backward, setup_context=_context, lib=_LIBRARY
)
