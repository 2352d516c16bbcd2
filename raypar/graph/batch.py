"""Which values keep samples apart: propagation of batch states through a graph.

Conservative: an op without a declared rule, or one that mixes samples, gives `Mixed`. Every claim
is checked against a second capture at twice the batch size: a `Batch` value must double along its
dim and nowhere else, a `Const` or `Reduced` value must not change shape.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from raypar.graph.batch_rules import Mixing, rule_for
from raypar.graph.passes.emit import bound_args, is_op, op_name
from raypar.graph.passes.randomness import SEEDED
from raypar.graph.states import Batch, Const, Mixed, Reduced, State, States

RATIO = 2


@dataclass
class Layout:
    """How the samples lie in one seeded random tensor.

    Attributes:
        dim: Batch dim, or None where the tensor has no rows per sample.
        outer: As in `Batch`.
        keyed: Whether the numbers differ between parts of the batch.
    """

    dim: int | None
    outer: int
    keyed: bool


@dataclass
class BatchAnalysis:
    """What propagation found.

    Attributes:
        states: Canonical id (or placeholder key) → state.
        globals: Ids of values that are summed over the whole batch before use (counts of a masked
            mean and the like), with the power of N to apply after the sum.
        loss: The loss's state.
        results: The states of all results, the loss first.
        blockers: (op id, reason) of every op that keeps the batch from being split exactly.
        layouts: Seeded op id → layout.
        rescales: Id of a sum → (power of N for its second term, whether its terms change places).
        updates: Buffer name → state of its new value.
    """

    states: dict[str, States] = field(default_factory=dict)
    globals: dict[str, int] = field(default_factory=dict)
    loss: State = field(default_factory=Const)
    results: tuple[State, ...] = ()
    blockers: list[tuple[str, str]] = field(default_factory=list)
    layouts: dict[str, Layout] = field(default_factory=dict)
    rescales: dict[str, tuple[int, bool]] = field(default_factory=dict)
    updates: dict[str, State] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether the result does not depend on how the batch is cut into parts."""
        return not self.blockers


class Call:
    """One op at both batch sizes, as a rule sees it.

    Attributes:
        node: The op at the smaller batch.
        twin: The op at the larger batch.
        name: Its schema name without namespace.
        args: Arguments by schema name; tensors are nodes.
        out: Output value(s) (fake).
        rescale: Set by a rule: the second term of a sum counts N**rescale on each of N parts.
        swap_terms: Set by a rule: before that, the terms change places.
    """

    def __init__(
        self,
        node: fx.Node,
        twin: fx.Node,
        states: dict[fx.Node, States],
    ) -> None:
        self.node = node
        self.twin = twin
        self.name = op_name(node)
        self.args = bound_args(node)
        self.twin_args = bound_args(twin)
        self._states = states
        self.rescale = 0
        self.swap_terms = False

    @property
    def out(self) -> Any:
        """Output value(s), fake."""
        return self.node.meta["val"]

    def state(self, value: Any) -> State:
        """State of a tensor argument; anything else is Const."""
        if not isinstance(value, fx.Node):
            return Const()
        found = self._states[value]
        if isinstance(found, tuple):
            raise Mixing(f"{self.name} takes several tensors at once")
        return found

    def shape(self, value: fx.Node) -> tuple[int, ...]:
        """Shape of a tensor argument."""
        return tuple(value.meta["val"].shape)

    def tensors(self) -> list[fx.Node]:
        """Every tensor argument, lists flattened, in schema order."""
        found: list[fx.Node] = []
        for value in self.args.values():
            items = value if isinstance(value, (list, tuple)) else [value]
            found.extend(v for v in items if isinstance(v, fx.Node))
        return found

    def number(self, name: str) -> tuple[Any, int]:
        """A scalar argument and its power of N.

        Raises:
            Mixing: It changes with the batch size in another way.
        """
        mine, twin = self.args.get(name), self.twin_args.get(name)
        if mine == twin or not isinstance(mine, (int, float)) or not isinstance(twin, (int, float)):
            if mine != twin:
                raise Mixing(f"argument {name} depends on the batch size")
            return mine, 0
        ratio = twin / mine if mine else math.nan
        power = math.log2(ratio) if ratio > 0 else math.nan
        if not math.isclose(power, round(power), abs_tol=1e-9):
            raise Mixing(f"argument {name} depends on the batch size ({mine} → {twin})")
        # A number that doubles with the batch counts samples: on a part it is N times smaller.
        return mine, round(power)

    def same(self, *names: str) -> None:
        """Requires that arguments do not depend on the batch size."""
        for name in names:
            if self.args.get(name) != self.twin_args.get(name):
                raise Mixing(f"argument {name} depends on the batch size")


def analyze(
    graph: fx.Graph,
    twin: fx.Graph,
    inputs: Sequence[tuple[fx.Node, int | None]],
    param_free: set[fx.Node],
    *,
    per_sample: bool = False,
) -> BatchAnalysis:
    """Propagates states from the inputs to the loss and the buffer updates.

    Args:
        graph: The graph at one batch size; nodes carry canonical ids in ``meta["id"]``.
        twin: The same graph at twice that batch size.
        inputs: Every input placeholder with its batch dim.
        param_free: Nodes that depend on neither parameters nor changing buffers: what they
            reduce over the batch may be reduced over the whole batch ahead of the step.
        per_sample: Whether results may have a row for every sample, as a model's output has.
    """
    forced: dict[str, int] = {}
    while True:
        analysis = _propagate(graph, twin, dict(inputs), param_free, forced, per_sample)
        if analysis.globals == forced:
            break
        forced = dict(analysis.globals)
    if analysis.blockers:
        # A model that feels how the batch is cut is compared with the unsplit model run over the
        # same microbatches, so its counts stay those of the microbatch.
        analysis.globals.clear()
        analysis.rescales.clear()
    return analysis


def _propagate(
    graph: fx.Graph,
    twin: fx.Graph,
    dims: dict[fx.Node, int | None],
    param_free: set[fx.Node],
    forced: dict[str, int],
    per_sample: bool,
) -> BatchAnalysis:
    analysis = BatchAnalysis(globals=dict(forced))
    states: dict[fx.Node, States] = {}
    reported: dict[str, str] = {}
    for node, other in zip(graph.nodes, twin.nodes, strict=True):
        if node.op == "placeholder":
            dim = dims.get(node)
            states[node] = Const() if dim is None else Batch(dim)
        elif node.op == "call_function":
            states[node] = _visit(node, other, states, param_free, analysis)
            if node.target is SEEDED:
                _lay_out(node, other, states, analysis)
            if node.meta["id"] in forced:
                states[node] = Const()
        elif node.op == "output":
            _finish(node, states, analysis, reported, per_sample)
        if node.op != "output":
            analysis.states[node.meta.get("id", node.name)] = states[node]
    analysis.blockers = list(reported.items())
    return analysis


def _finish(
    output: fx.Node,
    states: dict[fx.Node, States],
    analysis: BatchAnalysis,
    reported: dict[str, str],
    per_sample: bool,
) -> None:
    returned: Any = output.args[0]
    count = output.meta.get("results", 1)
    results, updates = returned[:count], returned[count:]
    names = output.meta.get("updates", [])
    found: list[State] = []
    for node in results:
        state = states[node]
        assert not isinstance(state, tuple)
        if isinstance(state, Mixed):
            reported[state.op] = state.reason
        elif not isinstance(state, (Const, Reduced)) and not (
            per_sample and isinstance(state, Batch)
        ):
            reported[node.meta.get("id", "loss")] = "the loss keeps one value per sample"
        found.append(state)
    analysis.loss, analysis.results = found[0], tuple(found)
    for name, node in zip(names, updates, strict=True):
        state = states[node]  # type: ignore[index]
        assert not isinstance(state, tuple)
        analysis.updates[name] = state
        if isinstance(state, Mixed):
            reported[state.op] = state.reason
        elif not (isinstance(state, Const) and state.power == 0):
            reported[node.meta.get("id", name)] = (  # type: ignore[union-attr]
                f"buffer {name!r} is updated from the batch"
            )
        elif any(n.meta.get("id") == f"buffer:{name}" and n.users for n in output.graph.nodes):
            reported[node.meta.get("id", name)] = (  # type: ignore[union-attr]
                f"buffer {name!r} is read, and changes with every microbatch"
            )


def _visit(
    node: fx.Node,
    other: fx.Node,
    states: dict[fx.Node, States],
    param_free: set[fx.Node],
    analysis: BatchAnalysis,
) -> States:
    if node.target is operator.getitem:
        source = states[node.args[0]]  # type: ignore[index]
        return source[node.args[1]] if isinstance(source, tuple) else source  # type: ignore[index]
    mixed = next((s for s in _input_states(node, states) if isinstance(s, Mixed)), None)
    if mixed is not None:
        return mixed
    if not is_op(node):
        return Mixed(node.meta["id"], "sizes that depend on the data")
    try:
        return _apply(node, other, states, analysis)
    except Mixing as mixing:
        reduced = [
            i for i in node.all_input_nodes if isinstance(states[i], Reduced) and i in param_free
        ]
        if not reduced:
            return Mixed(node.meta["id"], str(mixing))
        patched = dict(states)
        for i in reduced:
            patched[i] = Const()
        try:
            found = _apply(node, other, patched, analysis)
        except Mixing as second:
            return Mixed(node.meta["id"], str(second))
        for i in reduced:
            state = states[i]
            assert isinstance(state, Reduced)
            analysis.globals[i.meta["id"]] = state.power
        return found


def _input_states(node: fx.Node, states: dict[fx.Node, States]) -> list[State]:
    found: list[State] = []
    for i in node.all_input_nodes:
        state = states[i]
        found.extend(state if isinstance(state, tuple) else [state])
    return found


def _apply(
    node: fx.Node, other: fx.Node, states: dict[fx.Node, States], analysis: BatchAnalysis
) -> States:
    call = Call(node, other, states)
    constant = all(s == Const() for s in _input_states(node, states))
    result: States
    if constant and not _grows(node, other) and _all_same(call):
        result = Const()
        if isinstance(node.meta["val"], (list, tuple)):
            result = tuple(Const() for _ in node.meta["val"])
        return result
    rule = rule_for(call.name)
    try:
        result = rule(call)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise Mixing(f"{call.name} is called in a form its batch rule does not cover") from error
    _check_shapes(node, other, result)
    if call.rescale:
        analysis.rescales[node.meta["id"]] = (call.rescale, call.swap_terms)
    return result


def _all_same(call: Call) -> bool:
    """Whether every argument that is no tensor is the same at both batch sizes."""
    for name, value in call.args.items():
        items = value if isinstance(value, (list, tuple)) else [value]
        if not any(isinstance(v, fx.Node) for v in items) and value != call.twin_args[name]:
            return False
    return True


def _grows(node: fx.Node, other: fx.Node) -> bool:
    mine: Any = node.meta.get("val")
    twin: Any = other.meta.get("val")
    if not isinstance(mine, (list, tuple)):
        mine, twin = [mine], [twin]
    return any(
        isinstance(m, torch.Tensor) and tuple(m.shape) != tuple(t.shape)
        for m, t in zip(mine, twin, strict=True)
    )


def _check_shapes(node: fx.Node, other: fx.Node, result: States) -> None:
    mine, twin = node.meta["val"], other.meta["val"]
    if not isinstance(result, tuple):
        mine, twin, result = [mine], [twin], (result,)
    for m, t, state in zip(mine, twin, result, strict=True):
        if not isinstance(m, torch.Tensor) or isinstance(state, Mixed):
            continue
        expected = list(m.shape)
        dim = getattr(state, "dim", None)
        if dim is not None:
            expected[dim] *= RATIO
        if any(not isinstance(n, int) for n in m.shape) or expected != list(t.shape):
            raise Mixing("its result's shape does not follow the batch size")


def _lay_out(
    node: fx.Node, other: fx.Node, states: dict[fx.Node, States], analysis: BatchAnalysis
) -> None:
    """A random tensor is laid out by which of its dims grow with the batch.

    Samples are taken to be the slowest index of that dim; where they are not (a batch dim folded
    into the middle of another), the value it meets has another `outer`, and the rule of that op
    finds the mismatch.
    """
    mine, twin = node.meta["val"].shape, other.meta["val"].shape
    grown = [i for i, (m, t) in enumerate(zip(mine, twin, strict=True)) if m != t]
    if not grown:
        states[node] = Const()
        analysis.layouts[node.meta["id"]] = Layout(None, 1, keyed=False)
        return
    user = next((u for u in node.users if is_op(u)), None)
    peers = [states.get(i) for i in user.all_input_nodes if i is not node] if user else []
    peer = next((p for p in peers if isinstance(p, Batch)), None)
    outer = peer.outer if peer is not None and len(grown) == 1 else 1
    if any(isinstance(p, Mixed) for p in peers) or len(grown) != 1:
        analysis.layouts[node.meta["id"]] = Layout(None, 1, keyed=True)
        states[node] = Mixed(node.meta["id"], "random numbers where samples already meet")
        return
    analysis.layouts[node.meta["id"]] = Layout(grown[0], outer, keyed=True)
    states[node] = Batch(grown[0], outer)
