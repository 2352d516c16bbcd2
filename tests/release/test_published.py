"""Published step times: rows, plans as Megatron-LM makes them, the stand-in and its fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from raypar.errors import PlanError
from raypar.mesh.calibration_files import read_calibration
from release import published
from release._layered import Job, layers_of, memory_bytes, step_seconds
from release._megatron import Shape, equal_stages, tensor_sharding
from release._published_fit import CONSTANTS, Case, calibration_of, fit
from release._published_rows import Row, cluster_of, head_counts, read_rows, shapes
from release.workloads import gpt
from tests._tiers import examples

EXPECTED = {name: constant.expected for name, constant in CONSTANTS.items()}
SMALL = {"hidden": 64, "sequence": 32, "vocabulary": 128}


def _table(**row: Any) -> dict[str, Any]:
    return {
        "hardware": {
            "device": "V100-16GB SXM2",
            "peak_flops_per_s": 125e12,
            "memory_bytes": 16e9,
            "hbm_bytes_per_s": 900e9,
            "devices_per_node": 8,
            "intra_node_bytes_per_s": 150e9,
            "inter_node_bytes_per_s_per_node": 12.5e9,
        },
        "rows": [row],
    }


def _small(layers: int, data: int, tensor: int, pipeline: int, batch: int, **more: Any) -> Row:
    table = _table(
        data_parallel=data, tensor_parallel=tensor, pipeline_parallel=pipeline, layers=layers,
        heads=4, global_batch=batch, sequences_per_s=100.0, **SMALL, **more,
    )  # fmt: skip
    return read_rows(table)[0]


def _case(row: Row, size: int, chunks: int = 1) -> Case:
    layers = layers_of(row.hidden, 4, row.tensor, row.sequence, row.vocabulary)
    count = row.batch // (row.data * size)
    shape = Shape(row.data, row.tensor, row.pipeline, chunks, count)
    cluster = cluster_of(_table(), row.devices)
    return Case(row, cluster, [(4, Job(layers, row.layers, size, shape))])


def test_both_units_tell_the_same_step_time() -> None:
    row = _small(8, 2, 1, 1, 32)
    seconds = row.batch / 100.0
    assert row.published_s == pytest.approx(seconds)
    other = dataclasses.replace(row, rate=None, tflops=row.flops / seconds / row.devices / 1e12)
    assert other.published_s == pytest.approx(seconds)
    assert other.figure(seconds) == pytest.approx(other.published)


def test_flops_are_those_of_the_paper() -> None:
    # Narayanan et al. 2021, table 1: 145.6 billion parameters, 148 TFLOP/s on 1536 devices.
    table = _table(
        params_billion=145.6, heads=96, hidden=12288, layers=80, tensor_parallel=8,
        pipeline_parallel=8, devices=1536, global_batch=2304, tflops_per_device=148,
    )  # fmt: skip
    row = read_rows(table)[0]
    assert row.data == 24
    tokens = row.batch * row.sequence
    assert row.flops == pytest.approx(8 * tokens * 145.6e9, rel=0.06)


def test_rows_that_do_not_add_up_are_refused() -> None:
    numbers = {"tensor_parallel": 2, "pipeline_parallel": 1, "layers": 2, "hidden": 64}
    with pytest.raises(ValueError, match="not 3 devices"):
        read_rows(_table(devices=3, global_batch=4, tflops_per_device=1, **numbers))
    with pytest.raises(ValueError, match="no tflops_per_device"):
        read_rows(_table(devices=2, global_batch=4, **numbers))


def test_heads_divide_among_devices() -> None:
    wide = dataclasses.replace(_small(8, 1, 1, 1, 8), hidden=3072, heads=None)
    assert head_counts(wide) == [32, 24]
    assert head_counts(dataclasses.replace(wide, tensor=32)) == [32]
    assert head_counts(dataclasses.replace(wide, hidden=1536, tensor=32)) == [32]


def test_interleaving_only_where_layers_and_microbatches_divide() -> None:
    row = dataclasses.replace(_small(12, 1, 1, 4, 24), interleaves=True)
    found = {(size, shape.chunks) for size, shape in shapes(row)}
    assert found == {(1, 1), (1, 3), (2, 1), (2, 3), (4, 1), (8, 1)}
    with pytest.raises(PlanError, match="12 layers"):
        equal_stages(12, 5)


def test_shared_ports_are_dealt_out() -> None:
    cluster = cluster_of(_table(), 9)
    assert cluster.shape == (8, 8)
    assert cluster.link(0, 8).bandwidth == pytest.approx(12.5e9 / 8)


def test_tensor_parallelism_goes_by_columns_then_rows() -> None:
    graph = gpt(2, 64, 4, 2, explicit=True, tied=True, sequence=32, vocabulary=128).capture()
    found = tensor_sharding(graph.local(2).graph, 2)
    assert found["blocks.0.attention.q/linear#0"] == "Rg S0 S0 > S2"
    assert found["blocks.1.mlp.down/linear#0"] == "S2 S1 P > P"
    assert found["blocks.1.attention/softmax#0"] == "S1 > S1"
    assert "blocks.0.norm1/layer_norm#0" not in found
    with pytest.raises(PlanError, match="cannot be shared by 3 devices"):
        tensor_sharding(graph.local(2).graph, 3)


@pytest.mark.thorough  # of one benchmark; its parts are above
@pytest.mark.parametrize(
    ("row", "size", "chunks"),
    [
        (_small(6, 1, 2, 3, 12), 2, 2),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in (
                (_small(6, 1, 1, 1, 4), 4, 1),
                (_small(6, 2, 2, 1, 8), 2, 1),
                (_small(6, 1, 2, 3, 12), 2, 1),
                (_small(6, 1, 1, 3, 12), 2, 2),
            )
        ),
    ],
)
def test_the_stand_in_agrees_with_the_simulator(row: Row, size: int, chunks: int) -> None:
    case = _case(row, size, chunks)
    calibration = calibration_of(EXPECTED, case.cluster, "")
    heads, job = case.ways[0]
    simulated = published.prepare(case, heads, job).simulate(calibration)
    assert step_seconds(job, case.cluster, calibration) == pytest.approx(simulated, rel=0.06)


@pytest.mark.thorough  # of one benchmark
def test_more_layers_take_more_memory_and_more_stages_less() -> None:
    one = _case(_small(3, 1, 1, 1, 12), 2).ways[0][1]
    deeper = dataclasses.replace(one, depth=12)
    split = dataclasses.replace(one, shape=dataclasses.replace(one.shape, pipeline=3))
    assert memory_bytes(split) < memory_bytes(one) < memory_bytes(deeper)


@pytest.mark.thorough  # the fit of one benchmark
def test_the_fit_finds_what_the_rows_were_made_with() -> None:
    true = {**EXPECTED, "matmul_top": 0.6, "memory": 0.65, "across_efficiency": 0.3}
    cases = []
    rows = ((1, 1, 2), (1, 1, 16), (16, 1, 2), (4, 4, 8), (1, 4, 4))
    for data, tensor, size in rows[: examples(3, 5)]:
        row = dataclasses.replace(
            _small(6, data, tensor, 1, data * size), hidden=2048, sequence=1024, vocabulary=4096
        )
        case = _case(row, size)
        seconds = _seconds(case, true)
        row = dataclasses.replace(row, rate=row.batch / seconds)
        cases.append(dataclasses.replace(case, row=row))
    rows = [case.row for case in cases]
    before = published.mape(rows, [_seconds(case, EXPECTED) for case in cases])
    found = fit(cases)
    after = published.mape(rows, [_seconds(case, found) for case in cases])
    assert after < 0.2 * before
    assert found["across_efficiency"] == pytest.approx(0.3, rel=0.2)


def _seconds(case: Case, values: dict[str, float]) -> float:
    calibration = calibration_of(values, case.cluster, "")
    return step_seconds(case.ways[0][1], case.cluster, calibration)


def test_rank_correlation_and_the_constant_predictor() -> None:
    assert published.spearman([1.0, 2.0, 3.0], [10.0, 30.0, 20.0]) == pytest.approx(0.5)
    assert published.spearman([1.0, 2.0], [4.0, 3.0]) == pytest.approx(-1.0)
    rows = [
        dataclasses.replace(_small(6, 1, 1, 1, 4), rate=None, tflops=t)
        for t in (1.0, 2.0, 2.0, 2.0)
    ]
    assert published.constant_share(rows) == pytest.approx(2e12)


@pytest.mark.thorough  # its rows are played like those of the given tables
def test_a_table_of_unseen_rows_uses_the_committed_constants(tmp_path: Path) -> None:
    table = _table(
        data_parallel=1, tensor_parallel=2, pipeline_parallel=1, layers=2, heads=4,
        global_batch=4, sequences_per_s=100.0, **SMALL,
    )  # fmt: skip
    given, out = tmp_path / "table.json", tmp_path / "out.json"
    given.write_text(json.dumps({"note": "unseen", "small": table}))
    published.main(["--table", str(given), "--json", str(out)])
    found = json.loads(out.read_text())["tables"]["small"]
    assert set(found) >= {"mape", "spearman", "constant_mfu_mape", "rows"}
    assert found["constant_mfu_mape"] == pytest.approx(0.0)
    assert found["rows"][0]["predicted"] > 0
    assert found["calibration"] == read_calibration(published.CALIBRATIONS / "v100.json").note


@pytest.mark.parametrize("name", ["a100", "v100"])
def test_committed_constants_are_plausible(name: str) -> None:
    calibration = read_calibration(published.CALIBRATIONS / f"{name}.json")
    (rates,) = calibration.devices.values()
    curve = rates.matmul["float16"]
    limit = CONSTANTS["matmul_top"]
    assert limit.least <= curve.top <= limit.most
    for tier in (calibration.inside, calibration.across):
        assert 0.1 <= tier.p2p.efficiency <= 0.95
        assert 1e-6 <= tier.p2p.latency <= 1e-4
