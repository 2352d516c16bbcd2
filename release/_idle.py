"""Ranks without programs: what a step costs beside the work in it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from raypar.comm.group import Group
from raypar.stages.spec import RankSpec, StageSpec, StepReport


class IdleRunner:
    """A rank that holds nothing, and whose step does nothing."""

    def __init__(self, spec: RankSpec, world: Group) -> None:
        pass

    def step(self, step: int, inputs: Mapping[str, torch.Tensor]) -> StepReport:
        return StepReport(step, loss=0.0)

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    gradients = state

    def memory(self) -> dict[str, int]:
        return {}

    def positions(self) -> str:
        return "idle"

    def abort(self, reason: str) -> None:
        pass

    def close(self) -> None:
        pass


def idle_specs(
    world: int, *, global_batch: int = 1, inputs: bool = False, batch_dims: tuple[int, ...] = ()
) -> list[RankSpec]:
    """Ranks in a row, one stage each.

    Args:
        world: How many.
        global_batch: Rows of a batch.
        inputs: Whether each rank takes the input of its own number.
        batch_dims: Where the inputs of a batch have their rows.
    """
    return [
        RankSpec(
            rank=rank, world=world, group=rank, replica=0, replicas=1, microbatches=1,
            global_batch=global_batch, device=rank, stages=(StageSpec(rank, {}, "none", None),),
            instructions=(), posts={}, edges=(), rank_group_of=tuple(range(world)),
            inputs=(f"in:{rank}",) if inputs else (), batch_dims=batch_dims, shared={},
            model_fn=nn.Identity, loss_fn=None, optimizer=torch.optim.SGD, threads=1,
        )
        for rank in range(world)
    ]  # fmt: skip
