"""Can a cluster hold these placement groups at all, and if it can, what is in the way now?

Pure: works on plain values. Every test here is a *necessary* condition, so that nothing feasible
is ever refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raypar.mesh.device_mesh import PlacementRequest

_EPSILON = 1e-6
_SHOWN = ("CPU", "GPU", "memory")


@dataclass(frozen=True)
class NodeState:
    """An alive Ray node as the scheduler sees it.

    Attributes:
        id: Ray's node id.
        name: Host name.
        total: Resource → amount that the node has.
        free: Resource → amount that nobody holds now.
    """

    id: str
    name: str
    total: Mapping[str, float] = field(hash=False)
    free: Mapping[str, float] = field(hash=False)


@dataclass(frozen=True)
class Holder:
    """A placement group that holds resources now.

    Attributes:
        name: Its name, or its id where it has none.
        held: Node id → resource → amount.
    """

    name: str
    held: Mapping[str, Mapping[str, float]] = field(hash=False)


def shortage(requests: Sequence[PlacementRequest], nodes: Sequence[NodeState]) -> str | None:
    """Why no order of releases could ever make room on `nodes`, or None if it might fit."""
    by_id = {node.id: node for node in nodes}
    room = {node.id: dict(node.total) for node in nodes}
    loose: list[Mapping[str, float]] = []
    pinned: dict[str, dict[str, float]] = {}
    for request in requests:
        for bundle, at in zip(request.bundles, request.nodes, strict=True):
            if not at:
                loose.append(bundle)
                continue
            if at not in by_id:
                return (
                    f"{request.name!r} is pinned to node {at[:12]}, which is not alive: the plan "
                    "was made for another cluster"
                )
            _add(pinned.setdefault(at, {}), bundle)
    for at, wanted in pinned.items():
        for resource, amount in wanted.items():
            has = by_id[at].total.get(resource, 0)
            if amount > has + _EPSILON:
                return _missing(f"node {by_id[at].name}", resource, amount, has)
            room[at][resource] = has - amount
    return _loose_shortage(loose, room, by_id) or _strict_shortage(requests, nodes)


def _loose_shortage(
    loose: Sequence[Mapping[str, float]],
    room: Mapping[str, Mapping[str, float]],
    by_id: Mapping[str, NodeState],
) -> str | None:
    kinds = Counter(tuple(sorted(bundle.items())) for bundle in loose)
    for kind in kinds:
        bundle: dict[str, float] = dict(kind)
        if not any(_slots(by_id[at].total, bundle) for at in room):
            best = {r: max((n.total.get(r, 0) for n in by_id.values()), default=0) for r in bundle}
            for resource, amount in bundle.items():
                if amount > best[resource] + _EPSILON:
                    return _missing("any one node", resource, amount, best[resource])
            return f"no single node has {show(bundle)} together"
    need: dict[str, float] = {}
    for wanted in loose:
        _add(need, wanted)
    for resource, amount in need.items():
        has = sum(max(0.0, left.get(resource, 0)) for left in room.values())
        if amount > has + _EPSILON:
            return _missing("the whole cluster", resource, amount, has)
    for kind, count in kinds.items():
        slots = sum(_slots(left, dict(kind)) for left in room.values())
        if count > slots:
            return (
                f"{count} bundles of {show(dict(kind))} do not fit: the nodes have room for "
                f"{slots} of them, {count - slots} too few"
            )
    return None


def _strict_shortage(
    requests: Sequence[PlacementRequest], nodes: Sequence[NodeState]
) -> str | None:
    for request in requests:
        if request.strategy == "STRICT_SPREAD" and len(request.bundles) > len(nodes):
            return (
                f"{request.name!r} wants {len(request.bundles)} different nodes "
                f"(STRICT_SPREAD), but {len(nodes)} are alive; strategy PACK would do with fewer"
            )
        if request.strategy == "STRICT_PACK" and not any(
            _slots(node.total, request.total()) for node in nodes
        ):
            return (
                f"{request.name!r} wants {show(request.total())} on one node (STRICT_PACK), and "
                "no node has that; strategy PACK may use several"
            )
    return None


def _missing(where: str, resource: str, need: float, has: float) -> str:
    return (
        f"{where} would have to hold {_number(resource, need)} {resource} but has "
        f"{_number(resource, has)} in total: {_number(resource, need - has)} {resource} missing"
    )


def _slots(room: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """How many of `bundle` fit side by side into `room`."""
    counts = [
        math.floor((room.get(resource, 0) + _EPSILON) / amount)
        for resource, amount in bundle.items()
        if amount > 0
    ]
    return max(0, min(counts)) if counts else 10**9


def asked(requests: Sequence[PlacementRequest]) -> str:
    """``2 placement groups with 8 bundles, 8 CPU in all (raypar/x/stage-0: 4 x {1 CPU}, ...)``."""
    total: dict[str, float] = {}
    for request in requests:
        _add(total, request.total())
    bundles = sum(len(r.bundles) for r in requests)
    shown = [f"{r.name}: {show(r.total())} in {_some(len(r.bundles), 'bundle')}" for r in requests]
    more = [f"and {len(shown) - 6} more"] if len(shown) > 6 else []
    return (
        f"{_some(len(requests), 'placement group')} with {_some(bundles, 'bundle')}, "
        f"{show(total)} in all ({'; '.join(shown[:6] + more)})"
    )


def table(nodes: Sequence[NodeState]) -> str:
    """One line per node: total and free."""
    if not nodes:
        return "  no node is alive"
    rows = [
        f"  {n.name} ({n.id[:12]}): total {show(_known(n.total))}, free {show(_free(n))}"
        for n in nodes[:16]
    ]
    more = [f"  and {len(nodes) - 16} more nodes"] if len(nodes) > 16 else []
    return "\n".join(rows + more)


def largest_value(requests: Sequence[PlacementRequest], nodes: Sequence[NodeState]) -> int:
    """How many bundles like the commonest one the cluster could hold in all."""
    kinds = Counter(tuple(sorted(b.items())) for r in requests for b in r.bundles)
    bundle = dict(kinds.most_common(1)[0][0])
    return sum(_slots(node.total, bundle) for node in nodes)


def in_the_way(
    requests: Sequence[PlacementRequest], nodes: Sequence[NodeState], holders: Sequence[Holder]
) -> str:
    """Who holds what the requests need, one line each, as far as it is known."""
    wanted = {resource for r in requests for resource in r.total()}
    places = {at for r in requests for at in r.nodes if at} or {n.id for n in nodes}
    lines: list[str] = []
    in_groups: dict[str, float] = {}
    for holder in holders:
        held: dict[str, float] = {}
        for at, amounts in holder.held.items():
            if at in places:
                _add(held, {r: a for r, a in amounts.items() if r in wanted})
        if held:
            _add(in_groups, held)
            lines.append(f"  placement group {holder.name}: {show(held)}")
    for resource in sorted(wanted):
        used = sum(
            n.total.get(resource, 0) - n.free.get(resource, 0) for n in nodes if n.id in places
        )
        rest = used - in_groups.get(resource, 0)
        if rest > _EPSILON:
            lines.append(
                f"  actors or tasks outside placement groups: {_number(resource, rest)} {resource}"
            )
    return "\n".join(lines[:20]) or "  nobody that Ray tells of (it may have just been released)"


def show(resources: Mapping[str, float]) -> str:
    """``4 CPU, 1 GPU``."""
    return ", ".join(f"{_number(r, a)} {r}" for r, a in resources.items()) or "nothing"


def _number(resource: str, amount: float) -> str:
    if "memory" in resource:
        return f"{amount / 1e9:.1f} GB"
    return f"{amount:g}"


def _known(resources: Mapping[str, float]) -> dict[str, float]:
    return {r: resources[r] for r in _SHOWN if r in resources}


def _free(node: NodeState) -> dict[str, float]:
    # Ray leaves a resource out of the free ones when nothing of it is left.
    return {r: node.free.get(r, 0.0) for r in _SHOWN if r in node.total}


def _add(total: dict[str, float], more: Mapping[str, float]) -> None:
    for resource, amount in more.items():
        total[resource] = total.get(resource, 0) + amount


def _some(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
