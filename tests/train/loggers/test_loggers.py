"""Loggers: what they write, and that nothing in them ends a run."""

from __future__ import annotations

import json
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import raypar as rp
from raypar.errors import ConfigError
from raypar.stages.faults import RankInfo
from raypar.train.callbacks import Callback, RunFacts
from raypar.train.dashboards import METRICS, grafana_dashboard, scalars
from raypar.train.loggers import LOGGERS, EventLog, Logger, make_loggers
from raypar.train.loggers.ray_metrics import RayMetricsLogger

LINE: dict[str, Any] = {
    "step": 4, "time": 1.7e9, "loss": 2.5, "grad_norm": "nan", "lr": 0.1, "step_s": 0.5,
    "samples_per_s": 16.0, "breakdown": {"compute": 0.3, "bubble": 0.2},
    "memory": {"0": {"held": 10, "peak": 20}}, "slowest": {"rank": 0}, "ranks": [],
}  # fmt: skip
EVALUATION = {"step": 5, "eval_loss": 2.0, "eval_accuracy": 0.75}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunFacts]:
    graph = rp.capture(lambda: nn.Linear(4, 4), torch.randn(4, 4), lambda out: out.mean())
    cluster = rp.Cluster.local(1)
    plan = rp.plan(graph, cluster, rp.SearchConfig(stages=1))

    def make(folder: Path, first_step: int = 0) -> RunFacts:
        config = {"train": {"steps": 9}, "name": "tiny"}
        return RunFacts("tiny", folder, plan, graph, cluster, [RankInfo(0)], first_step, 9, config)

    return make


def play(callback: Callback, run: RunFacts, error: str | None = None) -> None:
    callback.on_start(run)
    callback.on_step(LINE)
    callback.on_evaluation(EVALUATION)
    callback.on_checkpoint("ckpt/5", 5)
    callback.on_event({"kind": "restart", "step": 5, "text": "rank 1 died"})
    callback.on_end({"error": error} if error else {"loss": 2.5})


def test_the_numbers_of_a_line_have_one_name_everywhere() -> None:
    assert scalars(LINE) == {
        "train/loss": 2.5, "train/lr": 0.1, "speed/samples_per_s": 16.0, "speed/step_s": 0.5,
        "speed/part_s/compute": 0.3, "speed/part_s/bubble": 0.2, "memory/held_bytes/0": 10.0,
        "memory/peak_bytes/0": 20.0,
    }  # fmt: skip
    assert scalars(EVALUATION) == {"train/eval_loss": 2.0, "eval/accuracy": 0.75}
    assert scalars({"loss": float("inf"), "mfu": None, "breakdown": 3, "step": True}) == {}


def test_the_dashboard_has_a_panel_for_every_metric_and_none_over_another() -> None:
    found = json.loads(json.dumps(grafana_dashboard()))
    panels = [panel for panel in found["panels"] if panel["type"] != "row"]
    queries = [panel["targets"][0]["expr"] for panel in panels]
    assert len(panels) == len(METRICS)
    for metric, query in zip(METRICS, queries, strict=True):
        assert f'(ray_{metric.gauge}{{run=~"$run"}})' in query
        assert not metric.tag or metric.tag in query
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    taken = set()
    for panel in found["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y) for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }  # fmt: skip
        assert max(x for x, _ in cells) < 24
        assert not cells & taken
        taken |= cells


def test_events_are_appended_by_a_run_that_goes_on(
    facts: Callable[..., RunFacts], tmp_path: Path
) -> None:
    play(EventLog(), facts(tmp_path), error="StageDiedError: gone")
    play(EventLog(), facts(tmp_path, 5))
    lines = [json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()]
    kinds = ["start", "evaluation", "checkpoint", "restart", "end"]
    assert [line["kind"] for line in lines] == kinds * 2
    assert lines[1]["text"] == "loss 2, accuracy 0.75"
    assert (lines[4]["text"], lines[9]["text"]) == ("StageDiedError: gone", "finished")
    play(EventLog(), facts(tmp_path))
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 5, "a new run"


def test_what_happens_before_the_ranks_are_up_is_an_event_too(
    facts: Callable[..., RunFacts], tmp_path: Path
) -> None:
    log = EventLog()
    log.on_event({"kind": "scale_up", "step": 0, "text": "waiting for 2 devices"})
    log.on_start(facts(tmp_path))
    lines = [json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["scale_up", "start"]


class Failing(Logger):
    def __init__(self) -> None:
        super().__init__("failing")
        self.calls = 0

    def _open(self, run: RunFacts) -> None:
        pass

    def _write(self, line: dict[str, Any]) -> None:
        self.calls += 1
        raise OSError("no route to host")

    def _close(self, result: dict[str, Any]) -> None:
        raise OSError("still none")


def steps(logger: Logger, run: RunFacts, count: int) -> None:
    logger.on_start(run)
    for _ in range(count):
        logger.on_step(LINE)


def run_to_its_end(logger: Logger, run: RunFacts, count: int) -> None:
    steps(logger, run, count)
    logger.on_end({})


def test_what_fails_in_a_logger_is_told_once_and_ends_nothing(
    facts: Callable[..., RunFacts], tmp_path: Path
) -> None:
    logger = Failing()
    with pytest.warns(RuntimeWarning, match="no route to host") as told:
        run_to_its_end(logger, facts(tmp_path), 10)
    assert logger.calls == 3, "it gives up"
    assert len(told) == 1


def test_a_logger_that_hangs_holds_nothing_up(
    facts: Callable[..., RunFacts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raypar.train.loggers.base._CLOSE_S", 0.05)
    monkeypatch.setattr("raypar.train.loggers.base._MOST_WAITING", 5)
    gate = threading.Event()

    class Hanging(Failing):
        def _write(self, line: dict[str, Any]) -> None:
            gate.wait(30)

    logger = Hanging()
    with pytest.warns(RuntimeWarning, match="5 entries wait"):
        steps(logger, facts(tmp_path), 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger.on_end({})  # told once is told
    gate.set()


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=rf"pip install 'raypar\[{name}\]'"):
            make_loggers([name])


def test_loggers_are_made_by_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'tensorboard'"):
        make_loggers(["tensorbord"])
    with pytest.raises(ConfigError, match="twice"):
        make_loggers(["ray", "ray"])
    assert [type(one) for one in make_loggers(["ray"])] == [RayMetricsLogger]
    assert set(LOGGERS) == {"tensorboard", "mlflow", "wandb", "ray"}


def test_gauges_are_tagged_by_run(
    facts: Callable[..., RunFacts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[str, str], float] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.keys = name, tag_keys

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) == self.keys
            seen[self.name, " ".join(tags.values())] = value

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setitem(sys.modules, "ray.util.metrics", SimpleNamespace(Gauge=Gauge))
    play(RayMetricsLogger(), facts(tmp_path))
    assert seen["raypar_loss", "tiny"] == 2.5
    assert seen["raypar_eval_loss", "tiny"] == 2.0
    assert seen["raypar_step", "tiny"] == 5
    assert seen["raypar_part_s", "tiny bubble"] == 0.2
    assert seen["raypar_peak_bytes", "tiny 0"] == 20


def test_tensorboard_shows_what_was_logged(facts: Callable[..., RunFacts], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        play(make_loggers(["tensorboard"])[0], facts(tmp_path))
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert set(scalars(LINE)) <= set(found.Tags()["scalars"])
    (loss,) = found.Scalars("train/loss")
    assert (loss.step, loss.value, loss.wall_time) == (5, 2.5, 1.7e9)
    assert found.Scalars("eval/accuracy")[0].step == 5


def test_mlflow_has_the_run(
    facts: Callable[..., RunFacts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        play(make_loggers(["mlflow"])[0], facts(tmp_path), error="gone")
        play(make_loggers(["mlflow"])[0], facts(tmp_path, 5))
    client = mlflow.MlflowClient()
    own = (tmp_path / "mlflow.id").read_text().strip()
    found = client.get_run(own)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["train/loss"] == 2.5
    assert found.data.params["train.steps"] == "9"
    assert found.data.tags["event.5"].startswith("restart")
    assert [one.step for one in client.get_metric_history(own, "eval/accuracy")] == [5, 5]


def test_wandb_has_the_run(
    facts: Callable[..., RunFacts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        play(make_loggers(["wandb"])[0], facts(tmp_path))
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    own = (tmp_path / "wandb.id").read_text().strip()
    written = (folder / f"run-{own}.wandb").read_bytes()
    assert b"train/loss" in written
    assert b"eval/accuracy" in written
