"""What is shipped to rank groups so that they evaluate: plain picklable values."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from raypar.graph.origins import Path
from raypar.schedules.instructions import Instruction
from raypar.schedules.io import Edge
from raypar.sharding.pieces import Piece
from raypar.sharding.spec import ShardingSpec
from raypar.stages.spec import RankSpec, StageSpec


@dataclass(frozen=True)
class Loan:
    """A tensor that some rank groups need to evaluate, and do not hold to train.

    Attributes:
        key: ``param:NAME`` or ``buffer:NAME``.
        shape: Its shape.
        dtype: Its dtype as text.
        lenders: Every rank that speaks for a part of it, with the part; None for all of it.
        borrowers: The ranks that need it, whole.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    lenders: tuple[tuple[int, Piece | None], ...]
    borrowers: tuple[int, ...]


@dataclass(frozen=True)
class ForwardSpec:
    """What the ranks of one rank group run to evaluate batches of one form.

    Attributes:
        stages: Its stages, ascending.
        instructions: Its instruction list.
        posts: Position → receives to post before the instruction there.
        edges: Every value that crosses between stages.
        inputs: Tensors of the batch (``in:0``, ...) that its stages read.
        batch_dims: For every tensor of the batch its batch dim, or None for broadcast.
        samples: Samples of a batch.
        microbatches: How many microbatches a batch is cut into.
        spread: Whether replicas share a batch; if not, each of them evaluates all of it.
        results: Stage → numbers of the results that it makes, in the order of its outputs.
        constants: Constant tensors by placeholder id: the value, or its place in the model.
        shapes: Edge id → (whole shape, dtype as text) for one microbatch on one replica.
        edge_specs: (edge id, rank group) → how the value lies there, as in `RankSpec`.
        loans: What has to be moved before; the same for all rank groups.
    """

    stages: tuple[StageSpec, ...]
    instructions: tuple[Instruction, ...]
    posts: dict[int, tuple[Instruction, ...]]
    edges: tuple[Edge, ...]
    inputs: tuple[str, ...]
    batch_dims: tuple[int | None, ...]
    samples: int
    microbatches: int
    spread: bool
    results: dict[int, tuple[int, ...]] = field(default_factory=dict)
    constants: dict[str, torch.Tensor | Path] = field(default_factory=dict)
    shapes: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    edge_specs: dict[tuple[str, int], ShardingSpec] = field(default_factory=dict)
    loans: tuple[Loan, ...] = ()

    def cutting(self, spec: RankSpec) -> RankSpec:
        """A rank's spec as far as it says which rows of a batch the rank sees."""
        return replace(
            spec,
            inputs=self.inputs,
            batch_dims=self.batch_dims,
            global_batch=self.samples,
            microbatches=self.microbatches,
            replicas=spec.replicas if self.spread else 1,
            replica=spec.replica if self.spread else 0,
        )
