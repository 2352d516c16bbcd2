"""Computes values of a tape, keeping no more of them in memory than it must."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from raypar.compat import OpOverload, pytree
from raypar.sharding.spec import Ranges
from raypar.stages._tape import (
    Call,
    Draw,
    NotDeferrable,
    Outside,
    Region,
    StreamNumber,
    Tape,
    work_for,
)

_CHUNK = 1 << 14


@dataclass(frozen=True, eq=False)
class Take:
    """A part of a tensor that is wanted.

    Attributes:
        region: The tensor.
        deliver: Called with the part, which shares no memory with anything else.
        ranges: For every dim the ranges that make up the part; None for all of it.
    """

    region: Region
    deliver: Callable[[torch.Tensor], None]
    ranges: tuple[Ranges, ...] | None = None


class Replay:
    """Runs the calls that some tensors need.

    Random calls run in their order, or just draw what they would have drawn. Any other call runs
    as soon as the random calls before it allow (it may finish a value, which is then cut and
    freed), or, where it waits for none, as late as it can.

    Args:
        tape: The calls.
        takes: What is wanted of their results.
        random: Whether random calls may run.
    """

    def __init__(self, tape: Tape, takes: Sequence[Take], random: bool = True) -> None:
        self._tape = tape
        self._takes: dict[int, list[Take]] = {}
        for take in takes:
            self._takes.setdefault(take.region.value, []).append(take)
        self._work = work_for(tape, frozenset(self._takes), foreign=random)
        drawing = [n for n in self._work.needed if tape.calls[n].draw is not None]
        if drawing and not random:
            raise NotDeferrable("random values were looked at while the model was built")
        self._left: dict[int, int] = {}
        for number in self._work.needed:
            for value in tape.calls[number].touches:
                self._left[value] = self._left.get(value, 0) + 1
        self._done: set[int] = set()
        self._storages = _Storages(tape)
        self._generators = [torch.default_generator]
        for start in tape.starts[1:]:
            self._generators.append(torch.Generator())
            self._generators[-1].set_state(start)
        self._states: dict[int, torch.Tensor] = {}
        self._expected: dict[int, torch.Tensor] = {}

    def run(self) -> dict[int, torch.Tensor]:
        """Delivers everything; returns the end states of all streams.

        Raises:
            NotDeferrable: A call did something else than when it was recorded.
        """
        work = self._work
        waves: dict[int, list[int]] = {}
        for number in sorted(work.needed):
            waves.setdefault(work.wave[number], []).append(number)
        with torch.no_grad():
            for number in sorted(work.drawn | (waves.keys() - {-1})):
                self._draw(number)
                for later in waves.get(number, ()):
                    self._complete(later)
            for value in sorted(self._takes):
                for number in waves.get(-1, ()):
                    if value in self._tape.calls[number].touches:
                        self._complete(number)
                if not self._left.get(value):
                    self._finish(value)
        assert self._done == work.needed
        return {i: g.get_state() for i, g in enumerate(self._generators)}

    def _draw(self, number: int) -> None:
        """Runs or skips a random call, from the state that it had."""
        call = self._tape.calls[number]
        draw = call.draw
        assert draw is not None
        generator = self._generators[draw.stream]
        expected = self._expected.get(draw.stream)
        if expected is not None and not torch.equal(expected, generator.get_state()):
            raise NotDeferrable("an operator draws random numbers without saying so")
        if draw.reset is not None:
            state = draw.reset
            generator.set_state(self._states[state] if isinstance(state, int) else state)
        if number in self._work.needed:
            self._complete(number)
        else:
            self._skip(call, draw)
        self._expected[draw.stream] = generator.get_state()
        if number in self._work.kept:
            self._states[number] = self._expected[draw.stream]

    def _skip(self, call: Call, draw: Draw) -> None:
        """Draws the numbers of a call whose result nobody needs."""
        region: Region = call.args[0]
        rest = tuple(call.args[1:])
        kwargs = {**call.kwargs, "generator": self._generators[draw.stream]}
        settings = tuple(sorted((k, v) for k, v in kwargs.items() if k != "generator"))
        count = region.numel
        if (
            isinstance(call.func, OpOverload)
            and count >= 2 * _CHUNK
            and region.dense
            and _draws_in_chunks(call.func, region.dtype, rest, settings)
        ):
            _fill_chunks(call.func, self._storages.chunk(region.dtype), count, rest, kwargs)
        else:
            call.func(_like(region), *rest, **kwargs)

    def _complete(self, number: int) -> None:
        """Runs a call after all that have to run before it."""
        stack = [number]
        while stack:
            top = stack[-1]
            if top in self._done:
                stack.pop()
                continue
            waiting = [n for n in self._work.after[top] if n not in self._done]
            if waiting:
                stack += reversed(waiting)
            else:
                self._execute(self._tape.calls[top])
                self._done.add(top)
                stack.pop()

    def _execute(self, call: Call) -> None:
        args, kwargs = pytree.tree_map_only(
            (Region, Outside, StreamNumber), self._resolve, (call.args, call.kwargs)
        )
        result = call.func(*args, **kwargs)
        if call.outputs:
            tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
            for position, region in call.outputs:
                if not region.same_form(tensors[position]):
                    raise NotDeferrable(f"{call.func} laid its result out in another way")
                self._storages.add(region.value, tensors[position].untyped_storage())
        del args, kwargs, result
        for value in call.touches:
            self._left[value] -= 1
            if not self._left[value]:
                self._finish(value)

    def _resolve(self, item: Region | Outside | StreamNumber) -> Any:
        if isinstance(item, StreamNumber):
            return self._generators[item.number]
        if isinstance(item, Outside):
            return item.tensor
        return item.on(self._storages.of(item.value, self._whole_take(item.value) is not None))

    def _whole_take(self, value: int) -> Take | None:
        """The only taker of the value, where it takes the whole storage."""
        takes = self._takes.get(value, [])
        if len(takes) != 1 or takes[0].ranges is not None:
            return None
        return takes[0] if takes[0].region.covers(self._tape.nbytes[value]) else None

    def _finish(self, value: int) -> None:
        """Cuts what is wanted of a value and frees it."""
        takes = self._takes.get(value, [])
        if takes:
            whole = self._whole_take(value)
            storage = self._storages.of(value, whole is not None)
            for take in takes:
                tensor = take.region.on(storage)
                take.deliver(tensor if take is whole else cut(tensor, take.ranges))
                del tensor
            self._takes[value] = []
        self._storages.drop(value, give_away=bool(takes) and whole is not None)


class _Storages:
    """The memory of values; the largest piece that is free is used again."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._held: dict[int, torch.UntypedStorage] = {}
        self._own: set[int] = set()
        self._spare: torch.UntypedStorage | None = None
        self._chunks: dict[torch.dtype, torch.Tensor] = {}

    def add(self, value: int, storage: torch.UntypedStorage) -> None:
        """A value that an operator made."""
        self._held[value] = storage

    def of(self, value: int, exact: bool) -> torch.UntypedStorage:
        """The value's storage, made at its first use; `exact` for one of just its size."""
        if value not in self._held:
            self._held[value] = self._make(value, exact)
            self._own.add(value)
        return self._held[value]

    def drop(self, value: int, give_away: bool) -> None:
        """Frees a value, or leaves its memory to who has it now."""
        storage = self._held.pop(value, None)
        if storage is None or value not in self._own or give_away:
            return
        if self._spare is None or self._spare.nbytes() < storage.nbytes():
            self._spare = storage

    def chunk(self, dtype: torch.dtype) -> torch.Tensor:
        """A little memory to draw into."""
        if dtype not in self._chunks:
            self._chunks[dtype] = torch.empty(2 * _CHUNK, dtype=dtype)
        return self._chunks[dtype]

    def _make(self, value: int, exact: bool) -> torch.UntypedStorage:
        nbytes = self._tape.nbytes[value]
        first = self._tape.contents.get(value)
        if first is not None:
            return first.untyped_storage().clone()
        spare = self._spare
        if not exact and spare is not None and spare.nbytes() >= nbytes:
            self._spare = None
            storage = spare
        else:
            if not exact:
                self._spare = spare = None  # before a larger one is made
            storage = torch.UntypedStorage(nbytes)
        if value in self._tape.partly:
            torch.empty(0, dtype=torch.uint8).set_(storage, 0, (nbytes,), (1,)).zero_()  # type: ignore[call-overload]
        return storage


def cut(tensor: torch.Tensor, ranges: tuple[Ranges, ...] | None) -> torch.Tensor:
    """A copy of the part of `tensor` that `ranges` name, or of all of it."""
    if ranges is None:
        return tensor.detach().clone()
    for dim, parts in enumerate(ranges):
        if len(parts) == 1:
            tensor = tensor.narrow(dim, parts[0][0], parts[0][1] - parts[0][0])
    for dim, parts in enumerate(ranges):
        if len(parts) != 1:
            tensor = torch.cat([tensor.narrow(dim, a, b - a) for a, b in parts], dim)
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _like(region: Region) -> torch.Tensor:
    extent = 1 + sum((n - 1) * s for n, s in zip(region.size, region.stride, strict=True))
    flat = torch.empty(extent if region.numel else 0, dtype=region.dtype)
    return flat.as_strided(region.size, region.stride)


def _fill_chunks(
    func: OpOverload, room: torch.Tensor, count: int, rest: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Draws `count` numbers; the last chunk is the one of odd size, and not a small one.

    Normal numbers are drawn in blocks of 16, and a rest shorter than a block is drawn anew with
    the last whole one (`normal_fill` in ATen), so sizes have to agree modulo 16.
    """
    while count >= 2 * _CHUNK:
        func(room[:_CHUNK], *rest, **kwargs)
        count -= _CHUNK
    func(room[:count], *rest, **kwargs)


@lru_cache(maxsize=256)
def _draws_in_chunks(
    func: OpOverload,
    dtype: torch.dtype,
    rest: tuple[Any, ...],
    settings: tuple[tuple[str, Any], ...],
) -> bool:
    """Whether drawing in chunks brings the generator to the same state as drawing at once.

    Tried out, once for every kind of draw, as no torch release promises it.
    """
    for odd in (0, 5):
        count = 3 * _CHUNK + odd
        ends = []
        for chunked in (False, True):
            generator = torch.Generator().manual_seed(7)
            kwargs = {**dict(settings), "generator": generator}
            if chunked:
                _fill_chunks(func, torch.empty(2 * _CHUNK, dtype=dtype), count, rest, kwargs)
            else:
                func(torch.empty(count, dtype=dtype), *rest, **kwargs)
            ends.append(generator.get_state())
        if not torch.equal(*ends):
            return False
    return True
