"""What ranks of one process hold together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import raypar as rp
from raypar.stages import holdings
from raypar.stages.compile import compile_plan
from raypar.stages.holdings import Holdings, Workshop
from raypar.testing import models, random_plan, random_sharding
from raypar.testing.equivalence import default_optimizer


def test_ranks_of_a_mesh_share_programs_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.case("mlp")
    graph = rp.capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)
    plan = random_plan(graph, rp.Cluster.local(2), seed=2, stages=2, replicas=1)
    plan = random_sharding(graph, plan, rp.Cluster.local(8), meshes=[(2,), (2, 2)])
    specs = compile_plan(graph, plan, optimizer=default_optimizer)
    whole, compiled = holdings.compile_stage, []

    def counted(*args: Any, **options: Any) -> Any:
        compiled.append(options["name"])
        return whole(*args, **options)

    monkeypatch.setattr(holdings, "compile_stage", counted)
    workshop, cpu = Workshop(), torch.device("cpu")
    held = [Holdings(spec, cpu, workshop) for spec in specs]
    assert sorted(compiled) == ["stage 0", "stage 1"]
    memory = [p.untyped_storage().data_ptr() for h in held for p in h.params.values()]
    assert len(set(memory)) == len(memory)
    Holdings(specs[0], cpu)
    assert len(compiled) == 3
