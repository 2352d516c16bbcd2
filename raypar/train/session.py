"""The Ray that a run uses: one that is there, or one of its own."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import ray

from raypar.errors import ClusterError
from raypar.mesh import discover
from raypar.train import _folders

_SHORT = 40  # longer temp paths break the sockets that Ray puts below them (107 bytes at most)
_STORE_BYTES = 512 * 2**20
_CPUS_PER_CORE = 8  # logical CPUs of a Ray started here: more ranks than that only thrash
_CPUS_AT_LEAST = 16
_TURN = threading.RLock()  # for whoever begins or ends this process's connection


class _Connection:
    """What raypar began in this process; runs on several threads share it, the last one ends it.

    Args:
        folder: Files of a Ray that was started here.
        env: Environment variables to set back at the end.
        cpus: Logical CPUs of a Ray that was started here.
    """

    def __init__(
        self,
        folder: str | None = None,
        env: dict[str, str | None] | None = None,
        cpus: int | None = None,
    ) -> None:
        self._folder = folder
        self._env = env or {}
        self.cpus = cpus
        self.users = 0

    def end(self) -> None:
        global _left
        if self._folder is None and ray.is_initialized() and discover.lost_head():
            _left = True  # a head that hangs is waited for without end
            return
        ray.shutdown()  # also where ray.init was interrupted: it ends the daemons begun so far
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        for name, value in self._env.items():
            _put(name, value)


_begun: _Connection | None = None
_left = False


def exit_would_hang() -> bool:
    """Whether a connection was left as it was, since its head hangs: Ray's own end waits for it."""
    return _left


class RaySession:
    """A user of this process's connection to Ray; `close` ends it where raypar began it.

    Args:
        connection: What raypar began; None where the connection was there.

    Attributes:
        seconds: What starting or connecting took.
        private: Whether it is to a Ray on this machine that raypar started.
        shared_cpus: Logical CPUs of a private Ray that another run of this process started, for
            itself, and that this one uses as well; else None.
    """

    def __init__(self, connection: _Connection | None = None) -> None:
        global _begun
        self.seconds = 0.0
        self.private = connection is not None and connection.cpus is not None
        self.shared_cpus = connection.cpus if connection and connection.users else None
        self._connection = connection
        if connection is not None:
            connection.users += 1
            _begun = connection

    def close(self) -> None:
        """Ends the connection, and a Ray that was started for it, unless another run uses it.

        No-op where the connection was there before, and when it is called twice.
        """
        global _begun
        with _TURN:
            connection, self._connection = self._connection, None
            if connection is None:
                return
            connection.users -= 1
            if not connection.users:
                _begun = None
                connection.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def start_private_ray(num_cpus: int, *, log_to_driver: bool = False) -> RaySession:
    """Starts a Ray of this process alone, whatever else runs on the machine.

    RAY_ADDRESS, running clusters and token authentication are left aside, and its files lie in a
    folder with a path short enough for its sockets. Folders that killed processes left behind are
    removed.

    Args:
        num_cpus: Logical CPUs: how many actors of one CPU each fit; may exceed the real cores.
        log_to_driver: Whether the actors' output is printed here.

    Raises:
        ClusterError: Ray does not start, this machine is far too small for `num_cpus` actors, or
            this process is connected to a Ray already.
    """
    with _TURN:
        if ray.is_initialized():
            raise ClusterError(
                "this process is connected to a Ray already; call ray.shutdown() first, or use "
                "that one"
            )
        return _started(num_cpus, log_to_driver)


def _started(num_cpus: int, log_to_driver: bool) -> RaySession:
    _refuse_too_many(num_cpus)
    began = time.perf_counter()
    base = _short_folder()
    _folders.remove_stale(base)
    folder = _folders.make(base)
    env = _swap({"RAY_ADDRESS": None, **_authentication()})
    session = RaySession(_Connection(folder, env, num_cpus))
    try:
        with _quiet():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=log_to_driver,
                logging_level=logging.ERROR,
                object_store_memory=_STORE_BYTES,
                _temp_dir=folder,
            )
    except BaseException as error:
        session.close()
        if isinstance(error, Exception):
            raise ClusterError(
                f"a local Ray with {num_cpus} CPUs did not start: {error}"
            ) from error
        raise
    session.seconds = time.perf_counter() - began
    return session


def connect(address: str | None = None, *, num_cpus: int = 1) -> RaySession:
    """Connects to Ray.

    To the one this process is connected to already, else to `address`, else to RAY_ADDRESS, else
    to a private one with `num_cpus` logical CPUs. Runs on several threads of this process share
    what the first of them began, and it ends with the last of them.

    Args:
        address: ``host:port`` of the head, ``ray://host:port``, ``auto`` or ``local``.
        num_cpus: Logical CPUs of a Ray that is started here.

    Raises:
        ClusterError: It is not reachable; told within seconds, while Ray itself tries for minutes.
    """
    global _left
    with _TURN:
        if _left and ray.is_initialized() and discover.lost_head():
            raise ClusterError(
                "the head of the cluster that this process is connected to does not answer, and "
                "the connection cannot be ended without it: begin the run in a new process"
            )
        _left = False
        if ray.is_initialized():
            return RaySession(_begun)
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        if address == "local":
            return start_private_ray(num_cpus)
        began = time.perf_counter()
        with _quiet():
            discover.connect(address)
        session = RaySession(_Connection())
        session.seconds = time.perf_counter() - began
        return session


def _refuse_too_many(num_cpus: int) -> None:
    cores = os.cpu_count() or 1
    most = max(_CPUS_AT_LEAST, _CPUS_PER_CORE * cores)
    if num_cpus > most:
        raise ClusterError(
            f"{num_cpus} ranks on this machine alone: it has {cores} cores, and raypar starts at "
            f"most {most} ranks on them ({_CPUS_PER_CORE} a core, {_CPUS_AT_LEAST} at least). Set "
            f"mesh.num_workers={cores} (ScalingConfig.num_workers), or set RAY_ADDRESS to a "
            "cluster that has the devices"
        )


def _authentication() -> dict[str, str | None]:
    """The environment in which a Ray of this process alone starts, whatever the user's says.

    Ray reads RAY_AUTH_MODE when it is imported, before anything here runs: what it read cannot be
    changed, so with tokens on, the private Ray gets a token where the user's cannot be read.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": None}
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_TOKEN") or not path or os.access(path, os.R_OK):
        return {}
    return {"RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _short_folder() -> str:
    for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if len(folder) <= _SHORT - len("/rp-12345678") and os.access(folder, os.W_OK):
            return folder
    raise ClusterError(
        f"Ray needs a writable folder with a path of at most {_SHORT} characters for its sockets; "
        f"{tempfile.gettempdir()!r} has {len(tempfile.gettempdir())}: set TMPDIR=/tmp"
    )


def _swap(values: dict[str, str | None]) -> dict[str, str | None]:
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        _put(name, value)
    return before


def _put(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Ray's banner and its advice on accelerators out of the output."""
    before = _swap({"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"})
    try:
        yield
    finally:
        for name, value in before.items():
            _put(name, value)
