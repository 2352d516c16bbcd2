"""The trainer in one process: what it writes, what it refuses, and what it makes of faults."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raypar as rp
from raypar.errors import ConfigError
from raypar.graph.autocast import under_autocast
from raypar.search.plan import Found, Progress, search
from raypar.search.record import SearchRecord
from raypar.stages import compiled
from raypar.testing import random_plan
from raypar.train.devices import first_devices
from raypar.train.settings import Settings


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )


def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(7)
    return [
        (torch.randn(8, 6, generator=g), torch.randint(0, 3, (8,), generator=g)) for _ in range(n)
    ]


def optimizer(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., rp.Result]:
    def run(**changed: Any) -> rp.Result:
        arguments: dict[str, Any] = {
            "loss_fn": nn.functional.cross_entropy,
            "optimizer": optimizer,
            "data": batches(3),
            "steps": 5,
            "scaling_config": rp.ScalingConfig(num_workers=0),
            "run_config": rp.RunConfig(name="run", storage_path=tmp_path, log_every=0),
            "search_config": rp.SearchConfig(stages=2, microbatches=2),
        }
        arguments.update(changed)
        return rp.Trainer(arguments.pop("model_fn", model), **arguments).fit()

    return run


def eager(data: list[Any], steps: int, clip: float | None = None) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    reference = model()
    rule = optimizer(reference.parameters())
    losses = []
    for step in range(steps):
        x, y = data[step % len(data)]
        loss = nn.functional.cross_entropy(reference(x), y)
        rule.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(reference.parameters(), clip)
        rule.step()
        losses.append(float(loss.detach()))
    return reference, losses


def test_it_trains_as_plain_torch_does_and_writes_its_folder(
    fit: Callable[..., rp.Result], tmp_path: Path
) -> None:
    result = fit(clip_norm=0.5)
    reference, losses = eager(batches(3), 5, 0.5)
    assert result.path == tmp_path / "run"
    lines = [json.loads(x) for x in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(5))
    torch.testing.assert_close(torch.tensor([x["loss"] for x in lines]), torch.tensor(losses))
    assert all(x["grad_norm"] > 0 and x["samples_per_s"] > 0 for x in lines)
    assert len(lines[0]["ranks"]) == 2
    assert result.checkpoint is not None
    state = result.checkpoint.state_dict()
    assert list(state) == list(reference.state_dict())
    torch.testing.assert_close(dict(state), dict(reference.state_dict()))
    assert rp.Plan.load(result.path / "plan.json") == result.plan
    assert len(result.plan.stages) == 2
    written = json.loads((result.path / "result.json").read_text())
    assert written["loss"] == lines[-1]["loss"] == result.metrics["loss"]
    assert {"data", "capture", "plan", "compile", "start", "first_step", "total"} <= set(
        written["startup"]
    )


def test_a_plan_file_is_run_as_it_is(fit: Callable[..., rp.Result], tmp_path: Path) -> None:
    first = fit()
    again = fit(plan=str(first.path / "plan.json"), search_config=None)
    assert again.plan == first.plan
    assert again.metrics["loss"] == first.metrics["loss"]


def test_a_plan_of_the_model_without_its_precision_is_told_as_such(
    fit: Callable[..., rp.Result],
) -> None:
    plain = rp.capture(model, batches(1)[0], nn.functional.cross_entropy)
    plan = random_plan(plain, rp.Cluster.local(2), stages=2, replicas=1, microbatches=2)
    with pytest.raises(rp.PlanError, match=r'precision="bf16" makes other ops.*under_autocast'):
        fit(plan=plan, precision="bf16")
    made, loss = under_autocast(model, nn.functional.cross_entropy, "bf16")
    cast = rp.capture(made, batches(1)[0], loss)
    plan = random_plan(cast, rp.Cluster.local(2), stages=2, replicas=1, microbatches=2)
    assert fit(plan=plan, precision="bf16").plan.graph_hash == cast.hash


def test_an_interrupted_search_ends_the_run_and_keeps_its_best_plan(
    fit: Callable[..., rp.Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("raypar.train.display._QUIET_S", -1.0)
    monkeypatch.setattr("raypar.train.display.Display.say", lambda _, text: told.append(text))

    def interrupted(*given: Any, measurer: Any, profiler: Any, progress: Progress) -> Found:
        assert measurer is profiler is None  # nothing is measured where there is no Ray
        found = search(*given)
        progress(found.record.trials[0], found.record.trials[0])
        return Found(found.plan, replace(found.record, stopped="interrupted"))

    monkeypatch.setattr("raypar.search.plan.search", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit()
    (path,) = tmp_path.glob("**/plan.json")
    assert rp.Plan.load(path).planner == "uniform"
    assert re.fullmatch(r"planning for \d+ devices?", told[-2])
    assert re.match(rf"{told[-2]}: 1 trial in \d+ s; ", told[-1])
    assert SearchRecord.from_json((path.parent / "search.json").read_text()).stopped
    assert "KeyboardInterrupt" in (path.parent / "result.json").read_text()


def test_a_shuffling_loader_is_repeated_over_epochs_in_the_seeds_order(
    fit: Callable[..., rp.Result],
) -> None:
    x, y = (torch.cat(t) for t in zip(*batches(3), strict=True))

    def loader() -> DataLoader[Any]:
        return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)

    losses = [fit(data=data, seed=seed, steps=7).metrics["loss"]
              for data, seed in ((loader, 3), (loader(), 3), (loader, 4))]  # fmt: skip
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_a_generator_is_read_once_from_its_first_batch(fit: Callable[..., rp.Result]) -> None:
    result = fit(data=iter(batches(5)))
    assert result.metrics["loss"] == fit(data=batches(5)).metrics["loss"]


def failing_after(n: int) -> Callable[[], Iterator[Any]]:
    def source() -> Iterator[Any]:
        yield from batches(n)
        raise FileNotFoundError("shard-00017.bin")

    return source


@pytest.mark.parametrize(
    ("changed", "error", "text", "steps"),
    [
        ({"data": failing_after(3)}, rp.DataError, r"FileNotFoundError.*step 3: shard-00017", 3),
        ({"data": iter(batches(2))}, rp.DataError, "ended after 2 batches", 2),
        (
            {"data": [*batches(2), tuple(t[:5] for t in batches(1)[0])]},
            rp.DataError,
            r"batch\[0\] of step 2 has shape \(5, 6\), expected \(8, 6\).*drop_last=True",
            2,
        ),
        ({"data": []}, rp.DataError, "is empty", 0),
        ({"optimizer": torch.optim.LBFGS}, rp.OptimizerError, "LBFGS cannot be used", 0),
        ({"optimizer": lambda p: 1 / 0}, rp.OptimizerError, "ZeroDivisionError", 0),
        (
            {"search_config": rp.SearchConfig(stages=2, microbatches=3)},
            rp.PlanError,
            "8.*3|3.*8",
            0,
        ),
    ],
)
def test_bad_input_is_told_at_its_step(
    fit: Callable[..., rp.Result],
    tmp_path: Path,
    changed: dict[str, Any],
    error: type[Exception],
    text: str,
    steps: int,
) -> None:
    with pytest.raises(error, match=text):
        fit(**changed)
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert error.__name__ in written["error"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert len(metrics.read_text().splitlines() if metrics.exists() else []) == steps


class Failing(torch.optim.SGD):
    """Raises in its third step."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        if self.count == 3:
            raise ArithmeticError("the rule broke")
        return super().step(closure)


def test_an_optimizer_that_raises_ends_the_run_with_its_text(
    fit: Callable[..., rp.Result], tmp_path: Path
) -> None:
    with pytest.raises(rp.OptimizerError, match="the rule broke"):
        fit(optimizer=lambda p: Failing(p, lr=0.1))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_loss_that_is_not_finite_names_step_and_stage(
    fit: Callable[..., rp.Result], tmp_path: Path
) -> None:
    data = batches(4)
    data[2][0][:] = float("nan")
    with pytest.raises(rp.NonFiniteError, match=r"step 2: not finite: .*stage"):
        fit(data=data)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [0, 1, 2]
    assert lines[2]["loss"] == "nan"
    assert lines[2]["non_finite"]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"clip_norm": 0.0}, "clip_norm is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_values_out_of_range(
    fit: Callable[..., rp.Result], changed: dict[str, Any], text: str
) -> None:
    with pytest.raises(rp.ConfigError, match=text):
        fit(**changed)


def test_the_first_devices_of_a_cluster() -> None:
    cluster = rp.Cluster.virtual(nodes=3, devices_per_node=2)
    assert first_devices(cluster, 3).shape == (2, 1)
    assert first_devices(cluster, 6) == cluster
    with pytest.raises(rp.ClusterError, match=r"num_workers=7.*6 devices.*set num_workers=6"):
        first_devices(cluster, 7)


def test_the_random_state_of_the_process_is_left_alone(fit: Callable[..., rp.Result]) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    fit(data=lambda: DataLoader(TensorDataset(*batches(1)[0]), batch_size=4, shuffle=True), steps=2)
    assert torch.equal(before, torch.get_rng_state())


class Peeking(nn.Module):
    """Looks at a random number while it is built, which cannot be put off."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = model()
        self.scale = float(torch.rand(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x) * self.scale
        return out


def test_a_model_that_is_built_whole_on_every_rank_is_told_once(
    fit: Callable[..., rp.Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = rp.RunConfig(name="run", storage_path=tmp_path, log_every=1)
    fit(model_fn=Peeking, run_config=shown)
    out = capsys.readouterr().out
    assert out.count("the whole model was built in memory") == 1
    assert "ranks 0, 1: " in out
    fit(run_config=shown)
    assert "the whole model" not in capsys.readouterr().out


def test_what_happens_before_the_first_step_is_told(
    fit: Callable[..., rp.Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = rp.RunConfig(name="run", storage_path=tmp_path, log_every=1)
    first = fit(run_config=shown, search_config=rp.SearchConfig(planner="alpa", stages=2))
    words = r"2 stages × 1 replica × \d+ microbatch(es)?, recompute none, zero 0, .*"
    wanted = [
        r"planning for \d+ devices?",
        rf"planned in \d+\.\d s: {words}; step [\d.]+ [mu]?s foreseen",
        r"starting 2 ranks as threads here",
        r"started 2 ranks in \d+\.\d s",
        r"first step done in \d+\.\d s",
        r"step 1/5  loss .*",
    ]
    lines = capsys.readouterr().out.splitlines()
    for line, form in zip(lines, wanted, strict=False):
        assert re.fullmatch(form, line), (line, form)
    fit(run_config=shown, steps=6, plan=first.plan, resume_from=first.checkpoint)
    out = capsys.readouterr().out
    assert re.match(rf"plan as given: {words}\nstarting", out)
    assert re.search(r"\nloading \S+\nloaded step 5 in \d+\.\d s from ", out)
    fit(run_config=shown, steps=7, resume_from="auto", search_config=None)
    assert capsys.readouterr().out.startswith("plan of the checkpoint: 2 stages")


def test_an_engine_reaches_the_ranks_and_trains_the_same(
    fit: Callable[..., rp.Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fit()
    assert plain.checkpoint is not None
    wanted = dict(plain.checkpoint.state_dict())
    traced: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
        traced.append(graph)
        return graph

    monkeypatch.setattr(compiled, "compile_fixed", keep)
    found = fit(engine="compiled")
    # Of two stages forward and backward; the first has no input to differentiate for.
    assert len(traced) == 4
    assert found.checkpoint is not None
    torch.testing.assert_close(dict(found.checkpoint.state_dict()), wanted)
    assert found.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-6)


def test_an_engine_that_cannot_work_is_refused(fit: Callable[..., rp.Result]) -> None:
    with pytest.raises(ConfigError, match=r"engine is 'cuda_graph'.*use_gpu=True.*'eager'"):
        fit(engine="cuda_graph")
    with pytest.raises(ConfigError, match=r"engine is 'compile'.*Did you mean 'compiled'"):
        fit(engine="compile")


def test_metrics_that_nothing_measures_are_refused(tmp_path: Path) -> None:
    def settings(score: str | None = None, **changed: Any) -> Settings:
        kept = rp.CheckpointConfig(score_attribute=score)
        needed: dict[str, Any] = {
            "model_fn": nn.Identity,
            "optimizer": list,
            "data": [],
            "steps": 1,
        }
        return Settings(**needed, run=rp.RunConfig(checkpoint_config=kept), **changed)

    for name in ("loss", "grad_norm"):
        settings(name)
    with pytest.raises(ConfigError, match=r"best_of\) is 'eval_loss'.*give eval_data"):
        settings("eval_loss")
    with pytest.raises(ConfigError, match="has loss, grad_norm, step_s, eval_loss"):
        settings("accuracy", eval_data=[])
    own: dict[str, Any] = {"eval_data": [], "eval_metrics": {"accuracy": max}}
    settings("eval_accuracy", early_stop=rp.EarlyStop(metric="eval_accuracy"), **own)
    with pytest.raises(ConfigError, match="evaluations give eval_loss, eval_samples"):
        settings(early_stop=rp.EarlyStop(metric="loss"), **own)
