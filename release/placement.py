"""Published operator graphs placed on devices: the least largest load, contiguous and of any form.

    python release/placement.py --input FILE [--devices K] [--cpus N] [--memory BYTES]
                                [--seconds S] --json OUT
    python release/placement.py --reference FILE [--json OUT]

The first form places one graph (what is left out is the file's) and writes ``{"contiguous":
{"objective", "bound", "assignment"}, "noncontiguous": {"objective", "bound", "assignment"},
"cpu_s"}``. An assignment is ``{"node id": device}``: accelerators are 0 to K - 1, CPUs follow from
K. A contiguous split numbers its devices in pipeline order, accelerators and CPUs each for
themselves; it is the best one where its bound equals its objective, and null where memory allows
none. The second form places every graph of a reference file that lies beside it, and prints how
objectives compare with those published; it exits with 1 if a target is missed: the contiguous
optimum reached, and the other placement at most the best known, or within 5 % of its bound.

`cpu_s` counts reading and placing, all threads, without imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raypar.errors import PlanError, RayparError
from raypar.graph.workloads import PlacementWorkload, read_workload
from raypar.search.exact.placement import DEFAULT_SECONDS, Placed, solve_placement
from release._figures import write_figures

RESULTS = Path(__file__).parent / "results" / "placement.json"
MOST_SECONDS = 60.0
MOST_GAP = 0.05
ROUNDING = 1e-9


def placed(args: argparse.Namespace) -> dict[str, Any]:
    """Places one graph; see the text of this file for what comes back."""
    start, wall = time.process_time(), time.monotonic()
    work = read_workload(args.input)
    if not isinstance(work, PlacementWorkload):
        raise PlanError(
            f"{args.input} is no operator graph (maxFPGAs, maxCPUs, maxSizePerFPGA, nodes, edges)"
        )
    for name, value, least in (
        ("--devices", args.devices, 0),
        ("--cpus", args.cpus, 0),
        ("--memory", args.memory, 0),
        ("--seconds", args.seconds, 0.1),
    ):
        if value is not None and not least <= value < float("inf"):
            raise PlanError(f"{name} is {value}; it must be at least {least}, and finite")
    work = replace(
        work,
        accelerators=work.accelerators if args.devices is None else args.devices,
        cpus=work.cpus if args.cpus is None else args.cpus,
        memory=work.memory if args.memory is None else args.memory,
    )
    found = solve_placement(work, args.seconds)
    return {
        "contiguous": _shown(work, found.contiguous),
        "noncontiguous": _shown(work, found.noncontiguous),
        "cpu_s": time.process_time() - start,
        "wall_s": time.monotonic() - wall,
    }


def _shown(work: PlacementWorkload, one: Placed | None) -> dict[str, Any] | None:
    if one is None:
        return None
    devices = zip(work.nodes, one.device_of, strict=True)
    return {
        "objective": one.objective,
        "bound": one.bound,
        "assignment": {str(node.id): device for node, device in devices},
    }


def compared(reference: Path, out: Path) -> int:
    """Places every graph of a reference file in a process of its own; prints a table."""
    rows = json.loads(reference.read_text(encoding="utf-8"))["throughput"]
    results: list[dict[str, Any]] = []
    print(
        f"{'workload':20} {'contiguous':>11} {'published':>11} {'any form':>11} {'published':>11} "
        f"{'bound':>11} {'gap':>6} {'CPU s':>6} {'s':>5}"
    )
    for row in rows:
        name = Path(row["input"]).name
        found = _alone(reference.parent / f"{name}.json")
        objectives = row["objectives"]
        theirs, best = objectives["dp"], objectives.get("noncontig_milp_highs")
        split, free = found["contiguous"], found["noncontiguous"]
        gap = free["objective"] / free["bound"] - 1
        good = abs(split["objective"] / theirs - 1) <= ROUNDING and found["wall_s"] <= MOST_SECONDS
        good &= gap <= MOST_GAP or (best is not None and free["objective"] <= best * (1 + ROUNDING))
        print(
            f"{name:20} {split['objective']:>11.6f} {theirs:>11.6f} {free['objective']:>11.6f} "
            f"{'' if best is None else f'{best:.6f}':>11} {free['bound']:>11.6f} {gap:>6.2%} "
            f"{found['cpu_s']:>6.1f} {found['wall_s']:>5.1f}{'' if good else '  MISSED'}",
            flush=True,
        )
        results.append(
            {"input": row["input"], "published_contiguous": theirs, "published_best": best}
            | {"gap": gap, "met": good}
            | found
        )
    write_figures(out, {"rows": results})
    missed = sum(not r["met"] for r in results)
    print(f"{len(results) - missed} of {len(results)} graphs meet the targets; written to {out}")
    return 1 if missed else 0


def _alone(path: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--input", str(path), "--json", "-"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--input", type=Path, help="an operator graph")
    parser.add_argument("--devices", type=int, help="accelerators")
    parser.add_argument("--cpus", type=int, help="CPUs")
    parser.add_argument("--memory", type=float, help="bytes of an accelerator")
    parser.add_argument(
        "--seconds", type=float, default=DEFAULT_SECONDS, help="most to take, about"
    )
    parser.add_argument("--json", help="where to write; - for standard output")
    parser.add_argument("--reference", type=Path, help="a file of published figures")
    args = parser.parse_args(arguments)
    if args.reference is not None:
        return compared(args.reference, Path(args.json) if args.json else RESULTS)
    if args.input is None:
        parser.error("give --input or --reference")
    try:
        found = placed(args)
    except RayparError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = json.dumps(found, indent=1)
    if args.json in (None, "-"):
        print(text)
        return 0
    Path(args.json).write_text(text + "\n", encoding="utf-8")
    split, free = found["contiguous"], found["noncontiguous"]
    print(
        f"contiguous {split['objective']:.9g} (bound {split['bound']:.9g}), "
        if split
        else "contiguous: none fits the memory, ",
        end="",
    )
    print(
        f"any form {free['objective']:.9g} (bound {free['bound']:.9g}), {found['cpu_s']:.1f} CPU s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
