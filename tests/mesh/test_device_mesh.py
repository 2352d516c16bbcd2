"""Meshes, their placement requests, and whether a cluster can hold them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypar.errors import ClusterError
from raypar.mesh import Cluster, DeviceMesh, Node, PlacementRequest, device_meshes
from raypar.mesh._feasible import Holder, NodeState, in_the_way, largest_value, shortage
from raypar.plan import MeshSlice

A, B = "a" * 56, "b" * 56


def _cluster(kind: str = "CPU", ids: bool = True) -> Cluster:
    return Cluster(
        (
            Node.of(kind, 4, name="n0", id=A if ids else ""),
            Node.of(kind, 4, name="n1", id=B if ids else ""),
        )
    )


def test_requests_are_pinned_to_the_nodes_of_the_plan() -> None:
    request = DeviceMesh("raypar/x/stage-0", (3, 4), (2,)).request(_cluster("H100"))
    assert request.nodes == (A, B)
    assert request.bundles == ({"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1})
    assert request.total() == {"CPU": 2, "GPU": 2}
    loose = DeviceMesh("m", (3, 4), (2,)).request(_cluster(ids=False), extra={"memory": 5})
    assert loose.nodes == ("", "")
    assert loose.bundles[0] == {"CPU": 1, "memory": 5}


def test_coordinates_and_lines() -> None:
    mesh = DeviceMesh("m", tuple(range(6)), (2, 3), ("data", "model"))
    assert [mesh.coordinate(i) for i in range(6)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    assert mesh.lines("data") == ((0, 3), (1, 4), (2, 5))
    assert mesh.lines("model") == ((0, 1, 2), (3, 4, 5))
    with pytest.raises(ClusterError, match="data, model"):
        mesh.lines("tensor")


@pytest.mark.parametrize(
    ("devices", "shape", "axes", "told"),
    [
        ((), (0,), ("data",), "no devices"),
        ((1, 1), (2,), ("data",), r"\[1\] appear twice"),
        ((1, 2), (3,), ("data",), "holds 3 devices, but 2"),
        ((1, 2), (2,), ("data", "model"), "axes"),
        ((1, 2), (1, 2), ("data", "data"), "different names"),
    ],
)
def test_malformed_meshes(
    devices: tuple[int, ...], shape: tuple[int, ...], axes: tuple[str, ...], told: str
) -> None:
    with pytest.raises(ClusterError, match=told):
        DeviceMesh("m", devices, shape, axes)


def test_stages_with_equal_slices_share_a_mesh() -> None:
    slices = [MeshSlice((0, 1), (2,)), MeshSlice((2, 3), (2,)), MeshSlice((0, 1), (2,))]
    meshes, index = device_meshes(slices, "gpt")
    assert [m.name for m in meshes] == ["raypar/gpt/stages-0,2", "raypar/gpt/stage-1"]
    assert index == (0, 1, 0)
    with pytest.raises(ClusterError, match="stages 0 and 1 share device 1"):
        device_meshes([MeshSlice((0, 1), (2,)), MeshSlice((1, 2), (2,))], "gpt")


def _node(id: str = A, cpu: float = 4, free: float = 4, **more: float) -> NodeState:
    return NodeState(id, f"host-{id[0]}", {"CPU": cpu, **more}, {"CPU": free, **more})


def _want(*cpus: float, nodes: tuple[str, ...] = (), strategy: str = "PACK") -> PlacementRequest:
    return PlacementRequest(
        "m", tuple({"CPU": c} for c in cpus), nodes or ("",) * len(cpus), strategy
    )


@pytest.mark.parametrize(
    ("requests", "told"),
    [
        ([_want(8)], "any one node would have to hold 8 CPU but has 4"),
        ([_want(*[1] * 9)], "9 CPU but has 8 in total: 1 CPU missing"),
        ([_want(*[3] * 2), _want(2, nodes=(A,))], "room for 1 of them"),
        ([_want(3, nodes=(A,)), _want(2, nodes=(A,))], "host-a would have to hold 5 CPU but has 4"),
        ([_want(1, nodes=("c" * 56,))], "not alive"),
        ([_want(1, 1, 1, strategy="STRICT_SPREAD")], "3 different nodes"),
        ([_want(3, 3, strategy="STRICT_PACK")], "one node"),
        ([PlacementRequest("m", ({"GPU": 1},), ("",))], "1 GPU but has 0"),
    ],
)
def test_what_can_never_fit_is_told(requests: list[PlacementRequest], told: str) -> None:
    why = shortage(requests, [_node(A), _node(B)])
    assert why is not None
    assert told in why


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_what_fits_is_never_refused(sizes: list[int], data: st.DataObject) -> None:
    nodes = [_node(chr(97 + i) * 56, cpu=n, free=0) for i, n in enumerate(sizes)]
    bundles: list[int] = []
    pins: list[str] = []
    for node, size in zip(nodes, sizes, strict=True):
        left = size
        while left and data.draw(st.booleans()):
            cpu = data.draw(st.integers(1, left))
            left -= cpu
            bundles.append(cpu)
            pins.append(data.draw(st.sampled_from(["", node.id])))
    if bundles:
        assert shortage([_want(*bundles, nodes=tuple(pins))], nodes) is None


def test_largest_value_counts_bundles_like_the_asked() -> None:
    assert largest_value([_want(*[2] * 9)], [_node(A), _node(B, cpu=5)]) == 4
    assert largest_value([_want(9)], [_node(A)]) == 0


def test_in_the_way_names_groups_and_the_rest() -> None:
    text = in_the_way([_want(4)], [_node(A, free=1)], [Holder("other-run", {A: {"CPU": 2}})])
    assert "placement group other-run: 2 CPU" in text
    assert "outside placement groups: 1 CPU" in text
