"""Seconds and bytes of ops, conversions and parameters, before anything is lowered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from raypar.graph.passes.emit import is_op, op_name
from raypar.search.cost.machine import MeshMachine
from raypar.search.cost.params import ADDING, BUCKET_BYTES, Move, moves
from raypar.search.cost.work import BACKWARD_KIND, Work, is_free, node_work
from raypar.search.intra.rewritten import local_calls, price_of
from raypar.search.intra.settings import Graph, IntraSettings, Value
from raypar.sharding.convert import COLLECTIVES, NONE, REDUCE_SCATTER, conversion, state_after
from raypar.sharding.layout import layout_of
from raypar.sharding.rules.base import Strategy
from raypar.sharding.spec import RG, ShardingSpec, is_shard

_ADDS_NOTHING = frozenset("add sub neg sum mean expand detach embedding where masked_fill".split())
"""Ops whose backward needs no value of the forward pass."""
_KEEPS_RESULT = frozenset(
    """exp tanh sigmoid relu sqrt rsqrt softmax _softmax log_softmax _log_softmax
    reciprocal""".split()
)
"""Ops whose backward needs the result instead of the input."""
_PASSES_GRADIENT = frozenset("add sub detach".split())
"""Ops whose backward hands on the gradient as it is."""


class OpPrice(NamedTuple):
    """One op in one strategy.

    Attributes:
        forward_s: Compute of one forward pass, in seconds.
        backward_s: Compute of one backward pass, recomputation included.
        saved: Bytes that it keeps of its own results for its backward pass.
    """

    forward_s: float
    backward_s: float
    saved: float


class ParamPrice(NamedTuple):
    """One parameter in one held state.

    Attributes:
        step_s: Seconds once per step: gather, gradient sync, optimizer.
        microbatch_s: Seconds per microbatch (ZeRO-3 gathers inside the programs, ZeRO-2 shares
            gradients out).
        resident: Bytes held through the step: parameter, gradient and optimizer states.
    """

    step_s: float
    microbatch_s: float
    resident: float


class Prices:
    """What things cost on one mesh.

    Args:
        graph: What is sharded.
        machine: The mesh, all of its axes.
        settings: Microbatches, memory policy, ZeRO level.
        twins: Op → an op that does the same on the same shapes; prices are worked out once.
    """

    def __init__(
        self,
        graph: Graph,
        machine: MeshMachine,
        settings: IntraSettings,
        twins: Mapping[fx.Node, fx.Node] | None = None,
    ) -> None:
        self.graph = graph
        self.machine = machine
        self.settings = settings
        self.axes = machine.mesh.inner
        self.mesh = tuple(size for _, size in self.axes)
        self._twins = twins or {}
        self._op: dict[tuple[fx.Node, Strategy], OpPrice] = {}
        self._saves: dict[tuple[fx.Node, int], bool] = {}
        self._collective: dict[Move, float] = {}
        self._converted: dict[tuple[object, ...], tuple[float, float]] = {}
        self._tables: dict[tuple[object, ...], npt.NDArray[np.float64]] = {}
        self._param: dict[tuple[object, ...], ParamPrice] = {}

    def local_bytes(self, value: Value, spec: ShardingSpec) -> float:
        """Bytes of one rank's part of a value."""
        return value.nbytes / _parts(spec, self.mesh)

    def op(self, node: fx.Node, strategy: Strategy) -> OpPrice:
        """What an op costs in a strategy, per microbatch."""
        key = (self._twins.get(node, node), strategy)
        known = self._op.get(key)
        if known is None:
            known = self._op[key] = self._price_op(*key)
        return known

    def _price_op(self, node: fx.Node, strategy: Strategy) -> OpPrice:
        whole = node_work(node)
        reads, makes = self.graph.reads[node], self.graph.makes[node]
        if whole.kind not in ("view", "none"):
            flows = [v in self.graph.flow for v in reads]
            calls = local_calls(node, strategy, self.axes, flows)
            if calls is not None:
                policy = self.settings.recompute
                found = OpPrice(*price_of(calls, self.machine, policy, self._leg))
                return found._replace(backward_s=found.backward_s + self._adding_s(node, strategy))
        read = [self.local_bytes(v, s) for v, s in zip(reads, strategy.inputs, strict=True)]
        made = [self.local_bytes(v, s) for v, s in zip(makes, strategy.outputs, strict=True)]
        work = self._local_work(whole, strategy, sum(read), sum(made))
        grads = [b for b, v in zip(read, reads, strict=True) if v in self.graph.flow]
        forward = work.seconds(self.machine)
        backward = 0.0
        if grads and any(v in self.graph.flow for v in makes):
            backward = sum(w.seconds(self.machine) for w in _backward(node, work, grads))
            backward += self._adding_s(node, strategy, work)
        if self._runs_again(node, whole):
            backward += forward
        return OpPrice(forward, backward, self._own_saved(node, read, made) if grads else 0.0)

    def _adding_s(self, node: fx.Node, strategy: Strategy, product: Work | None = None) -> float:
        """Seconds to add a microbatch's gradients of parameters to those of the ones before.

        As `raypar.search.cost.params.additions`: a product reads the sum that it is added to, and
        others read two gradients and write one. Where gradients are cut (ZeRO-2) it is less.
        """
        if self.settings.microbatches == 1 or is_free(node):
            return 0.0
        seconds = 0.0
        for value, spec in zip(self.graph.reads[node], strategy.inputs, strict=True):
            if not value.id.startswith("param:") or value not in self.graph.flow:
                continue
            nbytes = self.local_bytes(value, spec)
            if product is not None and product.matmul and value.tensor.dim() > 1:
                more = product._replace(nbytes=product.nbytes + nbytes)
                seconds += more.seconds(self.machine) - product.seconds(self.machine)
            else:
                seconds += Work(0.0, 3 * nbytes, kind=ADDING).seconds(self.machine)
        return seconds

    def _local_work(self, whole: Work, strategy: Strategy, read: float, made: float) -> Work:
        """The work of one rank: its share of products, and the bytes of its parts."""
        if whole.kind in ("view", "none"):
            return whole
        share = 1.0
        for axis, size in enumerate(self.mesh):
            if any(is_shard(s[axis]) for s in (*strategy.inputs, *strategy.outputs)):
                share /= size
        nbytes = 2 * made if whole.kind == "gather" else read + made
        return whole.scaled(share)._replace(nbytes=nbytes)

    def _runs_again(self, node: fx.Node, work: Work) -> bool:
        policy = self.settings.recompute
        return policy == "full" or (policy == "selective" and not work.matmul and is_op(node))

    def _own_saved(self, node: fx.Node, read: list[float], made: list[float]) -> float:
        policy = self.settings.recompute
        work = node_work(node)
        if policy == "full" or is_free(node):
            return 0.0
        if policy == "selective":
            return sum(made) if work.matmul else 0.0
        name = op_name(node)
        if name == "cross_entropy_loss":
            return read[0]  # the log-softmax of the logits
        return sum(made) if name in _KEEPS_RESULT or work.kind == "attention" else 0.0

    def saves_input(self, node: fx.Node, position: int) -> bool:
        """Whether an op keeps a tensor argument for its backward pass."""
        key = (self._twins.get(node, node), position)
        known = self._saves.get(key)
        if known is None:
            known = self._saves[key] = self._saves_input(*key)
        return known

    def _saves_input(self, node: fx.Node, position: int) -> bool:
        if self.settings.recompute != "none" or is_free(node) or not is_op(node):
            return False
        value = self.graph.reads[node][position]
        if value.node.op == "placeholder" and not value.id.startswith("edge:"):
            return False
        if not any(v in self.graph.flow for v in self.graph.reads[node]):
            return False
        name = op_name(node)
        kind = node_work(node).kind
        if name in _ADDS_NOTHING or name in _KEEPS_RESULT or kind in ("view", "none", "copy"):
            return False
        return name != "cross_entropy_loss"

    def convert(
        self, value: Value, source: ShardingSpec, target: ShardingSpec
    ) -> tuple[float, float]:
        """(forward, backward) seconds of bringing a value to another sharding, per microbatch."""
        if source == target:
            return 0.0, 0.0
        key = (source, target, value.nbytes, value in self.graph.flow, value.floats)
        known = self._converted.get(key)
        if known is None:
            known = self._converted[key] = self._convert(*key)
        return known

    def table(
        self, value: Value, made: Sequence[ShardingSpec], wanted: Sequence[ShardingSpec]
    ) -> npt.NDArray[np.float64]:
        """Seconds of both directions by (made, wanted) sharding, per microbatch."""
        key = (tuple(made), tuple(wanted), value.nbytes, value in self.graph.flow, value.floats)
        known = self._tables.get(key)
        if known is None:
            rows = [[sum(self.convert(value, s, t)) for t in wanted] for s in made]
            known = self._tables[key] = np.array(rows)
        return known

    def _convert(
        self, source: ShardingSpec, target: ShardingSpec, nbytes: int, grad: bool, floats: bool
    ) -> tuple[float, float]:
        forward = backward = 0.0
        for leg in _legs(source, target, self.mesh):
            axis = self.axes[leg.axis][0]
            before, after = nbytes * leg.before, nbytes * leg.after
            if leg.forward != NONE or floats:
                forward += self._leg(axis, leg.forward, before, after)
            if grad and leg.backward != NONE:
                backward += self._leg(axis, leg.backward, after, before)
        if self.settings.recompute == "full":
            backward += forward
        return forward, backward

    def _leg(self, axis: str, kind: str, before: float, after: float) -> float:
        if kind in COLLECTIVES:
            return self.collective(Move(axis, kind, int(max(before, after))))
        copied = 0.0 if kind == NONE else before + after
        return self.machine.compute_s(0, copied, "float32", False, "copy") if copied else 0.0

    def collective(self, move: Move) -> float:
        """Seconds of one collective."""
        known = self._collective.get(move)
        if known is None:
            known = self.machine.collective_s(move.axis, move.kind, move.nbytes)
            self._collective[move] = known
        return known

    def param(self, value: Value, held: ShardingSpec) -> ParamPrice:
        """What a parameter costs that programs take in the state `held` (over the inner axes)."""
        tensor = value.tensor
        trained = value in self.graph.flow
        key = (tuple(tensor.shape), tensor.dtype, held, trained)
        known = self._param.get(key)
        if known is None:
            known = self._param[key] = self._price_param(tensor, held, trained)
        return known

    def _price_param(self, tensor: torch.Tensor, held: ShardingSpec, trained: bool) -> ParamPrice:
        axes = self.machine.mesh.named
        shape, item = tuple(tensor.shape), tensor.element_size()
        replicas = (RG,) * (len(axes) - len(self.axes))
        layout = layout_of(shape, ShardingSpec((*replicas, *held)), axes, self.settings.zero)
        sizes = [size for _, size in axes]
        own = math.prod(layout.held.local_shape(shape, sizes)) * item
        part = math.prod(layout.stored.local_shape(shape, sizes)) * item
        gather = moves(layout.stored, layout.held, shape, item, axes)
        sync = moves(layout.stored, layout.held, shape, item, axes, backward=True)
        taken = part if layout.in_program else own
        if not trained:
            sync = []
        step = 0.0
        inside = 0.0
        if layout.in_program:
            inside = sum(self.collective(m) for m in (*gather, *sync))
        else:
            often = [m for m in sync if layout.zero >= 2 and m.kind == REDUCE_SCATTER]
            inside = sum(map(self._bucketed, often))
            step = sum(map(self._bucketed, (*gather, *sync))) - inside
        if trained:
            step += self.machine.optimizer_s(part, 1)
            gradient = part if layout.zero >= 2 else own
            taken += gradient + self.settings.optimizer_states * part
        return ParamPrice(step, inside, float(taken))

    def _bucketed(self, move: Move) -> float:
        """Seconds of a move that travels in buckets together with others of its kind."""
        bucket = self.collective(move._replace(nbytes=BUCKET_BYTES))
        return bucket * move.nbytes / BUCKET_BYTES


def _backward(node: fx.Node, work: Work, grads: list[float]) -> list[Work]:
    """The ops of a backward pass that makes `grads` (bytes of each gradient)."""
    name = op_name(node)
    if work.kind in ("view", "none") or name in _PASSES_GRADIENT:
        return [Work(0, 0, work.dtype, kind="view")]
    if work.kind == "attention":
        two_and_a_half = work.scaled(2.5)
        return [two_and_a_half._replace(nbytes=2 * work.nbytes, kind="attention_backward")]
    if work.kind == "recurrent":
        return [work.scaled(3.0)]
    if work.matmul:
        kind = BACKWARD_KIND.get(work.kind, work.kind)
        products = [work._replace(kind=kind)] * min(len(grads), 2)
        rest = sorted(grads)[: max(0, len(grads) - 2)]  # the bias: a sum over rows
        return products + [Work(0, work.nbytes / 3, work.dtype, kind="reduce") for _ in rest]
    kind = BACKWARD_KIND.get(work.kind, "plain")
    return [Work(work.flops, work.nbytes + sum(grads), work.dtype, kind=kind)]


class _Leg(NamedTuple):
    """One step of a conversion, with the shares of the value before and after it."""

    axis: int
    forward: str
    backward: str
    before: float
    after: float


@lru_cache(maxsize=1 << 14)
def _parts(spec: ShardingSpec, mesh: tuple[int, ...]) -> int:
    return spec.parts(mesh)


@lru_cache(maxsize=1 << 16)
def _legs(source: ShardingSpec, target: ShardingSpec, mesh: tuple[int, ...]) -> tuple[_Leg, ...]:
    now = list(source)
    found = []
    for step in conversion(source, target):
        before = _parts(ShardingSpec(now), mesh)
        now[step.axis] = state_after(step, now[step.axis])
        after = _parts(ShardingSpec(now), mesh)
        found.append(_Leg(step.axis, step.forward, step.backward, 1 / before, 1 / after))
    return tuple(found)
