"""Fake results of calls, remembered: lowering asks for the same few calls again and again.

A fake call takes most of a millisecond, whatever it calls. What it gives depends on the op, on its
other arguments, and on how its tensors lie; results that are views share the storage of the tensor
that they are views of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from raypar.compat import FakeTensor, OpOverload, fake_around, is_mutable, pytree, storage_id
from raypar.graph.passes.emit import Emitter, aten, autocast_of, fake_call, value_of

_MOST = 50_000
_PLAIN = frozenset(
    {
        aten.slice.Tensor,
        aten.cat.default,
        aten.reshape.default,
        aten.new_full.default,
        aten.constant_pad_nd.default,
    }
)
"""Calls whose results lie the same wherever their tensors are."""


class _Lie(NamedTuple):
    """How a result lies, and which of the tensors it was made of lends it its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    lender: int


_known: dict[object, _Lie | None] = {}


class RememberingEmitter(Emitter):
    """Writes nodes as `Emitter` does; equal calls are run on fake tensors once."""

    def __call__(self, target: Any, *args: Any, like: Any = None, **kwargs: Any) -> fx.Node:
        """Adds one call. See `Emitter`."""
        if like is None:
            like = remembered_call(target, args, kwargs, self.anchor, self.graph)
        return super().__call__(target, *args, like=like, **kwargs)


def remembered_call(
    target: Any, args: Any, kwargs: Any, place: fx.Node, graph: fx.Graph | None = None
) -> Any:
    """`raypar.graph.passes.emit.fake_call`; equal calls are run on fake tensors once.

    Args:
        target: What is called.
        args: Its arguments; nodes stand for their fake values.
        kwargs: Those by name.
        place: Calls are made in this node's autocast region.
        graph: Where no argument is fake, it tells what fake is.
    """
    tensors: list[FakeTensor] = []
    key = None
    if isinstance(target, OpOverload) and not is_mutable(target):
        key = _key_of(target, (args, kwargs), tensors, place.meta.get("autocast"))
    lie = _known.get(key) if tensors else None
    if key is not None and lie is not None:
        return _fake(lie, tensors)
    plain = target in _PLAIN and not kwargs and place.meta.get("autocast") is None
    if key is not None and plain and tensors:
        value = _on_meta(target, args, tensors)
    else:
        with autocast_of(place):
            value = fake_call(target, args, kwargs, graph)
    if key is not None and tensors and key not in _known:
        if len(_known) >= _MOST:
            _known.clear()
        _known[key] = _lie_of(value, tensors)
    return value


def _on_meta(target: Any, args: Any, tensors: Sequence[FakeTensor]) -> FakeTensor:
    """A call on meta tensors that lie as the fake ones do: the same result, many times faster."""

    def meta_of(value: Any) -> Any:
        value = value_of(value)
        return _meta(value) if isinstance(value, FakeTensor) else value

    with torch.no_grad():
        made = target(*pytree.tree_map(meta_of, args))
    return fake_around(tensors[0].fake_mode, made, tensors[0].device)


def _meta(value: FakeTensor) -> torch.Tensor:
    meta = torch.empty(0, dtype=value.dtype, device="meta")
    storage, offset = value.untyped_storage(), value.storage_offset()
    return meta.set_(storage, offset, tuple(value.shape), value.stride())


def fake_like(value: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A new tensor of `shape`, fake where `value` is: what its ``new_empty`` gives."""
    if not isinstance(value, FakeTensor) or any(type(n) is not int for n in shape):
        return value.new_empty(tuple(shape))
    meta = torch.empty(tuple(shape), dtype=value.dtype, device="meta")
    return fake_around(value.fake_mode, meta, value.device)


def _key_of(
    target: OpOverload, arguments: Any, tensors: list[FakeTensor], region: object
) -> object:
    """What the call depends on, and its tensors; None where one of them is unusual."""
    try:
        return target, _plain(arguments, tensors), torch.get_default_dtype(), region
    except _UnusualError:
        return None


class _UnusualError(Exception):
    """An argument that no key can stand for."""


def _plain(value: Any, tensors: list[FakeTensor]) -> Any:
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, FakeTensor):
        if any(type(n) is not int for n in value.shape) or value.requires_grad:
            raise _UnusualError
        place = next((i for i, known in enumerate(tensors) if known is value), len(tensors))
        if place == len(tensors):
            tensors.append(value)
        lie = (tuple(value.shape), value.stride(), value.storage_offset())
        return place, lie, value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(_plain(item, tensors) for item in value)
    if isinstance(value, dict):
        return tuple((key, _plain(item, tensors)) for key, item in value.items())
    if value is None or isinstance(value, _SIMPLE):
        return type(value), value  # 1, 1.0 and True are equal keys
    raise _UnusualError


_SIMPLE = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


def _lie_of(value: Any, tensors: Sequence[FakeTensor]) -> _Lie | None:
    """How a result lies; None where it is no single tensor of fixed size."""
    if not isinstance(value, FakeTensor) or any(type(n) is not int for n in value.shape):
        return None
    storage = storage_id(value)
    lender = next((i for i, one in enumerate(tensors) if storage_id(one) == storage), -1)
    offset = int(value.storage_offset())
    lie = _Lie(tuple(value.shape), value.stride(), offset, value.dtype, value.device, lender)
    if lender < 0:
        size = torch.empty_strided(lie.shape, lie.stride, dtype=lie.dtype, device="meta")
        if offset or size.untyped_storage().nbytes() != value.untyped_storage().nbytes():
            return None
    return lie


def _fake(lie: _Lie, tensors: Sequence[FakeTensor]) -> FakeTensor:
    if lie.lender < 0:
        meta = torch.empty_strided(lie.shape, lie.stride, dtype=lie.dtype, device="meta")
    else:
        storage = tensors[lie.lender].untyped_storage()
        meta = torch.empty(0, dtype=lie.dtype, device="meta")
        meta.set_(storage, lie.offset, lie.shape, lie.stride)
    return fake_around(tensors[0].fake_mode, meta, lie.device)
