"""Interleaved 1F1B (Narayanan et al. 2021, arXiv:2104.04473, section 2.2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raypar.schedules.base import Action, Placement, Schedule
from raypar.schedules.instructions import Kind


@dataclass(frozen=True, slots=True)
class Grid:
    """A placement laid over the paper's n devices × v chunks; empty cells hold no stage.

    Attributes:
        rows: For every device, its rank group.
        cells: (device, chunk) → the stages there.
        chunks: v.
    """

    rows: tuple[int, ...]
    cells: dict[tuple[int, int], tuple[int, ...]]
    chunks: int


def lay_out(placement: Placement) -> Grid:
    """Gives every block the first free cell after its predecessor's, row by row.

    Devices are numbered in the order in which the chain meets them. The classic placement (stage s
    on rank group s mod n) fills the grid without a gap.
    """
    rank_of = placement.rank_of
    rows = tuple(dict.fromkeys(rank_of[block[0]] for block in placement.blocks))
    device_of = {rank: device for device, rank in enumerate(rows)}
    cells: dict[tuple[int, int], tuple[int, ...]] = {}
    position = -1
    for block in placement.blocks:
        device = device_of[rank_of[block[0]]]
        chunk, column = divmod(position, len(rows))  # (-1, last) at first
        if device <= column:
            chunk += 1
        cells[device, chunk] = block
        position = chunk * len(rows) + device
    return Grid(rows, cells, 1 + max(chunk for _, chunk in cells))


class InterleavedOneFOneB(Schedule):
    """n microbatches go through one chunk of n devices, then through the next chunk.

    With v chunks per rank group the bubble is (n - 1)(F + B)/v, at v times the transfers. With one
    chunk it is 1F1B.

    The paper asks for stage s on rank group s mod n and M a multiple of n. Every other plan is
    laid over the smallest such grid that holds it: the order is made for the full grid and M
    rounded up, then the actions of missing stages and microbatches are left out. What is left of
    an order that can be executed can be executed, so that this never deadlocks.
    """

    name = "interleaved_1f1b"

    def orders(
        self, placement: Placement, microbatches: int, splits: Sequence[bool]
    ) -> list[list[Action]]:
        """The order of the full grid, without what is not there. See `Schedule.orders`."""
        grid = lay_out(placement)
        result: list[list[Action]] = [[] for _ in placement.stages]
        for device, rank in enumerate(grid.rows):
            passes = Passes(grid, device, len(grid.rows), microbatches)
            order = result[rank]
            for k in range(passes.turns + passes.warm_up):
                order += passes.forward(k)
                order += passes.backward(k - passes.warm_up)
        return result


def warm_up(device: int, devices: int, chunks: int, round_size: int) -> int:
    """Forward turns of a device before its first backward turn.

    One chunk needs as many as there are devices to come before its first backward is back; with
    more chunks, rounds take turns, and both ways must be filled.
    """
    to_come = devices - device - 1
    return to_come if chunks == 1 else 2 * to_come + (chunks - 1) * round_size


@dataclass(frozen=True, slots=True)
class Passes:
    """The turns of one device: in each, a microbatch goes through one of its chunks.

    Attributes:
        grid: The placement.
        device: Which device of it.
        round_size: Microbatches that go through a chunk before the next chunk is theirs, at least
            as many as there are devices.
        microbatches: M.
    """

    grid: Grid
    device: int
    round_size: int
    microbatches: int

    @property
    def turns(self) -> int:
        """Forward turns of the device, and as many backward turns."""
        rounds = -(-self.microbatches // self.round_size)
        return rounds * self.round_size * self.grid.chunks

    @property
    def warm_up(self) -> int:
        """Forward turns before the first backward turn; see `warm_up`."""
        wanted = warm_up(self.device, len(self.grid.rows), self.grid.chunks, self.round_size)
        return min(wanted, self.turns)

    def forward(self, k: int) -> list[Action]:
        """The k-th forward turn; nothing where there is none."""
        chunk = k // self.round_size % self.grid.chunks
        return [Action(Kind.FORWARD, s, mb) for s, mb in self._of(k, chunk)]

    def backward(self, k: int, kind: Kind = Kind.BACKWARD) -> list[Action]:
        """The k-th backward turn, or the `kind` half of it; nothing where there is none."""
        chunk = self.grid.chunks - 1 - k // self.round_size % self.grid.chunks
        return [Action(kind, s, mb) for s, mb in self._of(k, chunk)[::-1]]

    def _of(self, k: int, chunk: int) -> list[tuple[int, int]]:
        """(stage, microbatch) of a turn, without what is missing."""
        size = self.round_size
        mb = k // (size * self.grid.chunks) * size + k % size
        if not 0 <= k < self.turns or mb >= self.microbatches:
            return []
        return [(s, mb) for s in self.grid.cells.get((self.device, chunk), ())]
