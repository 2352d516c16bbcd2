"""The analytic cost model: rooflines and α-β collectives over the programs of a stage."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import fx

from raypar.graph.costs import size_of
from raypar.programs.wire import Wire, pack
from raypar.search.cost.base import CostModel, StageCode, StageCost, register_cost_model
from raypar.search.cost.exact import (
    PieceCost,
    Port,
    StagePieces,
    peak_bytes,
    piece_cost,
    stage_pieces,
    workspace_bytes,
)
from raypar.search.cost.machine import MeshMachine
from raypar.search.cost.params import accumulation_s, param_cost, timed


@register_cost_model
class AnalyticCost(CostModel):
    """Adds up every op of the programs that a rank runs, and walks their memory."""

    name = "analytic"

    def stage_cost(
        self, stage: StageCode, machine: MeshMachine, *, optimizer_states: int = 2
    ) -> StageCost:
        """What `stage` costs on one device of `machine`. See `CostModel`."""
        pieces = cached_pieces(stage)
        params = param_cost(stage)
        forward, backward, first, second = _programs(pieces, machine)
        adding = accumulation_s(params, machine, pieces.products)
        forward_peak, backward_peak = _peaks(pieces, {name for name, _ in params.uncut})
        states = optimizer_states * params.state_bytes
        buffers = _buffer_bytes(stage)
        held = params.param_bytes + params.gradient_bytes + states + buffers
        return StageCost(
            forward_s=forward.seconds,
            backward_s=backward.seconds + adding,
            backward_input_s=first.seconds + (0.0 if pieces.splits else adding),
            backward_weight_s=second.seconds + (adding if pieces.splits else 0.0),
            forward_comm=timed(forward.moves, machine),
            backward_comm=timed(backward.moves, machine),
            backward_input_comm=timed(first.moves, machine),
            backward_weight_comm=timed(second.moves, machine),
            gather=timed(params.gather, machine),
            sync=timed(params.sync, machine),
            rounds=timed(params.rounds, machine),
            optimizer_s=machine.optimizer_s(params.optimized_bytes, params.optimized),
            param_bytes=params.param_bytes,
            gradient_bytes=params.gradient_bytes,
            optimizer_bytes=states,
            buffer_bytes=buffers,
            saved_bytes=pieces.saved_bytes,
            half_bytes=pieces.half_bytes,
            saved_edges=_edges(pieces.saved_ports, pieces, stage),
            half_edges=_edges(pieces.half_ports, pieces, stage),
            forward_peak_bytes=forward_peak,
            backward_peak_bytes=backward_peak,
            overhead_bytes=machine.reserved_bytes(held + forward_peak + pieces.saved_bytes),
        )


def _programs(
    pieces: StagePieces, machine: MeshMachine
) -> tuple[PieceCost, PieceCost, PieceCost, PieceCost]:
    """Forward, backward and the halves of backward; compute depends on kinds of devices only."""
    key = ("programs", machine.kinds)
    if key not in pieces.figures:
        forward = piece_cost(pieces.forward.nodes, machine)
        backward = first = second = piece_cost((), machine)
        if pieces.parts is not None:
            first = backward = piece_cost(pieces.parts.backward.nodes, machine)
            if pieces.splits:
                first = piece_cost(pieces.parts.backward_input.nodes, machine)
                second = piece_cost(pieces.parts.backward_weight.nodes, machine)
        pieces.figures[key] = forward, backward, first, second
    found: tuple[PieceCost, PieceCost, PieceCost, PieceCost] = pieces.figures[key]
    return found


def _edges(ports: Iterable[Port], pieces: StagePieces, stage: StageCode) -> frozenset[str]:
    """Ids of values that enter or leave a stage."""
    found = [pieces.keys[i].removeprefix("edge:") for way, i in ports if way == "in"]
    out = stage.edges_out
    return frozenset([*found, *(out[i] for way, i in ports if way == "out" and i < len(out))])


def _peaks(pieces: StagePieces, uncut: Collection[str]) -> tuple[int, int]:
    """Most bytes of the forward and of the backward program.

    Products that are added to uncut sums exist nowhere else.
    """
    fused = [at for at in pieces.deferred if pieces.keys[at].removeprefix("param:") in uncut]
    key = ("peaks", tuple(fused))
    if key not in pieces.figures:
        pieces.figures[key] = _walk(pieces, [pieces.deferred[at].node for at in fused])
    found: tuple[int, int] = pieces.figures[key]
    return found


def _walk(pieces: StagePieces, unmade: Collection[fx.Node]) -> tuple[int, int]:
    forward = peak_bytes(pieces.forward, workspace=workspace_bytes)
    if pieces.parts is None or pieces.joint is None:
        return forward, 0
    program = pieces.parts.backward
    n_edges = len(program.outputs) - _weights(pieces)
    sunk = [n for n in program.outputs[n_edges:] if n is not None]
    freed = [*pieces.held, *pieces.joint.tangents]
    return forward, peak_bytes(program, freed, sunk, workspace_bytes, unmade)


def _weights(pieces: StagePieces) -> int:
    assert pieces.joint is not None
    return sum(pieces.keys[p].startswith("param:") for p in pieces.joint.wrt)


def _buffer_bytes(stage: StageCode) -> int:
    holders: list[fx.Node] = list(stage.graph.find_nodes(op="placeholder"))
    return sum(
        size_of(n.meta["val"])
        for n in holders
        if str(n.meta["id"]).startswith(("buffer:", "const:"))
        and isinstance(n.meta["val"], torch.Tensor)
    )


class _Cache:
    """The last traces: of this very graph, or of one that differs in names only.

    The repeated layers of a model make stages that differ in names only.
    """

    most: ClassVar[int] = 64

    def __init__(self) -> None:
        self.known: OrderedDict[object, StagePieces] = OrderedDict()
        self.likes: WeakKeyDictionary[fx.Graph, dict[object, object]] = WeakKeyDictionary()

    def __call__(self, stage: StageCode) -> StagePieces:
        flags = (stage.recompute, stage.trainable, stage.differentiable, stage.changing)
        own = self.likes.setdefault(stage.graph, {})
        like = own.get((*flags, stage.outputs_with_grad))
        wire = None
        if like is None:
            wire = pack(stage.graph)
            like = own[*flags, stage.outputs_with_grad] = _likeness(stage, wire)
        if like not in self.known:
            self.known[like] = stage_pieces(stage, wire)
            if len(self.known) > self.most:
                self.known.popitem(last=False)
        self.known.move_to_end(like)
        holders = stage.graph.find_nodes(op="placeholder")
        return replace(self.known[like], keys=tuple(str(n.meta["id"]) for n in holders))


def _likeness(stage: StageCode, shipped: Wire) -> object:
    """What a trace depends on: the graph as it is shipped, without names, and what is wanted."""
    wanted = {
        *(f"param:{name}" for name in stage.trainable),
        *(f"edge:{name}" for name in stage.differentiable),
        *(f"buffer:{name}" for name in stage.changing),
    }
    nodes = [
        (kind, name.split(":")[0], name in wanted, *rest) if kind == "in" else (kind, *rest)
        for kind, name, *rest in shipped["nodes"]
    ]
    text = repr((nodes, shipped["output"], stage.recompute, stage.outputs_with_grad))
    return hashlib.sha256(text.encode()).digest()


cached_pieces = _Cache()
"""`stage_pieces`, remembered: one stage is often priced on several machines."""
