"""Interleaved 1F1B (Narayanan et al. 2021, arXiv:2104.04473, section 2.2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raypar.schedules.base import Action, Placement, Schedule
from raypar.schedules.instructions import Kind


@dataclass(frozen=True, slots=True)
class _Grid:
    """A placement laid over the paper's n devices × v chunks; empty cells hold no stage.

    Attributes:
        rows: For every device, its rank group.
        cells: (device, chunk) → the stages there.
        chunks: v.
    """

    rows: tuple[int, ...]
    cells: dict[tuple[int, int], tuple[int, ...]]
    chunks: int


def _lay_out(placement: Placement) -> _Grid:
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
    return _Grid(rows, cells, 1 + max(chunk for _, chunk in cells))


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
        grid = _lay_out(placement)
        result: list[list[Action]] = [[] for _ in placement.stages]
        for device, rank in enumerate(grid.rows):
            result[rank] = _device_order(grid, device, microbatches)
        return result


def _device_order(grid: _Grid, device: int, microbatches: int) -> list[Action]:
    n, v = len(grid.rows), grid.chunks
    total = -(-microbatches // n) * n * v

    def forward(k: int) -> list[Action]:
        return _actions(grid, device, k // n % v, k, Kind.FORWARD, microbatches)

    def backward(k: int) -> list[Action]:
        return _actions(grid, device, v - 1 - k // n % v, k, Kind.BACKWARD, microbatches)

    # One chunk needs n - device - 1 forwards before its first backward comes back; with more
    # chunks, groups of n microbatches take turns, and both ways must be filled.
    warm_up = n - device - 1 if v == 1 else 2 * (n - device - 1) + (v - 1) * n
    warm_up = min(warm_up, total)
    order: list[Action] = []
    for k in range(total + warm_up):
        if k < total:
            order += forward(k)
        if k >= warm_up:
            order += backward(k - warm_up)
    return order


def _actions(
    grid: _Grid, device: int, chunk: int, k: int, kind: Kind, microbatches: int
) -> list[Action]:
    """The k-th turn of a device: one microbatch through the stages of one chunk."""
    n = len(grid.rows)
    mb = k // (n * grid.chunks) * n + k % n
    if mb >= microbatches:
        return []
    stages = grid.cells.get((device, chunk), ())
    return [Action(kind, s, mb) for s in (stages if kind is Kind.FORWARD else stages[::-1])]
