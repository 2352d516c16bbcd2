"""What building a model computes, written down: the calls, and the values that they make.

A *value* is what one storage holds from the moment it is filled to the moment it is filled again;
a call that overwrites a whole storage starts a new value. So the default weights of a layer that
are drawn anew later belong to a value that nobody reads, and nobody has to keep.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


class NotDeferrable(Exception):
    """The model cannot be built piece by piece; the message says why."""


@dataclass(frozen=True)
class Region:
    """A tensor as a place in a value: how to see the storage as this tensor."""

    value: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor, value: int) -> Region:
        """The place of `tensor`, whose storage holds `value`."""
        size, stride = tuple(tensor.size()), tuple(tensor.stride())
        return cls(value, size, stride, int(tensor.storage_offset()), tensor.dtype)

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for n in self.size:
            count *= n
        return count

    @property
    def dense(self) -> bool:
        """Whether its elements fill a stretch of memory without gaps or overlaps."""
        expected = 1
        for stride, n in sorted(zip(self.stride, self.size, strict=True)):
            if n != 1:
                if stride != expected:
                    return False
                expected *= n
        return True

    def covers(self, nbytes: int) -> bool:
        """Whether it is all of a storage of `nbytes`."""
        return self.offset == 0 and self.dense and self.numel * self.dtype.itemsize == nbytes

    def on(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The tensor, on a storage that holds the value."""
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(storage, self.offset, self.size, self.stride)  # type: ignore[call-overload, no-any-return]

    def same_form(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` lies in its storage as this one does."""
        return Region.of(tensor, self.value) == self


@dataclass(frozen=True, eq=False)
class Outside:
    """A real tensor that a call reads; large ones are not copied but checked for changes."""

    tensor: torch.Tensor
    fingerprint: int | None

    _COPIED = 1 << 16

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Outside:
        """Remembers what `tensor` holds now."""
        tensor = tensor.detach()
        if tensor.nbytes <= cls._COPIED:
            return cls(tensor.clone(), None)
        return cls(tensor, _fingerprint(tensor))

    @property
    def changed(self) -> bool:
        """Whether the tensor was written to since."""
        return self.fingerprint is not None and _fingerprint(self.tensor) != self.fingerprint


def _fingerprint(tensor: torch.Tensor) -> int:
    bits: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return zlib.crc32(bits)


@dataclass(frozen=True)
class Draw:
    """What a random call needs to draw what it would have drawn.

    Attributes:
        stream: Number of the generator.
        reset: State that the generator was set to since the call before on this stream: the state
            itself, or the number of the call whose end state came back; None if it just went on.
        fill: It fills its first argument without reading any tensor, so that drawing the same
            amount of numbers elsewhere takes its place.
    """

    stream: int
    reset: torch.Tensor | int | None
    fill: bool


@dataclass(frozen=True, eq=False)
class Call:
    """One operator call.

    Attributes:
        func: The operator, or a function that fills its first argument with random numbers.
        args: Arguments, with `Region`, `Outside` and `StreamNumber` for tensors and generators.
        kwargs: Keyword arguments, likewise.
        reads: Values it reads.
        writes: Values of which it overwrites a part.
        makes: Values it makes whole.
        outputs: (position among the tensors it returns, region) of the values that are new
            tensors.
        draw: Its random numbers, if any.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: frozenset[int]
    writes: frozenset[int]
    makes: frozenset[int]
    outputs: tuple[tuple[int, Region], ...]
    draw: Draw | None = None

    @property
    def touches(self) -> frozenset[int]:
        """All values it has to do with."""
        return self.reads | self.writes | self.makes


@dataclass(frozen=True)
class StreamNumber:
    """Stands for a generator in recorded arguments."""

    number: int


@dataclass
class Tape:
    """All calls in order.

    Attributes:
        calls: The calls.
        nbytes: Size of every value's storage.
        contents: What a value that no call makes holds at first.
        partly: Values of uninitialised memory that no call fills whole. They start as zeros, so
            that all replicas of a parameter that nobody initialises agree.
        outside: The real tensors that calls read.
        starts: First state of every stream; stream 0 is the default generator.
    """

    calls: list[Call] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    contents: dict[int, torch.Tensor] = field(default_factory=dict)
    partly: set[int] = field(default_factory=set)
    outside: list[Outside] = field(default_factory=list)
    starts: list[torch.Tensor] = field(default_factory=list)

    def new_value(self, nbytes: int) -> int:
        """Number of a new value."""
        self.nbytes.append(nbytes)
        return len(self.nbytes) - 1


@dataclass(frozen=True)
class Work:
    """The calls of a tape that some values need.

    Attributes:
        needed: Numbers of the calls to run.
        drawn: Numbers of the random calls not to run whose numbers have to be drawn all the same.
        kept: Random calls whose end state a later one comes back to.
        after: Call → calls that have to run before it.
        wave: Call → the last random call that it waits for, or -1.
    """

    needed: frozenset[int]
    drawn: frozenset[int]
    kept: frozenset[int]
    after: Mapping[int, tuple[int, ...]]
    wave: Mapping[int, int]


def work_for(tape: Tape, values: frozenset[int], foreign: bool) -> Work:
    """Finds the calls that `values` need.

    Args:
        tape: The calls.
        values: What is wanted.
        foreign: Draw all numbers of all streams but that of the default generator, so that their
            generators end where an eager run leaves them.
    """
    live = set(values)
    needed: set[int] = set()
    drawn: set[int] = set()
    kept: set[int] = set()
    running = set(range(1, len(tape.starts))) if foreign else set()
    for number in range(len(tape.calls) - 1, -1, -1):
        call = tape.calls[number]
        draw = call.draw
        run = not live.isdisjoint(call.writes | call.makes)
        if draw is not None:
            if number in kept:
                running.add(draw.stream)
            if draw.stream in running and not run:
                run = not draw.fill
                if draw.fill:
                    drawn.add(number)
            if run or number in drawn:
                running.add(draw.stream)
                if draw.reset is not None:
                    running.discard(draw.stream)
                    if isinstance(draw.reset, int):
                        kept.add(draw.reset)
        if run:
            needed.add(number)
            live -= call.makes
            live |= call.reads | call.writes
    after, wave = _order(tape, needed)
    return Work(frozenset(needed), frozenset(drawn), frozenset(kept), after, wave)


def _order(tape: Tape, needed: set[int]) -> tuple[dict[int, tuple[int, ...]], dict[int, int]]:
    writer: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    after: dict[int, tuple[int, ...]] = {}
    wave: dict[int, int] = {}
    for number in sorted(needed):
        call = tape.calls[number]
        before = {writer[v] for v in call.reads | call.writes if v in writer}
        for value in call.writes:
            before.update(readers.get(value, ()))
        for value in call.writes | call.makes:
            writer[value] = number
            readers[value] = []
        for value in call.reads - call.writes:
            readers.setdefault(value, []).append(number)
        after[number] = tuple(sorted(before))
        own = number if call.draw is not None else -1
        wave[number] = max([own, *(wave[b] for b in before)])
    return after, wave
