"""A runner without programs, that fails where it is told to."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from raypar.comm.group import Group, TensorSpec
from raypar.errors import OptimizerError
from raypar.stages.spec import RankSpec, StageSpec, StepReport


@dataclass(frozen=True)
class Fault:
    """What goes wrong, on which rank, in which step."""

    kind: str  # raise, optimizer, nan, die, stop, slow
    rank: int
    step: int


class FakeRunner:
    """Passes one number along the ranks in every step, and sums its inputs up."""

    def __init__(self, spec: RankSpec, world: Group, faults: tuple[Fault, ...] = ()) -> None:
        self._spec = spec
        self._world = world
        self._faults = faults
        self._weight = torch.full((2,), float(spec.rank))
        self._at = "idle"
        self._gate = threading.Event()
        self.seen: list[float] = []
        if any(f.kind == "build" and f.rank == spec.rank for f in faults):
            raise ValueError("the fake cannot be built")

    def step(self, step: int, inputs: Mapping[str, torch.Tensor]) -> StepReport:
        spec = self._spec
        self._at = f"step {step}: {spec.rank}F0"
        report = StepReport(step)
        if spec.rank > 0:
            self._at = f"step {step}: recv x from rank {spec.rank - 1}"
            self._world.irecv(TensorSpec((1,), torch.float32), spec.rank - 1, "x").wait()
        for fault in self._faults:
            if fault.rank == spec.rank and fault.step == step:
                self._strike(fault.kind)
        if spec.rank + 1 < spec.world:
            self._world.isend(torch.ones(1), spec.rank + 1, "x").wait()
        self._at = f"step {step}: NORM"
        bad = any(f.kind == "nan" and f.step == step for f in self._faults)
        count = torch.ones(1)
        self._world.all_reduce(count).wait()
        if spec.rank == spec.world - 1:
            report.loss = (
                float("nan")
                if bad
                else float(sum(t.double().sum().item() for t in inputs.values()))
            )
        report.applied = not bad
        if bad and any(f.kind == "nan" and f.rank == spec.rank for f in self._faults):
            report.non_finite = f"stage {spec.rank} loss"
        if report.applied:
            self._weight += 1
        return report

    def _strike(self, kind: str) -> None:
        if kind == "raise":
            raise ValueError("the fake raised")
        if kind == "optimizer":
            raise OptimizerError("the optimizer raised ZeroDivisionError: no reason")
        if kind == "die":
            os._exit(1)
        if kind == "hang":
            self._gate.wait()
        if kind == "slow":
            time.sleep(0.3)

    def state(self) -> dict[str, torch.Tensor]:
        return {f"layers.{self._spec.rank}.bias": self._weight}

    def gradients(self) -> dict[str, torch.Tensor]:
        return {f"layers.{self._spec.rank}.bias": self._weight * 2}

    def memory(self) -> dict[str, int]:
        return {"parameters": self._weight.nbytes, "total": self._weight.nbytes}

    def positions(self) -> str:
        return self._at

    def abort(self, reason: str) -> None:
        self._gate.set()

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class FakeFactory:
    """Makes fake runners; travels to actors."""

    faults: tuple[Fault, ...] = ()

    def __call__(self, spec: RankSpec, world: Group) -> FakeRunner:
        return FakeRunner(spec, world, self.faults)


class Stack(torch.nn.Module):
    """What the fake ranks hold: one bias each, and one that no rank uses."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(n))
        self.again = self.layers[0]
        self.register_buffer("unused", torch.rand(3))


def two() -> torch.nn.Module:
    """A model for two fake ranks."""
    return Stack(2)


def fake_specs(world: int, *, inputs: tuple[str, ...] = ()) -> list[RankSpec]:
    """Specs of `world` ranks in a row, one stage each."""
    return [
        RankSpec(
            rank=rank,
            world=world,
            group=rank,
            replica=0,
            replicas=1,
            microbatches=1,
            global_batch=4,
            device=rank,
            stages=(StageSpec(rank, {}, "none", None),),
            instructions=(),
            posts={},
            edges=(),
            rank_group_of=tuple(range(world)),
            inputs=inputs if rank in (0, world - 1) else (),
            batch_dims=(0,),
            shared={},
            model_fn=two,
            loss_fn=None,
            optimizer=torch.optim.SGD,
            threads=1,
        )
        for rank in range(world)
    ]
