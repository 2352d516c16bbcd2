"""Inputs on their way to a GPU: through pinned memory, twice, so that the host never waits.

A copy from ordinary memory makes the host wait until it is done. So inputs are first copied into
pinned memory, from where the device fetches them on a stream of its own while the host goes on. Of
that memory there are two sets: the next step fills one while the device may still read the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

_SETS = 2


class Road(Protocol):
    """How values get to a device."""

    def room(self, like: torch.Tensor) -> torch.Tensor:
        """Host memory of a tensor's form that the device can read by itself."""

    def send(self, values: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
        """Begins to copy; returns the copies, ordered for the current stream, and an event.

        The event's ``synchronize()`` returns once the values have been read.
        """


class CudaRoad:
    """Copies on a stream of their own.

    Args:
        device: Where to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def room(self, like: torch.Tensor) -> torch.Tensor:
        """See `Road`."""
        return torch.empty_like(like, memory_format=torch.contiguous_format, pin_memory=True)

    def send(self, values: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
        """See `Road`."""
        now = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            found = {k: v.to(self._device, non_blocking=True) for k, v in values.items()}
            read = torch.cuda.Event()
            read.record(self._stream)
        now.wait_event(read)
        for copy in found.values():
            copy.record_stream(now)
        return found, read


class Inputs:
    """A rank's inputs, step by step.

    Args:
        device: Where its programs run.
        road: How values get there; None where they are there already.
    """

    def __init__(self, device: torch.device, road: Road | None = None) -> None:
        self._device = device
        self._road = road
        self._rooms: list[dict[str, torch.Tensor]] = [{} for _ in range(_SETS)]
        self._read: list[Any] = [None] * _SETS
        self._turn = 0

    @classmethod
    def to(cls, device: torch.device) -> Inputs:
        """For a device of either kind."""
        return cls(device, CudaRoad(device) if device.type == "cuda" else None)

    def put(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One step's inputs on the device; the caller may write to its own ones at once."""
        if self._road is None:
            return {name: tensor.to(self._device) for name, tensor in inputs.items()}
        self._turn = (self._turn + 1) % _SETS
        rooms, read = self._rooms[self._turn], self._read[self._turn]
        if read is not None:  # of two steps ago: long since done, unless the device is behind
            read.synchronize()
        for name, tensor in inputs.items():
            room = rooms.get(name)
            if room is None or (room.shape, room.dtype) != (tensor.shape, tensor.dtype):
                room = rooms[name] = self._road.room(tensor)
            room.copy_(tensor)
        found, self._read[self._turn] = self._road.send({name: rooms[name] for name in inputs})
        return found
