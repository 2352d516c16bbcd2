"""Run by test_elastic: on one node, then on two, then on the one that is left of them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import raypar as rp
from raypar.mesh import autoscaler
from tests.train.scaling_head import write_config

FIRST, STEPS = 6, 24


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 3)).double()


class Samples(torch.utils.data.Dataset):
    def __init__(self) -> None:
        g = torch.Generator().manual_seed(7)
        self.x = torch.randn(40, 6, generator=g, dtype=torch.float64)
        self.y = torch.randint(0, 3, (40,), generator=g)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[at], self.y[at]


class Watch(rp.Callback):
    """Notes what happens; at a step, has the autoscaler take a node away."""

    def __init__(self, shrink: Any = None) -> None:
        self.losses: dict[int, float] = {}
        self.devices: list[int] = []
        self.events: list[str] = []
        self._shrink = shrink

    def on_start(self, run: Any) -> None:
        self.devices.append(len(run.plan.devices))

    def on_step(self, line: dict[str, Any]) -> None:
        self.losses[line["step"]] = line["loss"]

    def on_event(self, event: dict[str, Any]) -> None:
        self.events.append(f"{event['kind']}: {event['text'].splitlines()[0]}")

    def on_checkpoint(self, path: str, step: int) -> None:
        if self._shrink is not None and step >= FIRST + 6:
            self._shrink()
            self._shrink = None


def trainer(path: Path, watch: Watch, workers: Any, steps: int, **changed: Any) -> rp.Trainer:
    return rp.Trainer(
        model,
        loss_fn=nn.functional.cross_entropy,
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
        data=rp.batches(Samples(), 8, shuffle=True),
        steps=steps,
        scaling_config=rp.ScalingConfig(
            num_workers=workers, scale_up_timeout_s=60.0
        ),
        search_config=rp.SearchConfig(planner="uniform", microbatches=2),
        run_config=rp.RunConfig(
            name="run", storage_path=path, log_every=0, callbacks=[watch],
            checkpoint_config=rp.CheckpointConfig(every_steps=3),
            failure_config=rp.FailureConfig(max_failures=1 if workers else 0),
        ),
        **changed,
    )  # fmt: skip


def main(path: Path, address: str, config: Path) -> None:
    from ray.experimental.internal_kv import _internal_kv_get

    def shrink() -> None:
        # Which of the two goes is the autoscaler's choice: one killed here as well could be the
        # other one, and it brings none back while it takes the dead one for alive.
        write_config(config, address, 1)

    alone, one, two = Watch(), Watch(), Watch(shrink)
    trainer(path / "alone", alone, 0, STEPS).fit()
    began = time.monotonic()
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    autoscaler._QUIET_S = 12.0  # this one looks every second
    trainer(path, one, 1, FIRST).fit()
    write_config(config, address, 2)
    trainer(path, two, (1, 2), STEPS, resume_from="auto").fit()
    found = {
        "alone": alone.losses,
        "together": {**one.losses, **two.losses},
        "devices": [*one.devices, *two.devices],
        "events": [*one.events, *two.events],
        "request": json.loads(_internal_kv_get("autoscaler_resource_request") or "[]"),
        "seconds": time.monotonic() - began,
    }
    ray.shutdown()
    (path / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
