"""A mesh whose ranks are threads of this process, and values laid out over it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from raypar.errors import CommError, PlanError
from raypar.sharding.collectives import join, part_of, set_context
from raypar.sharding.convert import (
    ALL_GATHER,
    ALL_MAX,
    ALL_REDUCE,
    ALL_TO_ALL,
    REDUCE_SCATTER,
)
from raypar.sharding.spec import P, ShardingSpec, State, is_shard

Result = TypeVar("Result")
_DEADLINE_S = 60.0


class ThreadMesh:
    """Runs one function on every rank of a mesh, a thread each, with working collectives.

    Every rank must make the same collective calls in the same order, as the ranks of a sharded
    program do.
    """

    def __init__(self, axes: Sequence[tuple[str, int]]) -> None:
        """A mesh with these axes: (name, size), leftmost first."""
        self.names = [name for name, _ in axes]
        self.sizes = tuple(size for _, size in axes)
        self.size = math.prod(self.sizes)
        self.slots: list[torch.Tensor | None] = [None] * self.size
        self.barrier = threading.Barrier(self.size, timeout=_DEADLINE_S)

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """Where a rank is on every axis; the rightmost axis counts fastest."""
        found = []
        for size in reversed(self.sizes):
            found.append(rank % size)
            rank //= size
        return tuple(reversed(found))

    def line(self, rank: int, axis: int) -> list[int]:
        """The ranks that differ from `rank` in nothing but their coordinate on `axis`."""
        stride = math.prod(self.sizes[axis + 1 :])
        first = rank - self.coordinates(rank)[axis] * stride
        return [first + i * stride for i in range(self.sizes[axis])]

    def run(self, work: Callable[[int], Result]) -> list[Result]:
        """``work(rank)`` of every rank, each on a thread of its own.

        Raises:
            Exception: What the first failing rank raised.
        """
        results: dict[int, Result] = {}
        errors: dict[int, BaseException] = {}

        def body(rank: int) -> None:
            set_context(_RankContext(self, rank))
            try:
                results[rank] = work(rank)
            except BaseException as error:
                errors[rank] = error
                self.barrier.abort()
            finally:
                set_context(None)

        threads = [threading.Thread(target=body, args=(r,), daemon=True) for r in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            # The ranks that were only woken by another's failure are not the cause.
            causes = [e for e in errors.values() if not isinstance(e, threading.BrokenBarrierError)]
            raise (causes or list(errors.values()))[0]
        return [results[rank] for rank in range(self.size)]

    def run_alone(self, work: Callable[[int], Result]) -> list[Result]:
        """``work(rank)`` of one rank after the other on this thread: no collective may be met."""
        found = []
        try:
            for rank in range(self.size):
                set_context(_RankContext(self, rank))
                found.append(work(rank))
        finally:
            set_context(None)
        return found


class _RankContext:
    """The `MeshContext` of one rank."""

    def __init__(self, mesh: ThreadMesh, rank: int) -> None:
        self.mesh = mesh
        self.rank = rank

    def coordinate(self, axis: str) -> int:
        return self.mesh.coordinates(self.rank)[self.mesh.names.index(axis)]

    def collective(
        self, kind: str, x: torch.Tensor, cut: State, to: State, axis: str
    ) -> torch.Tensor:
        mesh = self.mesh
        at = mesh.names.index(axis)
        mesh.slots[self.rank] = x.detach().contiguous()
        mesh.barrier.wait()
        values = [mesh.slots[r] for r in mesh.line(self.rank, at)]
        result = _combine(
            kind, [v for v in values if v is not None], cut, to, self.coordinate(axis)
        )
        mesh.barrier.wait()  # nobody fills its slot again before all have read
        return result


def _combine(
    kind: str, values: list[torch.Tensor], cut: State, to: State, index: int
) -> torch.Tensor:
    size = len(values)
    if kind == ALL_GATHER:
        return join(values, cut)
    if kind == ALL_TO_ALL:
        return part_of(join(values, cut), to, index, size).contiguous()
    stacked = torch.stack(values)
    if kind == ALL_MAX:
        return stacked.amax(0)
    total = stacked.sum(0, dtype=values[0].dtype)
    if kind == ALL_REDUCE:
        return total
    if kind == REDUCE_SCATTER:
        return part_of(total, cut, index, size).contiguous()
    raise CommError(f"{kind!r} is no collective")


def distribute(
    value: torch.Tensor, spec: ShardingSpec, mesh: ThreadMesh, generator: torch.Generator
) -> list[torch.Tensor]:
    """What every rank holds of a value: parts, copies, or random terms that sum to it.

    Raises:
        PlanError: A bool value is to be a sum.
    """
    held = [value]
    for state, size in zip(spec, mesh.sizes, strict=True):
        held = [piece for v in held for piece in _divide(v, state, size, generator)]
    return [v.clone(memory_format=torch.contiguous_format) for v in held]


def collect(parts: Sequence[torch.Tensor], spec: ShardingSpec, mesh: ThreadMesh) -> torch.Tensor:
    """The value whose parts the ranks hold; the inverse of `distribute`.

    Raises:
        PlanError: Ranks that should hold copies hold different values.
    """
    held = list(parts)
    for state, size in reversed(list(zip(spec, mesh.sizes, strict=True))):
        held = [_unite(held[i : i + size], state) for i in range(0, len(held), size)]
    return held[0]


def _divide(
    value: torch.Tensor, state: State, size: int, generator: torch.Generator
) -> list[torch.Tensor]:
    if is_shard(state):
        return [part_of(value, state, i, size) for i in range(size)]
    if state != P:
        return [value] * size
    if value.dtype == torch.bool:
        raise PlanError("a bool value cannot be a partial sum")
    if value.is_floating_point() or value.is_complex():
        terms = [
            torch.randn(value.shape, generator=generator, dtype=value.dtype)
            for _ in range(size - 1)
        ]
    else:
        terms = [
            torch.randint(-3, 4, value.shape, generator=generator, dtype=value.dtype)
            for _ in range(size - 1)
        ]
    return [*terms, value - sum(terms)]


def _unite(values: list[torch.Tensor], state: State) -> torch.Tensor:
    if is_shard(state):
        return join(values, state)
    if state == P:
        if values[0].dtype == torch.bool:
            raise PlanError("a bool value cannot be a partial sum")
        return torch.stack(values).sum(0, dtype=values[0].dtype)
    for other in values[1:]:
        if values[0].is_floating_point() or values[0].is_complex():
            same = torch.allclose(values[0], other, rtol=1e-8, atol=1e-10, equal_nan=True)
        else:
            same = torch.equal(values[0], other)
        if not same:
            raise PlanError("ranks hold different values where each should hold the whole one")
    return values[0]
