"""A Ray head of its own whose autoscaler starts and ends nodes on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_NOTHING: dict[str, Any] = {
    name: []
    for name in (
        "initialization_commands setup_commands head_setup_commands worker_setup_commands "
        "head_start_ray_commands worker_start_ray_commands cluster_synced_files rsync_exclude "
        "rsync_filter"
    ).split()
}


class ScalingHead:
    """Started at once, and surely ended at the end of a ``with`` block.

    Args:
        most: Nodes of one CPU that the autoscaler may start.

    Attributes:
        address: Of the head.
        config: The autoscaler's file, which it reads again about once a second.
    """

    def __init__(self, most: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ra-", dir="/tmp"))
        self._port, client = _free_port(), _free_port()
        host = ray.util.get_node_ip_address()
        self.address = f"{host}:{self._port}"
        self.config = self.folder / "autoscaler.json"
        write_config(self.config, self.address, most)
        env = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "20",
        }
        env.pop("RAY_ADDRESS", None)
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--num-cpus=0",
            f"--autoscaling-config={self.config}", f"--port={self._port}",
            "--object-store-memory=200000000", f"--temp-dir={self.folder}",
            "--include-dashboard=false", f"--ray-client-server-port={client}",
            "--dashboard-agent-listen-port=0", "--disable-usage-stats",
        ]  # fmt: skip
        try:
            subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        except subprocess.CalledProcessError as error:
            self.close()
            raise RuntimeError(f"{error.stdout}\n{error.stderr}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the head, its nodes and their workers: all that names its folder or its port."""
        marks = (f"{self.folder}/", f"={self.address}", f":{self._port}", f"={self._port}")
        for number in (signal.SIGTERM, signal.SIGKILL):
            end = time.monotonic() + 5
            while (left := _processes(marks)) and time.monotonic() < end:
                for pid in left:
                    try:
                        os.kill(pid, number)
                    except ProcessLookupError:
                        continue
                time.sleep(0.3)
        assert not _processes(marks)
        shutil.rmtree(self.folder, ignore_errors=True)


def write_config(path: Path, address: str, most: int) -> None:
    """Writes the autoscaler's file; with fewer nodes than there are, it ends some."""
    node = {"resources": {"CPU": 1, "object_store_memory": 100 * 2**20}, "node_config": {}}
    config = {
        "cluster_name": "fake_multinode",
        "max_workers": most,
        "provider": {
            "type": "external",
            "module": _PROVIDER,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": address,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {**node, "min_workers": 0, "max_workers": most},
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        **_NOTHING,
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(config))
    os.replace(part, path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _processes(marks: tuple[str, ...]) -> list[int]:
    """Processes of this Ray: only daemons and workers are started with its address or folder."""
    text = subprocess.run(
        ["ps", "-axww", "-o", "pid=,command="], capture_output=True, text=True, check=True
    ).stdout
    rows = (line.split(None, 1) for line in text.splitlines())
    return [
        int(pid) for pid, command in rows if any(m in command for m in marks) and "ray" in command
    ]
