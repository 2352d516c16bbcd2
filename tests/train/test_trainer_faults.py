"""What goes wrong around a run: it is named, and hides nothing else."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import raypar as rp


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(7)
    return [
        (torch.randn(8, 6, generator=g), torch.randint(0, 3, (8,), generator=g)) for _ in range(n)
    ]


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., rp.Result]:
    def run(**changed: Any) -> rp.Result:
        arguments: dict[str, Any] = {
            "model_fn": model,
            "loss_fn": nn.functional.cross_entropy,
            "optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
            "data": batches(3),
            "steps": 5,
            "scaling_config": rp.ScalingConfig(num_workers=0),
            "run_config": rp.RunConfig(name="run", storage_path=tmp_path, log_every=0),
            "search_config": rp.SearchConfig(stages=2, microbatches=2),
        }
        return rp.Trainer(**{**arguments, **changed}).fit()

    return run


@pytest.mark.parametrize(
    "nothing",
    [
        [],
        torch.utils.data.DataLoader(torch.empty(0, 6), batch_size=8),
        list,
        lambda: (batch for batch in ()),
        iter(()),
    ],
    ids=["list", "loader", "returns a list", "returns a generator", "iterator"],
)
def test_empty_evaluation_data_are_told_before_a_step(
    fit: Callable[..., rp.Result], tmp_path: Path, nothing: Any
) -> None:
    with pytest.raises(rp.DataError, match="the evaluation data are empty"):
        fit(eval_data=nothing)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_stream_to_evaluate_on_loses_nothing_to_the_look_at_it(
    fit: Callable[..., rp.Result],
) -> None:
    found = fit(eval_data=lambda: iter(batches(2)), eval_every=3)
    assert found.metrics["eval_batches"] == 2
    assert fit(eval_data=iter(batches(2))).metrics["eval_batches"] == 2


class Tap:
    """Batches from a stream that has one position, whoever reads it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Any:
        yield from self._stream


@pytest.mark.parametrize("form", ["iterable", "callable", "returns the same"])
def test_what_is_read_ahead_of_a_stream_is_evaluated_on(
    fit: Callable[..., rp.Result], form: str
) -> None:
    def source() -> Any:
        stream = iter(batches(3))
        return {"iterable": Tap(stream), "callable": lambda: Tap(stream)}.get(form, lambda: stream)

    assert fit(eval_data=source()).metrics["eval_samples"] == 24
    with pytest.raises(rp.DataError, match=r"no batch at evaluation 2.*gone through only once"):
        fit(eval_data=source(), eval_every=2)


def test_a_stream_begun_for_a_look_is_ended_with_a_run_that_never_evaluates(
    fit: Callable[..., rp.Result],
) -> None:
    ended: list[bool] = []

    def stream() -> Any:
        try:
            yield from batches(3)
        finally:
            ended.append(True)

    with pytest.raises(rp.DataError, match="ended after"):
        fit(data=iter(batches(2)), eval_data=stream)
    assert ended == [True]


def test_every_evaluation_reads_the_same_also_where_the_first_batch_was_read_ahead(
    fit: Callable[..., rp.Result], tmp_path: Path
) -> None:
    """Draws are those of the seed: the look neither takes some nor leaves any."""
    told: list[float] = []

    class Told(rp.Callback):
        def on_evaluation(self, line: dict[str, Any]) -> None:
            told.append(sum(drawn))
            drawn.clear()

    drawn: list[float] = []

    def stream() -> Any:
        for x, y in batches(3):
            noise = torch.randn(())
            drawn.append(noise.item())
            yield x + noise, y

    config = rp.RunConfig(name="run", storage_path=tmp_path, log_every=0, callbacks=[Told()])
    fit(eval_data=stream, eval_every=2, steps=4, run_config=config)
    assert told[0] == told[1] != 0


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"clip_norm": "1"}, r"clip_norm is '1'; give a number above 0"),
        ({"time_limit_s": [60]}, r"time_limit_s is \[60\]; give seconds"),
        ({"eval_every": "5"}, r"eval_every is '5'; give steps"),
        ({"eval_data": 5}, r"eval_data is 5; give batches that can be gone through again"),
        ({"eval_data": iter(()), "eval_every": 2}, r"eval_data is a tuple_iterator, .* only once"),
        ({"plan": 4}, r"plan is 4; give 'auto'"),
        ({"seed": True}, r"seed is True; give a whole number"),
        ({"seed": 2**64}, r"seed is 18446744073709551616; .* below 2\*\*63"),
        ({"run_config": "runs"}, r"run_config is 'runs'; give raypar.RunConfig"),
        ({"search_config": "alpa"}, r"search_config is 'alpa'; give raypar.SearchConfig"),
        ({"resume_from": True}, r"resume_from is True; give 'auto'"),
    ],
)
def test_a_value_of_another_kind_is_named(
    fit: Callable[..., rp.Result], changed: dict[str, Any], text: str
) -> None:
    with pytest.raises(rp.ConfigError, match=text):
        fit(**changed)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"storage_path": "s3://bucket/runs"}, r"local folder.*CheckpointConfig\(storage='s3://"),
        ({"callbacks": rp.Callback()}, r"callbacks is .*give a list"),
        ({"callbacks": [rp.Callback]}, r"callbacks is .*\[MyCallback\(\)\]"),
    ],
)
def test_where_files_go_and_who_is_told_is_checked(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(rp.ConfigError, match=text):
        rp.RunConfig(**changed)


def test_checkpoints_that_cannot_be_written_are_told_before_training(
    fit: Callable[..., rp.Result], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    kept = rp.CheckpointConfig(storage=tmp_path / "file" / "far", every_steps=3)
    run = rp.RunConfig(name="run", storage_path=tmp_path, log_every=0, checkpoint_config=kept)
    with pytest.raises(rp.CheckpointError, match=r"cannot write to .*checkpoint\.storage"):
        fit(run_config=run)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


class Ends(rp.Callback):
    """Notes how a run ended; may raise then."""

    def __init__(self, error: Exception | None = None) -> None:
        self.told: list[dict[str, Any]] = []
        self._error = error

    def on_end(self, result: dict[str, Any]) -> None:
        self.told.append(result)
        if self._error is not None:
            raise self._error


def test_a_callback_that_raises_at_the_end_hides_nothing(
    fit: Callable[..., rp.Result], tmp_path: Path
) -> None:
    ends = [Ends(KeyError("mine")), Ends()]
    run = rp.RunConfig(name="run", storage_path=tmp_path, log_every=0, callbacks=ends)
    with pytest.raises(rp.DataError, match="ended after 2 batches") as raised:
        fit(data=iter(batches(2)), run_config=run)
    assert any("on_end raised KeyError" in note for note in raised.value.__notes__)
    assert "DataError" in ends[1].told[0]["error"]


def test_what_cannot_be_sent_is_named_before_ray_is_started(fit: Callable[..., rp.Result]) -> None:
    lock = threading.Lock()

    def locked() -> nn.Module:
        with lock:
            return model()

    with pytest.raises(rp.ConfigError, match=r"model_fn cannot be sent.*lock.*num_workers=0"):
        fit(model_fn=locked, scaling_config=rp.ScalingConfig(num_workers=2))
    assert fit(model_fn=locked).metrics["steps"] == 5


@pytest.mark.parametrize(
    ("kind", "name", "value", "text"),
    [
        (rp.ScalingConfig, "placement_timeout_s", "60", "give seconds above 0"),
        (rp.ScalingConfig, "threads_per_worker", [1], "give a number of at least 1, or None"),
        (rp.CheckpointConfig, "every_s", "600", "give seconds above 0"),
        (rp.RunConfig, "name", 7, "give the name of a folder"),
        (rp.EarlyStop, "patience", "3", "give a number of evaluations"),
    ],
)
def test_a_setting_of_another_kind_is_named(
    kind: Callable[..., object], name: str, value: object, text: str
) -> None:
    with pytest.raises(rp.ConfigError, match=re.escape(f"{name} is {value!r}; {text}")):
        kind(**{name: value})
