"""What links reach: messages and collectives between ranks, as programs exchange them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from raypar.comm.group import Group, TensorSpec
from raypar.mesh._probe_fit import LinkSample
from raypar.mesh.calibration import ACROSS, COLLECTIVE_KINDS, INSIDE
from raypar.sharding.collectives import join, part_of
from raypar.sharding.spec import S

_SIZES = (1 << 10, 1 << 15, 1 << 18, 1 << 20, 1 << 22)
_GPU_SIZES = (*_SIZES, 1 << 24, 1 << 26)
_REPEATS = 15
_CASE_S = 0.25


def measure_links(
    world: Group, nodes: Sequence[int], device: torch.device
) -> dict[str, list[LinkSample]]:
    """Measures every tier that the world has; called by all ranks at once.

    Args:
        world: All ranks.
        nodes: For every rank the number of its node.
        device: Where this rank's tensors are.

    Returns:
        Tier → samples of this rank (empty where it took no part).
    """
    found: dict[str, list[LinkSample]] = {INSIDE: [], ACROSS: []}
    rows = [[r for r in range(world.size) if nodes[r] == n] for n in dict.fromkeys(nodes)]
    columns = [[row[i] for row in rows if i < len(row)] for i in range(max(map(len, rows)))]
    for tier, lines in ((INSIDE, rows), (ACROSS, columns)):
        own = _own_line(world, lines, tier)
        world.barrier(name=tier)
        if own is not None:
            found[tier] = [*_messages(own, device), *_collectives(own, device)]
    return found


def loopback(group: Group, device: torch.device) -> list[LinkSample]:
    """What a group of one rank costs: its collectives copy, or do nothing at all.

    Messages need two ranks. `calibrate` is not given these: they say nothing about links.
    """
    return _collectives(group, device)


def _own_line(world: Group, lines: Sequence[list[int]], tier: str) -> Group | None:
    """This rank's group along one tier; all ranks make all groups in the same order."""
    own = None
    for line in lines:
        if len(line) > 1:
            made = world.subgroup(line, f"probe {tier} {line[0]}")
            own = own if made is None else made
    return own


def _sizes(device: torch.device) -> Sequence[int]:
    return _GPU_SIZES if device.type == "cuda" else _SIZES


def _messages(group: Group, device: torch.device) -> list[LinkSample]:
    """Ping-pong between neighbours, all pairs at once."""
    found = []
    peer = group.rank ^ 1
    paired = peer < group.size
    for size in _sizes(device):
        tensor = torch.ones(size // 4, device=device)
        spec = TensorSpec(tuple(tensor.shape), tensor.dtype)

        def there_and_back(tensor: torch.Tensor = tensor, spec: TensorSpec = spec) -> None:
            if not paired:
                return
            if group.rank < peer:
                group.isend(tensor, peer, "ping").wait()
                group.irecv(spec, peer, "pong").wait()
            else:
                group.irecv(spec, peer, "ping").wait()
                group.isend(tensor, peer, "pong").wait()

        seconds = _repeat(group, there_and_back, device)
        if paired:
            found.append(LinkSample("p2p", 2, float(size), seconds / 2))
    return found


def _collectives(group: Group, device: torch.device) -> list[LinkSample]:
    """Every kind of collective as `raypar::convert` runs it on a rank's mesh."""
    found = []
    for kind in COLLECTIVE_KINDS:
        for size in _sizes(device):
            rows = size // 4 // 64 // group.size * group.size or group.size
            tensor = torch.ones(rows, 64, device=device)

            def call(kind: str = kind, tensor: torch.Tensor = tensor) -> None:
                _run(group, kind, tensor)

            seconds = _repeat(group, call, device)
            found.append(LinkSample(kind, group.size, 4.0 * tensor.numel(), seconds))
    return found


def _run(group: Group, kind: str, x: torch.Tensor) -> torch.Tensor:
    """`x` has the size of the larger side."""
    if kind in ("all_reduce", "all_max"):
        result = x.clone()
        group.all_reduce(result, op="max" if kind == "all_max" else "sum").wait()
        return result
    if kind == "all_gather":
        return join(group.all_gather(part_of(x, S(0), group.rank, group.size)), S(0))
    parts = [part_of(x, S(0), i, group.size).contiguous() for i in range(group.size)]
    if kind == "reduce_scatter":
        return group.reduce_scatter(parts)
    return join(group.all_to_all(parts), S(1))


def _repeat(group: Group, call: Callable[[], None], device: torch.device) -> float:
    """Seconds (lower quartile) of a call that all ranks make together; rank 0 says how often."""
    call()
    group.barrier()
    began = time.perf_counter()
    call()
    once = torch.tensor([time.perf_counter() - began])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        once = once.to(device)
    group.broadcast(once, root=0)
    count = int(max(3, min(_REPEATS, _CASE_S / max(float(once), 1e-6))))
    found = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    group.barrier()
    return sorted(found)[len(found) // 4]
