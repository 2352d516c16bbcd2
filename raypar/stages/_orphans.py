"""Placement groups of runs that are gone: given back, where Ray itself keeps them.

Ray removes a group once the actor that asked for it and that actor's job have ended. So those of a
run stay as long as the job, where its trainer was an actor that was killed; and one that a driver
asked for just as it was killed stays for ever.
"""

from __future__ import annotations

import contextlib
import re
import time

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table

_OF_A_DRIVER = re.compile(r"raypar/(.+)/(?:stages?-[\d,]+|ranks)")
"""Names of groups that driver actors make (`raypar.mesh.device_mesh`, `raypar.stages.seats`)."""
_PAUSE_S = 0.25


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
    """Removes the groups of runs whose driver actor is gone.

    Returns:
        Their names.
    """
    found = []
    with contextlib.suppress(Exception):
        held = placement_group_table()  # first: whose driver is not there now has ended
        alive = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
        for identity, row in held.items():
            match = _OF_A_DRIVER.fullmatch(row["name"])
            if match and driver_name(match[1]) not in alive and _remove(identity, row["state"]):
                found.append(row["name"])
    return found


def _remove(identity: str, state: str) -> bool:
    if state == "REMOVED":
        return False
    # By its id: a name is found in one namespace alone.
    ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(identity))))
    return True
