"""A stage actor is killed, and the run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util.placement_group import placement_group_table
from torch import nn

import raypar as rp
from raypar.stages.compile import compile_plan
from raypar.testing import models
from raypar.testing.backends import start_run
from raypar.train.checkpoint import CheckpointStore
from tests.train.checkpoint.runs import adamw, differences, graph_of, losses, plan_of, save, start

STEPS = 40


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 3))


class Samples(torch.utils.data.Dataset):
    def __init__(self, pause: float) -> None:
        self.pause = pause
        g = torch.Generator().manual_seed(7)
        self.x, self.y = torch.randn(40, 6, generator=g), torch.randint(0, 3, (40,), generator=g)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(self.pause)
        return self.x[at], self.y[at]


class Watch(rp.Callback):
    """Keeps losses and events; kills a stage actor once a checkpoint of it is there."""

    def __init__(self, kill_after: int | None) -> None:
        self.losses: dict[int, float] = {}
        self.events: list[dict[str, Any]] = []
        self.starts = 0
        self._kill_after = kill_after
        self._run = ""

    def on_start(self, run: Any) -> None:
        self.starts += 1
        self._run = run.name

    def on_event(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def on_step(self, line: dict[str, Any]) -> None:
        self.losses[line["step"]] = line["loss"]

    def on_checkpoint(self, path: str, step: int) -> None:
        if self._kill_after is not None and step >= self._kill_after:
            self._kill_after = None
            threading.Thread(target=self._kill_once_there, args=(Path(path),)).start()

    def _kill_once_there(self, path: Path) -> None:
        while not path.is_dir():
            time.sleep(0.01)
        names = [n["name"] for n in ray.util.list_named_actors(all_namespaces=True)]
        name = next(n for n in names if n.startswith(f"raypar-{self._run}-") and "rank-1" in n)
        info = ray.get(ray.get_actor(name).info.remote())
        os.kill(info.pid, signal.SIGKILL)


def fit(path: Path, watch: Watch, workers: int, failures: int, pause: float) -> rp.Result:
    return rp.Trainer(
        model,
        loss_fn=nn.functional.cross_entropy,
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
        data=rp.batches(Samples(pause), 8, shuffle=True),
        steps=STEPS,
        scaling_config=rp.ScalingConfig(num_workers=workers),
        search_config=rp.SearchConfig(stages=2, microbatches=2),
        run_config=rp.RunConfig(
            name="run", storage_path=path, log_every=0, callbacks=[watch],
            checkpoint_config=rp.CheckpointConfig(every_steps=4),
            failure_config=rp.FailureConfig(max_failures=failures),
        ),
    ).fit()  # fmt: skip


def test_a_run_whose_actor_was_killed_goes_on_bit_for_bit(ray_session: str, tmp_path: Path) -> None:
    calm, killed = Watch(None), Watch(kill_after=8)
    straight = fit(tmp_path / "calm", calm, 0, 0, 0.0)  # in this process, as good as elsewhere
    found = fit(tmp_path / "killed", killed, 2, 1, 0.005)
    assert killed.starts == 2
    assert killed.losses == calm.losses
    assert straight.checkpoint is not None
    assert found.checkpoint is not None
    expected, weights = straight.checkpoint.state_dict(), found.checkpoint.state_dict()
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
    kinds = [event["kind"] for event in killed.events]
    assert kinds == ["failure", "restart"]
    assert "rank 1" in killed.events[0]["text"]
    assert "step-" in killed.events[1]["text"]
    lines = (tmp_path / "killed" / "run" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines].count("start") == 2
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "killed" / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(STEPS))
    assert not [g for g in placement_group_table().values() if g["state"] != "REMOVED"]


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
