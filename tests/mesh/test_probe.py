"""Calibrations: fits that find known constants, files that survive, links measured on threads."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypar import Cluster
from raypar.comm.local import LocalWorld
from raypar.errors import ClusterError
from raypar.mesh import _probe_device, _probe_links
from raypar.mesh._probe_device import DeviceSamples, Sample, measure_device
from raypar.mesh._probe_fit import (
    LinkSample,
    fit_device,
    fit_matmul,
    fit_memory,
    fit_reordered,
    fit_tier,
    non_negative,
)
from raypar.mesh.calibration import (
    COLLECTIVE_KINDS,
    INSIDE,
    Calibration,
    DeviceRates,
    LinkRates,
    MatmulCurve,
    MemoryCurve,
    TierRates,
    table_calibration,
)
from raypar.mesh.calibration_files import (
    CACHE_VARIABLE,
    fingerprint,
    load_calibration,
    save_calibration,
)
from raypar.mesh.devices import DEVICES, Link
from raypar.mesh.probe import RankSamples, calibrate, chosen_devices, probe_local
from raypar.report.calibration import calibration_text
from raypar.sharding.convert import COLLECTIVES

PEAK = 80e9
_rates = st.floats(min_value=1e8, max_value=1e12)


def test_the_kinds_of_collectives_are_those_of_conversions() -> None:
    assert set(COLLECTIVE_KINDS) == set(COLLECTIVES)


@given(st.floats(0.05, 2.0), st.floats(1e3, 1e8))
def test_a_matmul_curve_is_found_from_its_own_times(top: float, half: float) -> None:
    curve = MatmulCurve(top, half)
    flops = [1e4, 1e6, 1e7, 1e8, 1e9]
    samples = [Sample("matmul", "float32", f, 0, curve.seconds(f, PEAK)) for f in flops]
    found = fit_matmul(samples, PEAK, 0.0)
    for f in flops:
        assert found.seconds(f, PEAK) == pytest.approx(curve.seconds(f, PEAK), rel=1e-4)


@given(_rates, st.floats(0.1, 0.9), st.sampled_from([1e6, 4e6]))
def test_a_memory_curve_is_found_from_its_own_times(
    near: float, slower: float, knee: float
) -> None:
    curve = MemoryCurve(near, near * slower, knee)
    sizes = [1e5, 1e6, 4e6, 16e6, 64e6]
    found = fit_memory(sizes, [curve.seconds(b) for b in sizes], 0.0)
    for size in sizes:
        assert found.seconds(size) == pytest.approx(curve.seconds(size), rel=0.35)


def test_what_is_reordered_pays_for_its_bytes_too() -> None:
    samples = [
        Sample("conv", "float32", f, b, 1e-6 + f / 40e9 + b / 5e9)
        for f, b in ((1e7, 1e6), (1e8, 1e6), (5e7, 4e6), (2e8, 2e5))
    ]
    curve, memory = fit_reordered(samples, PEAK, 1e-6)
    assert memory is not None
    assert curve.top * PEAK == pytest.approx(40e9, rel=1e-3)
    assert memory.near == pytest.approx(5e9, rel=1e-3)


@given(st.lists(st.floats(1e-6, 1e-2), min_size=4, max_size=6))
def test_noise_gives_no_negative_coefficients(seconds: list[float]) -> None:
    n = len(seconds)
    found = non_negative([[1.0] * n, [float(i + 1) for i in range(n)]], seconds)
    assert min(found) >= 0
    assert max(found) > 0


def test_a_link_is_found_from_its_own_times() -> None:
    link = Link(1e9, 1e-5)
    samples = [LinkSample("p2p", 2, b, 2e-5 + b / 0.5e9) for b in (1e3, 1e5, 1e7)]
    samples += [
        LinkSample("all_reduce", 4, b, 4 * 3e-5 + 1.5 * b / 0.25e9) for b in (1e3, 1e5, 1e7)
    ]
    found = fit_tier(samples, link)
    assert found is not None
    assert found.p2p.latency == pytest.approx(2e-5, rel=1e-3)
    assert found.p2p.efficiency == pytest.approx(0.5, rel=1e-3)
    assert found.collective("all_max") == found.collective("all_reduce")
    assert found.collective("all_reduce").latency == pytest.approx(3e-5, rel=1e-3)
    assert found.collective("all_reduce").efficiency == pytest.approx(0.25, rel=1e-3)
    assert fit_tier([], link) is None


def _calibration(cluster: Cluster, top: float = 0.5) -> Calibration:
    rates = DeviceRates(
        {"float32": MatmulCurve(top, 1e5)}, {"plain": MemoryCurve(1e10, 5e9, 1e6)}, 1e-6,
        MemoryCurve(1e9, 1e9), 2e-6, 3e-7,
    )  # fmt: skip
    tier = TierRates(LinkRates(1e-5, 0.9), {"all_reduce": LinkRates(2e-5, 0.7)})
    return Calibration(
        {"CPU": rates}, tier, tier, True, fingerprint(cluster), "measured for a test"
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return tmp_path


def test_a_calibration_round_trips_and_is_found_again(cache: Path) -> None:
    cluster = Cluster.local(2)
    calibration = _calibration(cluster)
    assert Calibration.from_json(calibration.to_json()) == calibration
    text = Calibration.from_json(calibration.to_json()).to_json()
    assert text == calibration.to_json()
    path = save_calibration(calibration)
    assert load_calibration(cluster).to_json() == text
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written is left


def test_a_cluster_that_was_not_measured_says_so(cache: Path) -> None:
    cluster = Cluster.local(2)
    found = load_calibration(cluster)
    assert not found.measured
    assert found.note == "uncalibrated: device table"
    assert found == table_calibration(cluster)
    assert Calibration.from_json(found.to_json()) == found


def test_the_nearest_measurement_of_the_same_hardware_speaks_for_other_counts(
    cache: Path,
) -> None:
    save_calibration(_calibration(Cluster.local(8), top=0.4))
    save_calibration(_calibration(Cluster.local(2), top=0.6))
    found = load_calibration(Cluster.local(3))
    assert found.devices["CPU"].matmul["float32"].top == 0.6
    assert "other counts" in found.note
    assert not load_calibration(Cluster.virtual(1, 4, "A100-80")).measured


def test_a_corrupt_file_is_put_aside_and_told(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Cluster.local(2)
    path = save_calibration(_calibration(cluster))
    for text in ("{", '{"format": 1}', path.read_text().replace('"top": 0.5', '"top": -1')):
        path.write_text(text)
        with caplog.at_level(logging.WARNING):
            assert not load_calibration(cluster).measured
        assert "raypar probe" in caplog.text
        assert not path.exists()
        assert path.with_suffix(".corrupt").read_text() == text


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match=CACHE_VARIABLE):
        save_calibration(_calibration(Cluster.local(2)), tmp_path / "file" / "x.json")


def test_devices_are_chosen_from_every_kind_of_node() -> None:
    assert chosen_devices(Cluster.local(3)) == (0, 1, 2)
    many = chosen_devices(Cluster.virtual(16, 8, "H100"))
    assert many == tuple(range(16))


def test_this_machine_is_no_gpu_cluster() -> None:
    with pytest.raises(ClusterError, match="--address"):
        probe_local(Cluster.virtual(1, 2, "H100"))


def _links(ranks: int, nodes: list[int]) -> list[dict[str, list[LinkSample]]]:
    world = LocalWorld(ranks)
    found: list[dict[str, list[LinkSample]]] = [{} for _ in range(ranks)]

    def run(rank: int) -> None:
        found[rank] = _probe_links.measure_links(world.group(rank), nodes, torch.device("cpu"))

    threads = [threading.Thread(target=run, args=(r,)) for r in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return found


def test_every_tier_and_kind_of_exchange_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_probe_links, "_SIZES", (1 << 10, 1 << 12))
    monkeypatch.setattr(_probe_links, "_REPEATS", 3)
    found = _links(4, [0, 0, 1, 1])
    for rank in found:
        for tier in ("inside", "across"):
            assert {s.kind for s in rank[tier]} == {"p2p", *COLLECTIVE_KINDS}
            assert all(s.size == 2 and s.seconds > 0 for s in rank[tier])
    alone = _links(3, [0, 0, 0])
    assert not any(rank["across"] for rank in alone)
    assert {s.size for s in alone[2][INSIDE]} == {3}


def test_a_device_is_measured_and_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_probe_device, "_REPEATS", 1)
    monkeypatch.setattr(_probe_device, "_ROWS", (64, 128))
    monkeypatch.setattr(_probe_device, "_CPU_PRODUCTS", ((8, 8, 8), (32, 32, 32), (64, 64, 64)))
    monkeypatch.setattr(
        _probe_device, "_CONVOLUTIONS", ((1, 16, 16, 8, 3, 1), (1, 16, 32, 8, 1, 1))
    )
    monkeypatch.setattr(_probe_device, "_ATTENTIONS", ((1, 2, 16, 8), (1, 2, 32, 8)))
    monkeypatch.setattr(torch.optim, "AdamW", lambda params: torch.optim.SGD(params, lr=0.1))
    waited = []
    samples = measure_device(torch.device("cpu"), lambda: waited.append(1))
    assert waited
    assert samples.overhead > 0
    assert samples.view_overhead > 0
    rates = fit_device(samples, DEVICES["CPU"])
    assert {"float32", "float64", "float32/conv", "float32/attention"} <= set(rates.matmul)
    assert {"plain", "exp", "softmax", "norm", "gather", "scatter", "pool", "random"} <= set(
        rates.memory
    )
    assert rates.optimizer.near > 0
    cluster = Cluster.local(1)
    found = calibrate(cluster, [RankSamples(0, samples, {"inside": [], "across": []})])
    assert found.measured
    assert found.inside == table_calibration(cluster).inside
    assert Calibration.from_json(found.to_json()) == found
    text = calibration_text(found, cluster)
    assert "GFLOP/s" in text
    assert "conv_backward" in text


def test_ranks_are_merged_by_their_median() -> None:
    def rank(seconds: float) -> RankSamples:
        ops = [Sample("matmul", "float32", f, 0, seconds * f) for f in (1e6, 1e8)] + [
            Sample("plain", "float32", 0, b, seconds * b) for b in (1e6, 1e8)
        ]
        samples = DeviceSamples(ops, 0.0, 0.0, [(1e6, 1, 1e-3), (1e8, 1, 1e-1)])
        return RankSamples(0, samples, {"inside": [], "across": []})

    found = calibrate(Cluster.local(3), [rank(s) for s in (1e-10, 2e-10, 9e-10)])
    curve = found.devices["CPU"].matmul["float32"]
    assert curve.top * DEVICES["CPU"].peak("float32") == pytest.approx(5e9, rel=1e-3)
