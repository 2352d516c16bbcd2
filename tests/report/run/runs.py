"""Folders of small runs, as a trainer leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

import raypar as rp
from raypar.report.run import PredictionWriter
from raypar.stages.compile import compile_plan
from raypar.stages.local import LocalRun
from raypar.stages.run import StepResult
from raypar.testing import random_plan
from raypar.train.callbacks import Callbacks, RunFacts
from raypar.train.data import BatchForm, peek
from raypar.train.feed import DataFeed, HeldBatches
from raypar.train.loggers import EventLog
from raypar.train.metrics import MetricsLog
from raypar.train.utilisation import model_flops


def model(width: int = 32) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4)))


def loss(out: torch.Tensor) -> torch.Tensor:
    return out.square().mean()


def make_run(
    folder: Path, *, steps: int = 6, replicas: int = 1, microbatches: int = 4, width: int = 32,
    name: str = "tests.report:model", seed: int | None = None,
) -> Path:  # fmt: skip
    """Trains a small model in this process and writes what a run's folder holds.

    With a seed the plan is a random one on four devices.
    """
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    batch = torch.randn(16, width)
    graph = rp.capture(lambda: model(width), batch, loss)
    cluster = rp.Cluster.local(2 * replicas if seed is None else 4)
    if seed is None:
        search = rp.SearchConfig(stages=2, replicas=replicas, microbatches=microbatches)
        plan = rp.plan(graph, cluster, search)
    else:
        plan = random_plan(graph, cluster, seed=seed)
    plan.save(folder / "plan.json")
    specs = compile_plan(
        graph, plan, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), seed=0, threads=1
    )
    opened = peek([batch], 0)
    feed = DataFeed(HeldBatches(opened), BatchForm(opened.example, None), specs)
    callbacks = Callbacks([EventLog(), PredictionWriter()])
    with LocalRun(specs, feed=feed) as run:
        log = MetricsLog(
            folder / "metrics.jsonl", 16, None, run.infos, specs=specs,
            model_flops=model_flops(graph), peak_flops=1e11,
        )  # fmt: skip
        config = {"model": {"target": name}}
        callbacks.on_start(
            RunFacts("tiny", folder, plan, graph, cluster, run.infos, 0, steps, config)
        )

        def on_report(result: StepResult) -> None:
            line = log.add(result)
            callbacks.on_step(line)
            done = result.step + 1
            if done % 3 == 0:
                evaluation = {"step": done, "eval_loss": 1.1 * float(line["loss"])}
                log.evaluation(evaluation)
                callbacks.on_evaluation(evaluation)
                callbacks.on_checkpoint(f"checkpoints/{done:08d}", done)

        run.train(0, steps, on_report)
        log.close()
    result = {**log.summary(), "startup": {"capture": 0.5, "total": 1.5}}
    (folder / "result.json").write_text(json.dumps(result))
    callbacks.on_end(result)
    return folder
