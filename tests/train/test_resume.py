"""Runs that are stopped and go on: the trainer with checkpoints, evaluation, limits."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import raypar as rp
from raypar.testing.plans import random_plan
from raypar.train.checkpoint.storage import LocalStorage

STEPS = 9


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    ).double()


class Samples(torch.utils.data.Dataset):
    """Samples with their numbers, which a run's inputs give away."""

    def __init__(self, count: int = 40, pause: float = 0.0) -> None:
        self.pause = pause
        g = torch.Generator().manual_seed(7)
        self.x = torch.randn(count, 6, generator=g, dtype=torch.float64)
        self.y = torch.randint(0, 3, (count,), generator=g)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(self.pause)
        return self.x[at], self.y[at]


def scheduler(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


class Losses(rp.Callback):
    """Keeps losses, and may stop the run as a signal would."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.by_step: dict[int, float] = {}
        self.events: list[tuple[str, int]] = []
        self._stop_at = stop_at

    def on_step(self, line: dict[str, Any]) -> None:
        self.by_step[line["step"]] = line["loss"]
        if line["step"] == self._stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    def on_checkpoint(self, path: str, step: int) -> None:
        self.events.append(("checkpoint", step))

    def on_evaluation(self, line: dict[str, Any]) -> None:
        self.events.append(("evaluation", line["step"]))


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., rp.Trainer]:
    def make(name: str = "run", losses: rp.Callback | None = None, **changed: Any) -> rp.Trainer:
        checkpoint = changed.pop("checkpoint", rp.CheckpointConfig())
        arguments: dict[str, Any] = {
            "loss_fn": nn.functional.cross_entropy,
            "optimizer": lambda p: torch.optim.AdamW(p, lr=0.01),
            "scheduler": scheduler,
            "ema_decay": 0.9,
            "clip_norm": 0.5,
            "data": rp.batches(Samples(), 8, shuffle=True),
            "steps": STEPS,
            "scaling_config": rp.ScalingConfig(num_workers=0),
            "run_config": rp.RunConfig(
                name=name, storage_path=tmp_path, log_every=0, checkpoint_config=checkpoint,
                callbacks=[] if losses is None else [losses],
            ),
            "search_config": rp.SearchConfig(stages=2, microbatches=2),
        }  # fmt: skip
        return rp.Trainer(model, **{**arguments, **changed})

    return make


def halves(params: Any) -> torch.optim.Optimizer:
    """Two parameter groups."""
    known = list(params)
    return torch.optim.AdamW([{"params": known[:2]}, {"params": known[2:]}], lr=0.01)


def weights(result: rp.Result, *, average: bool = False) -> dict[str, torch.Tensor]:
    assert result.checkpoint is not None
    return result.checkpoint.state_dict(average=average)


def slow() -> Any:
    """The same batches, so slowly that a run does not get to its end before it is stopped."""
    return rp.batches(Samples(pause=0.01), 8, shuffle=True)


def interrupted(run: rp.Trainer) -> None:
    with pytest.raises(KeyboardInterrupt):
        run.fit()


def test_a_run_that_was_interrupted_goes_on_bit_for_bit(
    trainer: Callable[..., rp.Trainer], tmp_path: Path
) -> None:
    whole = Losses()
    straight = trainer("whole", whole).fit()
    first, second = Losses(stop_at=3), Losses()
    interrupted(trainer("parts", first, data=slow()))
    resumed = trainer("parts", second, resume_from="auto").fit()
    reached = max(first.by_step) + 1
    assert 4 <= reached < STEPS
    assert min(second.by_step) == reached
    assert {**first.by_step, **second.by_step} == whole.by_step
    for average in (False, True):
        expected, found = weights(straight, average=average), weights(resumed, average=average)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    lines = [json.loads(x) for x in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert [line["lr"] for line in lines[:2]] != [line["lr"] for line in lines[-2:]]
    assert resumed.metrics["total_steps"] == STEPS


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in (1, 2, 3))]
)
def test_a_resume_under_another_plan_trains_on_the_same(
    trainer: Callable[..., rp.Trainer], tmp_path: Path, seed: int
) -> None:
    graph = rp.capture(model, next(iter(rp.batches(Samples(), 8))), nn.functional.cross_entropy)
    one, other = (random_plan(graph, rp.Cluster.local(4), seed=2 * seed + i) for i in range(2))
    whole, first, second = Losses(), Losses(stop_at=2 + seed), Losses()
    straight = trainer("whole", whole, plan=one).fit()
    interrupted(trainer("parts", first, plan=one, data=slow()))
    resumed = trainer("elsewhere", second, plan=other, resume_from=tmp_path / "parts").fit()
    both = {**first.by_step, **second.by_step}
    assert set(both) == set(whole.by_step)
    for step, loss in whole.by_step.items():
        assert abs(both[step] - loss) <= 1e-9 * max(1, abs(loss))
    torch.testing.assert_close(weights(resumed), weights(straight), rtol=1e-9, atol=1e-9)


def test_epochs_end_a_run_and_batches_may_be_accumulated(
    trainer: Callable[..., rp.Trainer],
) -> None:
    losses = Losses()
    trainer(losses=losses, steps=None, epochs=2).fit()
    assert len(losses.by_step) == 10
    halves = Losses()
    trainer(
        "halves", halves, steps=None, epochs=2, accumulate=2,
        data=rp.batches(Samples(), 4, shuffle=True),
    ).fit()  # fmt: skip
    assert halves.by_step == losses.by_step


def test_a_loader_that_tells_no_length_ends_the_run(trainer: Callable[..., rp.Trainer]) -> None:
    def stream() -> Any:
        samples = Samples()
        return ((samples.x[i : i + 8], samples.y[i : i + 8]) for i in range(0, 40, 8))

    losses = Losses()
    result = trainer(losses=losses, steps=None, epochs=1, data=stream).fit()
    assert sorted(losses.by_step) == list(range(5))
    assert result.checkpoint is not None
    assert result.checkpoint.step == 5


def test_evaluations_choose_the_checkpoints_that_are_kept(
    trainer: Callable[..., rp.Trainer], tmp_path: Path
) -> None:
    losses = Losses()
    result = trainer(
        losses=losses, eval_data=rp.batches(Samples(24), 8), eval_every=2,
        eval_metrics={"right": lambda out, batch: (out.argmax(-1) == batch[1]).double().mean()},
        checkpoint=rp.CheckpointConfig(every_steps=2, num_to_keep=2, score_attribute="eval_loss"),
    ).fit()  # fmt: skip
    assert losses.events[:2] == [("evaluation", 2), ("checkpoint", 2)]
    assert result.metrics["eval_samples"] == 24
    assert 0 <= result.metrics["eval_right"] <= 1
    kept = rp.CheckpointStore(tmp_path / "run" / "checkpoints").all()
    assert result.checkpoint is not None
    assert result.checkpoint.step == STEPS
    assert 2 <= len(kept) <= 3  # the newest stays, whatever it scores
    reference = model()
    reference.load_state_dict(weights(result))
    samples = Samples(24)
    expected = nn.functional.cross_entropy(reference.eval()(samples.x), samples.y)
    assert abs(float(expected) - result.metrics["eval_loss"]) < 1e-9


def test_a_time_limit_and_early_stop_end_a_run_and_say_so(
    trainer: Callable[..., rp.Trainer],
) -> None:
    early = trainer(
        steps=10_000, eval_data=rp.batches(Samples(8), 8), eval_every=1, scheduler=None,
        early_stop=rp.EarlyStop(patience=1, min_delta=100.0),
    ).fit()  # fmt: skip
    assert early.metrics["total_steps"] == 2
    assert "has not got better" in early.metrics["stopped"]
    late = trainer("late", steps=1_000_000, time_limit_s=1.0, scheduler=None).fit()
    assert 1 <= late.metrics["total_steps"] < 1_000_000
    assert "time limit" in late.metrics["stopped"]


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ({"ema_decay": None}, {}, r"no average of the weights.*ema_decay=0.9: leave ema_decay out"),
        ({}, {"ema_decay": None}, r"holds an average of the weights.*set ema_decay, for example"),
        ({"scheduler": None}, {}, r"state of none, this run sets CosineAnnealingLR: leave"),
        ({}, {"scheduler": None}, r"of CosineAnnealingLR, this run sets none: set Cosine"),
        ({}, {"precision": "fp16"}, r"loss_scale: it holds none.*leave precision and loss_scale"),
        ({}, {"optimizer": halves}, r"1 parameter groups, those of this run are 2: make the 1"),
    ],
)
def test_options_that_a_checkpoint_does_not_go_with_are_named_before_anything_starts(
    trainer: Callable[..., rp.Trainer],
    monkeypatch: pytest.MonkeyPatch,
    before: dict[str, Any],
    after: dict[str, Any],
    text: str,
) -> None:
    found = trainer(steps=1, **before).fit().checkpoint
    assert found is not None
    monkeypatch.setattr("raypar.train.trainer.Devices", None)  # nothing may be started
    with pytest.raises(rp.OptimizerError, match=text) as error:
        trainer("again", steps=2, resume_from=found, **after).fit()
    assert found.path in str(error.value)
    assert "init_from" in str(error.value)


def test_what_would_be_ignored_is_refused(trainer: Callable[..., rp.Trainer]) -> None:
    for wrong, text in [
        ({"steps": None}, "has no end"),
        ({"epochs": 2}, "both say when the run ends"),
        ({"eval_every": 3}, "without eval_data"),
        ({"early_stop": rp.EarlyStop()}, "looks at evaluations"),
        ({"loss_scale": rp.LossScale()}, "precision is None"),
        ({"precision": "bf61"}, "Did you mean 'bf16'"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"eval_data": [1], "eval_weights": "ema", "ema_decay": None}, "needs an average"),
    ]:
        with pytest.raises(rp.ConfigError, match=text):
            trainer(**wrong)
    with pytest.raises(rp.CheckpointError):
        trainer(resume_from="/nowhere/at/all").fit()


def test_a_run_in_a_thread_is_stopped_by_its_limits_alone(
    trainer: Callable[..., rp.Trainer],
) -> None:
    found: list[rp.Result] = []
    thread = threading.Thread(target=lambda: found.append(trainer().fit()))
    thread.start()
    thread.join(60)
    assert found[0].metrics["total_steps"] == STEPS


def test_a_run_that_is_done_keeps_its_figures_when_it_is_resumed(
    trainer: Callable[..., rp.Trainer],
) -> None:
    first = trainer(steps=2).fit()
    again = trainer(steps=2, resume_from="auto").fit()
    assert again.metrics["steps"] == 0
    assert again.metrics["loss"] == first.metrics["loss"]
    kept = json.loads((again.path / "result.json").read_text())
    assert kept["loss"] == first.metrics["loss"]
    elsewhere = trainer("other", steps=2, resume_from=first.path).fit()
    assert elsewhere.checkpoint is not None
    assert elsewhere.checkpoint.step == 2


def test_a_name_that_is_used_again_sets_the_earlier_checkpoints_aside(
    trainer: Callable[..., rp.Trainer], tmp_path: Path
) -> None:
    expected = weights(trainer(steps=2).fit())
    again = trainer(steps=1).fit()
    assert again.checkpoint is not None
    assert again.checkpoint.step == 1
    assert len(rp.CheckpointStore(tmp_path / "run" / "checkpoints").all()) == 1
    aside = rp.CheckpointStore(tmp_path / "run" / "checkpoints-before-1").latest()
    assert aside is not None
    found = aside.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_checkpoints_may_lie_elsewhere_and_are_found_there(
    trainer: Callable[..., rp.Trainer], tmp_path: Path
) -> None:
    elsewhere = rp.CheckpointConfig(storage=tmp_path / "far" / "away")
    trainer(steps=3, checkpoint=elsewhere).fit()
    losses = Losses()
    trainer(losses=losses, steps=5, checkpoint=elsewhere, resume_from="auto").fit()
    assert sorted(losses.by_step) == [3, 4]


def full_on_ranks(*_: Any) -> None:
    if threading.current_thread() is not threading.main_thread():
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_last_checkpoint_that_cannot_be_written_is_told(
    trainer: Callable[..., rp.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = trainer(steps=2).fit().checkpoint
    monkeypatch.setattr(LocalStorage, "_sync", full_on_ranks)
    with pytest.raises(rp.CheckpointError, match=r"could not write.*No space left"):
        trainer(steps=4, resume_from="auto").fit()
    monkeypatch.undo()
    assert kept is not None
    assert trainer(steps=4, resume_from="auto").fit().metrics["steps"] == 2


def test_ctrl_c_while_the_last_checkpoint_is_written_waits_for_it(
    trainer: Callable[..., rp.Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, sent = LocalStorage._sync, []

    def slowly(storage: LocalStorage, number: int) -> None:
        if not sent and threading.current_thread() is not threading.main_thread():
            sent.append(number)
            time.sleep(0.1)  # until the main thread waits for it
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        sync(storage, number)

    monkeypatch.setattr(LocalStorage, "_sync", slowly)
    interrupted(trainer())
    found = rp.Checkpoint(next((tmp_path / "run" / "checkpoints").glob("0*")))
    assert found.step == STEPS
    assert not found.verify()


class Lines(rp.Callback):
    """Looks at what is in a file when a checkpoint is begun."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: list[tuple[int, int]] = []

    def on_checkpoint(self, path: str, step: int) -> None:
        self.found.append((step, self._path.read_text().count("\n")))


def test_the_lines_of_all_steps_before_a_checkpoint_outlive_a_killed_process(
    trainer: Callable[..., rp.Trainer], tmp_path: Path
) -> None:
    lines = Lines(tmp_path / "run" / "metrics.jsonl")
    trainer("run", lines, checkpoint=rp.CheckpointConfig(every_steps=3)).fit()
    assert [(step, step) for step, _ in lines.found] == lines.found
    assert len(lines.found) > 2
