"""Where the time of a step went, and when every rank did what."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import raypar as rp
from raypar.errors import ConfigError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import table_calibration
from raypar.schedules.instructions import Instruction
from raypar.stages.compile import compile_plan
from raypar.stages.faults import RankInfo
from raypar.stages.local import LocalRun
from raypar.stages.run import StepResult, merge_reports
from raypar.stages.spec import StepReport
from raypar.train.breakdown import PARTS, Breakdown, RankLists, busiest
from raypar.train.data import BatchForm, peek
from raypar.train.feed import DataFeed, HeldBatches
from raypar.train.metrics import MetricsLog
from raypar.train.timeline import Timeline, TimelineRecorder
from raypar.train.utilisation import model_flops, peak_flops, product_dtype
from tests._tiers import examples

FIRST = "0F0 0SF0[x>1] 0RB0[x<1] 0B0 NORM OPTIMIZER"
LAST = "1RF0[x<0] 1F0 1B0 1SB0[x>0] NORM OPTIMIZER"


def lists_of(*texts: str, nodes: tuple[str, ...] = ("", "")) -> RankLists:
    lists = tuple(tuple(map(Instruction.parse, text.split())) for text in texts)
    return RankLists(lists, tuple((group, 0) for group in range(len(lists))), nodes)


def report(step: int, clock: float, stamps: list[float], data: float = 0.0) -> StepReport:
    seconds = {"data": data, "total": stamps[-1] - stamps[0] + data}
    return StepReport(
        step, seconds=seconds, stamps=array("d", [clock + t for t in stamps]).tobytes()
    )


def two_ranks(step: int = 0, clock: float = 0.0) -> list[StepReport]:
    """By hand; the second rank's clock is ahead of the first one's."""
    at = 100.0 * step
    first = [0, 2, 3, 9, 11, 13, 14, 14]
    last = [0, 4, 6, 8, 8.5, 13, 16, 16]  # takes x at 4, of which it waits 3 for rank 0 to send
    return [
        report(step, at, [float(t) for t in first]),
        report(step, at + clock, [float(t) for t in last], data=1.0),
    ]


def test_waiting_for_somebody_is_bubble_and_for_what_is_under_way_communication() -> None:
    parts = Breakdown(lists_of(FIRST, LAST)).parts(two_ranks(), 17.0)
    zero = dict(zip(PARTS, parts[0], strict=True))
    one = dict(zip(PARTS, parts[1], strict=True))
    # Rank 0 waits from 3 on for the gradient, sent at 8.5, there at 9; all meet in the norm at 11.
    assert zero == pytest.approx(
        {"compute": 4, "communication": 1 + 0.5 + 2, "bubble": 5.5, "data": 0, "optimizer": 1,
         "other": 3}
    )  # fmt: skip
    assert one == pytest.approx(
        {"compute": 4, "communication": 1 + 0.5 + 2, "bubble": 3 + 2.5, "data": 1, "optimizer": 3,
         "other": 0}
    )  # fmt: skip
    assert busiest(parts) == 1


def test_waiting_for_updated_parameters_is_communication() -> None:
    """Stamps count it with the forward that waits."""
    lists, reports = lists_of(FIRST, LAST), two_ranks()
    parts = Breakdown(lists).parts(reports, 17.0)
    reports[0].awaited = 1.5
    waited = Breakdown(lists).parts(reports, 17.0)
    moved = dict(zip(PARTS, waited[0] - parts[0], strict=True))
    nothing = dict.fromkeys(PARTS, 0.0)
    assert moved == pytest.approx({**nothing, "compute": -1.5, "communication": 1.5})
    assert (waited[1] == parts[1]).all()


@given(st.floats(-1e4, 1e4), st.integers(1, 5))
@settings(max_examples=examples(7, 20))
def test_clocks_of_other_nodes_are_set_by_the_norm(ahead: float, steps: int) -> None:
    here, there = lists_of(FIRST, LAST), lists_of(FIRST, LAST, nodes=("a", "b"))
    apart = Breakdown(there)
    for step in range(steps):
        found = apart.parts(two_ranks(step, ahead), 17.0)
    wanted = Breakdown(here).parts(two_ranks(), 17.0)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_without_stamps_all_waiting_is_communication() -> None:
    seconds = {"compute": 1.0, "recv": 2.0, "sync": 0.5, "optimizer": 0.25, "data": 0.25}
    parts = Breakdown(lists_of(FIRST, LAST)).parts([StepReport(0, seconds=seconds)] * 2, 5.0)
    assert parts[0].tolist() == [1.0, 2.5, 0.0, 0.25, 0.25, 1.0]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def loss(out: torch.Tensor) -> torch.Tensor:
    return out.square().mean()


@pytest.fixture(scope="module")
def ran() -> tuple[LocalRun, list[StepResult], OpGraph, list[dict[str, int]]]:
    torch.set_num_threads(1)
    graph = rp.capture(model, torch.randn(8, 16), loss)
    plan = rp.plan(graph, rp.Cluster.local(2), rp.SearchConfig(stages=2, microbatches=4))
    specs = compile_plan(
        graph, plan, optimizer=lambda p: torch.optim.AdamW(p, lr=0.25), seed=0, threads=1
    )
    opened = peek([torch.randn(8, 16)], 0)
    feed = DataFeed(HeldBatches(opened), BatchForm(opened.example, None), specs)
    found: list[StepResult] = []
    with LocalRun(specs, feed=feed) as run:
        run.train(0, 6, found.append)
        return run, found, graph, run.memory()


def test_parts_of_a_real_run_add_up_to_its_steps(ran: tuple, tmp_path: Path) -> None:
    run, results, graph, held = ran
    log = MetricsLog(
        tmp_path / "metrics.jsonl", 8, None, run.infos, specs=run._specs,
        model_flops=model_flops(graph), peak_flops=1e12,
    )  # fmt: skip
    lines = [log.add(result) for result in results]
    log.close()
    for line in lines:
        assert min(line["breakdown"].values()) >= 0
        assert sum(line["breakdown"].values()) == pytest.approx(line["step_s"], abs=1e-5)
        assert sum(line["slowest"][part] for part in PARTS) == pytest.approx(
            line["step_s"], abs=1e-5
        )
        assert line["breakdown"]["compute"] > 0
        assert line["lr"] == 0.25
        assert line["mfu"] == pytest.approx(model_flops(graph) / line["step_s"] / 1e12, abs=1e-5)
    assert sum(log.summary()["breakdown"].values()) == pytest.approx(1.0, abs=1e-3)
    memory = lines[0]["memory"]
    for stage in (0, 1):
        assert memory[str(stage)]["held"] == held[stage]["total"]
        assert memory[str(stage)]["peak"] > memory[str(stage)]["held"]
    assert "memory" not in lines[1]
    timeline = Timeline.from_json((tmp_path / "timeline.json").read_text())
    assert timeline.steps == (0, 1, 2, 3, 4, 5)
    assert timeline.stages == ((0,), (1,))
    assert max(timeline.saved[0]) == results[0].ranks[0].most_saved
    assert len(timeline.saved[0]) == len(timeline.lists.lists[0])
    assert timeline.saved[0][-1] == 0, "nothing is kept over the end of a step"


def test_a_timeline_round_trips_and_damage_is_told(ran: tuple) -> None:
    run, results, *_ = ran
    breakdown = Breakdown(RankLists.of(run._specs, ["", ""]))
    recorder = TimelineRecorder(breakdown, run.infos)
    assert recorder.timeline() is None
    for result in results:
        recorder.add(result.step, result.ranks)
    found = recorder.timeline()
    assert found is not None
    again = Timeline.from_json(found.to_json())
    assert (again.lists, again.steps, again.held) == (found.lists, found.steps, found.held)
    np.testing.assert_allclose(again.stamps, found.stamps, atol=1e-7)
    raw = json.loads(found.to_json())
    for key in raw:
        if key == "format":
            continue
        for bad in (None, 3, ["x"], {}):
            with pytest.raises(ConfigError, match="no timeline"):
                Timeline.from_json(json.dumps({**raw, key: bad}))
    with pytest.raises(ConfigError, match="upgrade"):
        Timeline.from_json(json.dumps({**raw, "format": 99}))


@given(st.text() | st.recursive(st.none() | st.integers(), st.lists).map(json.dumps))
def test_any_other_text_is_no_timeline(text: str) -> None:
    with pytest.raises(ConfigError):
        Timeline.from_json(text)


def test_a_run_that_goes_on_replaces_the_lines_it_writes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    infos = [RankInfo(0, stages=(0,))]

    def steps(first: int, last: int, loss: float) -> None:
        log = MetricsLog(path, 8, None, infos, first_step=first)
        for step in range(first, last):
            log.add(merge_reports([StepReport(step, loss=loss, seconds={"total": 1.0})]))
            log.evaluation({"step": step + 1, "eval_loss": loss, "step_s": 3})
        log.close()

    steps(0, 4, 1.0)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    steps(2, 5, 2.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    own = [(x["step"], x.get("loss", x.get("eval_loss"))) for x in lines]
    assert own == [(0, 1.0), (1, 1.0), (1, 1.0), (2, 1.0), (2, 2.0), (3, 2.0), (3, 2.0),
                   (4, 2.0), (4, 2.0), (5, 2.0)]  # fmt: skip
    path.write_text('{"step": 0}\n{oops\n{"step": 2}\n')
    with pytest.warns(UserWarning, match="line 2"):
        MetricsLog(path, 8, None, infos, first_step=2).close()
    assert path.read_text() == '{"step": 0}\n{"step": 2}\n'  # lines of evaluations


def test_model_flops_are_those_of_the_unsplit_models_products() -> None:
    graph = rp.capture(model, torch.randn(8, 16), loss)
    assert model_flops(graph) == 3 * 2 * 8 * 2 * 16 * 32
    assert product_dtype(graph) == "float32"

    def half_frozen() -> nn.Module:
        made = model()
        made[0].requires_grad_(False)
        return made

    frozen = rp.capture(half_frozen, torch.randn(8, 16), loss)
    assert model_flops(frozen) == (2 + 3) * 2 * 8 * 16 * 32


def test_gpus_are_held_against_the_vendors_figure_and_cpus_against_a_measured_one() -> None:
    graph = rp.capture(model, torch.randn(8, 16), loss)
    gpus = rp.Cluster.virtual(1, 2, "H100")
    plan = rp.plan(graph, gpus, rp.SearchConfig(stages=2))
    one = gpus.nodes[0].device.peak("float32")
    table = table_calibration(gpus)
    assert peak_flops(plan, gpus, "float32", table) == len(plan.devices) * one
    cpus = rp.Cluster.local(2)
    table = table_calibration(cpus)
    assert peak_flops(plan, cpus, "float32", table) is None
    measured = replace(table, measured=True)
    kind = cpus.nodes[0].device
    share = measured.rates(kind).curve("float32").top
    assert peak_flops(plan, cpus, "float32", measured) == pytest.approx(
        len(plan.devices) * share * kind.peak("float32")
    )
