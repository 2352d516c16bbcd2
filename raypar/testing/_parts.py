"""What every op of a model should make of every part of a batch, and of its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from raypar.fit import stage_ranges
from raypar.graph.build import CleanGraph
from raypar.graph.opgraph import OpGraph
from raypar.graph.replay import autocast_of
from raypar.plan import Plan
from raypar.stages.compile import loss_scale
from raypar.stages.materialise import materialise


@dataclass
class Part:
    """One microbatch on one replica.

    Attributes:
        microbatch: Its microbatch.
        replica: Its replica.
        values: Id of every op, parameter, buffer, input, constant and batch-wide count → value.
        gradients: Id of every op → gradient of the global loss, where it gets one.
        borders: Id of every op that other stages read → the share of its gradient that comes from
            them.
        outside: Id of such an op → its value by the name that other stages read; while it runs.
    """

    microbatch: int
    replica: int
    values: dict[str, Any] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    borders: dict[str, torch.Tensor] = field(default_factory=dict)
    outside: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)


@dataclass
class Reference:
    """One step of the unsplit model, part by part.

    Attributes:
        parts: Microbatch by microbatch, replica by replica.
        loss: The global loss.
        gradients: Parameter → its gradient, summed over the parts.
        buffers: Buffer → its value after the step.
    """

    parts: list[Part]
    loss: float
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


class PartwiseModel:
    """The captured graph, run whole on one part of a batch after the other by autograd.

    Args:
        graph: The captured model.
        plan: Says into which parts a batch is cut.
        seed: Seed of random masks.
    """

    def __init__(self, graph: OpGraph, plan: Plan, seed: int) -> None:
        self._graph = graph
        self._plan = plan
        self._seed = seed
        self._clean: CleanGraph = graph.local(plan.local_batch)
        ranges = stage_ranges(plan, graph)
        ops = self._clean.ops
        self._stage_of = {ops[i]: s for s, (a, b) in enumerate(ranges) for i in range(a, b)}
        constants = {key: graph.constant(key) for key in self._clean.constants}
        self._constants = (
            materialise(graph.model_fn, seed, {}, (), constants).constants if constants else {}
        )

    def step(
        self,
        step: int,
        params: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        tensors: Sequence[torch.Tensor],
    ) -> Reference:
        """Runs one step.

        Args:
            step: Its number, part of the key of every random number.
            params: Name → value.
            buffers: Name → value before the step.
            tensors: Tensors of the global batch, in order.
        """
        plan = self._plan
        leaves = {n: p.detach().clone() for n, p in params.items()}
        for name, (_, _, trained) in self._graph.params.items():
            leaves[name].requires_grad_(trained)
        now = {n: b.detach().clone() for n, b in buffers.items()}
        rows = [
            [_rows(t, d, m, r, plan) for t, d in zip(tensors, plan.batch_dims, strict=True)]
            for m in range(plan.microbatches)
            for r in range(plan.replicas)
        ]
        counts = self._counts(step, leaves, now, rows)
        found = Reference([], 0.0, {}, now)
        scale = loss_scale(self._graph, plan)
        for i, inputs in enumerate(rows):
            part = Part(*divmod(i, plan.replicas))
            with torch.enable_grad():
                self._run(part, step, leaves, now, inputs, counts)
            loss = part.values[self._clean.loss.meta["id"]] * scale
            found.loss += float(loss.detach())
            self._differentiate(part, loss, leaves, found.gradients)
            for name, node in self._clean.updates.items():
                now[name] = part.values[node.meta["id"]].detach()
            part.values = {k: _detached(v) for k, v in part.values.items()}
            part.outside = {}
            found.parts.append(part)
        return found

    def _counts(
        self,
        step: int,
        params: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        rows: Sequence[Sequence[torch.Tensor]],
    ) -> dict[str, torch.Tensor]:
        """Values that are summed over the whole batch before the step."""
        powers = self._graph.analysis.globals
        totals: dict[str, torch.Tensor] = {}
        if not powers:
            return totals
        with torch.no_grad():
            for i, inputs in enumerate(rows):
                part = Part(*divmod(i, self._plan.replicas))
                self._run(part, step, params, buffers, inputs, {})
                for key in powers:
                    share = part.values[key]
                    totals[key] = totals[key] + share if key in totals else share
        return {k: t * float(len(rows)) ** powers[k] if powers[k] else t for k, t in totals.items()}

    def _run(
        self,
        part: Part,
        step: int,
        params: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        inputs: Sequence[torch.Tensor],
        counts: Mapping[str, torch.Tensor],
    ) -> None:
        per_microbatch = self._plan.global_batch // self._plan.microbatches
        first = part.microbatch * per_microbatch + part.replica * self._plan.local_batch
        values: dict[str, Any] = {f"param:{n}": p for n, p in params.items()}
        values.update({f"buffer:{n}": b for n, b in buffers.items()})
        values.update({f"in:{i}": t for i, t in enumerate(inputs)})
        values.update(self._constants)
        values.update({f"global:{key}": total for key, total in counts.items()})
        values["rng"] = torch.tensor([self._seed, step, first], dtype=torch.int64)
        env: dict[fx.Node, Any] = {}
        for node in self._clean.graph.nodes:
            if node.op == "output":
                break
            key = node.meta["id"]
            if node.op == "placeholder":
                env[node] = values[key]
            elif key in counts:
                env[node] = counts[key]
            else:
                read = partial(self._read, part, env, node)
                args, kwargs = fx.map_arg((node.args, node.kwargs), read)
                with autocast_of(node):
                    env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                values[key] = env[node]
        part.values = values

    def _read(self, part: Part, env: Mapping[fx.Node, Any], reader: fx.Node, node: fx.Node) -> Any:
        """A value as an op reads it: readers on other stages share a name for it of their own."""
        value = env[node]
        if self._stage_of.get(node, self._stage_of[reader]) == self._stage_of[reader]:
            return value
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return value
        return part.outside.setdefault(node.meta["id"], value.view_as(value))

    def _differentiate(
        self,
        part: Part,
        loss: torch.Tensor,
        params: Mapping[str, torch.Tensor],
        into: dict[str, torch.Tensor],
    ) -> None:
        ops = {
            n.meta["id"]: part.values[n.meta["id"]]
            for n in self._clean.ops
            if isinstance(part.values.get(n.meta["id"]), torch.Tensor)
            and part.values[n.meta["id"]].requires_grad
        }
        trained = {n: p for n, p in params.items() if p.requires_grad}
        named = [("op", ops), ("border", part.outside), ("param", trained)]
        wanted = [(kind, key, value) for kind, group in named for key, value in group.items()]
        grads = torch.autograd.grad(loss, [v for _, _, v in wanted], allow_unused=True)
        for (kind, key, _), grad in zip(wanted, grads, strict=True):
            if grad is None:
                continue
            if kind == "param":
                into[key] = into[key] + grad if key in into else grad
            else:
                (part.gradients if kind == "op" else part.borders)[key] = grad


def _rows(
    tensor: torch.Tensor, dim: int | None, microbatch: int, replica: int, plan: Plan
) -> torch.Tensor:
    if dim is None:
        return tensor
    size = plan.local_batch * tensor.shape[dim] // plan.global_batch
    at = microbatch * plan.replicas + replica
    return tensor.narrow(dim, at * size, size).contiguous()


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, (list, tuple)):
        return type(value)(_detached(v) for v in value)
    return value
