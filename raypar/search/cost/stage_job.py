"""A stage as plain data, to be profiled wherever a device of its kind is.

What runs it alone stands in for everything around it: random inputs that are valid wherever they
are used, and a mesh of which only this rank is there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import fx

from raypar.programs.wire import Wire, inputs_of, pack
from raypar.search.cost.base import StageCode
from raypar.sharding.collectives import join, part_of
from raypar.sharding.convert import ALL_GATHER, ALL_TO_ALL, REDUCE_SCATTER
from raypar.sharding.spec import State


@dataclass(frozen=True)
class StageJob:
    """A stage that can travel to another process; see `job_of`.

    Attributes:
        wire: Its local forward graph.
        bounds: For every input, integers of it are below this.
        recompute: As in `raypar.search.cost.base.StageCode`, as are all others.
        trainable: Parameters with a gradient.
        differentiable: Received values with a gradient.
        outputs_with_grad: Positions of outputs with one.
        changing: Buffers that forward replaces.
        axes: (name, size) of its mesh.
        halves: Whether the two halves of a backward pass are asked for besides the whole.
    """

    wire: Wire
    bounds: tuple[int, ...]
    recompute: str
    trainable: tuple[str, ...]
    differentiable: tuple[str, ...]
    outputs_with_grad: tuple[int, ...]
    changing: tuple[str, ...]
    axes: tuple[tuple[str, int], ...]
    halves: bool = True

    def inputs(self, device: torch.device) -> list[torch.Tensor]:
        """Values for all inputs, the same each time."""
        generator = torch.Generator().manual_seed(0)
        return [
            _random(key, shape, dtype, bound, generator).to(device)
            for (key, shape, dtype), bound in zip(inputs_of(self.wire), self.bounds, strict=True)
        ]


def job_of(stage: StageCode, wire: Wire | None = None, *, halves: bool = True) -> StageJob:
    """The job of profiling a stage.

    Args:
        stage: The stage.
        wire: Its graph as it is shipped, where that is known.
        halves: Whether the two halves of a backward pass are asked for besides the whole.
    """
    return StageJob(
        wire=pack(stage.graph) if wire is None else wire,
        bounds=tuple(_index_bound(node) for node in stage.graph.find_nodes(op="placeholder")),
        recompute=stage.recompute,
        trainable=tuple(stage.trainable),
        differentiable=tuple(stage.differentiable),
        outputs_with_grad=tuple(stage.outputs_with_grad),
        changing=tuple(stage.changing),
        axes=tuple(stage.axes),
        halves=halves,
    )


def _random(
    key: str, shape: tuple[int, ...], dtype: torch.dtype, bound: int, generator: torch.Generator
) -> torch.Tensor:
    """A value for one input: floats near zero, integers that are in range wherever they are used.

    Args:
        key: The input's id.
        shape: Its shape.
        dtype: Its dtype.
        bound: Integers are below this.
        generator: Where chance comes from.
    """
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    if not dtype.is_floating_point:
        return torch.randint(0, bound, shape, generator=generator, dtype=dtype)
    if key.startswith(("buffer:", "global:")):  # variances and counts are positive
        return torch.rand(shape, generator=generator).add_(0.5).to(dtype)
    return torch.randn(shape, generator=generator).mul_(0.05).to(dtype)


_LARGEST_INDEX = 1 << 15


def _index_bound(node: fx.Node) -> int:
    """Below this, an integer is a valid index wherever the graph uses it or what it becomes.

    Follows the value through integer ops to those that read float values beside it (tables,
    logits); the smallest dim of these is safe.
    """
    value = node.meta["val"]
    if value.dtype.is_floating_point or value.dtype == torch.bool:
        return 1
    bound = _LARGEST_INDEX
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        at = stack.pop()
        for user in at.users:
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            for other in user.all_input_nodes:
                value = other.meta.get("val")
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    bound = min([bound, *(int(n) for n in value.shape)])
            made = user.meta.get("val")
            if isinstance(made, torch.Tensor) and not made.is_floating_point():
                bound = min([bound, *(int(n) for n in made.shape if "one_hot" in str(user.target))])
                stack.append(user)
    return max(bound, 1)


class Clock:
    """Seconds of one device that nobody else is given.

    Args:
        device: A CPU core, or a GPU, whose queue is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None

    def __call__(self) -> float:
        """Now."""
        if self._gpu is None:
            return time.thread_time()
        torch.cuda.synchronize(self._gpu)
        return time.perf_counter()


class Alone:
    """A mesh of which only this rank is there: collectives give the right shapes, and are timed.

    Attributes:
        seconds: Time spent in collectives.
        sizes: Axis → ranks along it.
        clock: Tells the time.
    """

    def __init__(self, sizes: dict[str, int], clock: Clock) -> None:
        self.seconds = 0.0
        self.sizes = sizes
        self.clock = clock

    def coordinate(self, axis: str) -> int:
        """This rank is the first on every axis."""
        return 0

    def collective(
        self, kind: str, x: torch.Tensor, cut: State, to: State, axis: str
    ) -> torch.Tensor:
        """What the collective would give if all ranks held the same."""
        began = self.clock()
        size = self.sizes[axis]
        if kind == ALL_GATHER:
            result = join([x] * size, cut)
        elif kind == REDUCE_SCATTER:
            result = part_of(x, cut, 0, size).clone()
        elif kind == ALL_TO_ALL:
            result = join([part_of(x, to, 0, size)] * size, cut)
        else:
            result = x.clone()
        self.seconds += self.clock() - began
        return result
