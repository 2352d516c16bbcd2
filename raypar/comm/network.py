"""Which interface and ports a run uses, and what NCCL is told of it.

Every socket that raypar opens is bound to one address of its node: by default the one by which Ray
knows the node, never to all interfaces.
"""

from __future__ import annotations

import ipaddress
import os
import random
import re
import socket
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from raypar.errors import CommError, ConfigError, did_you_mean

SECTION = "comm"
"""The section of a configuration whose keys errors name."""

_LOWEST_PORT, _HIGHEST_PORT = 1024, 65535
_ENV_PREFIXES = ("NCCL_", "FI_", "UCX_")
_ENV_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
_BACKLOG = 128
# ioctl requests for an interface's address and mask: values of Linux's <sys/sockio.h>, macOS's.
_GET_ADDRESS, _GET_MASK = (0xC0206921, 0xC0206925) if sys.platform == "darwin" else (0x8915, 0x891B)

_applied: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Interface:
    """An address that this machine has.

    Attributes:
        name: Of the interface (``eth0``).
        network: Its address with the network's length (``10.0.3.7/24``).
    """

    name: str
    network: str

    @property
    def address(self) -> str:
        """The address alone."""
        return self.network.partition("/")[0]

    def holds(self, address: str) -> bool:
        """Whether `address` belongs to the interface's network."""
        return _within(address, self.network)


@dataclass(frozen=True)
class NetworkSettings:
    """The ``comm`` section of a configuration; picklable, and equal on every rank.

    Attributes:
        interface: Name of an interface that every node has (``eth1``), or a network in CIDR form
            (``10.0.0.0/16``) for nodes that name it differently; None for the address by which
            Ray knows each node.
        port_range: First and last TCP port (inclusive) on which ranks listen; None for any free
            one. Only the listening end is in it: what dials takes its port from the system.
        nccl_env: Environment variables that every rank sets before its first NCCL communicator.
            NCCL opens sockets of its own. They go to `interface`, too, but they know neither the
            port range nor the run's token.

    Raises:
        ConfigError: A value that cannot be meant; it names the key.
    """

    interface: str | None = None
    port_range: tuple[int, int] | None = None
    nccl_env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.interface is not None:
            _check_interface(self.interface)
        if self.port_range is not None:
            object.__setattr__(self, "port_range", _checked_range(self.port_range))
        for name, value in self.nccl_env.items():
            _check_variable(name, value)
        if self.interface is not None and "NCCL_SOCKET_IFNAME" in self.nccl_env:
            raise ConfigError(
                f"{SECTION}.interface and {SECTION}.nccl_env.NCCL_SOCKET_IFNAME say the same "
                f"thing ({self.interface!r} and {self.nccl_env['NCCL_SOCKET_IFNAME']!r}): keep "
                "interface, from which raypar sets the variable"
            )

    def host(self, node_address: str) -> str:
        """The address on which ranks of this node listen.

        Args:
            node_address: The address by which Ray knows this node.

        Raises:
            CommError: The node has no such interface; it names those that it has.
        """
        if self.interface is None:
            return node_address
        found = interfaces()
        if "/" in self.interface:
            if _within(node_address, self.interface):
                return node_address
            fitting = [i for i in found if _within(i.address, self.interface)]
        else:
            fitting = [i for i in found if i.name == self.interface]
            if any(i.holds(node_address) for i in fitting):
                return node_address  # several nodes can share an interface (loopback, containers)
        if fitting:
            return fitting[0].address
        raise CommError(
            f"{SECTION}.interface is {self.interface!r}, which node {node_address} "
            f"({socket.gethostname()}) does not have; it has {describe(found)}."
            f"{did_you_mean(self.interface, [i.name for i in found])} Give one of these names, a "
            "network as 10.0.0.0/16, or leave the key out to use the address that Ray uses"
        )

    def environment(self, node_address: str) -> dict[str, str]:
        """The variables that a rank on this node sets for NCCL.

        Raises:
            CommError: As `host`.
        """
        told = dict(self.nccl_env)
        if self.interface is not None:
            address = self.host(node_address)
            names = [i.name for i in interfaces() if i.holds(address)]
            if names:
                told["NCCL_SOCKET_IFNAME"] = f"={names[0]}"  # "=": this name, not a prefix of names
        return told

    def apply_environment(self, node_address: str) -> None:
        """Sets the variables in this process; call it before the first NCCL communicator.

        Raises:
            CommError: As `host`; or another environment is in force already, which NCCL has read.
        """
        global _applied
        told = self.environment(node_address)
        if _applied is not None and _applied != told:
            raise CommError(
                f"this process has set {_applied or 'no variables'} for NCCL, which reads them "
                f"once, and is now asked for {told or 'none'}: start the run in new processes, or "
                f"keep the section {SECTION} as it was"
            )
        _applied = told
        os.environ.update(told)


def interfaces() -> list[Interface]:
    """Every address that this machine has, IPv4 first, in the system's order."""
    found: list[Interface] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            address, mask = (_ask(probe, name, what) for what in (_GET_ADDRESS, _GET_MASK))
            if address and mask:
                length = ipaddress.ip_network(f"0.0.0.0/{mask}").prefixlen
                found.append(Interface(name, f"{address}/{length}"))
    return found + _interfaces_v6()


def _ask(probe: socket.socket, name: str, request: int) -> str:
    import fcntl

    try:
        answer = fcntl.ioctl(probe.fileno(), request, struct.pack("256s", name.encode()[:15]))
    except OSError:  # it has no IPv4 address
        return ""
    return socket.inet_ntoa(answer[20:24])


def _interfaces_v6() -> list[Interface]:
    """IPv6 addresses as Linux lists them; link-local ones cannot be dialled without a scope."""
    try:
        lines = Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    found: list[Interface] = []
    for line in lines:
        digits, _, length, _, _, name = line.split()
        address = ipaddress.IPv6Address(bytes.fromhex(digits))
        if not address.is_link_local:
            found.append(Interface(name, f"{address}/{int(length, 16)}"))
    return found


def describe(found: Iterable[Interface]) -> str:
    """Interfaces as text: ``lo 127.0.0.1/8, eth0 10.0.3.7/24``."""
    return ", ".join(f"{i.name} {i.network}" for i in found) or "none"


def listen(host: str, port_range: tuple[int, int] | None = None) -> socket.socket:
    """A listening TCP socket on `host`, on a free port of the range.

    Args:
        host: Address of this machine; the socket is bound to it alone.
        port_range: First and last port to try; None for any.

    Raises:
        CommError: The host is not of this machine, or every port of the range is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if port_range is None:
        ports = [0]
    else:
        ports = list(range(port_range[0], port_range[1] + 1))
        # Ranks of a node start together: let them not all try the same port first.
        at = random.randrange(len(ports))
        ports = ports[at:] + ports[:at]
    last = OSError("no port")
    for port in ports:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            # A port whose connections are still open (or dying) may be listened on again.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            last = error
            if _not_of_this_machine(host):
                break
            continue
        return sock
    raise CommError(_no_socket(host, port_range, last))


def _no_socket(host: str, port_range: tuple[int, int] | None, error: OSError) -> str:
    if port_range is not None and not _not_of_this_machine(host):
        first, end = port_range
        return (
            f"none of the {end - first + 1} ports {first} to {end} ({SECTION}.port_range) can "
            f"be listened on at {host}: {error}. A node needs one for each of its ranks while they "
            f"connect and one for the rendezvous; widen it, for example to [{first}, "
            f"{min(_HIGHEST_PORT, end + 64)}]"
        )
    return (
        f"cannot listen at host {host!r}: {error}; this machine has {describe(interfaces())}. "
        f"Name one of them as {SECTION}.interface, or give an address of this machine, for "
        "example host='127.0.0.1'"
    )


def _not_of_this_machine(host: str) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return True
    return False


def _within(address: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(address) in ipaddress.ip_network(network, strict=False)
    except ValueError:  # a host name, or the other IP version
        return False


def _check_interface(text: str) -> None:
    if "/" in text:
        try:
            ipaddress.ip_network(text, strict=False)
        except ValueError as error:
            raise ConfigError(
                f"{SECTION}.interface: {text!r} is not a network ({error}); give one as "
                "10.0.0.0/16, or an interface's name"
            ) from None
    elif not re.fullmatch(r"[\w.:@-]{1,15}", text):
        raise ConfigError(
            f"{SECTION}.interface: {text!r} is no interface name (at most 15 letters, digits "
            f"and . : @ - _); this machine has {describe(interfaces())}"
        )


def _checked_range(given: tuple[int, int]) -> tuple[int, int]:
    valid = (
        isinstance(given, (tuple, list))
        and len(given) == 2
        and all(isinstance(p, int) and not isinstance(p, bool) for p in given)
    )
    if not valid or not _LOWEST_PORT <= given[0] <= given[1] <= _HIGHEST_PORT:
        raise ConfigError(
            f"{SECTION}.port_range: {given!r} is not a first and a last port (inclusive) from "
            f"{_LOWEST_PORT} to {_HIGHEST_PORT}; give for example [20000, 20063]"
        )
    return (given[0], given[1])


def _check_variable(name: str, value: str) -> None:
    key = f"{SECTION}.nccl_env.{name}"
    if not isinstance(name, str) or not name.startswith(_ENV_PREFIXES):
        raise ConfigError(
            f"{key}: names begin with {', '.join(_ENV_PREFIXES)}; other variables go into Ray's "
            "runtime_env (env_vars)"
        )
    if not _ENV_NAME.fullmatch(name) or not isinstance(value, str) or "\0" in value:
        raise ConfigError(f"{key}: expected a name in capitals and a text, found {value!r}")
    if name == "NCCL_COMM_ID":
        raise ConfigError(f"{key}: raypar ships NCCL's ids to the ranks itself; leave it out")
    if name.endswith("_PLUGIN") and "/" in value:
        raise ConfigError(
            f"{key}: {value!r} is a path, and a configuration does not load code by path; give the "
            "plugin's name, and put the library where the system's loader finds it"
        )
