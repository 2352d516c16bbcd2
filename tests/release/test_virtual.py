"""Described clusters: what is kept of a case when one planner is run again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from raypar.mesh.cluster import Cluster
from release import virtual
from release.virtual import Found, Outcome
from release.workloads import Workload


def test_one_planner_is_run_again_and_the_other_rows_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, str, str]] = []

    def planned(workload: Workload, cluster: Cluster, planner: str) -> Found:
        asked.append((workload.name, cluster.name, planner))
        return Found(2.0, "two", 0.1, 5.0, 5.0)

    monkeypatch.setattr(virtual, "plan_with", planned)
    before = Outcome("a100_512", "GPT-39B", "then; auto later",
                     {"auto": Found(4.0, "four"), "alpa": Found(3.0, "three")},
                     Found(3.5, "by hand"), 7)  # fmt: skip
    file = tmp_path / "virtual.json"
    file.write_text(json.dumps({"cases": {"GPT-39B@a100_512": {**asdict(before), "share": None}}}))
    chosen = ["--clusters", "a100_512", "--models", "GPT-39B", "--json", str(file)]
    assert virtual.main(chosen) == 0
    assert asked == []
    assert "has it" in capsys.readouterr().out
    assert virtual.main([*chosen, "--only", "auto"]) == 0
    assert [planner for *_, planner in asked] == ["auto"]
    (case,) = json.loads(file.read_text())["cases"].values()
    steps = {name: row["step_s"] for name, row in case["planners"].items()}
    assert steps == {"auto": 2.0, "alpa": 3.0}
    assert case["by_hand"]["step_s"] == 3.5
    assert case["when"].startswith("then; auto ")
    assert "later" not in case["when"]
