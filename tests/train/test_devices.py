"""Waiting for devices, and what is left to run on after a failure: without Ray."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import raypar as rp
from raypar.mesh.autoscaler import await_devices
from raypar.train.attempts import Attempts
from raypar.train.devices import Devices, suits
from raypar.train.signals import terminating


class World:
    """A cluster on a clock of its own: devices arrive when they are told to."""

    def __init__(self, arrivals: dict[float, int], autoscaler: bool = True) -> None:
        self.arrivals = arrivals
        self.autoscaler = autoscaler
        self.time = 0.0

    def count(self) -> int:
        return max(n for at, n in self.arrivals.items() if at <= self.time)

    def grows(self) -> tuple[bool, int]:
        return self.autoscaler, sum(0 < at - self.time <= 10 for at in self.arrivals)

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.time += seconds

    def wait(self, wanted: int, least: int, timeout_s: float) -> Any:
        return await_devices(
            self.count, wanted, least, timeout_s,
            grows=self.grows, quiet_s=20, now=lambda: self.time, sleep=self.sleep,
        )  # fmt: skip


def test_waiting_ends_when_all_are_there() -> None:
    waited = World({0: 0, 5: 2, 30: 4, 31: 9}).wait(4, 1, 100)
    assert (waited.devices, waited.why) == (4, "there")
    assert 30 <= waited.seconds < 31


def test_without_an_autoscaler_nothing_is_waited_for() -> None:
    waited = World({0: 1, 5: 2}, autoscaler=False).wait(2, 1, 100)
    assert (waited.devices, waited.seconds, waited.why) == (1, 0, "no autoscaler")


def test_an_autoscaler_that_brings_nothing_more_is_believed_once_the_least_are_there() -> None:
    waited = World({0: 1, 15: 2}).wait(4, 2, 300)
    assert (waited.devices, waited.why) == (2, "nothing comes")
    assert 34 <= waited.seconds < 40
    assert World({0: 1}).wait(4, 2, 300).why == "time is up"


@given(
    st.dictionaries(st.floats(1, 200), st.integers(0, 9), max_size=4),
    st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 120),
)  # fmt: skip
def test_waiting_never_lasts_longer_than_allowed_and_never_misses_devices(
    arrivals: dict[float, int], wanted: int, least: int, timeout_s: float
) -> None:
    world = World({0: 0, **arrivals})
    waited = world.wait(wanted, min(least, wanted), timeout_s)
    assert waited.seconds <= timeout_s + 1e-6
    assert waited.devices == world.count()
    if waited.why != "there":
        assert waited.devices < wanted


# ---- attempts -----------------------------------------------------------------------------


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def trainer(path: Path, failures: int, **changed: Any) -> rp.Trainer:
    arguments: dict[str, Any] = {
        "loss_fn": nn.functional.cross_entropy,
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
        "data": [(torch.ones(4, 4), torch.zeros(4, dtype=torch.int64))],
        "steps": 4,
        "scaling_config": rp.ScalingConfig(num_workers=0, scale_up_timeout_s=20),
        "search_config": rp.SearchConfig(stages=2),
        "run_config": rp.RunConfig(
            name="run", storage_path=path, log_every=0,
            failure_config=rp.FailureConfig(max_failures=failures),
            checkpoint_config=rp.CheckpointConfig(every_steps=2),
        ),
    }  # fmt: skip
    return rp.Trainer(model, **{**arguments, **changed})


class Script:
    """Attempts that fail as they are told to, then succeed."""

    def __init__(self, *outcomes: tuple[BaseException | None, bool]) -> None:
        self.outcomes = list(outcomes)
        self.plans: list[rp.Plan] = []

    def __call__(self, settings: Any, made: Any, plan: rp.Plan, cluster: Any, on_up: Any) -> Any:
        error, up = self.outcomes.pop(0)
        self.plans.append(plan)

        class Scripted:
            def __init__(self) -> None:
                self.up = up

            def go(self) -> dict[str, Any]:
                if error is not None:
                    raise error
                return {"loss": 0.0, "steps": 1}

        return Scripted()


@pytest.fixture
def attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[rp.Trainer, list[str]]]:
    def make(failures: int, script: Script, **changed: Any) -> tuple[rp.Trainer, list[str]]:
        told: list[str] = []

        def made(settings: Any, prepared: Any, devices: Any, tell: Any) -> Attempts:
            def both(kind: str, text: str) -> None:
                told.append(f"{kind}: {text}")

            return Attempts(settings, prepared, devices, both, attempt=script)

        monkeypatch.setattr("raypar.train.trainer.Attempts", made)
        monkeypatch.setattr("raypar.train.attempts._PAUSE_S", 0.0)
        return trainer(tmp_path, failures, **changed), told

    return make


DIED = rp.StageDiedError("lost stage 1")
BUSY = rp.ClusterError("the cluster can never hold what was asked")


def test_failures_are_counted_and_the_last_one_is_raised(attempts: Callable[..., Any]) -> None:
    run, told = attempts(1, Script((DIED, True), (rp.CommError("broken"), True)))
    with pytest.raises(rp.CommError, match="broken"):
        run.fit()
    assert [t.split(":")[0] for t in told] == ["failure", "restart"]
    assert "from step 0, since there is no checkpoint" in told[1]


def test_starts_that_fail_soon_after_a_failure_belong_to_it(attempts: Callable[..., Any]) -> None:
    script = Script((DIED, True), (BUSY, False), (DIED, False), (None, True))
    run, told = attempts(1, script)
    assert run.fit().metrics["loss"] == 0.0
    assert [t.split(":")[0] for t in told] == ["failure", "restart", "retry", "retry"]
    assert len({plan.to_json() for plan in script.plans}) == 1


def test_a_cluster_that_lacks_devices_from_the_start_is_no_failure_to_wait_out(
    attempts: Callable[..., Any],
) -> None:
    run, told = attempts(-1, Script((BUSY, False)))
    with pytest.raises(rp.ClusterError, match="never hold"):
        run.fit()
    assert not told


def test_errors_that_would_come_again_end_the_run(attempts: Callable[..., Any]) -> None:
    run, _ = attempts(-1, Script((rp.NonFiniteError("loss is nan"), True)))
    with pytest.raises(rp.NonFiniteError):
        run.fit()


def test_data_that_can_be_read_once_cannot_restart(tmp_path: Path) -> None:
    def once() -> Iterator[Any]:
        while True:
            yield torch.ones(4, 4), torch.zeros(4, dtype=torch.int64)

    with pytest.raises(rp.DataError, match=r"max_failures=1.*generator.*once.*raypar\.batches"):
        trainer(tmp_path, 1, data=once()).fit()
    assert trainer(tmp_path, 1, data=once).fit().metrics["total_steps"] == 4


def test_a_plan_is_kept_as_long_as_it_suits_the_devices(tmp_path: Path) -> None:
    run = trainer(tmp_path, 0)
    plan = run.fit().plan  # two stages
    fixed = run.settings
    elastic = run.changed(scaling=rp.ScalingConfig(num_workers=(1, 4))).settings
    given_plan = run.changed(plan=plan, scaling=rp.ScalingConfig(num_workers=(1, 4))).settings
    one, same, more = (rp.Cluster.local(n) for n in (1, plan.cluster[0], plan.cluster[0] + 1))
    assert not suits(plan, one, fixed)
    assert suits(plan, more, fixed)
    assert suits(plan, same, elastic)
    assert not suits(plan, more, elastic)
    assert suits(plan, more, given_plan)
    assert not suits(plan, one, given_plan)


@pytest.mark.parametrize(
    "cluster",
    [rp.Cluster.local(4), rp.Cluster.virtual(2, 2, "CPU"), rp.Cluster.virtual(1, 4, "A100-80")],
    ids=("local", "two nodes", "GPUs"),
)
def test_in_process_a_plan_that_leaves_devices_idle_is_predicted_all_the_same(
    tmp_path: Path, cluster: rp.Cluster
) -> None:
    graph = rp.capture(model, torch.randn(6, 4), lambda out, batch: out.square().mean())
    plan = rp.plan(graph, cluster, rp.SearchConfig(stages=3, replicas=1, microbatches=2))
    assert len(plan.devices) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = trainer(
            tmp_path,
            0,
            loss_fn=lambda out, batch: out.square().mean(),
            data=[torch.randn(6, 4)],
            plan=plan,
            steps=1,
            scaling_config=rp.ScalingConfig(num_workers=0),
        ).fit()
    assert (result.path / "predicted.json").is_file()


def test_too_few_devices_of_another_run_s_ray_are_told_with_whose_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "raypar.train.session.connect",
        lambda **_: SimpleNamespace(private=True, shared_cpus=2, close=lambda: None),
    )
    monkeypatch.setattr("raypar.mesh.discover.devices_now", lambda _: 2)
    monkeypatch.setattr("raypar.mesh.autoscaler.has_autoscaler", lambda: False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    told: list[str] = []
    settings = trainer(tmp_path, 0, scaling_config=rp.ScalingConfig(num_workers=4)).settings
    devices = Devices(settings, lambda kind, text: told.append(f"{kind}: {text}"))
    with ExitStack() as stack, terminating() as signals:
        devices.connect(None, signals, stack)
        assert len(told) == 1
        assert told[0].startswith("ray: this run shares the Ray with 2 CPUs")
        with pytest.raises(rp.ClusterError, match=r"needs 4 devices.* 2 devices.*shares the Ray"):
            devices.find(None)


@pytest.mark.parametrize(("private", "workers"), [(True, 3), (True, 2), (False, 3)])
def test_ranks_that_share_cores_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool, workers: int
) -> None:
    monkeypatch.setattr(
        "raypar.train.session.connect",
        lambda **_: SimpleNamespace(private=private, shared_cpus=None, close=lambda: None),
    )
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    told: list[str] = []
    settings = trainer(tmp_path, 0, scaling_config=rp.ScalingConfig(num_workers=workers)).settings
    with ExitStack() as stack, terminating() as signals:
        Devices(settings, lambda _, text: told.append(text)).connect(None, signals, stack)
    assert [text.partition(":")[0] for text in told] == [
        "3 ranks share the 2 cores of this machine"
    ] * (private and workers > 2)


def test_an_autoscaler_that_brought_too_few_names_the_time_to_give_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World({0: 0, 90: 1})
    monkeypatch.setattr("raypar.mesh.discover.devices_now", lambda _: world.count())
    monkeypatch.setattr("raypar.mesh.autoscaler.has_autoscaler", lambda: True)
    monkeypatch.setattr(
        "raypar.mesh.autoscaler.await_devices", lambda _, *counts: world.wait(*counts)
    )
    scaling = rp.ScalingConfig(num_workers=(1, 2), scale_up_timeout_s=60)
    devices = Devices(trainer(tmp_path, 0, scaling_config=scaling).settings, lambda *_: None)
    devices._request = SimpleNamespace(ask=lambda *_: None)
    with pytest.raises(rp.ClusterError) as caught:
        devices.find(None)
    assert "needs 1 device: the cluster has 0 devices (CPU)" in str(caught.value)
    assert "set scale_up_timeout_s=240, or add nodes" in str(caught.value)
