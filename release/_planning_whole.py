"""Seconds that planner `alpa` takes for whole models, captures included."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from raypar.mesh.calibration import table_calibration
from raypar.mesh.cluster import Cluster
from raypar.search.config import SearchConfig
from raypar.search.planners.alpa import AlpaSearch
from release._chart import Chart, side_by_side
from release.workloads import ALPA_GPT, GPT_1T, Workload, gpt

DEEP = (12, 24, 48, 96, 192)
WIDE = (8, 64, 512, 4096)
_GROWN = {"width": 4096, "heads": 32}
"""Width and heads of the GPTs whose depth or cluster grows."""


@dataclass(frozen=True)
class Planned:
    """One search.

    Attributes:
        model: What was planned for.
        layers: Its transformer blocks.
        devices: Of the cluster.
        kind: Of the devices.
        seconds: From the module to the plan.
        capture_s: Of these, to the first graph.
        cpu_s: Processor seconds of the whole.
        programs: Distinct integer programs that were solved.
        stages: Of the plan.
        replicas: Of every stage.
        microbatches: M.
        step_s: Predicted seconds of a step.
    """

    model: str
    layers: int
    devices: int
    kind: str
    seconds: float
    capture_s: float
    cpu_s: float
    programs: int
    stages: int
    replicas: int
    microbatches: int
    step_s: float


def plan_whole(workload: Workload, nodes: int, per_node: int, kind: str) -> Planned:
    """Captures a model and searches a plan for a cluster, from nothing."""
    cluster = Cluster.virtual(nodes=nodes, devices_per_node=per_node, device=kind)
    began, worked = time.perf_counter(), time.process_time()
    graph = workload.capture()
    captured = time.perf_counter() - began
    search = AlpaSearch(graph, cluster, SearchConfig(planner="alpa"), table_calibration(cluster))
    plan = search.run()
    return Planned(
        workload.name, workload.sizes[0], cluster.n_devices, kind,
        time.perf_counter() - began, captured, time.process_time() - worked,
        search.bench.maker.solved,
        len(plan.stages), plan.replicas, plan.microbatches, plan.predicted["step_s"],
    )  # fmt: skip


def _head() -> None:
    print(
        f"{'model':24s} {'layers':>6s} {'devices':>7s} {'kind':>5s} {'seconds':>8s} {'(cpu)':>7s} "
        f"{'capture':>7s} {'programs':>8s}  plan: stages × replicas × microbatches, step"
    )


def _line(row: Planned) -> None:
    print(
        f"{row.model:24s} {row.layers:6d} {row.devices:7d} {row.kind:>5s} {row.seconds:8.1f} "
        f"{row.cpu_s:7.1f} {row.capture_s:7.1f} {row.programs:8d}  {row.stages} × {row.replicas} × "
        f"{row.microbatches}, {row.step_s:.3g} s",
        flush=True,
    )


def whole() -> dict[str, object]:
    """GPT-39B on 8 × 8 and GPT-1T on 384 × 8."""
    print("\nwhole plans, captures included")
    _head()
    rows = []
    for workload, nodes, kind in (
        (ALPA_GPT["39B"], 8, "V100"),
        (ALPA_GPT["39B"], 8, "A100"),
        (GPT_1T, 384, "A100-80"),
    ):
        rows.append(plan_whole(workload, nodes, 8, kind))
        _line(rows[-1])
    return {
        "rows": [asdict(row) for row in rows],
        "gpt_39b_s": max(row.seconds for row in rows[:2]),
        "gpt_1t_s": rows[2].seconds,
        "gpt_39b_cpu_s": max(row.cpu_s for row in rows[:2]),
        "gpt_1t_cpu_s": rows[2].cpu_s,
    }


def growth(picture: Path) -> dict[str, object]:
    """Seconds over layers (on 64 devices) and over devices (48 layers); draws `picture`."""
    print("\ngrowth, GPT of width 4096")
    _head()
    deep, wide = [], []
    for layers in DEEP:
        deep.append(plan_whole(gpt(layers, **_GROWN, batch=1024), 8, 8, "A100-80"))
        _line(deep[-1])
    for devices in WIDE:
        batch = max(1024, devices)
        grown = gpt(48, **_GROWN, batch=batch)
        wide.append(plan_whole(grown, devices // 8, 8, "A100-80"))
        _line(wide[-1])
    charts = [
        Chart("64 devices", "layers", "seconds", _lines(deep, "layers")),
        Chart("48 layers", "devices", "seconds", _lines(wide, "devices")),
    ]
    picture.write_text(side_by_side(charts), encoding="utf-8")
    print(f"drawn to {picture}")
    return {"layers": [asdict(r) for r in deep], "devices": [asdict(r) for r in wide]}


def _lines(rows: list[Planned], key: str) -> dict[str, list[tuple[float, float]]]:
    return {
        "whole plan": [(float(getattr(r, key)), r.seconds) for r in rows],
        "of these, first capture": [(float(getattr(r, key)), r.capture_s) for r in rows],
    }
