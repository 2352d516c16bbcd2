"""What one model of the zoo is: a builder, a batch maker, a loss, and what is special about it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from raypar.errors import ConfigError, did_you_mean

Batch = Any
"""A tensor, a tuple of positional arguments, a dict of keyword arguments, or (tuple, dict)."""

LossFn = Callable[..., torch.Tensor]


class ModelFn(Protocol):
    """Builds a model; the seed is set only where one is given."""

    def __call__(self, *, seed: int | None = None, dtype: torch.dtype = ...) -> nn.Module: ...


MakeBatch = Callable[[torch.Generator, int], Batch]


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    Attributes:
        name: Its name in the registry.
        model_fn: Builds it, in float64 unless another dtype is given; a picklable top-level
            function that seeds nothing unless a seed is given.
        make_batch: Draws one global batch from a generator; use `batch` to call it by seed.
        loss_fn: Maps (output, target) to the loss, the target being the last positional argument
            of the batch, which the model then does not get; None where the model's output is the
            loss or has ``.loss``.
        batch_dims: Like the batch, with an int or None in place of every tensor; None where the
            default holds (dim 0 of every tensor whose dim 0 is the batch size).
        reduction: How the losses of equal parts of a batch make the loss of the whole: ``mean``,
            ``sum``, or ``count`` (a masked mean: the parts weigh as many items as they count).
        dropout: Random in training mode.
        data_dependent: Some shapes depend on the data.
        batchnorm: Holds batch statistics.
        feels_microbatches: The result depends on how a batch is cut, even without randomness
            (BatchNorm, expert capacity, in-batch negatives, auxiliary losses).
        hf: Needs the ``hf`` extra (transformers).
        fp32_ops: Computes some ops in float32 whatever the model's dtype.
    """

    name: str
    model_fn: ModelFn
    make_batch: MakeBatch
    loss_fn: LossFn | None = None
    batch_dims: Any = field(default=None, hash=False)
    reduction: str = "mean"
    dropout: bool = False
    data_dependent: bool = False
    batchnorm: bool = False
    feels_microbatches: bool = False
    hf: bool = False
    fp32_ops: bool = False

    def batch(self, seed: int = 0, global_batch: int = 8) -> Batch:
        """Draws one global batch; equal seeds give equal batches."""
        return self.make_batch(torch.Generator().manual_seed(seed), global_batch)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The eager loss of one batch: the reference that a plan has to meet."""
        args, kwargs = arguments(batch)
        if self.loss_fn is not None:
            *inputs, target = args
            return self.loss_fn(model(*inputs, **kwargs), target)
        output = model(*args, **kwargs)
        return output if isinstance(output, torch.Tensor) else output.loss

    def split(self, batch: Batch, parts: int) -> list[Batch]:
        """Cuts a batch into contiguous equal parts along its batch dims.

        Raises:
            ConfigError: The batch is not divisible by `parts`.
        """
        dims = self.batch_dims if self.batch_dims is not None else default_batch_dims(batch)
        return [_part(batch, dims, parts, index) for index in range(parts)]


def arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments that a batch stands for."""
    if isinstance(batch, dict):
        return (), batch
    if not isinstance(batch, tuple):
        return (batch,), {}
    if len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], dict):
        return batch[0], batch[1]
    return batch, {}


def tensors(batch: Batch) -> list[torch.Tensor]:
    """Every tensor of a batch, depth first, dicts in insertion order."""
    if isinstance(batch, torch.Tensor):
        return [batch]
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple) else ()
    return [tensor for item in items for tensor in tensors(item)]


def default_batch_dims(batch: Batch) -> Any:
    """Dim 0 of every tensor whose dim 0 is that of the first tensor; None for the others."""
    size = tensors(batch)[0].shape[0]

    def dims(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: dims(value) for key, value in item.items()}
        if isinstance(item, tuple):
            return tuple(dims(value) for value in item)
        batched = isinstance(item, torch.Tensor) and item.dim() > 0 and item.shape[0] == size
        return 0 if batched else None

    return dims(batch)


def _part(item: Any, dim: Any, parts: int, index: int) -> Any:
    if isinstance(item, dict):
        return {key: _part(value, dim[key], parts, index) for key, value in item.items()}
    if isinstance(item, tuple):
        return tuple(_part(value, d, parts, index) for value, d in zip(item, dim, strict=True))
    if dim is None:
        return item
    size = item.shape[dim]
    if size % parts:
        raise ConfigError(
            f"asked for {parts} equal parts of a batch of {size} samples; "
            f"take a number of parts that divides {size}, such as {_divisor(size, parts)}"
        )
    return item.narrow(dim, index * (size // parts), size // parts)


def _divisor(size: int, near: int) -> int:
    return max(d for d in range(1, min(near, size) + 1) if size % d == 0)


_CASES: dict[str, Case] = {}


def register(batch: MakeBatch, **traits: Any) -> Callable[[Callable[[], nn.Module]], ModelFn]:
    """Adds the decorated builder to the zoo, under the builder's own name.

    Args:
        batch: Draws one global batch from a generator.
        **traits: The other fields of `Case`.

    Returns:
        A decorator; what it leaves in the builder's place takes `seed` and `dtype`.
    """

    def decorate(build: Callable[[], nn.Module]) -> ModelFn:
        @functools.wraps(build)
        def model_fn(*, seed: int | None = None, dtype: torch.dtype = torch.float64) -> nn.Module:
            if seed is not None:
                torch.manual_seed(seed)
            return build().to(dtype)

        name = build.__name__
        if name in _CASES:
            raise ConfigError(f"the zoo has a model {name!r} already: rename one of the two")
        _CASES[name] = Case(name, model_fn, batch, **traits)
        return model_fn

    return decorate


def names(*, hf: bool | None = None) -> list[str]:
    """The names of all cases; `hf` keeps only those that need, or do not need, the extra."""
    return [name for name, case in _CASES.items() if hf is None or case.hf == hf]


def case(name: str) -> Case:
    """The case of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in _CASES:
        raise ConfigError(
            f"the zoo has no model {name!r}.{did_you_mean(name, _CASES)} It has: "
            + ", ".join(_CASES)
        )
    return _CASES[name]


def cases(*, hf: bool | None = None) -> list[Case]:
    """All cases, in the order of `names`."""
    return [_CASES[name] for name in names(hf=hf)]
