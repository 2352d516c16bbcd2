"""Follows random generators while the calls that draw from them are put off."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from raypar.stages._tape import Draw, NotDeferrable, Tape

_SEED_OF_MARKS = 0x5EED0FA11
_SEED_BYTES = 8
"""A generator's state begins with the seed it was given."""


@dataclass
class _Stream:
    generator: torch.Generator
    last: bytes
    known: dict[bytes, int | torch.Tensor]
    last_call: int | None = None


class Streams:
    """The generators that a recorded construction draws from.

    While recording nothing is drawn, so after every recorded random call the generator gets a
    state of its own, which stands for the state that it would have. A state that is not the last
    one was set by the user: one seen before was saved and brought back, any other is a new seed.

    Args:
        tape: Where the first states are noted.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._streams: list[_Stream] = []
        self._marks = torch.Generator().manual_seed(_SEED_OF_MARKS)
        self._add(torch.default_generator)

    def draw(self, generator: torch.Generator | None, call: int, fill: bool) -> Draw:
        """Notes a random call; `fill` as in `Draw`."""
        number = self._number(generator or torch.default_generator)
        stream = self._streams[number]
        state = stream.generator.get_state()
        digest = _digest(state)
        reset: torch.Tensor | int | None = None
        if digest != stream.last:
            reset = stream.known.get(digest, state)
            stream.known.setdefault(digest, state)
        stream.generator.set_state(self._next_mark(state))
        stream.last = _digest(stream.generator.get_state())
        stream.known[stream.last] = call
        stream.last_call = call
        return Draw(number, reset, fill)

    def finish(self, ends: dict[int, torch.Tensor]) -> None:
        """Leaves foreign generators in the states that the calls brought them to.

        Args:
            ends: Stream → state after its last call.

        Raises:
            NotDeferrable: A generator was set back after its last call.
        """
        for number, stream in enumerate(self._streams):
            digest = _digest(stream.generator.get_state())
            if number == 0 or stream.last_call is None:
                continue
            if digest == stream.last:
                stream.generator.set_state(ends[number])
            elif isinstance(stream.known.get(digest), int):
                raise NotDeferrable("a generator was set back after it was used")

    def rewind(self) -> None:
        """Brings all generators back to where they were first seen."""
        for stream, start in zip(self._streams, self._tape.starts, strict=True):
            stream.generator.set_state(start)

    def _next_mark(self, state: torch.Tensor) -> torch.Tensor:
        """A state that no generator has had, but for the seed that it tells when asked."""
        torch.empty(1).uniform_(generator=self._marks)
        mark = self._marks.get_state()
        mark[:_SEED_BYTES] = state[:_SEED_BYTES]
        return mark

    def _number(self, generator: torch.Generator) -> int:
        for number, stream in enumerate(self._streams):
            if stream.generator is generator:
                return number
        self._add(generator)
        return len(self._streams) - 1

    def _add(self, generator: torch.Generator) -> None:
        start = generator.get_state()
        digest = _digest(start)
        self._tape.starts.append(start)
        self._streams.append(_Stream(generator, digest, {digest: start}))


def _digest(state: torch.Tensor) -> bytes:
    return hashlib.blake2b(state.numpy().tobytes(), digest_size=16).digest()
