"""Convolutions, pooling, resampling and batch norm, cut in every way that they offer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.errors import RayparError
from raypar.graph.passes.emit import aten
from raypar.sharding.rules import vision
from raypar.sharding.rules._halo import Window
from raypar.sharding.spec import S
from raypar.sharding.strategies import strategies
from tests._tiers import examples
from tests.sharding.one_op import Fixed, OneOp, check_op, real

few = settings(max_examples=examples(4, 12), deadline=None)


@given(
    kernel=st.integers(1, 5),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 3),
    channels=st.sampled_from([(4, 8, 1), (8, 8, 4), (4, 4, 4), (8, 4, 2), (3, 4, 1)]),
    bias=st.booleans(),
)
@few
def test_any_convolution(
    kernel: int,
    stride: int,
    dilation: int,
    padding: int,
    channels: tuple[int, int, int],
    bias: bool,
) -> None:
    inside, outside, groups = channels
    x = real(4, inside, 16)
    weight, shift = real(outside, inside // groups, kernel), real(outside) if bias else None
    found = check_op(aten.conv1d.default, x, weight, shift, [stride], [padding], [dilation], groups)
    learned = "Rg Rg" if bias else "Rg"
    assert f"S0 {learned} > S0" in found
    reach = dilation * (kernel - 1)
    rows = (16 + 2 * padding - reach - 1) // stride + 1
    fits = rows * stride == 16 and padding <= 8 and reach + 1 - stride - padding <= 8
    assert (f"S2 {learned} > S2" in found) == fits


@given(
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    more=st.integers(0, 1),
    channels=st.sampled_from([(4, 8, 1), (8, 4, 4), (4, 2, 2)]),
)
@few
def test_any_transposed_convolution(
    kernel: int, stride: int, padding: int, more: int, channels: tuple[int, int, int]
) -> None:
    inside, outside, groups = channels
    more = min(more, stride - 1)
    if (8 - 1) * stride - 2 * padding + kernel + more < 1:
        return
    args = ([stride], [padding], [more], groups)
    check_op(
        aten.conv_transpose1d.default,
        real(4, inside, 8),
        real(inside, outside, kernel),
        real(outside * groups),
        *args,
    )


IMAGES: dict[str, tuple[Any, ...]] = {
    "3x3": (aten.conv2d.default, real(2, 4, 8, 8), real(4, 4, 3, 3), real(4), [1], [1]),
    "stem": (aten.conv2d.default, real(2, 3, 16, 16), real(4, 3, 7, 7), None, [2], [3]),
    "same": (aten.conv2d.padding, real(2, 4, 8, 8), real(4, 4, 2, 4), None, [1], "same"),
    "volume": (aten.conv3d.default, real(2, 2, 4, 4, 4), real(4, 2, 3, 3, 3), None, [1], [1]),
    "up": (aten.conv_transpose2d.input, real(2, 4, 4, 4), real(4, 4, 4, 4), None, [2], [1]),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_cut_in_tiles(name: str) -> None:
    target, *args = IMAGES[name]
    learned = " Rg" * sum(isinstance(a, torch.Tensor) for a in args[1:])
    found = check_op(target, *args)
    assert f"S2{learned} > S2" in found
    assert f"S3{learned} > S3" in found


def test_channels_and_groups() -> None:
    plain = OneOp(aten.conv2d.default, real(2, 4, 4, 4), real(4, 4, 1, 1), real(4))
    assert {"Rg S0 S0 > S1", "S1 S1 P > P"} <= set(plain.texts())
    grouped = OneOp(aten.conv2d.default, real(2, 8, 4, 4), real(8, 2, 1, 1), None, [1], [0], [1], 4)
    assert {"S1 S0 > S1", "Rg S0/4 > S1/4", "S1/4 S1 > P"} <= set(grouped.texts())
    two_groups = OneOp(
        aten.conv2d.default, real(2, 8, 4, 4), real(8, 4, 1, 1), None, [1], [0], [1], 2
    )
    together = {str(s) for s in strategies(two_groups.node, (2, 2))}
    assert "S1,R S0,R > S1,R" in together
    assert "S1,S1 S0,S0 > S1,S1" not in together  # two groups cannot be cut into four
    assert not any(
        S(1) in s.inputs[0] and S(1, 2) in s.inputs[0] for s in strategies(two_groups.node, (2, 2))
    )


def test_a_halo_is_never_wider_than_a_part() -> None:
    wide = OneOp(aten.conv1d.default, real(2, 2, 8), real(2, 2, 5), None, [1], [2])
    assert "S2 Rg > S2" in wide.texts(4)
    assert "S2 Rg > S2" not in wide.texts(8)
    pairs = {str(s) for s in strategies(wide.node, (2, 4))}
    assert "S2,R Rg,R > S2,R" in pairs
    assert "S2,S2 Rg,Rg > S2,S2" not in pairs


def test_a_halo_that_is_too_narrow_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OneOp(aten.conv1d.default, real(2, 2, 8), real(2, 2, 3), None, [1], [1])
    monkeypatch.setattr(vision, "_window", lambda op, dim: Window(2, 0))
    with pytest.raises((AssertionError, RayparError)):
        op.check(meshes=((2,),))


POOLS: dict[str, tuple[Any, ...]] = {
    "max": (aten.max_pool2d.default, real(4, 4, 8, 8), [2, 2]),
    "overlapping max": (aten.max_pool2d.default, real(4, 4, 8, 8), [3, 3], [2, 2], [1, 1]),
    "max of one image": (aten.max_pool2d.default, real(4, 8, 8), [3, 3], [1, 1], [1, 1]),
    "mean": (aten.avg_pool2d.default, real(4, 4, 8, 8), [2, 2]),
    "padded mean": (aten.avg_pool2d.default, real(4, 4, 8, 8), [3, 3], [1, 1], [1, 1]),
    "mean without padding": (
        aten.avg_pool2d.default, real(4, 4, 8, 8), [3, 3], [1, 1], [1, 1], False, False,
    ),
    "sequence": (aten.avg_pool1d.default, real(4, 4, 8), [3], [1], [1]),
    "global mean": (aten.adaptive_avg_pool2d.default, real(4, 4, 8, 8), [1, 1]),
    "bins": (aten.adaptive_avg_pool2d.default, real(4, 4, 8, 8), [4, 2]),
    "uneven bins": (aten.adaptive_avg_pool2d.default, real(4, 4, 7, 7), [4, 2]),
    "max bins": (aten.adaptive_max_pool2d.default, real(4, 4, 8, 8), [4, 2]),
    "indices": (aten.max_pool2d_with_indices.default, real(4, 4, 8, 8), [2, 2]),
    "bilinear": (aten.upsample_bilinear2d.vec, real(4, 4, 4, 4), None, False, [2.0, 2.0]),
    "nearest": (aten.upsample_nearest2d.vec, real(4, 4, 4, 4), None, [2.0, 2.0]),
    "nearest of a size": (aten.upsample_nearest2d.default, real(4, 4, 4, 4), [8, 12]),
    "pad": (aten.pad.default, real(4, 4, 8), [2, 0]),
    "pad with ones": (aten.pad.default, real(4, 4, 8), [2, 0], "constant", 1.0),
    "reflect": (aten.reflection_pad2d.default, real(4, 4, 8, 8), [1, 1, 1, 1]),
    "shuffle": (aten.pixel_shuffle.default, real(4, 16, 4, 4), 2),
    "unshuffle": (aten.pixel_unshuffle.default, real(4, 4, 8, 8), 2),
    "unfold": (aten.im2col.default, real(4, 4, 8, 8), [2, 2], [1, 1], [0, 0], [2, 2]),
    "fold": (aten.col2im.default, real(4, 16, 16), [8, 8], [2, 2], [1, 1], [0, 0], [2, 2]),
    "affine grid": (aten.affine_grid_generator.default, real(4, 2, 3), [4, 3, 6, 6], False),
    "grid": (
        aten.grid_sampler.default, real(4, 4, 8, 8), real(4, 4, 4, 2).tanh(), 0, 0, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", POOLS)
def test_pooling_and_resampling(name: str) -> None:
    target, *args = POOLS[name]
    found = check_op(target, *args)
    assert any(text.startswith("S0 ") for text in found)


def test_what_tiles_of_a_pool_are_allowed() -> None:
    assert "S2 > S2" in OneOp(*POOLS["padded mean"]).texts()
    assert "S2 > S2" not in OneOp(*POOLS["mean without padding"]).texts()
    assert "S2 > P" in OneOp(*POOLS["global mean"]).texts()
    assert "P > P" not in OneOp(*POOLS["pad with ones"]).texts()
    assert "S2 > S2" not in OneOp(*POOLS["pad"]).texts()


def _batch_norm(shape: tuple[int, ...], learned: bool) -> OneOp:
    c = shape[1]
    weights = (real(c) + 2, real(c)) if learned else (None, None)
    buffers = (Fixed(real(c)), Fixed(real(c, seed=1).abs()))
    op = aten._native_batch_norm_legit_functional.default
    return OneOp(op, real(*shape) * 3 + 1, *weights, *buffers, True, 0.1, 1e-5, results=(0, 3, 4))


@pytest.mark.parametrize("shape", [(4, 4), (4, 8, 8), (4, 4, 4, 4)], ids=str)
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "plain"])
def test_batch_norm_has_the_statistics_of_the_whole_batch(
    shape: tuple[int, ...], learned: bool
) -> None:
    op = _batch_norm(shape, learned)
    op.check()
    weights = " Rg Rg" if learned else ""
    assert f"S0{weights} R R > S0 R R R R" in op.texts()
    assert any(text.startswith("S1 ") for text in op.texts())


def test_norms_that_need_no_statistics_of_others() -> None:
    buffers = (Fixed(real(4)), Fixed(real(4, seed=1).abs()))
    args = (real(4, 4, 8), real(4), real(4))
    evaluated = check_op(aten.batch_norm.default, *args, *buffers, False, 0.1, 1e-5, False)
    assert "S2 Rg Rg R R > S2" in evaluated
    instances = check_op(aten.instance_norm.default, *args, None, None, True, 0.1, 1e-5, False)
    assert instances == ["S0 Rg Rg > S0", "S1 S0 S0 > S1"]
