"""A resume that takes this run's optimizer options, not the checkpoint's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import raypar as rp


def model() -> nn.Module:
    return nn.Linear(4, 2).double()


class Rates(rp.Callback):
    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def on_step(self, line: dict[str, Any]) -> None:
        self.by_step[line["step"]] = line["lr"]


def fit(path: Path, lr: float, steps: int, scheduler: Any, **changed: Any) -> dict[int, float]:
    rates = Rates()
    rp.Trainer(
        model,
        loss_fn=nn.functional.mse_loss,
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=lr),
        scheduler=scheduler,
        data=[(torch.ones(4, 4).double(), torch.ones(4, 2).double())],
        steps=steps,
        scaling_config=rp.ScalingConfig(num_workers=0),
        search_config=rp.SearchConfig(stages=1),
        run_config=rp.RunConfig(name="run", storage_path=path, log_every=0, callbacks=[rates]),
    ).changed(**changed).fit()
    return rates.by_step


SCHEDULERS: dict[str, Any] = {
    "none": None,
    "step": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.StepLR(o, 2)], [3]
    ),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=o.param_groups[0]["lr"], total_steps=12, cycle_momentum=False
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.thorough] * (name in ("cosine", "step")))
        for name in SCHEDULERS
    ],
)
def test_learning_rates_keep_their_course_from_the_new_first_rate(
    tmp_path: Path, name: str
) -> None:
    scheduler = SCHEDULERS[name]
    whole = fit(tmp_path / "whole", 0.08, 8, scheduler)
    fit(tmp_path / "part", 0.02, 4, scheduler)
    kept = fit(tmp_path / "part", 0.08, 8, scheduler, resume_from="auto")
    assert all(rate == pytest.approx(whole[step] / 4) for step, rate in kept.items())
    fit(tmp_path / "again", 0.02, 4, scheduler)
    renewed = fit(tmp_path / "again", 0.08, 8, scheduler, resume_from="auto", renew_options=True)
    assert sorted(renewed) == [4, 5, 6, 7]
    assert all(rate == pytest.approx(whole[step]) for step, rate in renewed.items())
