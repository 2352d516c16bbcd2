"""Two Ray nodes on two loopback addresses, one with another raypar; in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, ray
from ray.cluster_utils import Cluster as Rays
from raypar import Cluster, doctor
from raypar.errors import ClusterError
from raypar.mesh.skew import check_skew

small = dict(num_cpus=1, object_store_memory=80 * 2**20)
rays = Rays()
rays.add_node(node_ip_address="127.0.0.2", include_dashboard=False, **small)
rays.add_node(node_ip_address="127.0.0.3", env_vars={"PYTHONPATH": sys.argv[1]}, **small)
ray.init(address=rays.address, _node_ip_address="127.0.0.2", log_to_driver=False)
try:
    try:
        check_skew(Cluster.from_ray())
    except ClusterError as error:
        print("SKEW", error)
    found = doctor.main_cluster(rays.address, "127.0.0.0/8", (24000, 24100), sys.argv[2])
    print("EXIT", found)
finally:
    ray.shutdown()
    rays.shutdown()
"""


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_two_nodes_with_different_raypar(tmp_path: Path) -> None:
    other = tmp_path / "raypar"
    other.mkdir()
    (other / "__init__.py").write_text("")
    (other / "_version.py").write_text('__version__ = "0.0.1"\n')
    # Ray puts the folder of the driver's script before PYTHONPATH on every node: an empty one.
    script = tmp_path / "script" / "run.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": root}
    env.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(tmp_path / "report.json")],
        capture_output=True,
        text=True,
        timeout=150,
        env=env,
        cwd=script.parent,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = done.stdout
    assert "SKEW the 2 nodes of" in out, out + done.stderr
    assert "0.0.1 on " in out
    assert "EXIT 1" in out
    report = json.loads((tmp_path / "report.json").read_text())
    nodes = {node["address"]: node for node in report["nodes"]}
    assert nodes.keys() == {"127.0.0.2", "127.0.0.3"}
    assert nodes["127.0.0.2"]["listens_at"] == "127.0.0.2"
    assert nodes["127.0.0.3"]["software"]["raypar"] == "0.0.1"
    [unequal] = [f for f in report["findings"] if f["found"].startswith("raypar: ")]
    assert (unequal["status"], unequal["name"]) == ("fail", "equal versions")
    assert f"equal versions: {unequal['mend']}" in out
