"""A stage's programs as they run: op by op over the graphs after autograd, and their memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from raypar.compat import FakeTensor, storage_id
from raypar.graph.costs import size_of
from raypar.graph.passes.emit import is_op, op_name
from raypar.graph.replay import replay
from raypar.programs.joint import Joint, trace_joint
from raypar.programs.partition import Parts, Piece, partition, saved_bytes
from raypar.programs.policy import recomputable
from raypar.programs.products import Deferred, products
from raypar.programs.recurrent import fuse_recurrent
from raypar.programs.stitch import stitch_joint, worth_stitching
from raypar.programs.wire import Wire, pack, unpack
from raypar.search.cost.base import StageCode
from raypar.search.cost.machine import MeshMachine
from raypar.search.cost.params import Move
from raypar.search.cost.work import Work, node_work
from raypar.sharding.convert import COLLECTIVES, REDUCE_SCATTER

_CPU = torch.device("cpu")

Port = tuple[str, int]
"""A value that enters or leaves a stage: ``in`` or ``out``, and its position."""


@dataclass(frozen=True)
class StagePieces:
    """The traced and partitioned programs of a stage.

    Attributes:
        joint: Forward and backward in one graph; None where nothing is differentiated.
        parts: Its programs; None where nothing is differentiated.
        forward: The forward program.
        keys: Ids of the stage's inputs, in order.
        held: Values that are held from forward to backward and freed by it.
        saved_bytes: Their bytes.
        half_bytes: Bytes held between the halves of backward.
        saved_ports: Received values and results that `saved_bytes` counts, which are held as such
            as well: ("in", position of the input) or ("out", position of the output).
        half_ports: The same for `half_bytes`.
        deferred: Position among `keys` of a parameter → how backward delivers its gradient as a
            product.
        splits: Whether backward is run in halves where a schedule asks for it; a stage without
            received values that want gradients does all of it in its input half.
        figures: What was worked out about the programs, so that equal stages are priced once.
    """

    joint: Joint | None
    parts: Parts | None
    forward: Piece
    keys: tuple[str, ...]
    held: frozenset[fx.Node] = frozenset()
    saved_bytes: int = 0
    half_bytes: int = 0
    saved_ports: frozenset[Port] = frozenset()
    half_ports: frozenset[Port] = frozenset()
    deferred: Mapping[int, Deferred] = field(default_factory=dict, compare=False, repr=False)
    splits: bool = False
    figures: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def products(self) -> dict[str, Work]:
        """Names of the parameters whose gradients programs deliver as products; what makes them."""
        return {
            self.keys[at].removeprefix("param:"): node_work(found.node)
            for at, found in self.deferred.items()
        }


def stage_pieces(stage: StageCode, wire: Wire | None = None) -> StagePieces:
    """Traces and partitions a stage as `raypar.programs.stage.compile_stage` does on its rank.

    Args:
        stage: The stage.
        wire: Its graph as it is shipped, where that is at hand.
    """
    wire = pack(stage.graph) if wire is None else wire
    keys = tuple(str(node[1]) for node in wire["nodes"] if node[0] == "in")
    params = [i for i, k in enumerate(keys) if k[:6] == "param:" and k[6:] in stage.trainable]
    edges = [i for i, k in enumerate(keys) if k[:5] == "edge:" and k[5:] in stage.differentiable]
    if not params and not edges:
        return _forward_only(wire, keys)
    wrt = [*edges, *params]
    joint = None
    if worth_stitching(wire):
        joint = stitch_joint(wire, wrt, stage.outputs_with_grad, _CPU)
    if joint is None:
        joint = trace_joint(_unpacked(wire), wrt, stage.outputs_with_grad)
    for node, key in zip(joint.inputs, keys, strict=True):
        node.meta["id"] = key
    parts = partition(joint, recomputable(stage.recompute), set(edges))
    own = {
        node
        for node, key in zip(joint.inputs, keys, strict=True)
        if key[:5] == "edge:" or (key[:7] == "buffer:" and key[7:] in stage.changing)
    }
    free = [n for n in joint.inputs if n not in own]
    held = [*parts.saved, *(n for n in parts.kept if n in own)]
    found = products(parts.backward, range(len(edges), len(wrt)))
    inputs = set(joint.inputs)
    later = [n for n in parts.weight_inputs if n not in inputs or n in own]
    halves = [*later, *parts.between] if edges else []
    return StagePieces(
        joint,
        parts,
        parts.forward,
        keys,
        frozenset(held),
        saved_bytes(held, free),
        saved_bytes(halves, free),
        _ports(joint, keys, held),
        _ports(joint, keys, halves),
        deferred={wrt[at]: product for at, product in found.items()},
        splits=bool(edges),
    )


def _unpacked(wire: Wire) -> fx.Graph:
    graph = unpack(wire, _CPU)
    fuse_recurrent(graph, _CPU)
    return graph


def _forward_only(wire: Wire, keys: tuple[str, ...]) -> StagePieces:
    """A stage in which nothing is differentiated."""
    graph = _unpacked(wire)
    holders = [n for n in graph.nodes if n.op == "placeholder"]
    _fill_in(graph, holders)
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    outputs = next(n for n in graph.nodes if n.op == "output").all_input_nodes
    return StagePieces(None, None, Piece(holders, nodes, list(outputs)), keys)


def _ports(joint: Joint, keys: Sequence[str], held: Iterable[fx.Node]) -> frozenset[Port]:
    """Which values that enter or leave share their memory with what is held."""
    known = {storage for node in held for storage in _storages(node)}

    def shares(node: object) -> bool:
        return isinstance(node, fx.Node) and not known.isdisjoint(_storages(node))

    arrived = [i for i, k in enumerate(keys) if k[:5] == "edge:" and shares(joint.inputs[i])]
    # The interpreter sends values contiguously: others leave as copies.
    gone = [i for i, n in enumerate(joint.outputs) if shares(n) and _contiguous(n)]
    return frozenset([*(("in", i) for i in arrived), *(("out", i) for i in gone)])


def _contiguous(node: fx.Node | None) -> bool:
    value = None if node is None else node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_contiguous()


def _fill_in(graph: fx.Graph, holders: Sequence[fx.Node]) -> None:
    """Gives the ops of a shipped graph, which runs as it is, their fake values again."""

    def note(node: fx.Node, value: object) -> None:
        node.meta["val"] = value

    values = {node: node.meta["val"] for node in holders}
    mode = next((v.fake_mode for v in values.values() if isinstance(v, FakeTensor)), None)
    with contextlib.nullcontext() if mode is None else mode, torch.no_grad():
        replay(graph, values, note)


class PieceCost(NamedTuple):
    """Seconds of compute of a program, and its collectives in order."""

    seconds: float
    moves: tuple[Move, ...]


def piece_cost(nodes: Iterable[fx.Node], machine: MeshMachine) -> PieceCost:
    """What a program takes on one device, one op after the other."""
    seconds = 0.0
    moves: list[Move] = []
    known: dict[Work, float] = {}
    for node in nodes:
        move = move_of(node)
        if move is not None:
            moves.append(move)
            continue
        work = node_work(node)
        if work not in known:
            known[work] = work.seconds(machine)
        seconds += known[work]
    return PieceCost(seconds, tuple(moves))


def move_of(node: fx.Node) -> Move | None:
    """The collective that a node runs, if it runs one."""
    if not is_op(node) or op_name(node) != "convert":
        return None
    kind, axis, size = str(node.args[1]), str(node.args[5]), node.args[6]
    if kind not in COLLECTIVES or size == 1:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = size_of(source.meta.get("val")), size_of(node.meta.get("val"))
    return Move(axis, kind, before if kind == REDUCE_SCATTER else max(before, after))


def peak_bytes(
    piece: Piece,
    freed: Collection[fx.Node] = (),
    sunk: Collection[fx.Node] = (),
    workspace: Callable[[fx.Node], int] = lambda node: 0,
    unmade: Collection[fx.Node] = (),
) -> int:
    """Most bytes that a program holds at once beyond what was held before it began.

    Values are dropped at their last use, as the generated code does.

    Args:
        piece: The program.
        freed: Inputs that the program owns: their bytes come back at their last use.
        sunk: Outputs that are taken away as soon as they exist (gradients that are added up).
        workspace: Bytes that an op needs only while it runs.
        unmade: Values that are added to something else as they are made, and never exist.
    """
    uses = _storage_uses(piece, set(sunk))
    own = {s for n in freed for s in _storages(n)}
    given = {s for n in (*piece.inputs, *unmade) for s in _storages(n)} - own
    sizes = {s: b for n in (*piece.inputs, *piece.nodes) for s, b in _storages(n).items()}
    live = most = 0
    seen = given | own
    for at, node in enumerate(piece.nodes):
        touched = {**_storages(node)}
        for source in node.all_input_nodes:
            touched.update(_storages(source))
        for storage in _storages(node):
            if storage not in seen:
                seen.add(storage)
                live += sizes[storage]
        most = max(most, live + workspace(node))
        for storage in touched:
            if uses.get(storage) == at and storage not in given:
                live -= sizes[storage]
    return most


def _storage_uses(piece: Piece, sunk: set[fx.Node]) -> dict[int, int]:
    """Storage → position of the node after which nobody needs it; missing if it is returned."""
    last: dict[int, int] = {}
    for at, node in enumerate(piece.nodes):
        for touched in (node, *node.all_input_nodes):
            last.update(dict.fromkeys(_storages(touched), at))
    for output in piece.outputs:
        if output is not None and output not in sunk:
            for storage in _storages(output):
                last.pop(storage, None)
    return last


def _storages(node: fx.Node) -> dict[int, int]:
    """Storage → bytes of a node's value."""
    value = node.meta.get("val")
    items: Sequence[object] = value if isinstance(value, (list, tuple)) else (value,)
    found: dict[int, int] = {}
    for item in items:
        if isinstance(item, torch.Tensor):
            size = item.untyped_storage().nbytes()
            found[storage_id(item)] = size if isinstance(size, int) else size_of(item)
    return found


def workspace_bytes(node: fx.Node) -> int:
    """Bytes that an op needs besides its inputs and outputs while it runs.

    Convolutions on a CPU reorder their inputs and outputs into blocks of channels.
    """
    if not is_op(node) or not op_name(node).startswith("convolution"):
        return 0
    return size_of(node.meta.get("val")) + sum(
        size_of(n.meta.get("val")) for n in node.all_input_nodes
    )
