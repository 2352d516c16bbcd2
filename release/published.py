"""Simulated step times beside published ones: GPTs on A100 and V100 clusters.

    python release/published.py --table FILE --json OUT [--fit] [--only TABLE]

FILE holds tables of published throughputs (JSON: ``{name: {"hardware": {...}, "rows": [...]}}``).
Every row's GPT is captured with attention written out, in half precision, all activations
recomputed; split as the row says (data × tensor × pipeline, `_megatron.py`), heads, interleaving
and microbatch size that the row does not give being the fastest that fit the memory; lowered;
and its instruction lists are simulated. What Megatron-LM does otherwise than raypar is simulated as
Megatron-LM does it: gradients are summed over replicas after the last backward, not during it,
stages wait while values are handed on, and collectives over nodes go in rings.

Devices and links reach what `release/calibrations/` says. ``--fit`` fits its six constants per
device and fabric anew (`_published_fit.py`) and writes them there; then every row is also predicted
with constants fitted on all the other rows. The best predictor that knows just the FLOPs (one
constant share of the peak for all rows) is printed beside. Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from raypar.graph.opgraph import OpGraph
from raypar.lowered import LoweredPlan, lower_plan
from raypar.mesh.calibration import Calibration, table_calibration
from raypar.mesh.calibration_files import read_calibration, save_calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search._sim_setting import setting_of
from raypar.search.simulate import Setting, simulate_lists
from release._figures import write_figures
from release._layered import Job, handing_seconds, step_seconds
from release._megatron import equal_stages, megatron_plan
from release._published_fit import Case, calibration_of, candidates, fit, left_out
from release._published_rows import Row, cluster_of, device_name, read_rows
from release._rings import AnalyticRings
from release.workloads import gpt

CALIBRATIONS = Path(__file__).parent / "calibrations"
RESULTS = Path(__file__).parent / "results" / "published.json"
_UNIT = {"tflops_per_device": "TFLOP/s per device", "sequences_per_s": "sequences/s"}


@dataclass
class Prepared:
    """A row's model, lowered: simulated again with other constants, it is not lowered again."""

    case: Case
    heads: int
    job: Job
    graph: OpGraph
    plan: Plan
    lowered: LoweredPlan

    def simulate(self, calibration: Calibration) -> float:
        """Seconds of a step."""
        setting = setting_of(
            self.graph, self.plan, self.lowered, self.case.cluster, calibration,
            AnalyticRings.name, None, 2,
        )  # fmt: skip
        setting = as_megatron(setting, self.job, self.case.cluster, calibration)
        return simulate_lists(self.lowered.lists, setting).step_s


def as_megatron(setting: Setting, job: Job, cluster: Cluster, calibration: Calibration) -> Setting:
    """What Megatron-LM does otherwise: nothing travels while a device computes."""
    costs = tuple(replace(c, gather=(*c.gather, *c.sync), sync=()) for c in setting.costs)
    wait = handing_seconds(job, cluster, calibration) if job.shape.stages > 1 else 0.0
    return replace(setting, costs=costs, overhead_s=wait)


def prepare(case: Case, heads: int, job: Job) -> Prepared:
    """Captures, plans and lowers the whole model of a row."""
    row = case.row
    graph = gpt(
        row.layers, row.hidden, heads, row.batch, row.name,
        sequence=row.sequence, vocabulary=row.vocabulary, explicit=True, tied=True,
    ).capture()  # fmt: skip
    layers = equal_stages(row.layers, job.shape.stages)
    plan = megatron_plan(graph, case.cluster, layers, job.shape)
    return Prepared(case, heads, job, graph, plan, lower_plan(graph, plan))


def constant_share(rows: Sequence[Row]) -> float:
    """FLOP/s per device with which a predictor that knows just the FLOPs errs least."""
    rates = [row.flops / (row.devices * row.published_s) for row in rows]

    def error(rate: float) -> float:
        return mape(rows, [row.flops / (row.devices * rate) for row in rows])

    return min(rates, key=error)  # the error bends only where a row is met


def mape(rows: Sequence[Row], seconds: Sequence[float]) -> float:
    """Mean absolute error, as a fraction of the published figures."""
    errors = (abs(row.figure(s) / row.published - 1) for row, s in zip(rows, seconds, strict=True))
    return sum(errors) / len(rows)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equal values share the mean of their ranks."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]

    x, y = torch.tensor(ranks(a)), torch.tensor(ranks(b))
    x, y = x - x.mean(), y - y.mean()
    whole = float(x.norm() * y.norm())
    return float(x @ y) / whole if whole else 1.0


def run_table(name: str, table: Mapping[str, Any], refit: bool) -> dict[str, Any]:
    """One table: predictions, errors, and the constant-share predictor's beside."""
    rows = read_rows(table)
    cases = []
    for row in rows:
        cluster = cluster_of(table, row.devices)
        cases.append(Case(row, cluster, candidates(row, cluster.memory(0))))
    path = CALIBRATIONS / f"{device_name(table).lower()}.json"
    values: dict[str, float] = {}
    if refit:
        values = fit(cases)
        calibration = calibration_of(values, cases[0].cluster, "")
    elif path.exists():
        calibration = read_calibration(path)
    else:
        calibration = table_calibration(cases[0].cluster)
    ready = [prepare(case, *case.best(calibration)) for case in cases]
    if refit:
        for one in ready:
            stand_in = step_seconds(one.job, one.case.cluster, calibration)
            one.case.ratio = one.simulate(calibration) / stand_in
        values = fit(cases, values)
        calibration = calibration_of(values, cases[0].cluster, _note(name, rows, values))
        save_calibration(calibration, path)
    ready = [
        one if one.case.best(calibration)[1] == one.job
        else prepare(one.case, *one.case.best(calibration))
        for one in ready
    ]  # fmt: skip
    seconds = [one.simulate(calibration) for one in ready]
    unseen = left_out(cases, values) if refit and len(cases) > 2 else None
    return _report(name, table, ready, seconds, unseen, calibration.note, values)


def _note(name: str, rows: Sequence[Row], values: Mapping[str, float]) -> str:
    words = ", ".join(f"{key} {value:.3g}" for key, value in values.items())
    return (
        f"fitted by release/published.py --fit on {len(rows)} rows of {name} (least squares on "
        f"logarithms of step times, with expected values of the constants as priors): {words}"
    )


def _report(
    name: str,
    table: Mapping[str, Any],
    ready: Sequence[Prepared],
    seconds: Sequence[float],
    unseen: Sequence[float] | None,
    note: str,
    values: Mapping[str, float],
) -> dict[str, Any]:
    rows = [one.case.row for one in ready]
    figures = [row.figure(s) for row, s in zip(rows, seconds, strict=True)]
    rate = constant_share(rows)
    constant = [row.flops / (row.devices * rate) for row in rows]
    found: dict[str, Any] = {
        "mape": mape(rows, seconds),
        "spearman": spearman(figures, [row.published for row in rows]),
        "constant_mfu": rate / float(table["hardware"]["peak_flops_per_s"]),
        "constant_mfu_mape": mape(rows, constant),
        "calibration": note,
        "rows": [
            {
                "row": row.name, "unit": row.unit, "published": row.published, "predicted": figure,
                "step_s": s, "heads": one.heads, "microbatch": one.job.size,
                "chunks": one.job.shape.chunks, "microbatches": one.job.shape.microbatches,
            }
            for row, figure, s, one in zip(rows, figures, seconds, ready, strict=True)
        ],
    }  # fmt: skip
    if unseen is not None:
        found["constants"] = dict(values)
        found["left_out_mape"] = mape(rows, unseen)
        for entry, row, s in zip(found["rows"], rows, unseen, strict=True):
            entry["left_out"] = row.figure(s)
    return found


def show(name: str, found: Mapping[str, Any]) -> None:
    """Prints a table."""
    unit = _UNIT[found["rows"][0]["unit"]]
    print(f"\n{name} ({unit})\n  {found['calibration']}")
    print(f"  {'row':36s} published predicted  error  left out  heads microbatch chunks")
    for row in found["rows"]:
        error = row["predicted"] / row["published"] - 1
        other = f"{row['left_out'] / row['published'] - 1:+8.1%}" if "left_out" in row else " " * 8
        print(
            f"  {row['row']:36s} {row['published']:9.2f} {row['predicted']:9.2f} {error:+6.1%}  "
            f"{other}  {row['heads']:5d} {row['microbatch']:10d} {row['chunks']:6d}"
        )
    left = f", left out {found['left_out_mape']:.1%}" if "left_out_mape" in found else ""
    print(
        f"  mean absolute error {found['mape']:.1%}{left}; Spearman {found['spearman']:.3f}; best "
        f"constant share of the peak ({found['constant_mfu']:.1%}): "
        f"{found['constant_mfu_mape']:.1%}"
    )


def misses(found: Mapping[str, Any]) -> list[str]:
    """Targets that a table misses."""
    relative = found["rows"][0]["unit"] == "sequences_per_s"
    most = 0.12 if relative else 0.06
    least = found["constant_mfu_mape"] * (0.5 if relative else 1.0)
    missed = []
    if found["mape"] > most:
        missed.append(f"mean absolute error {found['mape']:.1%} > {most:.0%}")
    if found["mape"] > least:
        missed.append(f"mean absolute error {found['mape']:.1%} > {least:.1%}, from a constant")
    return missed


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the tables, simulates, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, required=True, help="JSON of published tables")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the result goes")
    parser.add_argument("--fit", action="store_true", help="fit the constants on these rows")
    parser.add_argument("--only", help="one table of the file")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tables = json.loads(asked.table.read_text(encoding="utf-8"))
    results, missed = {}, 0
    for name, table in tables.items():
        if not isinstance(table, dict) or "rows" not in table or asked.only not in (None, name):
            continue
        began = time.perf_counter()
        results[name] = run_table(name, table, asked.fit)
        show(name, results[name])
        print(f"  {time.perf_counter() - began:.0f} s")
        for line in misses(results[name]):
            missed += 1
            print(f"  MISSED {name}: {line}")
    write_figures(asked.json, {"tables": results})
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
