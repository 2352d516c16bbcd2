"""Random numbers as pure functions of (seed, step, op, sample).

The number at one element depends on the run's seed, the step, the canonical op and the *global*
index of its sample, never on microbatches, replicas, stages or recomputation. Every sample's row
comes from a generator of its own, so a rank makes just the rows it needs.
"""

from __future__ import annotations

import math
from typing import Any

import torch

_LIBRARY = torch.library.Library("raypar", "FRAGMENT")
_LIBRARY.define(
    "seeded(Tensor rng, int key, SymInt[] shape, SymInt samples, SymInt before, bool keyed, "
    "str kind, float p, ScalarType dtype, Device device) -> Tensor"
)
_LIBRARY.define("apply_mask(Tensor x, Tensor mask, float scale) -> Tensor")

_MASK64 = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """A 63-bit hash of some integers (splitmix64 steps; Steele et al., OOPSLA 2014)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state + (number & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1


def seeded(
    rng: torch.Tensor,
    key: int,
    shape: list[int],
    samples: int,
    before: int,
    keyed: bool,
    kind: str,
    p: float,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Random numbers of `shape`.

    Args:
        rng: int64 CPU tensor: seed, step, global index of the first sample at hand.
        key: The canonical op's number.
        shape: Shape of the result; it holds `samples` equal rows of numbers.
        samples: Samples at hand.
        before: Elements in front of the sample index in the flattened result: element
            ``[i, s, j]`` of the result seen as ``(before, samples, rest)`` belongs to sample s.
        keyed: Whether numbers differ by sample; else all parts of the batch see the same ones.
        kind: ``bernoulli`` (1 with probability p), ``uniform`` in [0, 1) or ``normal``.
        p: Probability for ``bernoulli``.
        dtype: Dtype of the result.
        device: Device of the result.
    """
    seed, step, first = rng.tolist()
    count = math.prod(shape)
    width = count // max(samples, 1)
    rows = torch.empty(samples, width, dtype=dtype if dtype.is_floating_point else torch.float32)
    if device.type != "cpu":
        rows = rows.to(device)
    generator = torch.Generator(device=rows.device)
    for sample in range(samples):
        generator.manual_seed(mix(seed, step, key, first + sample if keyed else 0))
        row = rows[sample]
        if kind == "bernoulli":
            row.bernoulli_(p, generator=generator)
        elif kind == "uniform":
            row.uniform_(generator=generator)
        else:
            row.normal_(generator=generator)
    if before > 1:
        rows = rows.view(samples, before, -1).transpose(0, 1)
    return rows.reshape(shape).to(dtype)


def _seeded_fake(
    rng: torch.Tensor,
    key: int,
    shape: list[int],
    samples: int,
    before: int,
    keyed: bool,
    kind: str,
    p: float,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _apply_mask(x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.mul(x, mask).mul_(scale)


def _apply_mask_fake(x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.mul(x, mask)


def _mask_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, mask, scale = inputs
    ctx.save_for_backward(mask)
    ctx.scale = scale


def _mask_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return torch.ops.raypar.apply_mask(grad, ctx.saved_tensors[0], ctx.scale), None, None


_LIBRARY.impl("seeded", seeded, "CompositeExplicitAutograd")
_LIBRARY.impl("apply_mask", _apply_mask, "CompositeExplicitAutograd")
torch.library.register_fake("raypar::seeded", _seeded_fake, lib=_LIBRARY)
torch.library.register_fake("raypar::apply_mask", _apply_mask_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "raypar::apply_mask", _mask_backward, setup_context=_mask_context, lib=_LIBRARY
)
