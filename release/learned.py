"""The learned cost model on families of models that it has not seen.

    python release/learned.py [--count 30] [--budget 1200] [--seed 0] [--samples FILE]
                              [--note TEXT] [--json release/results/learned.json]

Measures stages of eight families of models (several sizes, batches, recompute policies, sharded or
not), alone on one thread, in CPU time of the thread. Every family in turn is left out, and what the
model learned of the others predicts it. Calibration: what `raypar probe` measured on this machine;
it is measured now where there is none. With `--samples`, what an earlier run measured is read from
there if it is there, else written. Exits with 1 if the mean error is over 10 % or over half of the
calibrated analytic model's, the rank correlation under 0.97, or the share inside the 80 % intervals
not between 70 and 90 %.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from raypar import Cluster
from raypar.mesh.calibration import Calibration
from raypar.mesh.calibration_files import load_calibration, save_calibration
from raypar.mesh.probe import probe
from raypar.plan import MeshSlice
from raypar.search.cost.features import PIECES, Pricer, analytic_s
from raypar.search.cost.machine import machine_of
from raypar.search.cost.regression import Row, WorkRegression
from release._figures import write_figures
from release._learned_measure import Sample, load_samples, measure, save_samples
from release._learned_rivals import RIVALS, Rival
from release.learned_models import FAMILIES

Array = Any
LEARNED = "learned: factors of classes and sizes"
_Z80 = 1.2816
DIRECTIONS = PIECES[:2]
"""Forward and backward are judged; the halves of backward are learned from as well."""


def rows_of(samples: Sequence[Sample], calibration: Calibration) -> list[tuple[str, str, Row]]:
    """(family, piece, row) of everything that was measured."""
    mesh = MeshSlice((0,), (1,))
    price = Pricer(machine_of(Cluster.local(2), mesh, calibration))
    found = []
    for sample in samples:
        priced = price(sample.work, 1)
        for at, piece in enumerate(PIECES):
            seconds, measured = priced.pieces[at], sample.measured[at]
            # A stage whose backward does not divide has no halves of its own.
            if measured > 0.0 and seconds and (at < 2 or sample.measured[3] > 0.0):
                row = Row(seconds, priced.traits[at], measured, sample.family)
                found.append((sample.family, piece, row))
    return found


def judged(rival: Rival, rows: Sequence[tuple[str, str, Row]]) -> dict[str, Any]:
    """How well a regressor predicts every family from the others."""
    error: dict[str, list[float]] = {}
    inside: list[bool] = []
    measured: list[float] = []
    predicted: list[float] = []
    took = []
    for family in dict.fromkeys(f for f, _, _ in rows):
        train = [row for f, _, row in rows if f != family]
        test = [row for f, piece, row in rows if f == family and piece in DIRECTIONS]
        began = time.perf_counter()
        guess = rival(train, test)
        took.append(time.perf_counter() - began)
        for row, log, sigma in zip(test, guess.log, guess.sigma, strict=True):
            seconds = analytic_s(row.seconds) * float(np.exp(log))
            error.setdefault(family, []).append(abs(seconds / row.measured - 1.0))
            inside.append(bool(abs(np.log(row.measured / seconds)) <= _Z80 * sigma))
            measured.append(row.measured)
            predicted.append(seconds)
    whole = [e for own in error.values() for e in own]
    return {
        "error": round(statistics.mean(whole), 4),
        "median_error": round(statistics.median(whole), 4),
        "rank_correlation": round(_rank_correlation(measured, predicted), 4),
        "inside_80": round(statistics.mean(inside), 4),
        "fit_s": round(statistics.median(took), 3),
        "families": {f: round(statistics.mean(own), 4) for f, own in error.items()},
    }


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def learning_curve(rows: Sequence[tuple[str, str, Row]], seed: int = 0) -> dict[str, float]:
    """Mean error on a model family after few of its own stages were seen besides the others'."""
    draw = np.random.default_rng(seed)
    found = {}
    for few in (0, 2, 6):
        errors = []
        for family in dict.fromkeys(f for f, _, _ in rows):
            own = [row for f, piece, row in rows if f == family and piece in DIRECTIONS]
            order = draw.permutation(len(own))
            seen = [own[i] for i in order[:few]]
            test = [own[i] for i in order[6:]]
            model = WorkRegression()
            model.fit([row for f, _, row in rows if f != family] + seen)
            for row, p in zip(test, model.predict(test), strict=True):
                seconds = analytic_s(row.seconds) * float(np.exp(p.log))
                errors.append(abs(seconds / row.measured - 1.0))
        found[f"{few} rows seen"] = round(statistics.mean(errors), 4) if errors else 0.0
    return found


def refit_s(rows: Sequence[tuple[str, str, Row]], count: int = 500) -> float:
    """Seconds of a refit with `count` rows."""
    own = [row for _, _, row in rows]
    many = [own[i % len(own)] for i in range(count)]
    model = WorkRegression()
    model.fit(many)
    found = []
    for _ in range(5):
        began = time.thread_time()
        model.fit(many, calibrate=False)
        found.append(time.thread_time() - began)
    return round(statistics.median(found), 4)


def measured_samples(args: argparse.Namespace, calibration: Calibration) -> list[Sample]:
    """What an earlier run measured, or what is measured now."""
    if args.samples and args.samples.exists():
        return load_samples(args.samples)
    found = []
    for sample in measure(FAMILIES, args.count, calibration, args.seed, args.budget):
        found.append(sample)
        print(f"{len(found):3} {sample.family:<6} {sample.words}", flush=True)
        if args.samples:
            save_samples(found, args.samples)
    return found


def calibrated() -> Calibration:
    """What was measured on this machine, measured now where nothing was."""
    cluster = Cluster.local(2)
    found = load_calibration(cluster)
    if not found.measured:
        found = probe(cluster)
        save_calibration(found)
    return found


def main() -> int:
    """Prints how well every regressor does; 1 if the chosen one misses its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=30, help="stages of every family")
    parser.add_argument("--budget", type=float, default=1200.0, help="seconds to measure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--note", default="", help="kept with the results")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    calibration = calibrated()
    samples = measured_samples(args, calibration)
    rows = rows_of(samples, calibration)
    table: dict[str, Any] = {}
    for name, rival in RIVALS.items():
        try:
            table[name] = judged(rival, rows)
        except ImportError as missing:
            print(f"{name}: left out, {missing}")
            continue
        own = table[name]
        print(
            f"{name:<40} error {100 * own['error']:5.1f} %  median {100 * own['median_error']:5.1f}"
            f" %  rank {own['rank_correlation']:.4f}  inside 80 % {100 * own['inside_80']:5.1f} %"
            f"  fit {own['fit_s']:.2f} s",
            flush=True,
        )
    ours, plain = table[LEARNED], table["analytic"]
    for family, error in ours["families"].items():
        print(
            f"  {family:<8} {100 * error:5.1f} %, analytic {100 * plain['families'][family]:5.1f} %"
        )
    good = (
        ours["error"] <= min(0.10, plain["error"] / 2)
        and ours["rank_correlation"] >= 0.97
        and 0.7 <= ours["inside_80"] <= 0.9
    )
    body = {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "calibration": calibration.note,
        "note": args.note,
        "stages": {f: sum(s.family == f for s in samples) for f in FAMILIES},
        "spread": round(statistics.median(s.spread for s in samples), 4),
        "held_out": table,
        "own_stages_seen": learning_curve(rows),
        "refit_500_rows_cpu_s": refit_s(rows),
        "met": good,
    }
    print(json.dumps({k: body[k] for k in ("stages", "own_stages_seen", "refit_500_rows_cpu_s")}))
    if args.json:
        write_figures(args.json, body)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
