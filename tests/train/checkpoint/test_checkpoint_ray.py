"""Saved by actors, restored into others."""

from __future__ import annotations

from pathlib import Path

import pytest

from raypar.stages.compile import compile_plan
from raypar.testing import models
from raypar.testing.backends import start_run
from raypar.train.checkpoint import CheckpointStore
from tests.train.checkpoint.runs import adamw, differences, graph_of, losses, plan_of, save, start


@pytest.mark.thorough  # a run whose actor is killed saves and restores on actors too
def test_between_actors_and_threads(ray_session: str, tmp_path: Path) -> None:
    plan, other = plan_of("mlp", 1, sharded=False), plan_of("mlp", 5, sharded=False)
    store, second = CheckpointStore(tmp_path / "a"), CheckpointStore(tmp_path / "b")
    specs = compile_plan(graph_of("mlp"), plan, optimizer=adamw)
    batch = models.tensors(models.case("mlp").batch())
    with start_run("ray", specs, batch) as run:
        losses(run, 0, 2)
        saved = save(store, run, plan, 2)
        wanted = losses(run, 2, 2)
        assert saved.restore(run).step == 2
        assert losses(run, 2, 2) == wanted
    with start("mlp", other, seed=1) as run:
        saved.restore(run)
        assert differences(saved, save(second, run, other, 2)) == []
    store.close()
    second.close()
