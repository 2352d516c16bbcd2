"""Pooling, resampling, padding and pixel shuffles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import fx

from raypar.graph.passes.emit import aten
from raypar.sharding.rules._halo import Window, exchange, window
from raypar.sharding.rules._local import cutting, local_bound, parts_of, per_dim
from raypar.sharding.rules.base import (
    Choice,
    LocalCall,
    OpView,
    Strategy,
    combination,
    localiser,
    rule,
)
from raypar.sharding.spec import RG, P, S

_POOLS = tuple(f"{kind}_pool{n}d" for kind in ("max", "avg") for n in (1, 2, 3))
_ADAPTIVE = tuple(f"adaptive_avg_pool{n}d" for n in (1, 2, 3))
_NEAREST = tuple(f"upsample_nearest{n}d" for n in (1, 2, 3))
_PLANES = (
    *(f"max_pool{n}d_with_indices" for n in (2, 3)),
    *(f"adaptive_max_pool{n}d" for n in (1, 2, 3)),
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    *(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)),
)
_PADS = (
    "pad",
    "constant_pad_nd",
    *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
)


def _image_dims(op: OpView) -> int:
    return int(next(c for c in op.name if c.isdigit()))


def _leading(op: OpView) -> Iterator[Choice]:
    """Samples and channels: every plane of an image is worked on alone."""
    for dim in range(len(op.out) - _image_dims(op)):
        yield Choice((S(dim),), (S(dim),) * len(op.results))


@rule(*_PLANES)
def planes(op: OpView, size: int) -> Iterator[Choice]:
    """Samples and channels."""
    yield from _leading(op)


@rule(*_POOLS)
def pool(op: OpView, size: int) -> Iterator[Choice]:
    """Samples, channels, and tiles of the image with halos."""
    yield from _leading(op)
    for dim in range(len(op.out) - _image_dims(op), len(op.out)):
        if _tiles(op, dim, size):
            yield Choice((S(dim),), (S(dim),))
    if op.name.startswith("avg"):
        yield Choice((P,), (P,))


@combination(*_POOLS)
def pool_together(op: OpView, strategy: Strategy, mesh: Sequence[int]) -> bool:
    """Halos fit into the parts."""
    x = strategy.inputs[0]
    images = range(len(op.out) - _image_dims(op), len(op.out))
    return all(_tiles(op, dim, parts_of(x, dim, mesh)) for dim in images if cutting(x, dim))


@localiser(*_POOLS)
def local_pool(call: LocalCall) -> fx.Node:
    """Rows of the neighbours in place of padding."""
    op, spec, b = call.op, call.strategy.inputs[0], local_bound(call)
    count = _image_dims(op)
    x, padding = b["self"], per_dim(b["padding"], count, 0)
    fill = float("-inf") if op.name.startswith("max") else 0.0
    for i in range(count):
        dim = len(op.out) - count + i
        if cutting(spec, dim):
            halo = _window(op, dim)
            assert halo is not None
            x = exchange(call, x, spec, dim, halo, fill)
            padding[i] = 0
    kernel, stride = b["kernel_size"], b["stride"] or b["kernel_size"]
    if op.name.startswith("max"):
        rest = (b["dilation"], b["ceil_mode"])
    else:
        rest = (b["ceil_mode"], b["count_include_pad"])
        rest += (b["divisor_override"],) if "divisor_override" in b else ()
    return call.emit(op.node.target, x, kernel, stride, padding, *rest)


def _tiles(op: OpView, dim: int, parts: int) -> bool:
    halo = _window(op, dim)
    if halo is None or op.shapes[0][dim] % parts or op.out[dim] % parts:
        return False
    return max(halo) <= op.shapes[0][dim] // parts


def _window(op: OpView, dim: int) -> Window | None:
    count, b = _image_dims(op), op.bound
    i = dim - (len(op.out) - count)
    kernel = per_dim(b["kernel_size"], count, 1)
    stride = per_dim(b["stride"] or kernel, count, 1)
    padding, dilation = per_dim(b["padding"], count, 0), per_dim(b.get("dilation"), count, 1)
    found = window(op.shapes[0][dim], op.out[dim], kernel[i], stride[i], padding[i], dilation[i])
    if found is None or op.name.startswith("max"):
        return found
    # Averages that do not count padding would count the rows that stand for it.
    own_divisor = b["count_include_pad"] or b.get("divisor_override")
    return found if own_divisor or not padding[i] else None


@rule(*_ADAPTIVE, "_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
def adaptive(op: OpView, size: int) -> Iterator[Choice]:
    """Samples, channels, tiles where bins are even; a global mean is a partial sum of means."""
    yield from _leading(op)
    yield Choice((P,), (P,))
    for dim in range(len(op.out) - _image_dims(op), len(op.out)):
        if op.out[dim] == 1:
            yield Choice((S(dim),), (P,))
        elif op.shapes[0][dim] % op.out[dim] == 0:
            yield Choice((S(dim),), (S(dim),))


@localiser(*_ADAPTIVE, "_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
def local_adaptive(call: LocalCall) -> fx.Node:
    """Local bins; the mean of a part counts as much as the part."""
    op, spec = call.op, call.strategy.inputs[0]
    count = _image_dims(op)
    images = range(len(op.out) - count, len(op.out))
    sizes = [1 if op.out[d] == 1 else n for d, n in enumerate(call.local_out())][-count:]
    out = call.emit(op.node.target, call.args[0], sizes)
    parts = math.prod(parts_of(spec, d, call.mesh) for d in images if op.out[d] == 1)
    return out if parts == 1 else call.emit(aten.mul.Scalar, out, 1 / parts)


@rule(*_NEAREST)
def nearest(op: OpView, size: int) -> Iterator[Choice]:
    """Samples, channels, and tiles that grow by a whole factor."""
    yield from _leading(op)
    yield Choice((P,), (P,))
    for dim in range(len(op.out) - _image_dims(op), len(op.out)):
        if op.out[dim] % op.shapes[0][dim] == 0:
            yield Choice((S(dim),), (S(dim),))


@localiser(*_NEAREST)
def local_nearest(call: LocalCall) -> fx.Node:
    """The local size of the output; a whole factor follows from the sizes."""
    sizes = call.local_out()[-_image_dims(call.op) :]
    name = call.op.name
    target = getattr(aten, name).vec
    b = local_bound(call)
    return call.emit(target, b["input" if "input" in b else "self"], sizes, None)


@rule(*_PADS)
def pad(op: OpView, size: int) -> Iterator[Choice]:
    """Dims that are not padded; zeros, and copies of the image, pass partial sums through."""
    widths = next(op.bound[n] for n in ("pad", "padding") if n in op.bound)
    ndim = len(op.out)
    padded = {ndim - 1 - i // 2 for i, n in enumerate(widths) if n}
    for dim in range(ndim):
        if dim not in padded:
            yield Choice((S(dim),), (S(dim),))
    if not op.bound.get("value") and op.results[0].is_floating_point():
        yield Choice((P,), (P,))


@rule("pixel_shuffle", "pixel_unshuffle")
def shuffle(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim: both sides are cut in the same order."""
    for dim in range(len(op.out)):
        yield Choice((S(dim),), (S(dim),))
    yield Choice((P,), (P,))


@rule("im2col", "channel_shuffle", "native_channel_shuffle")
def samples(op: OpView, size: int) -> Iterator[Choice]:
    """Samples."""
    if len(op.out) >= 3 and len(op.shapes[0]) >= 4:
        yield Choice((S(0),), (S(0),))
        yield Choice((P,), (P,))
    if op.name == "im2col" and len(op.shapes[0]) == 4:
        yield Choice((S(1),), (S(1),))


@rule("col2im")
def col2im(op: OpView, size: int) -> Iterator[Choice]:
    """Samples and channels: the columns of a channel lie together."""
    if len(op.shapes[0]) == 3:
        yield Choice((S(0),), (S(0),))
        if op.out[1] % size == 0:
            yield Choice((S(1),), (S(1),))
    yield Choice((P,), (P,))


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(op: OpView, size: int) -> Iterator[Choice]:
    """Samples; channels; tiles of the grid."""
    yield Choice((S(0), S(0)), (S(0),))
    yield Choice((S(1), RG), (S(1),))
    for dim in range(1, len(op.out) - 1):
        yield Choice((RG, S(dim)), (S(dim + 1),))


@rule("affine_grid_generator")
def affine_grid(op: OpView, size: int) -> Iterator[Choice]:
    """Samples."""
    yield Choice((S(0),), (S(0),))


@localiser("affine_grid_generator")
def local_affine_grid(call: LocalCall) -> fx.Node:
    """The local number of samples."""
    b = local_bound(call)
    sizes = [call.local_out()[0], *list(b["size"])[1:]]
    return call.emit(call.op.node.target, b["theta"], sizes, b["align_corners"])
