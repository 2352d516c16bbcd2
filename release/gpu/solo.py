"""raypar on one device, without Ray: the interpreter of a stage actor in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from raypar.comm.local import LocalWorld
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.plan import plan as make_plan
from raypar.stages.batch import shard_batch
from raypar.stages.compile import compile_plan
from raypar.stages.interpreter import RankRunner
from raypar.stages.spec import Engine, StepReport


def solo_cluster(device: str) -> Cluster:
    """One device, as planners know it."""
    return Cluster.virtual(1, 1, "H200") if device == "cuda" else Cluster.local(1)


def solo_plan(graph: OpGraph, device: str, microbatches: int = 1, recompute: str = "none") -> Plan:
    """Everything on one device, in so many microbatches."""
    form: dict[str, Any] = {"stages": 1, "replicas": 1, "microbatches": microbatches}
    return make_plan(graph, solo_cluster(device), SearchConfig(**form, recompute=recompute))


def adamw(params: Any) -> torch.optim.Optimizer:
    """What every system under comparison uses; fused where there is a device for it."""
    given = list(params)
    first = given[0]["params"][0] if isinstance(given[0], dict) else given[0]
    return torch.optim.AdamW(given, lr=1e-4, fused=first.device.type == "cuda" or None)


class Solo:
    """Steps of a plan of one rank.

    Args:
        graph: The captured model.
        plan: A plan of one device.
        tensors: The batch, on the host.
        device: ``cuda`` or ``cpu``.
        engine: How programs are run.
        runner: What interprets.
    """

    def __init__(
        self,
        graph: OpGraph,
        plan: Plan,
        tensors: Sequence[torch.Tensor],
        device: str,
        engine: Engine = "eager",
        runner: type[RankRunner] = RankRunner,
    ) -> None:
        on_gpu = device == "cuda"
        (self.spec,) = compile_plan(graph, plan, optimizer=adamw, accelerator=on_gpu, engine=engine)
        self._world = LocalWorld(1, name="solo", timeout_s=60.0)
        self.runner = runner(self.spec, self._world.group(0))
        self._inputs = shard_batch(self.spec, list(tensors))
        self.losses: list[float] = []
        self.last: StepReport | None = None

    def step(self, index: int) -> None:
        """One step; its loss is kept."""
        self.last = report = self.runner.step(index, self._inputs)
        self.losses.append(float(report.loss or 0.0))

    def close(self) -> None:
        """Drops everything held."""
        self.runner.close()
