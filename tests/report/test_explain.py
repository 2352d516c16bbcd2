import dataclasses
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import raypar as rp
from examples.data import stdlib_bytes
from examples.models import gpt
from raypar._plan_text import duration, size, table
from raypar.lowered import lower_plan
from raypar.mesh.calibration import table_calibration
from raypar.plan import MeshSlice
from raypar.search.simulate import simulate
from raypar.testing import models
from raypar.testing.sharding import random_sharding


@pytest.fixture(scope="module")
def graph() -> rp.OpGraph:
    batch = next(stdlib_bytes(8, 8))
    return rp.capture(lambda: gpt(layers=3, width=16, heads=2, seq_len=8), batch)


def cells(text: str, column: str) -> list[str]:
    """One column of the table, by the place of its title (cells hold no double space)."""
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("stage"))
    place = re.split(r"\s{2,}", lines[head].strip()).index(column)
    rows = []
    for line in lines[head + 1 :]:
        if not line:
            break
        rows.append(re.split(r"\s{2,}", line.strip())[place])
    return rows


def test_the_table_has_a_row_per_stage_with_work_and_traffic(graph: rp.OpGraph) -> None:
    cluster = rp.Cluster.local(3)
    plan = rp.plan(graph, cluster, rp.SearchConfig(stages=3, microbatches=4))
    text = rp.explain(plan, graph, cluster)
    assert cells(text, "stage") == ["0", "1", "2"]
    assert cells(text, "first op") == [s.first for s in plan.stages]
    work = [int(cell.removesuffix(" %")) for cell in cells(text, "work")]
    assert 98 <= sum(work) <= 102
    # The residual stream is (2 samples, 8, 16) in float32: 1024 bytes; a cut may hold it twice.
    sent = cells(text, "sends")
    assert set(sent[:2]) <= {"1.02 kB", "2.05 kB"}
    assert sent[2] == "0 B"
    assert "batch 8 = 4 microbatches × 1 replica × 2 samples" in text
    assert cluster.describe() in text


def test_the_tied_embedding_is_told(graph: rp.OpGraph) -> None:
    plan = rp.plan(graph, rp.Cluster.local(2), rp.SearchConfig(stages=2))
    assert "token_embedding.weight is used by stages 0, 1" in rp.explain(plan, graph)


def test_more_microbatches_idle_less(graph: rp.OpGraph) -> None:
    def idle(microbatches: int) -> int:
        config = rp.SearchConfig(stages=2, microbatches=microbatches, replicas=1)
        plan = rp.plan(graph, rp.Cluster.local(2), config)
        match = re.search(r"idle (\d+) %", rp.explain(plan, graph))
        assert match is not None
        return int(match[1])

    assert idle(1) > idle(2) > idle(8)


def test_what_mixes_samples_is_named() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))

    graph = rp.capture(model, torch.randn(8, 4), lambda out: out.square().mean())
    plan = rp.plan(graph, rp.Cluster.local(2))
    text = rp.explain(plan, graph)
    assert "one replica only" in text
    assert "batch_norm" in text
    assert "depends on the number of microbatches" in text


def test_a_plan_explains_itself_without_graph(graph: rp.OpGraph) -> None:
    plan = rp.plan(graph, rp.Cluster.local(4), rp.SearchConfig(stages=2, replicas=2))
    text = plan.explain()
    assert cells(text, "devices") == ["0-1", "2-3"]
    assert "2 stages on 2 rank groups × 2 replicas = 4 devices" in text
    assert rp.Plan.from_json(plan.to_json()).explain() == text


def test_a_plan_for_another_model_is_refused(graph: rp.OpGraph) -> None:
    plan = rp.plan(graph, rp.Cluster.local(2), rp.SearchConfig(stages=2))
    other = rp.capture(lambda: nn.Linear(4, 4), torch.randn(8, 4), lambda out: out.mean())
    with pytest.raises(rp.PlanError):
        rp.explain(plan, other)


def sharded(graph: rp.OpGraph, **options: Any) -> rp.Plan:
    """A plan of one stage whose blocks are sharded as in Megatron-LM, over ("data", "x")."""
    base = rp.plan(graph, rp.Cluster.local(4), rp.SearchConfig(stages=1, replicas=1))
    (stage,) = base.stages
    texts = ("Rg S0 S0 > S2", "S2 > S2", "S2 S1 P > P")
    names = ("mlp.0/linear#0", "mlp.1/gelu#0", "mlp.2/linear#0")
    made = dataclasses.replace(
        stage,
        mesh=MeshSlice((0, 1, 2, 3), (2, 2), ("data", "x")),
        sharding={
            f"blocks.{i}.{name}": text
            for i in range(3)
            for name, text in zip(names, texts, strict=True)
        },
    )
    return dataclasses.replace(base, stages=(made,), **options)


def test_shardings_have_names_and_repeated_layers_are_counted(graph: rp.OpGraph) -> None:
    cluster = rp.Cluster.local(4)
    text = rp.explain(sharded(graph), graph, cluster)
    assert "stage 0 on devices 0-3 as data 2 × x 2: " in text
    assert "blocks.0-2" in text
    flat = " ".join(text.split())
    assert re.search(r"column-parallel \d+ %: 3 linear", flat), flat
    assert re.search(r"row-parallel \d+ %: 3 linear", flat)
    assert "over data (2): batch" in flat
    assert "forward: 3 × all_reduce over x" in flat
    assert "backward: 3 × all_reduce over x" in flat
    without = " ".join(rp.explain(sharded(graph), graph).split())
    assert "forward: 3 × all_reduce over x" in without


def test_time_and_memory_are_those_of_the_simulation(graph: rp.OpGraph) -> None:
    cluster, plan = rp.Cluster.local(4), sharded(graph)
    played = simulate(graph, plan, cluster)
    text = rp.explain(plan, graph, cluster)
    assert f"step {duration(played.step_s)}" in text
    assert f"{size(played.peak_bytes[0])} of {size(cluster.memory(0))}" in text
    assert "device table; `raypar probe` measures this cluster" in text
    assert "critical path: " in text
    measured = dataclasses.replace(table_calibration(cluster), measured=True, note="by hand")
    text = rp.explain(plan, graph, cluster, calibration=measured)
    assert "costs: by hand\n" in text


def test_a_step_is_told_once_where_the_planner_foresaw_the_same(graph: rp.OpGraph) -> None:
    cluster = rp.Cluster.local(4)
    played = simulate(graph, sharded(graph), cluster)
    same = sharded(graph, predicted={"step_s": played.step_s})
    text = rp.explain(same, graph, cluster)
    assert text.count(f"step {duration(played.step_s)}") == 1
    assert "planned: step" not in text
    other = rp.explain(sharded(graph, predicted={"step_s": 2 * played.step_s}), graph, cluster)
    assert f"when it was planned: step {duration(2 * played.step_s)}\n" in other
    assert f"step {duration(played.step_s)}, " in other
    assert f"predicted: step {duration(played.step_s)}" in rp.explain(same, graph)


def test_lists_have_every_instruction_in_order(graph: rp.OpGraph) -> None:
    cluster = rp.Cluster.local(2)
    plan = rp.plan(graph, cluster, rp.SearchConfig(stages=2, replicas=1, microbatches=2))
    lists = lower_plan(graph, plan).lists
    text = rp.explain(plan, graph, cluster, lists=True)
    blocks = text[text.index("rank group 0, device") :].split("\n\n")
    for block, program in zip(blocks, lists, strict=True):
        words = [line.split()[0] for line in block.splitlines()[1:] if line[:4].strip()]
        assert words == [str(now) for now in program]


def test_runner_up_plans_come_with_what_they_lose(graph: rp.OpGraph) -> None:
    own, others = {"step_s": 0.010}, {"2 stages": 0.012, "4 replicas": 0.011}
    plan = sharded(graph, predicted=own, alternatives=others)
    for text in (rp.explain(plan, graph), plan.explain()):
        rows = [line.split() for line in text.splitlines() if line.startswith("  +")]
        assert rows == [
            ["+10.0", "%", "11", "ms", "4", "replicas"],
            ["+20.0", "%", "12", "ms", "2", "stages"],
        ]
    assert "runner-up" not in rp.explain(sharded(graph), graph)


@given(
    st.lists(st.tuples(st.text("abc.", min_size=1, max_size=90), st.integers(0, 10**6)), min_size=1)
)
def test_a_table_is_never_wider_than_the_screen(rows: list[tuple[str, int]]) -> None:
    names, numbers = [a for a, _ in rows], [str(b) for _, b in rows]
    lines = table([("first", names), ("last", names), ("number", numbers)])
    assert len(lines) == len(rows) + 1
    assert max(map(len, lines)) <= 100
    for (name, _), line in zip(rows, lines[1:], strict=True):
        assert name in line or "…" in line


@pytest.mark.parametrize(
    "name",
    [
        "gpt",
        pytest.param("cnn", marks=pytest.mark.thorough),
        pytest.param("t5", marks=pytest.mark.thorough),
    ],
)
def test_no_line_is_longer_than_100_columns(name: str) -> None:
    case = models.case(name)
    graph = rp.capture(case.model_fn, case.batch(seed=0), case.loss_fn, case.batch_dims)
    base = rp.plan(
        graph, rp.Cluster.local(4), rp.SearchConfig(planner="uniform", stages=2, replicas=1)
    )
    plan = random_sharding(graph, base, rp.Cluster.local(4), seed=1, meshes=((2,),))
    text = rp.explain(plan, graph, rp.Cluster.local(4), lists=True)
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (5 * 10**12, "5 TB")],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text
