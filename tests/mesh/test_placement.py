"""Placement groups on Ray: all or none, contention, what cannot fit, lent bundles."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from raypar.errors import ClusterError
from raypar.mesh import Cluster, DeviceMesh, Node, PlacementRequest, device_meshes
from raypar.plan import MeshSlice


def _want(name: str, *cpus: float, key: str = "mesh.num_workers") -> PlacementRequest:
    return PlacementRequest(name, tuple({"CPU": c} for c in cpus), ("",) * len(cpus), key=key)


def _held() -> list[str]:
    from raypar.mesh.placement import holders

    return sorted(holder.name for holder in holders())


def test_from_ray_sees_the_session(ray_session: str) -> None:
    cluster = Cluster.from_ray()
    assert cluster.shape == (16,)
    assert cluster.kind == "CPU"
    assert len(cluster.nodes[0].id) == 56
    assert Cluster.from_ray(ray_session) == cluster
    with pytest.raises(ClusterError, match="connected to"):
        Cluster.from_ray("127.0.0.1:1")


def test_the_probe_knows_a_real_head(ray_session: str) -> None:
    from raypar.mesh._probe import probe

    probe(ray_session)


def test_meshes_become_named_pinned_groups(ray_session: str) -> None:
    import ray
    from ray.util.placement_group import placement_group_table

    from raypar.mesh.bundles import BundleRange
    from raypar.mesh.placement import acquired, check_nodes

    cluster = Cluster.from_ray()
    meshes, _ = device_meshes([MeshSlice((0, 1), (2,)), MeshSlice((2,), (1,))], "test")

    @ray.remote
    class Probe:
        def where(self) -> tuple[str, str | None, dict[str, float]]:
            context = ray.get_runtime_context()
            return (
                context.get_node_id(),
                context.get_placement_group_id(),
                context.get_assigned_resources(),
            )

    with acquired([m.request(cluster) for m in meshes]) as groups:
        tables = [placement_group_table(g) for g in groups]
        assert [t["name"] for t in tables] == ["raypar/test/stage-0", "raypar/test/stage-1"]
        nodes = {n for t in tables for n in t["bundles_to_node_id"].values()}
        assert nodes == {cluster.nodes[0].id}
        bundles = BundleRange.own(meshes[0].name, groups[0])
        actor = Probe.options(**bundles.actor_options(1)).remote()
        node, group, resources = ray.get(actor.where.remote())
        assert group == groups[0].id.hex()
        assert resources == {"CPU": 1}
        check_nodes({0: node, 1: node, 2: node}, cluster)
    assert _held() == []


def test_a_pin_to_an_unknown_node_is_refused(ray_session: str) -> None:
    from raypar.mesh.placement import acquire

    cluster = Cluster((Node.of("CPU", 2, id="f" * 56),))
    with pytest.raises(ClusterError, match="not alive"):
        acquire([DeviceMesh("m", (0, 1), (2,)).request(cluster)])


def test_the_impossible_is_refused_at_once(ray_session: str) -> None:
    from raypar.mesh.placement import acquire

    with pytest.raises(ClusterError) as caught:
        acquire([_want("raypar/x/stage-0", *[1] * 12), _want("raypar/x/stage-1", *[1] * 12)], 3600)
    text = str(caught.value)
    for part in ("24 CPU", "16 CPU", "8 CPU missing", "raypar/x/stage-0", "total", "free"):
        assert part in text
    assert "Set mesh.num_workers to at most 16" in text
    with pytest.raises(ClusterError, match="GPU"):
        acquire([PlacementRequest("g", ({"GPU": 1, "CPU": 1},), ("",))], 3600)
    assert _held() == []


def test_a_busy_cluster_is_waited_for_and_then_told(ray_session: str) -> None:
    from raypar.mesh.placement import acquire, acquired

    with acquired([_want("the-other-run", *[1] * 14)]):
        with pytest.raises(ClusterError) as caught:
            acquire([_want("a", 1, 1), _want("b", 4)], 0.6, attempt_s=0.2, deadline_key="patience")
        assert "set a longer deadline (patience=2.4)" in str(caught.value)
        assert "placement group the-other-run: 14 CPU" in str(caught.value)
        assert _held() == ["the-other-run"]


def test_a_busy_request_succeeds_once_there_is_room(ray_session: str) -> None:
    from raypar.mesh.placement import acquire, release

    first = acquire([_want("first", *[1] * 12)])
    timer = threading.Timer(0.5, release, [first])
    timer.start()
    second = acquire([_want("second", 8)], 30, attempt_s=0.3)
    timer.join()
    release(second)
    assert _held() == []


def test_nothing_is_given_back_while_ray_places_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles of such a group may stay taken for ever; shown by contention under load."""
    from raypar.mesh import placement

    states = iter(["SCHEDULING_STARTED", "SCHEDULING_STARTED", "NO_RESOURCES"])
    told: list[str] = []

    def look(group: Any) -> dict[str, Any]:
        told.append(next(states))
        return {"state": "PENDING", "stats": {"scheduling_state": told[-1]}}

    removed: list[int] = []
    monkeypatch.setattr(placement, "placement_group_table", look)
    monkeypatch.setattr(placement, "remove_placement_group", lambda g: removed.append(len(told)))
    placement._remove(object())  # type: ignore[arg-type]
    assert removed == [3]


def test_contending_jobs_never_hold_half_each(ray_session: str) -> None:
    """Four jobs want two groups of 6 CPUs each, of 16: one job fits at a time, four halves do not.

    Without giving back, two jobs would hold one group each for ever.
    """
    from raypar.mesh.placement import acquire, release

    inside: list[str] = []
    overlaps: list[list[str]] = []
    lock = threading.Lock()
    start = threading.Barrier(4)

    def job(name: str) -> str:
        start.wait()
        groups = acquire([_want(f"{name}-0", *[2] * 3), _want(f"{name}-1", 6)], 100, attempt_s=0.3)
        with lock:
            inside.append(name)
            overlaps.append(list(inside))
        time.sleep(0.05)
        with lock:
            inside.remove(name)
        release(groups)
        return name

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(job, "wxyz")) == list("wxyz")
    assert len(overlaps) == 4
    assert all(len(names) == 1 for names in overlaps)
    assert _held() == []


@pytest.mark.timeout(300)
def test_contending_processes(ray_session: str) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def job(name: str) -> str:
        from raypar.mesh.placement import acquired

        want = [_want(f"{name}-0", 5), _want(f"{name}-1", 5)]
        with acquired(want, 120, attempt_s=0.3) as groups:
            return f"{name} {len(groups)}"

    # Far more than a job waits for the other: both begin with processes that import torch.
    assert ray.get([job.remote("p"), job.remote("q")], timeout=270) == ["p 2", "q 2"]
    assert _held() == []


def test_an_interrupt_leaves_nothing(ray_session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.util.placement_group import PlacementGroup

    from raypar.mesh.placement import acquire

    def interrupted(self: Any, timeout_seconds: float) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(PlacementGroup, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        acquire([_want("i", 1), _want("j", 1)])
    assert _held() == []


def test_release_twice_is_safe(ray_session: str) -> None:
    from raypar.mesh.placement import acquire, release

    groups = acquire([_want("twice", 1)])
    release(groups)
    release(groups)


def test_lent_bundles(ray_session: str) -> None:
    from raypar.mesh.bundles import BundleRange
    from raypar.mesh.placement import acquired

    with acquired([_want("trial", *[1] * 4)]) as (group,):
        lent = BundleRange.lent("workers", group, 1, 3)
        cluster, order = lent.cluster()
        assert cluster.shape == (3,)
        assert cluster.kind == "CPU"
        assert order == (0, 1, 2)
        part = lent.sub("stage-1", 1, 2)
        options = part.actor_options(1)
        assert options["scheduling_strategy"].placement_group_bundle_index == 3
        assert options["num_cpus"] == 1
        assert options["max_restarts"] == 0
        lent.release()
        assert _held() == ["trial"]
        with pytest.raises(ClusterError, match="has 4"):
            BundleRange.lent("too many", group, 2, 3)
        with pytest.raises(ClusterError, match="which has 3"):
            lent.sub("too many", 2, 2)
        with pytest.raises(ClusterError, match="0 to 2"):
            lent.bundle(3)
        with pytest.raises(ClusterError, match="does not run inside"):
            BundleRange.current("here", 1)


def test_current_group_counts_from_the_end(ray_session: str) -> None:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from raypar.mesh.placement import acquired

    @ray.remote(num_cpus=1)
    def trial() -> tuple[int, int]:
        from raypar.mesh.bundles import BundleRange

        mine = BundleRange.current("workers", 2)
        return mine.first, mine.count

    with acquired([_want("trial", 1, 1, 1)]) as (group,):
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        ran = trial.options(scheduling_strategy=strategy).remote()
        assert ray.get(ran, timeout=60) == (1, 2)


def test_actors_elsewhere_are_named() -> None:
    from raypar.mesh.placement import check_nodes

    a, b = "a" * 56, "b" * 56
    pinned = Cluster((Node.of("CPU", 1, name="n0", id=a), Node.of("CPU", 1, name="n1", id=b)))
    check_nodes({0: a, 1: b}, pinned)
    with pytest.raises(
        ClusterError, match=r"device 1 .*should be on Ray node b+, its actor is on a"
    ):
        check_nodes({0: a, 1: a}, pinned)
    free = Cluster((Node.of("CPU", 2, name="n0"), Node.of("CPU", 1, name="n1")))
    check_nodes({0: b, 1: b, 2: a}, free)
    with pytest.raises(ClusterError, match="device 1"):
        check_nodes({0: a, 1: b, 2: b}, free)
    with pytest.raises(ClusterError, match="already stands for node n0"):
        check_nodes({0: a, 1: a, 2: a}, free)
