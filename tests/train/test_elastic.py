"""The autoscaler brings a node and takes one away, and training goes on with what there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.scaling_head import ScalingHead

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(
    "RAYPAR_ELASTIC" not in os.environ,
    reason="starts an autoscaling cluster of its own, for minutes: set RAYPAR_ELASTIC=1",
)
def test_from_one_node_to_two_and_back_to_one(tmp_path: Path) -> None:
    with ScalingHead(most=1) as head:
        script = [sys.executable, "-m", "tests.train.elastic_script"]
        done = subprocess.run(
            [*script, str(tmp_path), head.address, str(head.config)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["devices"] == [1, 2, 1], found["events"]
    kinds = [event.split(":")[0] for event in found["events"]]
    assert kinds.count("failure") == 1
    assert kinds.index("failure") < kinds.index("restart") < len(kinds)
    assert kinds[0] == "scale_up"
    assert found["request"] == []  # nothing is asked of the autoscaler any more
    assert found["together"].keys() == found["alone"].keys()
    for step, loss in found["alone"].items():
        assert abs(found["together"][step] - loss) <= 1e-9 * max(1, abs(loss))
