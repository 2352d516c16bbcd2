"""What tests of jobs share: a Ray head with a job server."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="package")
def head() -> Iterator[str]:
    """A Ray head of its own, with a job server; yields the server's address.

    All its ports are free ones: a second Ray on a machine whose agent meets the default port in use
    takes no jobs.
    """
    # AF_UNIX paths are limited to about 100 bytes: pytest's own folders are too long for Ray.
    folder, port = tempfile.mkdtemp(prefix="rpj-", dir="/tmp"), _free_port()
    scripts = Path(sys.executable).parent
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        # The shell commands of jobs find raypar as those of a user do who has it installed.
        "PATH": os.pathsep.join([str(scripts), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": folder,  # where `ray start` notes its address: nobody else may join it
    }
    process = subprocess.Popen(
        [
            str(scripts / "ray"), "start", "--head", "--block", "--num-cpus=4",
            f"--port={_free_port()}", "--include-dashboard=true", f"--dashboard-port={port}",
            f"--dashboard-agent-listen-port={_free_port()}", f"--temp-dir={folder}",
            f"--object-store-memory={100 * 2**20}", f"--ray-client-server-port={_free_port()}",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api/version", process)
        yield address
    finally:
        process.terminate()  # ends its daemons, too
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(url: str, process: subprocess.Popen[bytes], patience_s: float = 120.0) -> None:
    end = time.monotonic() + patience_s
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).read()
            return
        except OSError:
            assert process.poll() is None, f"ray start ended with {process.returncode}"
            assert time.monotonic() < end, f"no Ray head at {url}"
            time.sleep(0.5)
