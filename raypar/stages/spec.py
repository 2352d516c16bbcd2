"""What is shipped to a rank, and what a rank reports: plain picklable values, no Ray, no fx."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from raypar.comm.reshard import LinkCosts
from raypar.graph.origins import Path
from raypar.plan import DATA
from raypar.schedules.instructions import Instruction
from raypar.schedules.io import Edge
from raypar.sharding.layout import Axes, ParamLayout
from raypar.sharding.spec import ShardingSpec
from raypar.stages.initial import InitialWeights
from raypar.stages.recipe import Recipe

OptimizerFn = Callable[[Iterable[Any]], torch.optim.Optimizer]
"""Builds the optimizer from parameters, or from (name, parameter) pairs where its first parameter
is called ``named_parameters``."""

Engine = Literal["eager", "compiled", "cuda_graph"]
"""How the programs of a stage are run (`raypar.stages.engines`)."""

ParamForms = Mapping[str, tuple[tuple[int, ...], str, bool]]
"""Shape, dtype as text, and whether it is trained, of the parameters of a model by name."""


@dataclass(frozen=True)
class StageSpec:
    """One stage as one rank holds it (see `raypar.stages.compile` for how it is made).

    Attributes:
        index: The stage's number in the plan.
        nodes: ``graph`` and ``globals`` (or None): the stage's graphs as data
            (`raypar.programs.wire`), never code.
        recompute: ``none``, ``selective`` or ``full``.
        loss_scale: What the loss of one microbatch is multiplied with to sum up to the global
            loss; None where the stage does not make the loss.
        edges_out: Ids of the values that other stages need: its first outputs, in order.
        updates: Buffers whose new values are its last outputs, in order.
        globals: Values reduced over the whole batch before the step, with the power of N to
            apply, in the order of the globals graph's outputs.
        trainable: Its parameters that receive a gradient.
        differentiable: Ids of received values that receive a gradient here.
        outputs_with_grad: Positions of its outputs that receive a gradient.
        arrivals: Received value → how it lies on this stage's mesh (without the ``data`` axis) when
            the programs take it; its gradient leaves in the same sharding.
        departures: Sent value → how it lies when the programs return it; its gradient comes back in
            the same sharding.
    """

    index: int
    nodes: dict[str, Any]
    recompute: str
    loss_scale: float | None
    edges_out: tuple[str, ...] = ()
    updates: tuple[str, ...] = ()
    globals: tuple[tuple[str, int], ...] = ()
    trainable: tuple[str, ...] = ()
    differentiable: tuple[str, ...] = ()
    outputs_with_grad: tuple[int, ...] = ()
    arrivals: dict[str, ShardingSpec] = field(default_factory=dict)
    departures: dict[str, ShardingSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class RankSpec:
    """All that one rank needs to hold its stages and run steps.

    Attributes:
        rank: This rank's number in the run, 0-based; position p of rank group g's mesh is
            ``bases[g] + p``.
        world: Number of ranks in the run.
        group: Its rank group (the row of the schedule it executes).
        replica: Its replica number.
        replicas: D.
        microbatches: M.
        global_batch: Samples of a step.
        device: Cluster-wide device index from the plan.
        stages: The stages it holds, ascending.
        instructions: Its instruction list, the same for every step.
        posts: Position → receives to post before the instruction there.
        edges: Every value that crosses between stages of the plan.
        rank_group_of: For every stage of the plan, its rank group.
        inputs: Example-tensor names (``in:0``, ...) its stages read.
        batch_dims: For every example tensor its batch dim, or None for broadcast.
        shared: Parameter name → the rank groups that hold a copy (tied over stages), ascending.
        shared_layouts: For every such name its layout on each of those rank groups.
        shared_dtypes: For every such name its dtype as text.
        owned_params: Parameters whose state this rank reports and, where unused by any stage,
            just keeps.
        owned_buffers: The same for buffers.
        constants: Constant tensors of the graph by placeholder id: the value, or where the model
            that the rank builds has it.
        shapes: Edge id → (whole shape, dtype as text) for one microbatch on one replica.
        meshes: Axes of every rank group's mesh.
        bases: First rank of every rank group.
        params: Layout of every parameter that this rank group holds.
        edge_specs: (edge id, rank group) → how the value lies there, without the ``data`` axis: as
            sent on its source's rank group, as received on the others.
        link_costs: (sending, receiving) rank group → what messages cost, where links differ.
        model_fn: Builds the model.
        loss_fn: Maps the model's output (and batch) to the loss, or None.
        optimizer: Builds the optimizer from parameters.
        recipe: What else decides the numbers: clipping, schedule, loss scale, average.
        forms: Every parameter of the model in its order, also those of other ranks.
        seed: Seed of initialisation and of dropout.
        initial: What the model begins with in place of what the seed makes, or None.
        default_dtype: `torch.get_default_dtype()` where the plan was compiled, as text.
        threads: torch threads for this rank, or None to leave them alone.
        keep_gradients: Keep a copy of every step's gradients (equivalence tests).
        accelerator: Whether the rank runs on a GPU.
        engine: How its programs are run.
    """

    rank: int
    world: int
    group: int
    replica: int
    replicas: int
    microbatches: int
    global_batch: int
    device: int
    stages: tuple[StageSpec, ...]
    instructions: tuple[Instruction, ...]
    posts: dict[int, tuple[Instruction, ...]]
    edges: tuple[Edge, ...]
    rank_group_of: tuple[int, ...]
    inputs: tuple[str, ...]
    batch_dims: tuple[int | None, ...]
    shared: dict[str, tuple[int, ...]]
    model_fn: Callable[[], torch.nn.Module] | torch.nn.Module
    loss_fn: Callable[..., torch.Tensor] | None
    optimizer: OptimizerFn
    shared_layouts: dict[str, tuple[ParamLayout, ...]] = field(default_factory=dict)
    shared_dtypes: dict[str, str] = field(default_factory=dict)
    owned_params: tuple[str, ...] = ()
    owned_buffers: tuple[str, ...] = ()
    constants: dict[str, torch.Tensor | Path] = field(default_factory=dict)
    shapes: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    meshes: tuple[Axes, ...] = ()
    bases: tuple[int, ...] = ()
    params: dict[str, ParamLayout] = field(default_factory=dict)
    edge_specs: dict[tuple[str, int], ShardingSpec] = field(default_factory=dict)
    link_costs: dict[tuple[int, int], LinkCosts] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    forms: ParamForms = field(default_factory=dict)
    seed: int = 0
    initial: InitialWeights | None = None
    default_dtype: str = "float32"
    threads: int | None = None
    keep_gradients: bool = False
    accelerator: bool = False
    engine: Engine = "eager"

    @property
    def axes(self) -> Axes:
        """Axes of the own rank group's mesh."""
        return self.meshes[self.group]

    @property
    def coordinate(self) -> tuple[int, ...]:
        """Where this rank lies on every axis of its mesh."""
        return coordinate_of(self.rank - self.bases[self.group], self.axes)

    @property
    def leads(self) -> bool:
        """Whether it is the first rank of its replica: the one that speaks for all of it."""
        return all(
            c == 0 for c, (n, _) in zip(self.coordinate, self.axes, strict=True) if n != DATA
        )


def coordinate_of(position: int, axes: Axes) -> tuple[int, ...]:
    """Where the rank at `position` (row-major) lies on every axis."""
    found: list[int] = []
    for _, size in reversed(axes):
        position, index = divmod(position, size)
        found.append(index)
    return tuple(reversed(found))


@dataclass
class StepReport:
    """What a rank tells of one finished step.

    Attributes:
        step: Step number, 0-based.
        loss: This rank's share of the global loss (the shares of all ranks add up to it); None on
            ranks without the loss stage.
        grad_norm: Global gradient norm before clipping (equal on every rank), unscaled.
        applied: Whether the optimizer step was applied.
        skipped: Not applied, because the loss scale was too large; the run goes on.
        lr: Learning rate of the first parameter group in this step, where it has one.
        loss_scale: What the loss was multiplied with for backward; None where it is not scaled.
        non_finite: Where this rank first saw a NaN or infinity ("stage 1 loss", "stage 0
            gradients", ...), or None.
        seconds: Wall time of the step here, and of parts of it: ``total``, ``compute``, ``recv``
            (waiting for activations and gradients), ``sync`` (waiting for gradient buckets and
            updated parameters),
            ``optimizer``, ``data`` (waiting for input).
        awaited: Seconds of ``sync`` in which forwards waited for updated parameters (ZeRO); the
            stamps count them with the forwards.
        passes: Stage → seconds in its forward and in its backward programs, over all microbatches:
            collectives inside them count, waiting for values of other stages does not. Where a
            device works behind the program's back (a GPU), it is the time to tell it what to do.
        peak_saved: Stage → most bytes held between forward and backward at once; of a rank's first
            step alone, as `most_saved`.
        most_saved: The same for all stages of the rank together.
        saved_over: The same after each instruction; of a rank's first step alone.
        held: Bytes held from step to step (`raypar.stages.accounts.measured_memory`); of a rank's
            first step alone.
        stamps: This host's monotonic clock in seconds, as packed float64: at the beginning of the
            list, after each instruction, and once all sends are through.
    """

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    applied: bool = True
    skipped: bool = False
    lr: float | None = None
    loss_scale: float | None = None
    non_finite: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    awaited: float = 0.0
    passes: dict[int, tuple[float, float]] = field(default_factory=dict)
    peak_saved: dict[int, int] = field(default_factory=dict)
    most_saved: int = 0
    saved_over: tuple[int, ...] = ()
    held: dict[str, int] = field(default_factory=dict)
    stamps: bytes = b""

    @property
    def ends_run(self) -> bool:
        """Whether no step may follow: it was not finite, and not merely for the loss scale."""
        return not (self.applied or self.skipped)
