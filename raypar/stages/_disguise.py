"""Lets tensors on the meta device pass for tensors on the CPU while a model is built."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from raypar.stages._recorder import CPU, META, Recorder


def _get(name: str) -> Any:
    return getattr(torch.Tensor, name).__get__


_ANSWERS: dict[Any, Any] = {
    _get("device"): CPU,
    _get("is_meta"): False,
    _get("is_cpu"): True,
    torch.Tensor.get_device: -1,
    torch.Tensor.is_pinned: False,
    torch.Tensor.is_shared: False,
}
_OF_VALUES = frozenset({torch.Tensor.tolist, torch.Tensor.__format__})
_OF_MEMORY = {
    getattr(torch.Tensor, name): name
    for name in "numpy __array__ data_ptr __reduce_ex__ __dlpack__ storage untyped_storage "
    "share_memory_ pin_memory cuda apply_ map_ map2_".split()
}


class Disguise(TorchFunctionMode):
    """Lets the recorder's meta tensors answer questions about their device as eager ones do."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None and torch.device(kwargs["device"]) == META:
            raise self._recorder.refuse("a tensor is made on the meta device")
        first = args[0] if args else None
        if not isinstance(first, torch.Tensor) or not first.is_meta:
            return func(*args, **kwargs)
        if func in _ANSWERS:
            return _ANSWERS[func]
        if func in _OF_VALUES:
            return func(self._recorder.real(first), *args[1:], **kwargs)
        if func in _OF_MEMORY:
            raise self._recorder.refuse(
                f"Tensor.{_OF_MEMORY[func]} was called while the model was built"
            )
        if func is torch.Tensor.cpu:
            return first
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return torch.empty(0, dtype=first.dtype).type()
        if func is torch.Tensor.to:
            return self._to(first, args[1:], kwargs)
        return func(*args, **kwargs)

    def _to(self, tensor: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`Tensor.to` without its device: the tensor is where it has to be."""
        given = [*args, kwargs.pop("other", None), kwargs.pop("device", None)]
        dtype = kwargs.pop("dtype", None)
        flags: list[bool] = []
        for item in given:
            if isinstance(item, torch.Tensor):
                dtype = item.dtype
                item = CPU if item.is_meta else item.device
            if isinstance(item, torch.dtype):
                dtype = item
            elif isinstance(item, bool):
                flags.append(item)
            elif item is not None and torch.device(item).type != "cpu":
                raise self._recorder.refuse(f"a tensor was moved to {item}")
        return tensor.to(tensor.dtype if dtype is None else dtype, *flags, **kwargs)
