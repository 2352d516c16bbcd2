"""The GPU scripts without a GPU: names, targets, gaps, configurations, tables, parts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from raypar.mesh._probe_device import DeviceSamples, Sample, gpu_seconds
from raypar.mesh._probe_table import against_table
from raypar.mesh.devices import device_kind
from release.gpu import conformance, fidelity, kit, names, overhead, speed, table

FOLDER = Path(kit.ROOT) / "release" / "gpu"


def test_all_private_names_are_there_and_a_missing_one_is_told() -> None:
    found = names.all_uses()
    assert {use.file for use in found} == {"compat.py", "compat_ray.py"}
    assert len(found) > 30
    assert names.missing_here(found) == ([], [])
    assert names.failing() == []
    text = "import torch\nfrom torch._ops import OpOverload, Gone\ntorch._C._gone_too(1)\n"
    told, _ = names.missing_here(names.uses(text, "a.py"))
    assert [line.split(":")[1] for line in told] == ["2", "3"]
    assert "torch._ops has no Gone" in told[0]
    assert "torch has no _C._gone_too" in told[1]


def test_names_are_looked_up_in_sources_too(tmp_path: Path) -> None:
    (tmp_path / "torch" / "_C").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text("from torch._C import *\n")
    (tmp_path / "torch" / "_C" / "__init__.pyi").write_text("def here() -> None: ...\nx: int = 1\n")
    (tmp_path / "torch" / "_ops.py").write_text("class OpOverload: pass\n")
    text = (
        "from torch._ops import OpOverload, Gone\ntorch._C.here()\ntorch._C.away()\ntorch.here()\n"
        "from torch.built.in_c import anything\n"
    )
    wrong, unknown = names.missing_in(tmp_path, names.uses(text, "a.py"))
    assert [line.rsplit(" ", 1)[1] for line in sorted(wrong)] == ["Gone", "away"]
    assert unknown == ["torch.built.in_c.anything"]


@pytest.mark.parametrize(
    ("value", "bound", "met"),
    [(1.0, "<= 1", True), (1.1, "<= 1", False), (1.0, ">= 1.5", False), (0, "== 0", True)],
)
def test_targets(value: float, bound: str, met: bool) -> None:
    assert kit.Target("x", value, bound).met == met


def test_gaps_are_what_nothing_covers() -> None:
    # The second ends before the first; then 3 to 4 is empty, then 6 to 6.5.
    busy = [(4.0, 6.0), (0.0, 3.0), (1.0, 2.0), (6.5, 7.0)]
    assert overhead.gaps(busy) == pytest.approx([0.0, 1.0, 0.5])


def test_there_are_twenty_configurations_and_all_differ() -> None:
    found = fidelity.configurations(smoke=False)
    assert len(found) >= 20
    assert len(set(found)) == len(found)
    assert all(shape.batch % microbatches == 0 for _, shape, microbatches, _ in found)


def test_the_suite_runs_whole_once() -> None:
    whole = {n for n in vars(conformance.CommConformance) if n.startswith("test_")}
    assert set(conformance.chosen(3, smoke=False)) == whole
    assert set(conformance.chosen(1, smoke=False)) == set(conformance.ALONE)


def test_ratios_and_losses_that_differ() -> None:
    rows: list[dict[str, Any]] = [
        {"system": "plain", "step_s": {"median": 0.2}, "losses": [4.0, 3.0]},
        {"system": "raypar", "step_s": {"median": 0.1}, "losses": [4.0, 3.3]},
        {"system": "fsdp-one", "failed": "no NCCL"},
    ]
    ratios, targets = speed.compared(rows, "x")
    assert ratios == {"raypar ÷ plain": pytest.approx(0.5)}
    assert [t.met for t in targets] == [True]
    assert speed.loss_gap(rows) == pytest.approx(0.1)


def test_the_table_says_what_is_missed(tmp_path: Path) -> None:
    part = {
        "part": "speed x",
        "smoke": True,
        "machine": dict.fromkeys(("device", "torch", "python", "when", "commit"), "x"),
        "targets": [{"name": "a", "value": 2.0, "bound": "<= 1", "met": False}],
        "figures": {
            "shape": "x",
            "systems": [
                {"system": "plain", "failed": "no | room"},
                {
                    "system": "raypar",
                    "step_s": {"median": 0.01, "low": 0.009, "high": 0.011},
                    "tokens_per_s": 5.0,
                    "tflops": 1.0,
                    "peak_bytes": 2e9,
                },
            ],
        },
    }  # fmt: skip
    (tmp_path / "speed_x.json").write_text(json.dumps(part))
    (tmp_path / "calibration.json").write_text("{}")
    text = table.table(table.parts(tmp_path))
    assert "| speed x | a | 2 | <= 1 | **missed** |" in text
    assert "| x | raypar | 10.00 | 9.00 to 11.00 | 5 | 1.0 | 2.0 |" in text
    assert "no / room" in text
    assert "smoke run" in text


def _script(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(FOLDER / "run_all.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_part_is_told_in_the_readme() -> None:
    parts = _script("--list").stdout.split()
    text = (FOLDER / "README.md").read_text()
    assert [p for p in parts if f"`{p}`" not in text] == []
    wrong = _script("nonsense")
    assert wrong.returncode == 2
    assert "no part 'nonsense'" in wrong.stderr


def test_the_manifest_asks_for_sixteen_gpus() -> None:
    job = yaml.safe_load((FOLDER / "kuberay_gpu.yaml").read_text())
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert group["replicas"] * int(limits["nvidia.com/gpu"]) == 16
    assert "mesh.num_workers=16" in job["spec"]["entrypoint"]


# -- what `raypar probe` makes of a GPU -------------------------------------------------------


class FakeEvent:
    """An event on a clock that every call moves by what it takes."""

    now_s = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        self.at = FakeEvent.now_s

    def synchronize(self) -> None:
        FakeEvent.now_s += 1.0  # what the host waits is no time of the calls

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


@pytest.mark.parametrize("takes", [3e-6, 1e-4, 0.5])
def test_a_row_of_calls_is_timed_by_events(takes: float) -> None:
    calls = 0

    def call(turn: int) -> None:
        nonlocal calls
        calls += 1
        FakeEvent.now_s += takes

    assert gpu_seconds(call, FakeEvent) == pytest.approx(takes)
    assert calls >= 2e-3 / takes


def test_a_row_of_the_table_that_is_wrong_is_seen() -> None:
    kind = device_kind("H200")

    def samples(share: float) -> DeviceSamples:
        peak = kind.flops["bfloat16"]
        return DeviceSamples(
            [
                Sample("matmul", "bfloat16", 1e9, 0, 1e9 / (0.2 * share * peak)),
                Sample("matmul", "bfloat16", 1e12, 0, 1e12 / (share * peak)),
                Sample("plain", "float32", 0, 1e6, 1e6 / (5 * kind.bandwidth)),  # from a cache
                Sample("plain", "float32", 0, 2e9, 2e9 / (share * kind.bandwidth)),
            ]
        )

    assert {v.verdict for v in against_table(samples(0.8), kind)} == {"plausible"}
    assert all("smaller device" in v.verdict for v in against_table(samples(1.2), kind))
    assert all("larger device" in v.verdict for v in against_table(samples(0.2), kind))
    assert [v.share for v in against_table(samples(0.8), kind)] == pytest.approx([0.8, 0.8])
