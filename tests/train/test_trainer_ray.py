"""The trainer on Ray actors: equal to one process, and tidy when it is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.util.placement_group import placement_group_table
from torch import nn

import raypar as rp

ROOT = Path(__file__).resolve().parents[2]


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )


def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(7)
    return [
        (torch.randn(8, 6, generator=g), torch.randint(0, 3, (8,), generator=g)) for _ in range(n)
    ]


def trainer(path: Path, **changed: Any) -> rp.Trainer:
    arguments: dict[str, Any] = {
        "loss_fn": nn.functional.cross_entropy,
        "optimizer": lambda p: torch.optim.AdamW(p, lr=0.01),
        "data": batches(3),
        "steps": 6,
        "clip_norm": 0.5,
        "scaling_config": rp.ScalingConfig(num_workers=4),
        "run_config": rp.RunConfig(name="run", storage_path=path, log_every=0),
        "search_config": rp.SearchConfig(stages=2, replicas=2, microbatches=2),
    }
    arguments.update(changed)
    return rp.Trainer(model, **arguments)


def weights(result: rp.Result) -> dict[str, torch.Tensor]:
    assert result.checkpoint is not None
    return result.checkpoint.state_dict()


def held_groups() -> list[str]:
    return [g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED"]


@pytest.mark.parametrize("stages", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_stages_of_two_replicas_on_actors_equal_one_process(
    ray_session: str, tmp_path: Path, stages: int
) -> None:
    small = {"search_config": rp.SearchConfig(stages=stages, replicas=2, microbatches=2)}
    workers = rp.ScalingConfig(num_workers=2 * stages)
    there = trainer(tmp_path / "ray", scaling_config=workers, **small).fit()
    here = trainer(
        tmp_path / "local", plan=there.plan, scaling_config=rp.ScalingConfig(num_workers=0)
    ).fit()
    assert weights(there).keys() == model().state_dict().keys()
    torch.testing.assert_close(weights(there), weights(here))
    assert there.metrics["startup"]["start"] > 0
    assert there.metrics["driver_share"] >= 0
    assert not held_groups()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_search_runs_plans_and_training_starts_afresh(
    ray_session: str, tmp_path: Path, workers: int
) -> None:
    small = {"scaling_config": rp.ScalingConfig(num_workers=workers), "steps": 3}
    search = rp.SearchConfig(planner="optuna", trials=3, seeds=("uniform",), measure=2)
    random_state = torch.get_rng_state()
    there = trainer(tmp_path / "ray", search_config=search, **small).fit()
    assert torch.equal(torch.get_rng_state(), random_state)
    small["scaling_config"] = rp.ScalingConfig(num_workers=0)
    here = trainer(tmp_path / "local", plan=there.plan, **small).fit()
    record = json.loads((there.path / "search.json").read_text())
    assert record["measured_s"] > 0
    torch.testing.assert_close(weights(there), weights(here))
    assert not held_groups()


def test_a_generator_that_cannot_travel_is_relayed_and_its_error_arrives(
    ray_session: str, tmp_path: Path
) -> None:
    def source() -> Iterator[Any]:
        yield from batches(4)
        raise PermissionError("the tape is locked")

    class Look(rp.Callback):
        holders: list[str] | None = None

        def on_step(self, line: dict[str, Any]) -> None:
            if line["step"] == 3 and Path("/proc/self/maps").exists():  # after a checkpoint
                self.holders = torch_holders("_QueueActor", "ray::Driver")

    look = Look()
    small = {
        "scaling_config": rp.ScalingConfig(num_workers=1),
        "search_config": rp.SearchConfig(stages=1),
        "run_config": rp.RunConfig(
            name="run", storage_path=tmp_path, log_every=0, callbacks=[look],
            checkpoint_config=rp.CheckpointConfig(every_steps=2),
        ),
    }  # fmt: skip
    with pytest.raises(rp.DataError, match=r"PermissionError.*step 4: the tape is locked"):
        trainer(tmp_path, data=source(), **small).fit()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    if Path("/proc/self/maps").exists():
        assert look.holders == []  # those that only pass things on start fast, and stay small
    assert not held_groups()


def test_what_scaling_plan_and_cluster_disagree_about(ray_session: str, tmp_path: Path) -> None:
    wide = trainer(tmp_path, scaling_config=rp.ScalingConfig(num_workers=0)).fit().plan
    with pytest.raises(rp.PlanError, match=r"plan uses 4 devices.*num_workers=3\) allows 3"):
        trainer(tmp_path, plan=wide, scaling_config=rp.ScalingConfig(num_workers=3)).fit()
    with pytest.raises(rp.ClusterError, match=r"num_workers=99.*16 devices.*num_workers=16"):
        trainer(tmp_path, scaling_config=rp.ScalingConfig(num_workers=99)).fit()


SCRIPT = """
import sys, time, torch, raypar as rp
from torch import nn

def model():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

class Slow:
    def __iter__(self):
        while True:
            time.sleep(0.02)
            yield torch.ones(4, 4), torch.zeros(4, dtype=torch.int64)

rp.Trainer(
    model, loss_fn=nn.functional.cross_entropy, data=Slow(), steps=100000,
    optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
    scaling_config=rp.ScalingConfig(num_workers=int(sys.argv[2])),
    search_config=rp.SearchConfig(stages=int(sys.argv[2])),
    run_config=rp.RunConfig(name="run", storage_path=sys.argv[1], log_every=1),
).fit()
"""


class Stopped:
    """A training process, started and brought to its first steps."""

    def __init__(self, path: Path, address: str | None, workers: int) -> None:
        script = path / "script.py"
        script.write_text(textwrap.dedent(SCRIPT))
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        if address:
            env["RAY_ADDRESS"] = address
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(path), str(workers)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if line.startswith("step 3/"):
                return
        raise AssertionError(f"it ended by itself:\n{self.output}")

    def __enter__(self) -> Stopped:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        self.output += self.process.communicate(timeout=60)[0]
        return self.process.returncode


def processes() -> dict[int, tuple[int, str]]:
    """pid → (parent, command)."""
    text = subprocess.run(
        ["ps", "-axww", "-o", "pid=,ppid=,command="], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for line in text.splitlines():
        pid, parent, command = line.split(None, 2)
        found[int(pid)] = (int(parent), command)
    return found


def actor_processes() -> set[int]:
    """Those of the shared Ray, which this process started: others may train on this machine too."""
    own = descendants(os.getpid())
    return {
        pid
        for pid, (_, command) in processes().items()
        if pid in own and ("ray::StageActor" in command or "ray::Driver" in command)
    }


def descendants(of: int) -> set[int]:
    table = processes()
    found, queue = set(), [of]
    while queue:
        at = queue.pop()
        children = [pid for pid, (parent, _) in table.items() if parent == at]
        found.update(children)
        queue.extend(children)
    return found


def torch_holders(*names: str) -> list[str]:
    """Which of the shared Ray's processes of such names, one of each at least, loaded torch."""
    own = descendants(os.getpid())
    found = {
        pid: command
        for pid, (_, command) in processes().items()
        if pid in own and any(name in command for name in names)
    }
    assert all(any(name in command for command in found.values()) for name in names)
    return [
        command
        for pid, command in found.items()
        if "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    ]


def all_gone(pids: set[int], patience_s: float = 30.0) -> bool:
    end = time.monotonic() + patience_s
    while pids & processes().keys():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "workers"),
    [
        (signal.SIGKILL, -9, 1),
        pytest.param(signal.SIGINT, None, 1, marks=pytest.mark.thorough),
        pytest.param(signal.SIGTERM, 143, 2, marks=pytest.mark.thorough),
    ],
)
def test_a_stopped_process_leaves_nothing_on_the_cluster(
    ray_session: str, tmp_path: Path, number: signal.Signals, code: int | None, workers: int
) -> None:
    # Workers of earlier tests may still be ending: only what this run starts counts.
    before = actor_processes()
    with Stopped(tmp_path, ray_session, workers) as run:
        mine = actor_processes() - before
        assert len(mine) == 1 + workers
        assert held_groups()
        returned = run.stop(number)
    assert returned != 0
    if code is not None:
        assert returned == code, run.output
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in run.output
    assert all_gone(mine)
    end = time.monotonic() + 20
    while held_groups() and time.monotonic() < end:
        time.sleep(0.1)
    assert not held_groups()


@pytest.mark.slow
def test_a_stopped_process_takes_its_own_ray_along(tmp_path: Path) -> None:
    with Stopped(tmp_path, None, 1) as run:
        mine = descendants(run.process.pid)
        assert len(mine) > 4
        assert run.stop(signal.SIGTERM) == 143, run.output
    assert all_gone(mine), {pid: processes().get(pid) for pid in mine}


def test_a_cluster_that_is_not_there_is_told(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tests.train.test_trainer_ray import trainer
trainer(Path({str(tmp_path)!r})).fit()
"""
    done = subprocess.run(  # this process may be connected to the shared Ray
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True,
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:9"}, check=False, timeout=100,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert "ClusterError" in last
    assert "127.0.0.1:9" in last
