"""Devices of runs whose trainer was killed: the next run gets them back."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

from raypar.mesh.cluster import Cluster
from raypar.stages.orphans import driver_name, remove_groups_of, remove_orphans
from raypar.train._warm_pool import PoolSettings, WarmPool


@pytest.fixture(autouse=True)
def _on_ray(ray_session: str) -> None:
    """The suite's own Ray."""


@ray.remote(num_cpus=0)
class Holder:
    """A driver actor, as far as Ray can tell."""

    def hold(self, name: str) -> None:
        group = placement_group([{"CPU": 0.01}], name=name)
        assert group.wait(30)


def held(*names: str) -> list[str]:
    rows = placement_group_table().values()
    return sorted(r["name"] for r in rows if r["name"] in names and r["state"] != "REMOVED")


def holding(run: str, *names: str) -> Any:
    actor = Holder.options(name=driver_name(run)).remote()
    ray.get([actor.hold.remote(name) for name in names])
    return actor


def await_end(run: str) -> None:
    end = time.monotonic() + 60
    while any(
        a["name"] == driver_name(run) for a in ray.util.list_named_actors(all_namespaces=True)
    ):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_groups_whose_driver_is_gone_are_given_back_and_no_others() -> None:
    gone, alive = "raypar-orphan-gone", "raypar-orphan-alive"
    lost = (f"raypar/{gone}/stage-0", f"raypar/{gone}/stages-1,2", f"raypar/{gone}/ranks")
    # Those of a search in a driver are Ray's to remove, and others are nobody's of raypar.
    kept = (f"raypar/{alive}/stage-0", f"raypar/{gone}/devices-0-to-1", "stage-0")
    actors = [holding(gone, *lost, *kept[1:]), holding(alive, kept[0])]
    try:
        assert not set(remove_orphans()) & {*lost, *kept}
        ray.kill(actors[0])
        await_end(gone)
        assert held(*lost) == sorted(lost)  # Ray keeps them: the job goes on
        assert sorted(set(remove_orphans()) & {*lost, *kept}) == sorted(lost)
        assert held(*lost, *kept) == sorted(kept)
    finally:
        ray.kill(actors[1])
        for run in (gone, alive):
            remove_groups_of(run)
        for name in kept[2:]:
            ray.util.remove_placement_group(ray.util.get_placement_group(name))
    assert held(*lost, *kept) == []


@ray.remote(num_cpus=0)
class Searcher:
    """A trainer in an actor, whose search holds a device."""

    def hold(self) -> str:
        self._pool = WarmPool(Cluster.local(1), [], PoolSettings(cpus_per_rank=0.01))
        self._pool.begin([0])
        (group,) = self._pool._groups
        return group.name

    def die(self) -> None:
        os._exit(1)


def test_what_a_search_held_is_given_back_once_its_process_is_gone() -> None:
    gone, alive = Searcher.remote(), Searcher.remote()
    names = ray.get([gone.hold.remote(), alive.hold.remote()])
    assert held(*names) == sorted(names)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(gone.die.remote())
    try:
        end = time.monotonic() + 60
        while names[0] not in remove_orphans():
            assert time.monotonic() < end
            time.sleep(0.05)
        assert held(*names) == [names[1]]
    finally:
        ray.kill(alive)
        for name in names:
            remove_groups_of(name.split("/")[1])
    assert held(*names) == []
