"""Placement groups of a run: acquired all or none, released together, checked against the plan.

Ray keeps a placement group that cannot be placed pending for ever, and two runs that want several
groups each can end up with half of theirs. So every acquisition has a deadline, what can never fit
is refused at once, and an attempt that does not get everything gives everything back. Two things
keep contenders from stumbling over each other for ever: each is patient for a random time, so that
one gives back first and the other gets what it lacks; and who gave back waits a random time
(exponential backoff with jitter: M. Brooker, "Exponential Backoff and Jitter", AWS Architecture
Blog, 2015) and until the free resources suffice before it tries again. Nothing is given back while
Ray is placing it (`_remove`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from raypar.compat_ray import ray_free_by_node
from raypar.errors import ClusterError
from raypar.mesh._feasible import (
    Holder,
    NodeState,
    asked,
    in_the_way,
    largest_value,
    shortage,
    table,
)
from raypar.mesh.cluster import Cluster
from raypar.mesh.device_mesh import PlacementRequest

NODE_ID_LABEL = "ray.io/node-id"
DEFAULT_DEADLINE_S = 60.0
_ATTEMPT_S = 1.0
_LOOK_S = 0.05
_RENEW_S = 0.2
_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 2.0
_FREEING_S = 5.0
_PLACING_S = 2.0


def acquire(
    requests: Sequence[PlacementRequest],
    deadline_s: float = DEFAULT_DEADLINE_S,
    *,
    attempt_s: float = _ATTEMPT_S,
    may_grow: bool = False,
    deadline_key: str = "deadline_s",
    seed: int | None = None,
) -> list[PlacementGroup]:
    """Creates all placement groups, or none.

    Args:
        requests: What is wanted.
        deadline_s: Seconds to keep trying while others hold the resources.
        attempt_s: Least seconds that one attempt waits for its groups before it gives them all
            back; each waits a random time up to three times that.
        may_grow: The cluster has an autoscaler: do not refuse what its present nodes cannot hold.
        deadline_key: What the caller's users know `deadline_s` as; told when it has passed.
        seed: Makes the random waits repeatable; by default they differ from process to process,
            which is what keeps contenders apart.

    Returns:
        The groups in the order of `requests`, every one placed. The caller releases them.

    Raises:
        ClusterError: The request can never fit the alive nodes (told at once), or the deadline
            passed (told with who holds the resources). Nothing is held then.
    """
    if not ray.is_initialized():
        raise ClusterError(
            "this process is not connected to Ray: call ray.init() or Cluster.from_ray() first"
        )
    if not may_grow:
        refuse_impossible(requests)
    chance = random.Random(seed)
    began = time.monotonic()
    end = began + deadline_s
    backoff = _FIRST_BACKOFF_S
    attempts = 0
    while True:
        # An autoscaler must see the demand, and the first look may be out of date: try anyway.
        if may_grow or not attempts or _room_now(requests):
            attempts += 1
            patience = attempt_s * chance.uniform(1, 3)
            groups = _attempt(requests, min(patience, max(0.0, end - time.monotonic())))
            if groups is not None:
                return groups
            backoff = min(2 * backoff, _LONGEST_BACKOFF_S)
        if not may_grow:
            refuse_impossible(requests)  # a node may have died meanwhile
        left = end - time.monotonic()
        if left <= 0:
            break
        time.sleep(min(left, chance.uniform(0.05, backoff)))
    more = f"{deadline_key}={4 * deadline_s:g}"
    raise ClusterError(_busy(requests, time.monotonic() - began, attempts, more))


@contextmanager
def acquired(
    requests: Sequence[PlacementRequest],
    deadline_s: float = DEFAULT_DEADLINE_S,
    **options: Any,
) -> Iterator[list[PlacementGroup]]:
    """`acquire` for a ``with`` block; releases the groups at its end, however it ends."""
    groups = acquire(requests, deadline_s, **options)
    try:
        yield groups
    finally:
        release(groups)


def release(groups: Sequence[PlacementGroup]) -> None:
    """Removes the groups, which kills the actors in them. Safe to call twice, and after Ray ended.

    Returns once Ray no longer lists them as held (at most some seconds).
    """
    if not ray.is_initialized():
        return
    for group in groups:
        _remove(group)
    end = time.monotonic() + _FREEING_S
    for group in groups:
        while _state(group) not in ("REMOVED", "") and time.monotonic() < end:
            time.sleep(0.01)


def refuse_impossible(requests: Sequence[PlacementRequest]) -> None:
    """Raises what `acquire` would, for requests that the alive nodes can never hold.

    Raises:
        ClusterError: With what was asked, what the nodes have, what is missing, and what to change.
    """
    nodes = node_states()
    why = shortage(requests, nodes)
    if why is None:
        return
    fits = largest_value(requests, nodes)
    key = requests[0].key
    mend = (
        f"Set {key} to at most {fits} and plan again, or add nodes"
        if fits
        else "Add nodes that have it, or set mesh.device to what they have"
    )
    raise ClusterError(
        f"the cluster can never hold what was asked: {asked(requests)}.\n"
        f"{why[0].upper()}{why[1:]}.\nAlive nodes:\n{table(nodes)}\n{mend}."
    )


def _room_now(requests: Sequence[PlacementRequest]) -> bool:
    """Whether what is free at this moment looks sufficient."""
    now = [NodeState(n.id, n.name, n.free, n.free) for n in node_states()]
    return shortage(requests, now) is None


def node_states() -> list[NodeState]:
    """The alive Ray nodes with their total and free resources."""
    free = ray_free_by_node()
    return [
        NodeState(
            id=record["NodeID"],
            name=record.get("NodeManagerHostname") or record["NodeManagerAddress"],
            total=record["Resources"],
            free=free.get(record["NodeID"], {}),
        )
        for record in ray.nodes()
        if record["Alive"]
    ]


def holders() -> list[Holder]:
    """The placement groups that hold resources now, of whatever job."""
    found: list[Holder] = []
    for identity, entry in placement_group_table().items():
        if entry["state"] not in ("CREATED", "PREPARED", "RESCHEDULING"):
            continue
        held: dict[str, dict[str, float]] = {}
        for index, bundle in entry["bundles"].items():
            at = held.setdefault(entry["bundles_to_node_id"].get(index, ""), {})
            for resource, amount in bundle.items():
                at[resource] = at.get(resource, 0) + amount
        found.append(Holder(entry["name"] or identity, held))
    return found


def check_nodes(actual: Mapping[int, str], cluster: Cluster) -> None:
    """Compares where the actors are with where the plan put them.

    Args:
        actual: Cluster-wide device index → id of the Ray node that its actor reports
            (``ray.get_runtime_context().get_node_id()``).
        cluster: The cluster of the plan. Where its nodes have no Ray ids, devices of one node
            must be together and devices of different nodes apart.

    Raises:
        ClusterError: Naming every device that is elsewhere.
    """
    wrong: list[str] = []
    stands_for: dict[int, str] = {}  # node index → Ray node
    taken: dict[str, int] = {}  # Ray node → the node index that it stands for
    for device, at in sorted(actual.items()):
        index, local = cluster.device(device)
        node = cluster.nodes[index]
        expected = node.id or stands_for.setdefault(index, at)
        other = index if node.id else taken.setdefault(at, index)
        if at != expected:
            wrong.append(
                f"device {device} (number {local} of node {node.name}) should be on Ray node "
                f"{expected[:12]}, its actor is on {at[:12]}"
            )
        elif other != index:
            wrong.append(
                f"device {device} is on Ray node {at[:12]}, which already stands for node "
                f"{cluster.nodes[other].name} of the plan, not {node.name}"
            )
    if wrong:
        raise ClusterError(
            "actors are not where the plan put them:\n  "
            + "\n  ".join(wrong)
            + "\nPlan again for the cluster as it is: Cluster.from_ray()"
        )


def _attempt(requests: Sequence[PlacementRequest], wait_s: float) -> list[PlacementGroup] | None:
    """All groups placed within `wait_s` seconds, or None with everything given back."""
    groups: list[PlacementGroup] = []
    end = time.monotonic() + wait_s
    try:
        for request in requests:
            groups.append(_create(request))
        made = time.monotonic()
        while True:
            # The first look is patient enough for a group that is about to be placed.
            pending = [i for i, group in enumerate(groups) if not group.wait(_LOOK_S)]
            if not pending:
                return groups
            if time.monotonic() >= end:
                break
            # Ray looks at a pending group about once a second, but at a new one at once: where
            # there is room by now, asking anew saves that second.
            if time.monotonic() - made > _RENEW_S and _room_now([requests[i] for i in pending]):
                for i in pending:
                    if not _being_placed(groups[i]) and not groups[i].wait(0):
                        remove_placement_group(groups[i])
                        groups[i] = _create(requests[i])
                made = time.monotonic()
    except BaseException:
        release(groups)
        raise
    release(groups)
    return None


def _remove(group: PlacementGroup) -> None:
    """Removes a group, but not while Ray is placing it.

    On a loaded machine, bundles of a group that is removed at that moment stay taken for ever: Ray
    shows their resources as taken with no group to show for them.
    """
    end = time.monotonic() + _PLACING_S
    while _being_placed(group) and time.monotonic() < end:
        time.sleep(0.01)
    remove_placement_group(group)


def _being_placed(group: PlacementGroup) -> bool:
    """Whether Ray is reserving its bundles right now."""
    entry = placement_group_table(group)
    stats = entry.get("stats", {})
    return entry.get("state") == "PREPARED" or (
        entry.get("state") == "PENDING" and stats.get("scheduling_state") == "SCHEDULING_STARTED"
    )


def _create(request: PlacementRequest) -> PlacementGroup:
    pins = [{NODE_ID_LABEL: node} if node else {} for node in request.nodes]
    try:
        return placement_group(
            [dict(bundle) for bundle in request.bundles],
            strategy=request.strategy,
            name=request.name,
            bundle_label_selector=pins if any(pins) else None,
        )
    except ValueError as error:
        raise ClusterError(f"Ray refuses placement group {request.name!r}: {error}") from error


def _busy(requests: Sequence[PlacementRequest], waited_s: float, attempts: int, more: str) -> str:
    nodes = node_states()
    return (
        f"the cluster is busy: after {waited_s:.1f} s and {attempts} attempts there was still no "
        f"room for {asked(requests)}.\nAlive nodes:\n{table(nodes)}\nIn the way:\n"
        f"{in_the_way(requests, nodes, holders())}\nWait for them or stop them, set a longer "
        f"deadline ({more}), or set {requests[0].key} to a number that fits what is free."
    )


def _state(group: PlacementGroup) -> str:
    return str(placement_group_table(group).get("state", ""))
