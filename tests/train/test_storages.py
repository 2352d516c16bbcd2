"""Checkpoints that lie elsewhere than in the run's folder: whose they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import raypar as rp
from raypar.train import _run_lock


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))


class Watch(rp.Callback):
    """Notes losses and events; at a step it does something, once."""

    def __init__(self, at: int = -1, do: Callable[[], object] = lambda: None) -> None:
        self.losses: dict[int, float] = {}
        self.events: list[str] = []
        self._at, self._do = at, do

    def on_step(self, line: dict[str, Any]) -> None:
        self.losses[line["step"]] = line["loss"]
        if line["step"] == self._at:
            self._at = -1
            self._do()

    def on_event(self, event: dict[str, Any]) -> None:
        self.events.append(event["text"])


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., rp.Result]:
    g = torch.Generator().manual_seed(7)
    data = [
        (torch.randn(8, 6, generator=g), torch.randint(0, 3, (8,), generator=g)) for _ in range(3)
    ]

    def run(name: str, watch: Watch, storage: Path | None, **changed: Any) -> rp.Result:
        return rp.Trainer(
            model,
            loss_fn=nn.functional.cross_entropy,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            data=data,
            steps=6,
            scaling_config=rp.ScalingConfig(num_workers=0),
            search_config=rp.SearchConfig(stages=2, microbatches=2),
            run_config=rp.RunConfig(
                name=name, storage_path=tmp_path, log_every=0, callbacks=[watch],
                failure_config=rp.FailureConfig(max_failures=1),
                checkpoint_config=rp.CheckpointConfig(storage=storage, every_steps=4),
            ),
            **changed,
        ).fit()  # fmt: skip

    return run


def _dies() -> None:
    raise rp.StageDiedError("its node is gone")


def test_a_new_run_goes_on_from_no_checkpoint_of_another_one(
    fit: Callable[..., rp.Result], tmp_path: Path
) -> None:
    far = tmp_path / "far"
    alone = Watch()
    fit("alone", alone, None)
    fit("first", Watch(), far)
    before = sorted(p.name for p in far.glob("0*"))
    second = Watch(1, _dies)  # before its first checkpoint
    found = fit("second", second, far)
    assert second.losses == alone.losses
    assert any("from step 0" in text for text in second.events), second.events
    assert before == sorted(p.name for p in far.glob("0*"))[: len(before)] != []
    assert found.checkpoint is not None
    assert found.checkpoint.name not in before
    # One that is resumed has them all for its own.
    assert fit("second", Watch(), far, resume_from="auto").metrics["total_steps"] == 6


def test_a_storage_has_one_writer_at_a_time(
    fit: Callable[..., rp.Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_run_lock, "_PATIENCE_S", 0.0)
    far, told = tmp_path / "far", []

    def other() -> None:
        with pytest.raises(rp.ConfigError) as caught:
            fit("other", Watch(), far)
        told.append(str(caught.value))

    fit("first", Watch(2, other), far)
    [text] = told
    assert f"checkpoint storage {str(far)!r} is in use: this process (" in text
    assert "checkpoint.storage" in text
    fit("other", Watch(), far)
