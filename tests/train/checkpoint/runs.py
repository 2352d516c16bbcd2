"""Small runs to be saved and restored, on threads of this process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from raypar.graph.capture import capture
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.sharding.pieces import piece_of
from raypar.stages.compile import compile_plan
from raypar.stages.run import Run
from raypar.stages.saved import RANDOM, Key
from raypar.testing import models, random_plan, random_sharding
from raypar.testing.backends import start_run
from raypar.train.checkpoint import Checkpoint, CheckpointStore
from raypar.train.checkpoint.reading import Reader, read_index
from raypar.train.checkpoint.storage import storage_at
from raypar.train.state import TrainState

OptimizerFn = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def adamw(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1)


def momentum(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9)


def adagrad(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(params, lr=1e-2)


OPTIMIZERS: tuple[OptimizerFn, ...] = (adamw, momentum, adagrad)


@functools.cache
def graph_of(name: str) -> OpGraph:
    """One of the zoo's models."""
    case = models.case(name)
    return capture(case.model_fn, case.batch(), case.loss_fn, case.batch_dims)


@functools.cache
def plan_of(name: str, seed: int, *, parts: int | None = None, sharded: bool = True) -> Plan:
    """A random plan for it on up to 4 devices, with ops sharded and every ZeRO level."""
    graph = graph_of(name)
    plan = random_plan(graph, Cluster.local(2 if sharded else 4), seed=seed, microbatches=parts)
    return random_sharding(graph, plan, Cluster.local(4), seed=seed) if sharded else plan


def start(name: str, plan: Plan, optimizer: OptimizerFn = adamw, **options: Any) -> Run:
    """A run of it, not started, that sees one batch again and again."""
    graph = graph_of(name)
    specs = compile_plan(graph, plan, optimizer=optimizer, **options)
    return start_run("local", specs, models.tensors(models.case(name).batch()))


def losses(run: Run, first: int, steps: int) -> list[float]:
    """Trains, and returns every step's loss."""
    found: list[float] = []
    run.train(first, steps, lambda result: found.append(float(result.loss or 0.0)))
    return found


def save(store: CheckpointStore, run: Run, plan: Plan, step: int, **metrics: Any) -> Checkpoint:
    """One finished checkpoint."""
    state = TrainState(step=step, samples=8 * step, metrics=metrics)
    store.begin(run, state, plan, {"config": {"name": "test"}})
    return store.wait()[-1]


def tensors_of(checkpoint: Checkpoint) -> dict[Key, torch.Tensor]:
    """Every tensor of a checkpoint as a whole, but for the random generators."""
    root, _, folder = checkpoint.path.rpartition("/")
    storage = storage_at(root)
    index = read_index(storage, folder)
    reader = Reader(storage, folder, index)
    found = {}
    for key, saved in index.tensors.items():
        if key.kind != RANDOM:
            found[key] = torch.empty(saved.shape, dtype=saved.dtype)
            reader.fill(key, piece_of(tuple(((0, n),) for n in saved.shape)), found[key])
    return found


def differences(a: Checkpoint, b: Checkpoint) -> list[str]:
    """The tensors of two checkpoints that are not equal bit for bit."""
    mine, theirs = tensors_of(a), tensors_of(b)
    missing = [str(key) for key in mine.keys() ^ theirs.keys()]
    both = mine.keys() & theirs.keys()
    return missing + [str(key) for key in both if not torch.equal(mine[key], theirs[key])]
