"""Addresses, probes, and what ray.nodes() is turned into. Starts no Ray."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from raypar.errors import ClusterError
from raypar.mesh import DEVICES, Cluster
from raypar.mesh._probe import probe, split_address
from raypar.mesh.discover import connect, nodes_from, resolve

_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@contextmanager
def _server(answer: bytes | None) -> Iterator[str]:
    """Listens; answers every connection with `answer`, or never (None)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        held: list[socket.socket] = []

        def serve() -> None:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.append(connection)
            if answer is not None:
                connection.recv(64)
                connection.sendall(answer)
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            thread.join()
            for connection in held:
                connection.close()


def _dead_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_dead_address_is_told() -> None:
    with pytest.raises(ClusterError, match="no Ray cluster answers at 127"):
        probe(_dead_address())


def test_from_ray_refuses_a_dead_address(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("connected to a dead address"))
    with pytest.raises(ClusterError, match="RAY_ADDRESS"):
        Cluster.from_ray(_dead_address())
    monkeypatch.setenv("RAY_ADDRESS", _dead_address())
    with pytest.raises(ClusterError, match="RAY_ADDRESS"):
        Cluster.from_ray()


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_another_service_is_no_ray_head(answer: bytes | None) -> None:
    with _server(answer) as address, pytest.raises(ClusterError, match="not a Ray head"):
        probe(address, timeout_s=0.5)


def test_a_head_that_hangs_is_told_as_such() -> None:
    with _server(None) as address, pytest.raises(ClusterError, match=r"says nothing within 0\.5 s"):
        probe(address, timeout_s=0.5)


def test_a_settings_frame_is_a_grpc_server() -> None:
    with _server(_SETTINGS) as address:
        probe(address)


def test_a_head_without_a_node_here_is_told_before_ray_waits_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray waits a minute for a node"))
    monkeypatch.setattr("raypar.mesh.discover.ray_node_on_this_machine", lambda *_: False)
    with _server(_SETTINGS) as address, pytest.raises(ClusterError) as told:
        connect(address)
    assert f"ray start --address={address}" in str(told.value)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("ray://head:10001", ("head", 10001)),
        ("[::1]:6379", ("::1", 6379)),
    ],
)
def test_addresses(address: str, expected: tuple[str, int]) -> None:
    assert split_address(address) == expected


@pytest.mark.parametrize(
    "address", ["head", "head:", ":6379", "head:x", "head:70000", "http://h:1"]
)
def test_malformed_addresses(address: str) -> None:
    with pytest.raises(ClusterError, match="host"):
        split_address(address)


def test_resolve_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raypar.mesh.discover.ray_address_on_this_machine", _dead_address)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert resolve(None) == "local"  # what a Ray that has ended left behind is not used
    with pytest.raises(ClusterError, match="ray start --head"):
        resolve("auto")
    monkeypatch.setenv("RAY_ADDRESS", "head:1")
    assert resolve(None) == resolve("auto") == "head:1"
    assert resolve("other:2") == "other:2"
    assert resolve("local") == "local"


def _record(name: str, id: str, labels: dict[str, str] | None = None, **resources: float) -> Any:
    return {
        "NodeID": id,
        "Alive": True,
        "NodeManagerHostname": name,
        "NodeManagerAddress": name,
        "Resources": {k.replace("__", ":"): v for k, v in resources.items()},
        "Labels": labels or {},
    }


def test_gpus_are_preferred_and_known_by_their_label() -> None:
    records = [
        _record("cpu", "1", CPU=64, memory=10),
        _record("h", "2", {"ray.io/accelerator-type": "H100"}, CPU=8, GPU=8, memory=10),
        _record(
            "a",
            "3",
            {"ray.io/accelerator-type": "A100"},
            GPU=4,
            **{"accelerator_type__A100-80G": 1},
        ),
    ]
    nodes = nodes_from(records)
    assert [(n.name, n.devices, n.device.name, n.id) for n in nodes] == [
        ("a", 4, "A100-80", "3"),
        ("h", 8, "H100", "2"),
    ]
    assert [n.device.name for n in nodes_from(records, "cpu")] == ["CPU", "CPU"]


def test_unknown_accelerators_need_a_kind() -> None:
    records = [_record("x", "1", {"ray.io/accelerator-type": "T4"}, GPU=1)]
    with pytest.raises(ClusterError, match="device_kinds"):
        nodes_from(records)
    assert nodes_from(records, "GPU", {"T4": DEVICES["L4"]})[0].device is DEVICES["L4"]


def test_dead_and_empty_nodes_do_not_count() -> None:
    dead = _record("d", "1", CPU=4) | {"Alive": False}
    with pytest.raises(ClusterError, match="no alive node"):
        nodes_from([dead])
    with pytest.raises(ClusterError, match="has a GPU"):
        nodes_from([_record("x", "1", CPU=4)], "GPU")
    nodes = nodes_from(
        [dead, _record("h", "2"), _record("x", "3", CPU=2.5), _record("x", "4", CPU=1)]
    )
    assert [(n.name, n.devices) for n in nodes] == [("x", 2), ("x#2", 1)]


def test_the_head_comes_first() -> None:
    head = _record("z", "9", CPU=1)
    head["Resources"]["node:__internal_head__"] = 1.0
    assert [n.name for n in nodes_from([_record("a", "1", CPU=1), head])] == ["z", "a"]
