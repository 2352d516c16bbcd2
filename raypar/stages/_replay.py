"""Computes values of a tape, keeping no more of them in memory than it must."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from raypar.compat import OpOverload, pytree
from raypar.stages._memory import CHUNK, Storages, Take, cut
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
        self._storages = Storages(tape)
        self._generators = [torch.default_generator]
        for start in tape.starts[1:]:
            self._generators.append(torch.Generator())
            self._generators[-1].set_state(start)
        self._random = random
        self._states: dict[int, torch.Tensor] = {}
        self._expected: dict[int, torch.Tensor] = {}

    def run(self) -> dict[int, torch.Tensor]:
        """Delivers everything; returns the end states of all streams.

        Raises:
            NotDeferrable: A call did something else than when it was recorded.
        """
        work = self._work
        if self._random:
            torch.default_generator.set_state(self._tape.starts[0])
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
            and count >= 2 * CHUNK
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
                take.deliver(tensor if take is whole else cut(tensor, take.ranges, take.room))
                del tensor
            self._takes[value] = []
        self._storages.drop(value, give_away=bool(takes) and whole is not None)


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
    while count >= 2 * CHUNK:
        func(room[:CHUNK], *rest, **kwargs)
        count -= CHUNK
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
        count = 3 * CHUNK + odd
        ends = []
        for chunked in (False, True):
            generator = torch.Generator().manual_seed(7)
            kwargs = {**dict(settings), "generator": generator}
            if chunked:
                _fill_chunks(func, torch.empty(2 * CHUNK, dtype=dtype), count, rest, kwargs)
            else:
                func(torch.empty(count, dtype=dtype), *rest, **kwargs)
            ends.append(generator.get_state())
        if not torch.equal(*ends):
            return False
    return True
