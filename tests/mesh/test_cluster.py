"""Device table, cluster values, and their YAML form."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypar.errors import ClusterError
from raypar.mesh import DEVICES, Cluster, Link, Node, device_kind
from raypar.mesh.calibration import table_calibration

H100 = DEVICES["H100"]


def test_every_row_is_complete() -> None:
    assert set(DEVICES) == {"V100", "A100-40", "A100-80", "H100", "H200", "B200", "L4", "CPU"}
    for kind in DEVICES.values():
        assert kind.source
        assert kind.bandwidth > 0
        assert kind.peak("float32") > 0
        assert kind.peak("bfloat16") >= kind.peak("float32") >= kind.peak("float64")
        assert kind.inside.bandwidth >= kind.across.bandwidth
        assert (kind.memory > 0) == kind.is_gpu


def test_peak_of_a_missing_format_is_the_next_wider_one() -> None:
    assert device_kind("V100").peak("torch.bfloat16") == 15.7e12
    assert device_kind("A100-80").peak("float8_e4m3fn") == 312e12
    with pytest.raises(ClusterError, match="float32"):
        H100.peak("floot32")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("h100", "H100"), ("A100", "A100-40"), ("A100-80G", "A100-80"), ("cpu", "CPU")],
)
def test_lookup_by_rays_names(name: str, expected: str) -> None:
    assert device_kind(name).name == expected


def test_unknown_device_proposes_the_nearest() -> None:
    with pytest.raises(ClusterError, match="Did you mean 'H200'"):
        device_kind("H20")


def test_local_is_one_node_of_cpu_devices() -> None:
    cluster = Cluster.local(4)
    assert (cluster.shape, cluster.kind, cluster.n_devices) == ((4,), "CPU", 4)
    assert cluster.memory(0) * 4 <= cluster.nodes[0].host_memory
    assert Cluster.local().n_devices >= 1


@pytest.mark.parametrize("n", [0, -1, 2.5, True])
def test_local_refuses(n: object) -> None:
    with pytest.raises(ClusterError, match="n must be a whole number"):
        Cluster.local(n)  # type: ignore[arg-type]


def test_devices_are_numbered_node_after_node() -> None:
    cluster = Cluster((Node.of("H100", 2, name="a"), Node.of("L4", 3, name="b")))
    assert [cluster.device(i) for i in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert cluster.kind == "H100+L4"
    assert not cluster.homogeneous
    assert list(cluster.devices_of(1)) == [2, 3, 4]
    assert cluster.memory(1) == 80 * 10**9
    assert cluster.memory(2) == 24 * 10**9
    with pytest.raises(ClusterError, match="0 to 4"):
        cluster.device(5)


def test_links() -> None:
    cluster = Cluster((Node.of("H100", 2, name="a"), Node.of("L4", 2, name="b")))
    assert cluster.link(0, 1).name == "NVLink 4"
    assert cluster.link(0, 2) == cluster.link(2, 0)
    assert cluster.link(0, 2).bandwidth == DEVICES["L4"].across.bandwidth
    assert cluster.link(3, 3).seconds(1e9) == 0
    assert Link(1e9, 1e-3).seconds(1e9) == pytest.approx(1.001)


def test_virtual_takes_its_own_links() -> None:
    cluster = Cluster.virtual(nodes=2, devices_per_node=4, device="A100-80", across=Link(1e9, 1e-5))
    assert cluster.shape == (4, 4)
    assert cluster.link(0, 4).bandwidth == 1e9
    assert cluster.homogeneous
    assert "2 nodes x 4 A100-80" in cluster.describe()


def test_equal_names_are_refused() -> None:
    with pytest.raises(ClusterError, match="two nodes are called 'a'"):
        Cluster((Node.of("L4", 1, name="a"), Node.of("L4", 1, name="a")))
    with pytest.raises(ClusterError, match="no nodes"):
        Cluster(())


def test_fingerprint_feels_hardware_not_names() -> None:
    a = Cluster((Node.of("H100", 8, name="x", id="1" * 56),), "one")
    b = Cluster((Node.of("H100", 8, name="y"),), "two")
    assert a.fingerprint() == b.fingerprint()
    others = [
        Cluster((Node.of("H100", 7),)),
        Cluster((Node.of("H200", 8),)),
        Cluster((Node.of("H100", 8, across=Link(1e9, 0)),)),
        Cluster((Node.of("H100", 8, host_memory=1 << 40),)),
    ]
    assert len({c.fingerprint() for c in [a, *others]}) == 5


_links = st.builds(Link, st.floats(1, 1e13), st.floats(0, 1), st.text(max_size=5))
_nodes = st.builds(
    lambda kind, n, memory, inside, across, id: Node.of(
        kind, n, host_memory=memory, inside=inside, across=across, id=id
    ),
    st.sampled_from(sorted(DEVICES)),
    st.integers(1, 64),
    st.integers(1, 2**42),
    _links,
    _links,
    st.sampled_from(["", "ab" * 28]),
)


@given(st.lists(_nodes, min_size=1, max_size=4))
def test_dict_round_trip(nodes: list[Node]) -> None:
    import dataclasses

    named = tuple(dataclasses.replace(n, name=f"n{i}") for i, n in enumerate(nodes))
    cluster = Cluster(named, "c")
    assert Cluster.from_dict(cluster.to_dict()) == cluster


def test_file_round_trip_with_an_own_kind(tmp_path: Path) -> None:
    import dataclasses

    own = dataclasses.replace(H100, name="H100-PCIe", memory=94 * 10**9, source="mine")
    cluster = Cluster((Node.of(own, 2, name="a"), Node.of("CPU", 4, name="b")))
    cluster.save(tmp_path / "c.yaml")
    again = Cluster.load(tmp_path / "c.yaml")
    assert again == cluster
    assert again.fingerprint() == cluster.fingerprint()


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_load_reads_units_and_counts(tmp_path: Path) -> None:
    text = """
name: lab
nodes:
  - {name: big, device: h100, devices: 8, host_memory: 2 TB, count: 2}
  - {device: L4, devices: 4, host_memory: 64GiB, across: {bandwidth: 12.5 GB/s, latency: 1e-5}}
"""
    cluster = Cluster.load(_write(tmp_path, text))
    assert cluster.shape == (8, 8, 4)
    assert [n.name for n in cluster.nodes] == ["big-0", "big-1", "node2"]
    assert cluster.nodes[0].host_memory == 2 * 10**12
    assert cluster.nodes[2].host_memory == 64 * 2**30
    assert cluster.nodes[2].across == Link(12.5e9, 1e-5)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nodes: []", "nodes: list should have at least 1"),
        ("- 1", "expected a mapping with the key 'nodes'"),
        ("nods: []", "nods: unknown key.*Did you mean 'nodes'"),
        (
            "nodes: [{device: H100, host_memory: 1}]",
            r"nodes\[0\].devices: this key is missing, such as devices: 8",
        ),
        ("nodes: [{device: H100, devices: 0, host_memory: 1}]", r"nodes\[0\].devices: .*found 0"),
        ("nodes: [{device: H10, devices: 1, host_memory: 1}]", r"nodes\[0\].device: .*H100"),
        ("nodes: [{device: L4, device_s: 2, host_memory: 1}]", "Did you mean 'devices'"),
        ("nodes: [{device: L4, devices: 2, host_memory: 3 parsec}]", "host_memory: .*is no size"),
        (
            "nodes: [{device: L4, devices: 2, host_memory: 1, inside: {bandwith: 1}}]",
            "inside.bandwith: unknown key.*Did you mean 'bandwidth'",
        ),
        ("nodes: {", "not valid YAML"),
        (
            "{device_kinds: {X: {flops: {floot: 1}, memory: 1, bandwidth: 1, inside: {bandwidth: 1}"
            ", host: {bandwidth: 1}, across: {bandwidth: 1}}}, "
            "nodes: [{device: X, devices: 1, host_memory: 1}]}",
            "device_kinds.X.flops.floot",
        ),
    ],
)
def test_load_names_the_key(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ClusterError, match=f"(?s){told}"):
        Cluster.load(_write(tmp_path, text))


def test_load_tells_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"nowhere\.yaml"):
        Cluster.load(tmp_path / "nowhere.yaml")


def test_take_keeps_places_where_it_can() -> None:
    cluster = Cluster(tuple(Node.of("L4", n, name=f"n{n}") for n in (8, 4, 2)))
    part = cluster.take((4, 4))
    assert [(n.name, n.devices) for n in part.nodes] == [("n8", 4), ("n4", 4)]
    part = cluster.take((2, 8))
    assert [(n.name, n.devices) for n in part.nodes] == [("n2", 2), ("n8", 8)]
    with pytest.raises(ClusterError, match="at most 14"):
        cluster.take((8, 8))


def test_take_keeps_a_cores_share_of_memory() -> None:
    cluster = Cluster.local(4)
    assert cluster.take((2,)).memory(0) == cluster.memory(0)


@given(st.permutations([1, 2, 3, 4, 5]), st.data())
def test_take_finds_every_assignment_there_is(have: list[int], data: st.DataObject) -> None:
    need = [data.draw(st.integers(1, n)) for n in data.draw(st.permutations(have))]
    cluster = Cluster(tuple(Node.of("L4", n, name=f"n{n}") for n in have))
    assert cluster.take(tuple(need)).shape == tuple(need)


def test_a_slow_nodes_devices_are_a_kind_of_their_own() -> None:
    raw = {"nodes": [{"device": "L4", "devices": 2, "host_memory": "64 GB", "speed": 0.5}]}
    cluster = Cluster.from_dict(raw)
    slow, table = cluster.nodes[0].device, DEVICES["L4"]
    assert slow.name == "L4@0.5"
    assert slow.peak("float16") == table.peak("float16") / 2
    assert slow.bandwidth == table.bandwidth / 2
    assert (slow.memory, slow.across) == (table.memory, table.across)
    assert Cluster.from_dict(cluster.to_dict()) == cluster
    with pytest.raises(ClusterError, match=r"nodes\[0\].speed"):
        Cluster.from_dict({"nodes": [{**raw["nodes"][0], "speed": 1.5}]})


def test_a_slow_device_reaches_its_share_of_what_was_measured_of_its_kind() -> None:
    table = DEVICES["A100-80"]
    own = table_calibration(Cluster((Node.of(table, 1),)))
    slow = own.rates(table.at_speed(0.25))
    whole = own.rates(table)
    work = 3e11
    assert slow.curve("float16").seconds(
        work, table.at_speed(0.25).peak("float16")
    ) == pytest.approx(4 * whole.curve("float16").seconds(work, table.peak("float16")), rel=1e-2)
    for mine, like in (
        (slow.bytes_curve("plain"), whole.bytes_curve("plain")),
        (slow.optimizer, whole.optimizer),
    ):
        assert mine.seconds(1e9) == pytest.approx(4 * like.seconds(1e9))
