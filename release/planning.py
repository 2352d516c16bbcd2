"""How long planning takes.

    python release/planning.py [--sections intra,whole,growth] [--layers 12,24,48,96]
                               [--json FILE]

Section ``intra``: the intra-op program of a GPT (width 2048, 16 heads, 1024 tokens, vocabulary
51,200, 8 sequences; captured on the meta device) on a mesh of 2 × 4: seconds to enumerate the
strategies, to build and reduce the program, and to solve it; its variables; how far the tied plan
is from the lower bound over free decisions; and the same under a memory limit of 90 % of what the
free plan holds. The strategies of ops are enumerated anew for every model.

Section ``whole``: planner `alpa` from the module to the plan, captures included: GPT-39B on 8 × 8
V100 and A100, GPT-1T on 384 × 8 A100; with the number of distinct integer programs. Section
``growth``: the same for GPTs of 12 to 192 layers and clusters of 8 to 4,096 devices, as a table and
as a picture beside the JSON file. Processor seconds are given with seconds: on a machine that does
other things too, only they can be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from examples.models import gpt
from raypar import Cluster, capture
from raypar.graph.build import CleanGraph
from raypar.plan import MeshSlice
from raypar.search.cost.machine import machine_of
from raypar.search.intra.planner import lower_bound_s, plan_intra
from raypar.search.intra.settings import IntraSettings
from release._figures import write_figures
from release._planning_whole import growth, whole

WIDTH, HEADS, TOKENS, VOCAB, BATCH = 2048, 16, 1024, 51200, 8
MESH = (2, 4)
REPEATS = 5
SECTIONS = ("intra", "whole", "growth")
RESULTS = Path(__file__).parent / "results" / "planning.json"


def captured(layers: int) -> CleanGraph:
    tokens = torch.empty(BATCH, TOKENS, dtype=torch.long, device="meta")
    return capture(lambda: gpt(layers, WIDTH, HEADS, TOKENS, VOCAB), (tokens, tokens)).at(BATCH)


def intra(layers: int) -> dict[str, Any]:
    """Seconds (medians) and sizes for one depth."""
    graph = captured(layers)
    n = MESH[0] * MESH[1]
    machine = machine_of(
        Cluster.virtual(1, n, "V100"), MeshSlice(tuple(range(n)), MESH, ("x", "y"))
    )
    seconds, cpu, plans = [], [], []
    for _ in range(REPEATS):
        start, worked = time.perf_counter(), time.process_time()
        plans.append(plan_intra(graph, machine, IntraSettings(microbatches=4)))
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - worked)
    plan = plans[-1]
    bound = lower_bound_s(graph, machine, IntraSettings(microbatches=4))
    limit = 0.9 * sum(plan.bytes.values())
    start = time.perf_counter()
    tight = plan_intra(
        graph, machine, IntraSettings(microbatches=4, memory_bytes=limit, time_limit_s=60)
    )
    return {
        "layers": layers,
        "ops": int(plan.stats["nodes"]),
        "variables": int(plan.stats["variables"]),
        "constraints": int(plan.stats["constraints"]),
        "first_s": seconds[0],
        "seconds": statistics.median(seconds),
        "first_cpu_s": cpu[0],
        "enumerate_s": plan.stats["enumerate_s"],
        "build_s": plan.stats["build_s"],
        "solve_s": plan.stats["solve_s"],
        "gap": 1 - bound / plan.objective_s,
        "memory_seconds": time.perf_counter() - start,
        "memory_gap": tight.stats["gap"],
        "memory_parts": int(tight.stats["parts"]),
    }


def intra_table(depths: list[int]) -> dict[str, Any]:
    print(f"intra-op, GPT on {MESH[0]} x {MESH[1]}: seconds (first run, median of {REPEATS})")
    print(
        "layers   ops  variables    first  (cpu)  median  enumerate  build  solve     gap"
        "  limit: s, gap"
    )
    rows = []
    for layers in depths:
        row = intra(layers)
        rows.append(row)
        print(
            f"{layers:6} {row['ops']:5} {row['variables']:10} {row['first_s']:8.2f}"
            f" {row['first_cpu_s']:6.2f} {row['seconds']:7.2f} {row['enumerate_s']:10.2f}"
            f" {row['build_s']:6.2f} {row['solve_s']:6.2f} {row['gap']:7.3%}"
            f"   {row['memory_seconds']:5.1f}  {row['memory_gap']:.2%}",
            flush=True,
        )
    deep = next((r for r in rows if r["layers"] == 48), rows[-1])
    return {"rows": rows, "seconds_48": deep["first_s"], "memory_gap_48": deep["memory_gap"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated")
    parser.add_argument("--layers", default="12,24,48,96")
    parser.add_argument("--json", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    if asked.json.exists():  # sections that are not measured now are kept
        figures = json.loads(asked.json.read_text(encoding="utf-8")).get("figures", {})
    for section in asked.sections.split(","):
        if section == "intra":
            figures[section] = intra_table([int(n) for n in asked.layers.split(",")])
        elif section == "whole":
            figures[section] = whole()
        elif section == "growth":
            figures[section] = growth(asked.json.with_suffix(".svg"))
        else:
            parser.error(f"no section {section!r}; there are {', '.join(SECTIONS)}")
        write_figures(asked.json, {"figures": figures})


if __name__ == "__main__":
    main()
