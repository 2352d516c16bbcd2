"""One stage of a plan run op by op on threads, to find the op that is not what it should be."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from raypar.graph.replay import replay
from raypar.lowered import LoweredPlan
from raypar.plan import DATA, Plan
from raypar.sharding.pieces import piece_of
from raypar.sharding.spec import ShardingSpec
from raypar.stages.layouts import taken_ranges
from raypar.testing._compare import Compare, compare_joined
from raypar.testing._parts import Part
from raypar.testing.mesh_threads import ThreadMesh


@dataclass(frozen=True)
class Culprit:
    """An op that is at fault.

    Attributes:
        op: Its id.
        strategy: How it runs on the stage's mesh, as text; empty where it runs whole.
        replica: The replica on which it was seen.
        text: What is wrong.
    """

    op: str
    strategy: str
    replica: int
    text: str


class StageReplay:
    """Runs the local graph of one stage for one microbatch, on right inputs, op by op.

    Args:
        plan: The plan.
        low: The same, lowered.
        stage: Number of the stage.
        parts: What the microbatch should be on every replica, by replica.
        loss_scale: What the loss counts in the global loss.
    """

    def __init__(
        self, plan: Plan, low: LoweredPlan, stage: int, parts: Sequence[Part], loss_scale: float
    ) -> None:
        self._low = low
        self._stage = stage
        self._parts = parts
        self._scale = loss_scale
        self._axes = plan.stages[stage].mesh.named
        self._inner = plan.stages[stage].mesh.inner
        self._layouts = low.layouts[plan.schedule.placement[stage][0]]
        self._mesh = ThreadMesh(self._axes)
        self._strategies = {n.meta["id"]: s for n, s in low.chosen[stage].items()}

    def wrong_forward(self, compare: Compare) -> Culprit | None:
        """The first op whose result is wrong."""
        try:
            values = [found[0] for found in self._run(backward=False)]
        except Exception as error:
            return self._raised(error)
        for key, strategy in self._strategies.items():
            for part in self._parts:
                own = [values[rank].get(key) for rank in self._ranks(part.replica)]
                for i, spec in enumerate(strategy.outputs):
                    wanted = _tensors(part.values[key])
                    pieces = [_tensors(v)[i] for v in own]
                    text = self._compare(pieces, spec, wanted[i], compare)
                    if text is not None:
                        return Culprit(key, self._text(key), part.replica, f"result {text}")
        return None

    def wrong_backward(self, compare: Compare, suspects: Sequence[str]) -> Culprit | None:
        """The last op whose input gets a wrong gradient, though its own gradient is right.

        Args:
            compare: What is wrong.
            suspects: Ids of placeholders (``edge:ID``, ``param:NAME``) whose gradient is wrong: if
                all ops' gradients are right, it is one that reads the first of them.
        """
        try:
            gradients = [found[1] for found in self._run(backward=True)]
        except Exception as error:
            return self._raised(error)
        for key in reversed(self._strategies):
            strategy = self._strategies[key]
            for part in self._parts:
                own = [gradients[rank].get(key) for rank in self._ranks(part.replica)]
                wanted = part.gradients.get(key)
                if wanted is None or len(strategy.outputs) != 1:
                    continue
                pieces = [g for g in own if g is not None]
                if len(pieces) < len(own):
                    text: str | None = "does not get a gradient on every rank"
                else:
                    spec = strategy.outputs[0].gradient()
                    text = self._compare(pieces, spec, wanted, compare)
                if text is not None:
                    return self._reader(
                        key, part.replica, f"the gradient that it gives {key!r} {text}"
                    )
        if suspects:
            return self._reader(
                suspects[0], 0, f"the gradient that it gives {suspects[0]!r} differs"
            )
        return None

    def _raised(self, error: Exception) -> Culprit:
        """An op that cannot even run on its parts is at fault as well."""
        if not self._last:
            raise error
        text = f"or the op behind it raises {type(error).__name__}: {error}"
        return Culprit(self._last, self._text(self._last), 0, text)

    def _reader(self, key: str, replica: int, text: str) -> Culprit | None:
        """An op that reads a value here; the one that is cut, if only some are."""
        graph = self._low.whole[self._stage].graph
        node = next((n for n in graph.nodes if n.meta.get("id") == key), None)
        readers = [
            u.meta["id"] for u in (node.users if node is not None else ()) if u.op != "output"
        ]
        if not readers:
            return None
        cut = [r for r in readers if self._text(r)] or readers
        return Culprit(cut[0], self._text(cut[0]), replica, text)

    def _text(self, key: str) -> str:
        strategy = self._strategies.get(key)
        return "" if strategy is None or strategy.whole else str(strategy)

    def _ranks(self, replica: int) -> list[int]:
        count = self._mesh.size // len(self._parts)
        return list(range(replica * count, (replica + 1) * count))

    def _compare(
        self,
        pieces: Sequence[torch.Tensor],
        spec: ShardingSpec,
        wanted: torch.Tensor,
        compare: Compare,
    ) -> str | None:
        return compare_joined(pieces, spec, self._inner, wanted, compare)

    # ---- running --------------------------------------------------------------------------

    def _run(self, *, backward: bool) -> list[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
        self._last = ""
        lock = threading.Lock()

        def work(rank: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
            coordinate = self._mesh.coordinates(rank)
            replica = coordinate[0] if DATA in self._mesh.names else 0
            given = self._given(coordinate, self._parts[replica], backward)
            found: dict[str, Any] = {}

            def visit(node: fx.Node, value: Any) -> None:
                key = node.meta.get("id", "")
                if key in self._strategies:
                    found[key] = value
                    with lock:
                        self._last = key

            with torch.set_grad_enabled(backward):
                outputs = replay(self._low.stages[self._stage].graph, given, visit)
                gradients = self._gradients(coordinate, replica, outputs, found) if backward else {}
            values = {k: _map(v) for k, v in found.items()}
            return values, gradients

        return self._mesh.run(work)

    def _given(
        self, coordinate: tuple[int, ...], part: Part, backward: bool
    ) -> dict[fx.Node, torch.Tensor]:
        found = {}
        lowered = self._low.lowered[self._stage]
        sizes = [size for _, size in self._inner]
        inner = coordinate[len(coordinate) - len(sizes) :]
        for node in self._low.stages[self._stage].graph.nodes:
            if node.op != "placeholder":
                continue
            key = node.meta["id"]
            kind, _, name = key.partition(":")
            if kind == "edge":
                whole = part.values[name]
                spec = lowered.arrivals[name]
                value = piece_of(spec.ranges(whole.shape, sizes, inner)).read(whole)
            elif kind == "param" and name in self._layouts:
                ranges = taken_ranges(self._layouts[name], self._axes, coordinate)
                value = piece_of(ranges).read(part.values[key])
            else:
                value = part.values[key]
            value = value.detach().clone(memory_format=torch.contiguous_format)
            flows = (key if kind == "param" else name) in self._low.flow
            found[node] = value.requires_grad_(flows and backward and value.is_floating_point())
        return found

    def _gradients(
        self,
        coordinate: tuple[int, ...],
        replica: int,
        outputs: Sequence[Any],
        found: Mapping[str, Any],
    ) -> dict[str, torch.Tensor]:
        stage, lowered = self._low.stages[self._stage], self._low.lowered[self._stage]
        sizes = [size for _, size in self._inner]
        inner = coordinate[len(coordinate) - len(sizes) :]
        gradients = self._parts[replica].borders
        ends, tangents = [], []
        for edge, value in zip(stage.edges_out, outputs, strict=False):
            if value.requires_grad and edge in gradients:
                spec, whole = lowered.departures[edge], gradients[edge]
                ends.append(value)
                tangents.append(piece_of(spec.ranges(whole.shape, sizes, inner)).read(whole))
        if stage.has_loss:
            loss = outputs[len(stage.edges_out)]
            ends.append(loss)
            tangents.append(torch.full_like(loss, self._scale))
        asked = {k: v for k, v in found.items() if isinstance(v, torch.Tensor) and v.requires_grad}
        if not ends or not asked:
            return {}
        grads = torch.autograd.grad(ends, list(asked.values()), tangents, allow_unused=True)
        return {k: g for k, g in zip(asked, grads, strict=True) if g is not None}


def _map(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    return [v.detach() if isinstance(v, torch.Tensor) else v for v in value]


def _tensors(value: Any) -> list[torch.Tensor]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in items if isinstance(v, torch.Tensor)]
