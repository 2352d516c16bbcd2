"""What a configuration names, as functions that can be sent to every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch

from raypar.compat import pytree
from raypar.errors import ConfigError
from raypar.train.data import batches
from raypar.train.data.batches import needs_batches
from raypar.train.data.convert import converted


@dataclass(frozen=True)
class BuildModel:
    """Builds the configured model in the configured precision; picklable by its target's name."""

    target: Callable[..., torch.nn.Module]
    kwargs: dict[str, Any]
    dtype: torch.dtype

    def __call__(self) -> torch.nn.Module:
        """The model.

        Raises:
            ConfigError: The target makes something else.
        """
        model = self.target(**self.kwargs)
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(
                f"model.target: {name_of(self.target)}(...) returned {type(model).__name__}, "
                "not a torch.nn.Module"
            )
        return model.to(self.dtype)


@dataclass(frozen=True)
class Cast:
    """Floating-point tensors of a batch in one dtype."""

    dtype: torch.dtype

    def __call__(self, batch: Any) -> Any:
        """The batch, cast."""

        def in_dtype(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                return leaf.to(self.dtype)
            return leaf

        return pytree.tree_map(in_dtype, batch)


@dataclass(frozen=True)
class BuildData:
    """Opens the configured data; floating-point tensors come in the configured precision.

    Attributes:
        target: Returns batches, or a data set of samples.
        kwargs: Its keyword arguments.
        dtype: Of floating-point tensors.
        section: The config's section that names the target.
        global_batch: Samples of a batch, where the target returns a data set.
        options: Keyword arguments of `raypar.batches` for a data set; None: the defaults.
    """

    target: Callable[..., Any]
    kwargs: dict[str, Any]
    dtype: torch.dtype
    section: str = "data"
    global_batch: int = 1
    options: dict[str, Any] | None = None

    def __call__(self) -> Iterable[Any]:
        """The batches.

        Raises:
            ConfigError: The target makes something else, or an option would be ignored.
        """
        return self._opened()

    def _opened(self, **at: Any) -> Iterable[Any]:
        made = self.target(**self.kwargs, **at)
        if needs_batches(made):
            made = batches(made, self.global_batch, **(self.options or {}))
            return cast(Iterable[Any], converted(made, self._cast))
        if self.options:
            raise ConfigError(
                f"{self.section}.{next(iter(self.options))} is given, but {self.section}.target "
                f"{name_of(self.target)} returned {type(made).__name__}, which makes its own "
                "batches, and would ignore it: return a data set of samples "
                "(torch.utils.data.Dataset, datasets.Dataset), or remove the key"
            )
        if not isinstance(made, Iterable):
            raise ConfigError(
                f"{self.section}.target: {name_of(self.target)}(...) returned "
                f"{type(made).__name__}, not an iterable of batches"
            )
        return cast(Iterable[Any], converted(made, self._cast))

    @property
    def _cast(self) -> Cast:
        return Cast(self.dtype)


@dataclass(frozen=True)
class BuildDataFrom(BuildData):
    """The same for a target that can begin anywhere: it takes ``start_sample``."""

    def __call__(self, start_sample: int = 0) -> Iterable[Any]:
        """The batches from a sample of a pass on; see `BuildData.__call__`."""
        return self._opened(start_sample=start_sample)


@dataclass(frozen=True)
class BuildOptimizer:
    """Builds the configured optimizer from parameters."""

    target: Callable[..., torch.optim.Optimizer]
    kwargs: dict[str, Any]
    groups: tuple[dict[str, Any], ...] = ()

    def __call__(
        self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """The optimizer of these parameters: each in the first group that its name matches."""
        named = list(named_parameters)
        if not self.groups:
            return self.target([p for _, p in named], **self.kwargs)
        members: list[list[torch.nn.Parameter]] = [[] for _ in range(len(self.groups) + 1)]
        for name, parameter in named:
            first = (i for i, g in enumerate(self.groups) if fnmatchcase(name, g["match"]))
            members[next(first, len(self.groups))].append(parameter)
        options = [{k: v for k, v in g.items() if k != "match"} for g in self.groups] + [{}]
        both = zip(members, options, strict=True)
        return self.target([{"params": m, **o} for m, o in both], **self.kwargs)


@dataclass(frozen=True)
class BuildScheduler:
    """Builds the configured learning-rate scheduler for an optimizer."""

    target: Callable[..., Any]
    kwargs: dict[str, Any]

    def __call__(self, optimizer: torch.optim.Optimizer) -> Any:
        """The scheduler of this optimizer."""
        return self.target(optimizer, **self.kwargs)


def name_of(target: Any) -> str:
    """What a target is called, for people."""
    target = getattr(target, "func", target)
    return str(getattr(target, "__qualname__", target))
