"""`raypar probe`: what it measured is kept, for constants and for the model that learns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from raypar.cli import main
from raypar.errors import ClusterError
from raypar.mesh import probe as probing
from raypar.mesh._probe_device import DeviceSamples, Sample
from raypar.mesh._probe_fit import LinkSample
from raypar.mesh.calibration_files import load_calibration
from raypar.mesh.cluster import Cluster
from raypar.mesh.probe import RankSamples
from raypar.plan import MeshSlice
from raypar.search.cost.collectives import CollectiveFit
from raypar.search.cost.machine import machine_of
from raypar.search.cost.store import MeasurementStore


def _rank(device: int) -> RankSamples:
    ops = [Sample("matmul", "float32", f, 0, 1e-10 * f) for f in (1e6, 1e8)]
    ops += [Sample("plain", "float32", 0, b, 1e-10 * b) for b in (1e6, 1e8)]
    samples = DeviceSamples(ops, 0.0, 0.0, [(1e6, 1, 1e-3), (1e8, 1, 1e-1)])
    # Twice as slow from 1 MB on as the small ones foretell: no line goes through all of them.
    inside = [
        LinkSample(kind, 2, n, 1e-4 + n * (1e-9 if n < 1e6 else 2e-9))
        for kind in ("p2p", "all_reduce")
        for n in (1 << 10, 1 << 15, 1 << 18, 1 << 20, 1 << 22)
    ]
    return RankSamples(device, samples, {"inside": inside, "across": []})


def test_collectives_are_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYPAR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(probing, "probe_local", lambda cluster: [_rank(0), _rank(1)])
    done = CliRunner().invoke(main, ["probe", "--local", "2"])
    assert done.exit_code == 0, done.output
    cluster = Cluster.local(2)
    calibration = load_calibration(cluster)
    assert calibration.measured
    rows = MeasurementStore.for_cluster(cluster).collectives
    assert {(row.collective, row.tier, row.size, row.count) for row in rows} == {
        ("all_reduce", "inside", 2, 2)
    }
    fit = CollectiveFit(cluster, calibration, rows)
    machine = machine_of(cluster, MeshSlice((0, 1), (2,), ("x",)), calibration)
    alone, learned = 0.0, 0.0
    for row in rows:
        analytic = machine.collective_s("x", "all_reduce", int(row.nbytes))
        factor = fit.predict(machine, "x", "all_reduce", int(row.nbytes)).log
        off = math.log(row.seconds / analytic)
        alone, learned = alone + abs(off), learned + abs(off - factor)
    assert learned < 0.7 * alone


@pytest.mark.parametrize(
    ("args", "env", "expected"),
    [
        ([], "head:6379", "head:6379"),
        (["--address", "other:6379"], "head:6379", "other:6379"),
        (["--local", "2"], "head:6379", None),
        ([], "local", None),
        ([], None, None),
    ],
)
def test_what_is_measured_is_what_runs_would_use(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    env: str | None,
    expected: str | None,
) -> None:
    monkeypatch.setenv("RAYPAR_CACHE_DIR", str(tmp_path))
    if env is not None:
        monkeypatch.setenv("RAY_ADDRESS", env)
    seen: list[str | None] = []

    def measured(cluster: Cluster, *, address: str | None, keep: object) -> None:
        seen.append(address)
        raise ClusterError("that is all")

    def from_ray(address: str) -> Cluster:
        assert address == expected
        return Cluster.local(2)

    monkeypatch.setattr(probing, "probe", measured)
    monkeypatch.setattr(Cluster, "from_ray", from_ray)
    assert CliRunner().invoke(main, ["probe", *args]).exit_code == 1
    assert seen == [expected]
