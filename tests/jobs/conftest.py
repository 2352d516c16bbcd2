"""What tests of jobs share: a Ray head with a job server."""

from __future__ import annotations

import os
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
_HEAD = """
import ray, sys
ray.init(address="local", num_cpus=4, include_dashboard=True, dashboard_port=int(sys.argv[2]),
    log_to_driver=False, object_store_memory=100 * 2**20, _temp_dir=sys.argv[1])
print("up", flush=True)
sys.stdin.read()
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="package")
def head() -> Iterator[str]:
    """A Ray head of its own, with a job server; yields the server's address."""
    folder, port = tempfile.mkdtemp(prefix="rpj-", dir="/tmp"), _free_port()
    # The shell commands of jobs find raypar as those of a user do who has it installed.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(
        [sys.executable, "-c", _HEAD, folder, str(port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline().strip() == "up"
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api/version", timeout=2).read()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        subprocess.run(["rm", "-rf", folder], check=False)
