"""Where in a module a tensor outside parameters and buffers lives.

A rank builds the model itself, from its own seed, so a constant tensor that the model made has to
come from the rank's model, not from the one that was captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

Path = tuple[str, str, tuple[Any, ...]]
"""(module path, attribute, keys into nested containers)."""

_DEPTH = 3


def find_tensor(model: nn.Module, tensor: torch.Tensor) -> Path | None:
    """The place of a tensor attribute, also inside lists, tuples and dicts; None if not found."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            for keys, leaf in _leaves(value, ()):
                if leaf is tensor or _same(leaf, tensor):
                    return name, attribute, keys
    return None


def fetch_tensor(model: nn.Module, path: Path) -> torch.Tensor:
    """The tensor at a place that `find_tensor` found."""
    name, attribute, keys = path
    value = getattr(model.get_submodule(name), attribute)
    for key in keys:
        value = value[key]
    assert isinstance(value, torch.Tensor)
    return value.detach()


def _leaves(value: Any, keys: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield keys, value
    elif len(keys) < _DEPTH and isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _leaves(item, (*keys, i))
    elif len(keys) < _DEPTH and isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*keys, key))


def _same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (
        not mine.is_meta
        and not theirs.is_meta
        and mine.numel() > 0
        and mine.data_ptr() == theirs.data_ptr()
        and mine.shape == theirs.shape
        and mine.stride() == theirs.stride()
        and mine.dtype == theirs.dtype
    )
