"""Piper's published workloads: the optimal pipeline in Piper's cost model, and the time it takes.

    python release/piper.py --input FILE --devices K --memory BYTES --microbatches B
                            --bandwidth BYTES_PER_S --json OUT
    python release/piper.py --reference FILE [--json OUT]

The first form plans for one setting (what is left out is taken from the file, where it says so) and
writes ``{"feasible", "objective", "cpu_s", "stages": [{"nodes", "d", "t", "recomp"}, …]}``, stages
in pipeline order. The second plans every row of a reference file (workloads lie beside it) and
prints how objective and CPU time compare with those of Piper's own program; it exits with 1 if a
target is missed: no objective above Piper's, and a fifth of its CPU time for 512 devices or more
and for the workload with many downsets (resnet).

`cpu_s` counts reading the workload and planning, all threads and children, without imports.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raypar.errors import RayparError
from raypar.graph.workloads import LayerWorkload, read_workload
from raypar.search.exact.piper import PiperSetting, solve_piper
from release._figures import write_figures

RESULTS = Path(__file__).parent / "results" / "piper.json"
MOST_CPU = 0.2
"""Share of the CPU time of Piper's program that is allowed."""


def cpu_seconds() -> float:
    """CPU seconds of this process so far, its threads and its children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def planned(args: argparse.Namespace) -> dict[str, Any]:
    """Plans one setting; see the text of this file for what comes back."""
    start = cpu_seconds()
    workload = read_workload(args.input)
    if not isinstance(workload, LayerWorkload):
        raise RayparError(f"{args.input} is no workload of profiled layers (nodes with TMPCs)")
    given = {
        "devices": (args.devices, workload.devices),
        "memory": (args.memory, workload.memory),
        "microbatches": (args.microbatches, workload.microbatches),
        "bandwidth": (args.bandwidth, workload.bandwidth),
    }
    values: dict[str, Any] = {
        name: own if own is not None else file for name, (own, file) in given.items()
    }
    missing = [f"--{name}" for name, value in values.items() if value is None]
    if missing:
        raise RayparError(f"the file does not say it: give {', '.join(missing)}")
    found = solve_piper(workload, PiperSetting(**values))
    cpu = cpu_seconds() - start
    return {
        "feasible": bool(found.stages),
        "objective": found.objective if found.stages else None,
        "cpu_s": cpu,
        "stages": [
            {
                "nodes": list(stage.layers),
                "d": stage.replicas,
                "t": stage.degree,
                "recomp": list(stage.recomputed),
            }
            for stage in found.stages
        ],
    }


def compared(reference: Path, out: Path) -> int:
    """Plans every row of a reference file in a process of its own; prints a table."""
    rows = json.loads(reference.read_text(encoding="utf-8"))["results"]
    results: list[dict[str, Any]] = []
    print(
        f"{'workload':18} {'k':>5} {'GiB':>6}  {'objective':>12} {'÷ Piper':>9}  {'CPU s':>6} ÷ C++"
    )
    for row in rows:
        found = _alone(reference.parent / row["input"], row)
        theirs = row["piper_tps"] if row["feasible"] else None
        ratio = None
        if theirs is not None and found["feasible"]:
            ratio = found["objective"] / theirs
        share = found["cpu_s"] / row["cpu_s"]
        timed = row["k"] >= 512 or row["input"].startswith("resnet")
        good = found["feasible"] == row["feasible"] and (ratio is None or ratio <= 1 + 1e-9)
        good &= found["cpu_s"] <= 10 and (not timed or share <= MOST_CPU)
        shown = f"{found['objective']:.9g}" if found["feasible"] else "infeasible"
        print(
            f"{row['input']:18} {row['k']:>5} {row['mem_bytes'] / 2**30:>6.4g}  {shown:>12} "
            f"{'' if ratio is None else f'{ratio:.6f}':>9}  {found['cpu_s']:>6.2f} {share:.3f}"
            f"{'' if good else '  MISSED'}",
            flush=True,
        )
        kept = ("input", "k", "mem_bytes", "microbatches", "bandwidth_Bps")
        results.append(
            {name: row[name] for name in kept}
            | {"piper": theirs, "piper_cpu_s": row["cpu_s"], "ratio": ratio, "met": good}
            | found
        )
    write_figures(out, {"rows": results})
    missed = sum(not r["met"] for r in results)
    print(f"{len(results) - missed} of {len(results)} rows meet the targets; written to {out}")
    return 1 if missed else 0


def _alone(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--input", str(path), "--json", "-"]
    command += ["--devices", str(row["k"]), "--memory", repr(row["mem_bytes"])]
    command += ["--microbatches", str(row["microbatches"])]
    command += ["--bandwidth", repr(row["bandwidth_Bps"])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--input", type=Path, help="a workload file")
    parser.add_argument("--devices", type=int, help="k")
    parser.add_argument("--memory", type=float, help="bytes of a device")
    parser.add_argument("--microbatches", type=int, help="microbatches of a step")
    parser.add_argument("--bandwidth", type=float, help="bytes per second between devices")
    parser.add_argument("--json", help="where to write; - for standard output")
    parser.add_argument("--reference", type=Path, help="a file of settings with Piper's figures")
    args = parser.parse_args()
    try:
        if args.reference is not None:
            return compared(args.reference, Path(args.json) if args.json else RESULTS)
        if args.input is None:
            parser.error("give --input or --reference")
        found = planned(args)
    except RayparError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = json.dumps(found, indent=1)
    if args.json in (None, "-"):
        print(text)
        return 0
    Path(args.json).write_text(text + "\n", encoding="utf-8")
    value = found["objective"]
    shown = f"{value:.9g}" if value is not None and math.isfinite(value) else "infeasible"
    print(f"{shown} with {len(found['stages'])} stages, {found['cpu_s']:.2f} CPU seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
