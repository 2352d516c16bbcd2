"""Is there a Ray head at an address? Answered within seconds, and without importing Ray.

`ray.init` retries a dead address for minutes, so every address is probed first. A Ray head (and a
Ray Client server) speaks gRPC, that is HTTP/2: a server must answer the client's preface with a
SETTINGS frame (RFC 9113, section 3.4), which tells it from the dashboard and from other services.
"""

from __future__ import annotations

import socket
import time

from raypar.errors import ClusterError

PROBE_S = 4.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_EMPTY_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_SETTINGS_TYPE = 4
_HEADER_BYTES = 9


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of ``host:port``, ``ray://host:port`` or ``[v6]:port``.

    Raises:
        ClusterError: It is none of these.
    """
    scheme, separator, rest = address.rpartition("://")
    if separator and scheme != "ray":
        raise ClusterError(
            f"Ray address {address!r}: {scheme}:// is no way to reach a cluster; write the head's "
            "'host:6379' (or 'ray://host:10001' for Ray Client)"
        )
    host, colon, port = rest.rstrip("/").rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ClusterError(
            f"Ray address {address!r} is not of the form host:port; write for example "
            "'10.0.0.1:6379', or 'auto' for a Ray on this machine"
        )
    return host.strip("[]"), int(port)


def probe(address: str, timeout_s: float = PROBE_S) -> None:
    """Returns if a gRPC server answers at `address`.

    Raises:
        ClusterError: The address is malformed, nobody listens there, or what does is not Ray, or
            hangs.
    """
    host, port = split_address(address)
    deadline = time.monotonic() + timeout_s
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            answer = _greet(connection, deadline)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise ClusterError(
            f"no Ray cluster answers at {address} within {timeout_s:g} s ({reason}). Check that "
            f"the head runs (`ray start --head --port={port}` there), that this machine reaches "
            "the port, and that address or RAY_ADDRESS is right; unset RAY_ADDRESS to use this "
            "machine alone"
        ) from None
    if answer is None:
        raise ClusterError(
            f"what listens at {address} says nothing within {timeout_s:g} s: it is a Ray head that "
            "hangs or cannot keep up (look at its machine, restart it there), or not a Ray head"
        )
    if len(answer) < _HEADER_BYTES or answer[3] != _SETTINGS_TYPE:
        raise ClusterError(
            f"something listens at {address}, but it is not a Ray head. The head's port is 6379 "
            "unless chosen otherwise (8265 is the dashboard's): write 'host:6379'"
        )


def _greet(connection: socket.socket, deadline: float) -> bytes | None:
    """What answers the preface: short where the other side ends, None where it says nothing."""
    connection.sendall(_PREFACE + _EMPTY_SETTINGS)
    answer = b""
    while len(answer) < _HEADER_BYTES:
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        connection.settimeout(left)
        try:
            part = connection.recv(_HEADER_BYTES - len(answer))
        except TimeoutError:
            return None
        except ConnectionError:
            break
        if not part:
            break
        answer += part
    return answer
