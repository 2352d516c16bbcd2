"""Placement groups of runs that are gone: given back, where Ray itself keeps them.

Ray removes a group once the actor that asked for it and that actor's job have ended. So those of a
run stay as long as the job, where its trainer was an actor that was killed, and so do those that a
search of such a trainer measures on; and one that a driver asked for just as it was killed stays
for ever.
"""

from __future__ import annotations

import contextlib
import re
import time

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table

from raypar.compat_ray import ray_workers

_OF_A_DRIVER = re.compile(r"raypar/(.+)/(?:stages?-[\d,]+|ranks)")
"""Names of groups that driver actors make (`raypar.mesh.device_mesh`, `raypar.stages.seats`)."""
_OF_A_WORKER = re.compile(r"raypar/.+-of-([0-9a-f]{12})/.+")
_PAUSE_S = 0.25


def of_this_process(name: str) -> str:
    """`name`, and which worker of Ray this is: what it holds is known as lost once that is gone.

    A program that connected to Ray keeps the bare name: what it holds, Ray removes at its end.
    """
    worker = ray.get_runtime_context().get_worker_id()
    return f"{name}-of-{worker[:12]}" if worker in ray_workers() else name


def driver_name(run: str) -> str:
    """The name of a run's driver actor."""
    return f"{run}/driver"


def remove_groups_of(run: str, looks: int = 1) -> None:
    """Removes what a driver that is gone has left behind.

    Args:
        run: Its run.
        looks: How often to look: one that was killed may have asked for a group a moment before.
    """
    with contextlib.suppress(Exception):
        for look in range(looks):
            if look:
                time.sleep(_PAUSE_S)
            for identity, row in placement_group_table().items():
                if f"/{run}/" in row["name"]:
                    _remove(identity, row["state"])


def remove_orphans() -> list[str]:
    """Removes the groups of runs whose driver actor is gone, and of searches whose process is.

    Returns:
        Their names.
    """
    found = []
    with contextlib.suppress(Exception):
        held = placement_group_table()  # first: whose driver is not there now has ended
        drivers = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
        workers = {worker[:12] for worker in ray_workers()}
        for identity, row in held.items():
            run, search = (p.fullmatch(row["name"]) for p in (_OF_A_DRIVER, _OF_A_WORKER))
            gone = (run and driver_name(run[1]) not in drivers) or (
                search and search[1] not in workers
            )
            if gone and _remove(identity, row["state"]):
                found.append(row["name"])
    return found


def _remove(identity: str, state: str) -> bool:
    if state == "REMOVED":
        return False
    # By its id: a name is found in one namespace alone.
    ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(identity))))
    return True
