"""Interfaces and ports: what is chosen, what is refused and in which words."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from raypar.comm import network, rendezvous
from raypar.comm.gloo import GlooGroup
from raypar.comm.network import Interface, NetworkSettings, interfaces, listen
from raypar.comm.rendezvous import Rendezvous
from raypar.errors import CommError, ConfigError
from tests.comm.test_connect import exchange, together

TWO_CARDS = [
    Interface("lo", "127.0.0.1/8"),
    Interface("eth0", "192.168.1.5/24"),
    Interface("ib0", "10.0.3.7/16"),
]


@pytest.fixture
def _two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interfaces", lambda: TWO_CARDS)


@pytest.mark.usefixtures("_two_cards")
@pytest.mark.parametrize(
    ("interface", "host", "variable"),
    [
        (None, "192.168.1.5", None),
        ("ib0", "10.0.3.7", "=ib0"),
        ("eth0", "192.168.1.5", "=eth0"),
        ("10.0.0.0/8", "10.0.3.7", "=ib0"),
        ("192.168.0.0/16", "192.168.1.5", "=eth0"),
    ],
)
def test_the_address_of_a_node(interface: str | None, host: str, variable: str | None) -> None:
    settings = NetworkSettings(interface)
    assert settings.host("192.168.1.5") == host
    assert settings.environment("192.168.1.5").get("NCCL_SOCKET_IFNAME") == variable


@pytest.mark.usefixtures("_two_cards")
def test_nodes_that_share_an_interface_keep_their_own_address() -> None:
    for settings in (NetworkSettings("lo"), NetworkSettings("127.0.0.0/8")):
        assert settings.host("127.0.0.3") == "127.0.0.3"


@pytest.mark.usefixtures("_two_cards")
def test_an_interface_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(CommError) as caught:
        NetworkSettings("ib1").host("192.168.1.5")
    text = str(caught.value)
    assert "lo 127.0.0.1/8, eth0 192.168.1.5/24, ib0 10.0.3.7/16" in text
    assert "Did you mean 'ib0'?" in text
    with pytest.raises(CommError, match="does not have"):
        NetworkSettings("172.16.0.0/12").host("192.168.1.5")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"interface": "10.0.0.0/99"}, "not a network"),
        ({"interface": "eth0; rm"}, "no interface name"),
        ({"port_range": (5000, 4000)}, "20000, 20063"),
        ({"port_range": (80, 90)}, "1024"),
        ({"port_range": (5000, 70000)}, "65535"),
        ({"port_range": "5000-6000"}, "a first and a last port"),
        ({"nccl_env": {"LD_PRELOAD": "x"}}, "NCCL_, FI_, UCX_"),
        ({"nccl_env": {"NCCL_DEBUG": 1}}, "expected a name in capitals and a text"),
        ({"nccl_env": {"NCCL_COMM_ID": "x"}}, "ships NCCL's ids"),
        ({"nccl_env": {"NCCL_NET_PLUGIN": "/tmp/x.so"}}, "does not load code by path"),
        ({"interface": "lo", "nccl_env": {"NCCL_SOCKET_IFNAME": "lo"}}, "same thing"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        NetworkSettings(**values)
    assert f"{network.SECTION}." in str(caught.value)


def test_this_machine_has_a_loopback() -> None:
    found = interfaces()
    assert any(i.address == "127.0.0.1" and i.holds("127.0.0.9") for i in found)
    assert {i.name for i in found} <= {name for _, name in socket.if_nameindex()}


def test_a_port_of_the_range_or_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CommError, match=f"none of the 1 ports {port} to {port}"):
            listen("127.0.0.1", (port, port))
        with listen("127.0.0.1", (port, port + 3)) as free:
            assert port < free.getsockname()[1] <= port + 3
    with pytest.raises(CommError, match=r"this machine has .*127\.0\.0\.1/8"):
        listen("192.0.2.1", (20000, 20100))


def test_a_listener_is_bound_to_its_host_alone() -> None:
    server = Rendezvous("127.0.0.2")
    assert _reaches("127.0.0.2", server.address.port)
    assert not _reaches("127.0.0.1", server.address.port)
    server.close()
    assert not _reaches("127.0.0.2", server.address.port)


def _reaches(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True


def test_two_nodes_on_two_loopback_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = iter(range(100))
    monkeypatch.setattr(rendezvous, "_machine", lambda: f"machine {next(machines)}")
    heard: list[tuple[str, int]] = []

    def listening(host: str, port_range: tuple[int, int] | None = None) -> socket.socket:
        sock = listen(host, port_range)
        heard.append(sock.getsockname())
        return sock

    monkeypatch.setattr(rendezvous, "listen", listening)
    settings = NetworkSettings("127.0.0.0/8", (22000, 22100))
    server = Rendezvous(settings.host("127.0.0.2"), settings.port_range)

    def one(rank: int) -> tuple[float, str]:
        group = GlooGroup.create(
            "two nodes",
            rank,
            2,
            server.address,
            host=f"127.0.0.{2 + rank}",
            timeout_s=20.0,
            network=settings,
        )
        endpoint: Any = group._endpoint
        [peer] = endpoint._peers.values()
        ends = (peer._sock.getsockname(), peer._sock.getpeername())
        total = exchange(group)
        group.close()
        return total, ends[rank][0]  # the end that dialled may have any address of the machine

    assert together(2, one) == [(400_000.0, "127.0.0.2"), (400_000.0, "127.0.0.2")]
    assert {host for host, _ in heard} == {"127.0.0.2", "127.0.0.3"}
    assert all(22000 <= port <= 22100 for _, port in heard)


def test_nccl_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(network, "_applied", None)
    monkeypatch.setattr(os, "environ", {})
    settings = NetworkSettings("lo", nccl_env={"NCCL_DEBUG": "INFO"})
    settings.apply_environment("127.0.0.1")
    settings.apply_environment("127.0.0.1")
    assert os.environ == {"NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "=lo"}
    with pytest.raises(CommError, match="reads them once"):
        NetworkSettings().apply_environment("127.0.0.1")
