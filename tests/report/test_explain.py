import re

import pytest
import torch
from torch import nn

import raypar as rp
from examples.data import stdlib_bytes
from examples.models import gpt


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
