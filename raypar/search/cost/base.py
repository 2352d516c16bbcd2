"""What a stage costs, and the contract of the models that say so."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from torch import fx

from raypar.errors import ConfigError, did_you_mean
from raypar.search.cost.machine import MeshMachine
from raypar.sharding.layout import ParamLayout

if TYPE_CHECKING:
    from raypar.lowered import LoweredPlan
    from raypar.mesh.cluster import Cluster
    from raypar.plan import Plan


class Collective(NamedTuple):
    """One collective that a stage runs.

    Attributes:
        axis: Name of the mesh axis.
        kind: One of `raypar.sharding.convert.COLLECTIVES`.
        nbytes: Bytes of the larger side on one device.
        seconds: How long it takes alone.
    """

    axis: str
    kind: str
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class StageCode:
    """A stage as one device of its mesh runs it: what a cost model looks at.

    Attributes:
        graph: The local forward graph (`raypar.programs.slicing.StageGraph.graph`, lowered).
        recompute: ``none``, ``selective`` or ``full``.
        trainable: Names of the parameters that receive a gradient.
        differentiable: Ids of the received values that receive a gradient here.
        outputs_with_grad: Positions of the outputs that receive a gradient.
        changing: Names of the buffers that forward replaces.
        layouts: Parameter → how it lies; a missing one is whole and belongs to this device alone.
        axes: (name, size) of every axis of the mesh.
        edges_out: Ids of the values that leave, in the order of the outputs.
    """

    graph: fx.Graph
    recompute: str = "none"
    trainable: tuple[str, ...] = ()
    differentiable: tuple[str, ...] = ()
    outputs_with_grad: tuple[int, ...] = ()
    changing: tuple[str, ...] = ()
    layouts: Mapping[str, ParamLayout] = field(default_factory=dict)
    axes: tuple[tuple[str, int], ...] = ()
    edges_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageCost:
    """What one stage costs one device: seconds of one microbatch or step, and bytes.

    Attributes:
        forward_s: Compute of one forward pass, in seconds, without its collectives.
        backward_s: The same for a whole backward pass (recomputation, and adding its gradients to
            those of earlier microbatches, included).
        backward_input_s: The same for the half that makes the gradients of received values.
        backward_weight_s: The same for the half that makes the gradients of parameters.
        forward_comm: Collectives inside a forward pass, in order.
        backward_comm: Inside a whole backward pass.
        backward_input_comm: Inside its input half.
        backward_weight_comm: Inside its weight half.
        gather: Collectives that bring parameters from how they are stored to how programs take
            them, once per step.
        sync: Collectives that sum up gradients, once per step.
        rounds: Collectives that sum up gradients after every microbatch (ZeRO-2).
        optimizer_s: Seconds of the optimizer, once per step.
        param_bytes: Parameters as they are stored, and as programs take them where that is a copy.
        gradient_bytes: Accumulated gradients.
        optimizer_bytes: States of the optimizer.
        buffer_bytes: Buffers and constants.
        saved_bytes: Held from a forward to its backward, per microbatch.
        half_bytes: Held from a backward's input half to its weight half, per microbatch.
        saved_edges: Ids of the values that enter or leave the stage and that `saved_bytes` counts.
        half_edges: The same for `half_bytes`.
        forward_peak_bytes: Most that one forward pass holds at once besides its inputs and what is
            held anyway; what it saves and returns is included.
        backward_peak_bytes: The same for a backward pass, its new gradients included, without
            what was saved.
        overhead_bytes: Memory that the allocator cannot use (fragmentation), and libraries take.
    """

    forward_s: float
    backward_s: float
    backward_input_s: float
    backward_weight_s: float
    forward_comm: tuple[Collective, ...] = ()
    backward_comm: tuple[Collective, ...] = ()
    backward_input_comm: tuple[Collective, ...] = ()
    backward_weight_comm: tuple[Collective, ...] = ()
    gather: tuple[Collective, ...] = ()
    sync: tuple[Collective, ...] = ()
    rounds: tuple[Collective, ...] = ()
    optimizer_s: float = 0.0
    param_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    buffer_bytes: int = 0
    saved_bytes: int = 0
    half_bytes: int = 0
    forward_peak_bytes: int = 0
    backward_peak_bytes: int = 0
    overhead_bytes: int = 0
    saved_edges: frozenset[str] = frozenset()
    half_edges: frozenset[str] = frozenset()

    @property
    def resident_bytes(self) -> int:
        """What is held through the whole step."""
        return (
            self.param_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.buffer_bytes
            + self.overhead_bytes
        )

    def peak_bytes(self, in_flight: int) -> int:
        """Most bytes held in a step that keeps `in_flight` microbatches between F and B.

        One of them is being computed: its forward holds what it saves, its backward frees it.
        """
        running = max(
            (in_flight - 1) * self.saved_bytes + self.forward_peak_bytes,
            in_flight * self.saved_bytes + self.backward_peak_bytes,
        )
        return self.resident_bytes + running

    def with_seconds(
        self, forward: float, backward: float, backward_input: float, backward_weight: float
    ) -> StageCost:
        """The same with other compute times."""
        return replace(
            self,
            forward_s=forward,
            backward_s=backward,
            backward_input_s=backward_input,
            backward_weight_s=backward_weight,
        )


def total_s(collectives: tuple[Collective, ...]) -> float:
    """Seconds of collectives one after the other."""
    return sum(c.seconds for c in collectives)


class CostModel(ABC):
    """Says what a stage costs.

    Attributes:
        name: What the model is registered under.
    """

    name: str

    @abstractmethod
    def stage_cost(
        self, stage: StageCode, machine: MeshMachine, *, optimizer_states: int = 2
    ) -> StageCost:
        """What `stage` costs on one device of `machine`.

        Args:
            stage: The stage as one device runs it.
            machine: Its mesh.
            optimizer_states: Tensors that the optimizer keeps per parameter (Adam: 2).
        """

    def for_cluster(self, cluster: Cluster) -> CostModel:
        """The model that knows what is on disk about such a cluster: itself, where nothing is."""
        return self


_MODELS: dict[str, type[CostModel]] = {}


def register_cost_model(model: type[CostModel]) -> type[CostModel]:
    """Class decorator that makes a cost model known by its name."""
    if not issubclass(model, CostModel):
        raise TypeError(f"{model!r} is not a CostModel")
    if _MODELS.setdefault(model.name, model) is not model:
        raise ValueError(f"a cost model named {model.name!r} is registered already")
    return model


def cost_model_names() -> list[str]:
    """Registered names."""
    from raypar.search.cost import analytic, learned, profiled  # noqa: F401

    return sorted(_MODELS)


def get_cost_model(name: str) -> CostModel:
    """The cost model of that name.

    Raises:
        ConfigError: None has it.
    """
    names = cost_model_names()
    if name not in names:
        raise ConfigError(
            f"cost model {name!r} is unknown; valid are {', '.join(names)}."
            f"{did_you_mean(name, names)}"
        )
    return _MODELS[name]()


def stage_code(lowered: LoweredPlan, plan: Plan, index: int) -> StageCode:
    """Stage `index` of a lowered plan, as one device runs it."""
    stage = lowered.stages[index]
    flow = lowered.flow
    outputs = [i for i, e in enumerate(stage.edges_out) if e in flow]
    if stage.has_loss:
        outputs.append(len(stage.edges_out))
    return StageCode(
        graph=stage.graph,
        recompute=plan.stages[index].memory.recompute,
        trainable=tuple(p for p in stage.keys("param:") if f"param:{p}" in flow),
        differentiable=tuple(e for e in stage.keys("edge:") if e in flow),
        outputs_with_grad=tuple(outputs),
        changing=stage.updates,
        layouts=lowered.layouts[lowered.io.rank_of[index]],
        axes=plan.stages[index].mesh.named,
        edges_out=tuple(stage.edges_out),
    )
