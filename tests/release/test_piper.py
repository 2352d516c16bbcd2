"""The script that plans Piper's workloads: what it writes, and how it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from release import piper
from tests.search.exact import piper_by_hand as by_hand


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command's exit code."""
    monkeypatch.setattr(sys, "argv", ["piper.py", *map(str, arguments)])
    return piper.main()


def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raw: Any, memory: float) -> int:
    """Plans a workload on four devices; the answer is in ``out.json``."""
    path = tmp_path / "workload.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return run(
        monkeypatch, "--input", path, "--devices", 4, "--memory", memory, "--microbatches", 12,
        "--bandwidth", 3.0, "--json", tmp_path / "out.json",
    )  # fmt: skip


def test_what_is_written_is_a_pipeline(monkeypatch, tmp_path) -> None:
    raw = by_hand.workload(3)
    assert plan(monkeypatch, tmp_path, raw, 40.0) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == {"feasible", "objective", "cpu_s", "stages"}
    assert found["feasible"]
    assert found["cpu_s"] >= 0
    by_id = {node["id"]: node for node in raw["nodes"]}
    stages = []
    for stage in found["stages"]:
        assert set(stage) == {"nodes", "d", "t", "recomp"}
        assert set(stage["recomp"]) <= set(stage["nodes"])
        numbers = []
        for one in stage["nodes"]:
            variants = by_id[one]["TMPCs"][str(stage["t"])]
            recomputes = one in stage["recomp"]
            fit = [j for j, v in enumerate(variants) if ("recomp" in v["id"]) == recomputes]
            numbers.append(fit[0])
        stages.append((stage["nodes"], stage["d"], stage["t"], numbers))
    own = by_hand.objective(raw, stages, 4, 40.0, 12, 3.0)
    assert own == pytest.approx(found["objective"])


def test_infeasible_is_said(monkeypatch, tmp_path) -> None:
    assert plan(monkeypatch, tmp_path, by_hand.workload(3), 0.5) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["feasible"], found["objective"], found["stages"]) == (False, None, [])


def test_a_bad_file_ends_with_one_line(monkeypatch, tmp_path, capsys) -> None:
    assert plan(monkeypatch, tmp_path, {"nodes": [{"TMPCs": {}}], "edges": []}, 1.0) == 2
    assert capsys.readouterr().err.count("\n") == 1
    path = tmp_path / "workload.json"
    path.write_text(json.dumps(by_hand.workload(3)), encoding="utf-8")
    assert run(monkeypatch, "--input", path, "--devices", 2) == 2
    assert "--memory, --microbatches, --bandwidth" in capsys.readouterr().err
