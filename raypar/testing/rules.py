"""The property that every sharding rule must have, as one check.

For every strategy that an op offers on a mesh: cut the inputs as the strategy says, run the local
call that a sharded program would hold on every rank, put the results together: they must be the
op's results. The same for the gradients of every floating-point input.

    check_rule(torch.ops.aten.linear.default, (x, weight, bias))

A rule with one wrong state cannot pass: partial sums are random terms, so that an op that is not
linear betrays itself, and gradients are compared on every rank, so that a whole gradient (``R``)
is told from a partial one (``Rg``).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from raypar.compat import fake_mode, pytree
from raypar.errors import PlanError
from raypar.graph.passes.emit import fake_call
from raypar.sharding.convert import COLLECTIVES
from raypar.sharding.local_call import local_graph
from raypar.sharding.rules.base import OpView, Strategy
from raypar.sharding.spec import R, ShardingSpec
from raypar.sharding.strategies import strategies
from raypar.testing.mesh_threads import ThreadMesh, collect, distribute

MESHES: tuple[tuple[int, ...], ...] = ((2,), (3,), (2, 2))
"""Meshes that `check_rule` tries by default."""
_TOLERANCE = 1e-8

Blocks = Mapping[int, Sequence[int]]


@dataclass
class OpCall:
    """One op call on real tensors, and the graph of it that rules look at.

    Attributes:
        target: The operator.
        args: Its arguments; floating-point tensors should be float64.
        kwargs: Its keyword arguments.
        blocks: For dims of the first result, the block counts that readers want.
        input_blocks: The same for the dims of tensor arguments, by their position among them.
        fixed: Positions of the tensors that get no gradient, though they could.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    blocks: Blocks = field(default_factory=dict)
    input_blocks: Mapping[int, Blocks] = field(default_factory=dict)
    fixed: Sequence[int] = ()

    def __post_init__(self) -> None:
        leaves, self.tree = pytree.tree_flatten((self.args, self.kwargs))
        self.leaves: list[Any] = leaves
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.tensors: list[torch.Tensor] = [leaves[i] for i in self.places]
        self.mode = fake_mode()
        self.node = self._node()

    def _node(self) -> fx.Node:
        graph = fx.Graph()
        args, kwargs = self.filled(self.placeholders(graph, [t.shape for t in self.tensors]))
        node = graph.call_function(self.target, args, kwargs)
        node.meta["val"] = fake_call(self.target, args, kwargs)
        node.meta["id"] = getattr(self.target, "__name__", str(self.target))
        node.meta["blocks"] = {d: set(g) for d, g in self.blocks.items()}
        for i, blocks in self.input_blocks.items():
            OpView(node).tensors[i].meta["blocks"] = {d: set(g) for d, g in blocks.items()}
        return node

    def placeholders(self, graph: fx.Graph, shapes: Sequence[Sequence[int]]) -> list[fx.Node]:
        """Fake inputs of these shapes."""
        found = []
        for i, (tensor, shape) in enumerate(zip(self.tensors, shapes, strict=True)):
            node = graph.placeholder(f"x{i}")
            with self.mode:
                node.meta["val"] = torch.empty(tuple(shape), dtype=tensor.dtype)
            found.append(node)
        return found

    def filled(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments with other things in place of the tensors."""
        leaves = list(self.leaves)
        for place, value in zip(self.places, tensors, strict=True):
            leaves[place] = value
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        return args, kwargs

    def leaves_of(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of input tensors that gradients can be asked of."""
        wanted = [
            (t.is_floating_point() or t.is_complex()) and i not in self.fixed
            for i, t in enumerate(tensors)
        ]
        return [t.detach().clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]

    def run(self) -> list[torch.Tensor]:
        """The op itself: its tensor results, with a gradient graph to the inputs."""
        self.whole = self.leaves_of(self.tensors)
        args, kwargs = self.filled(self.whole)
        return _tensors(self.target(*args, **kwargs))


def check_rule(
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    meshes: Sequence[tuple[int, ...]] = MESHES,
    blocks: Blocks | None = None,
    input_blocks: Mapping[int, Blocks] | None = None,
    fixed: Sequence[int] = (),
    seed: int = 0,
    most: int | None = None,
) -> list[str]:
    """Checks every strategy that an op call offers on some meshes.

    Args:
        target: The operator, as ``torch.ops.aten.linear.default``.
        args: Real arguments; floating-point tensors in float64.
        kwargs: Keyword arguments.
        meshes: Shapes of the meshes.
        blocks: For dims of the first result, block counts that readers want.
        input_blocks: The same for dims of tensor arguments.
        fixed: Positions of the tensor arguments that get no gradient, though they could.
        seed: Of the partial sums and gradients.
        most: Check no more than so many strategies of a mesh, drawn at random; all by default.

    Returns:
        The text of every strategy that was checked, in order of the meshes.

    Raises:
        AssertionError: A strategy does not compute what the op computes.
    """
    call = OpCall(target, args, kwargs or {}, blocks or {}, input_blocks or {}, fixed)
    checked = []
    for mesh in meshes:
        offered = strategies(call.node, mesh)
        if most is not None and len(offered) > most:
            offered = random.Random(seed).sample(offered, most)
        for strategy in offered:
            check_strategy(call, strategy, mesh, seed)
            checked.append(str(strategy))
    return checked


def check_strategy(
    call: OpCall, strategy: Strategy, mesh: tuple[int, ...], seed: int = 0
) -> fx.Graph:
    """Checks one strategy of an op call on one mesh.

    Returns:
        The local graph that the ranks ran.

    Raises:
        AssertionError: The strategy does not compute what the op computes; tells where.
    """
    name = f"{call.node.meta['id']} as {str(strategy)!r} on {list(mesh)}"
    threads = ThreadMesh([(f"a{i}", n) for i, n in enumerate(mesh)])
    generator = torch.Generator().manual_seed(seed)
    axes = list(zip(threads.names, threads.sizes, strict=True))
    graph = local_graph(OpView(call.node), strategy, axes)
    expected = call.run()
    gradients = [
        torch.randn(y.shape, generator=generator, dtype=y.dtype) if y.requires_grad else None
        for y in expected
    ]
    wanted = _gradients(call.whole, expected, gradients)
    inputs = [
        distribute(x, spec.value(), threads, generator)
        for x, spec in zip(call.tensors, strategy.inputs, strict=True)
    ]
    returned = [
        None if g is None else distribute(g, spec.gradient(), threads, generator)
        for g, spec in zip(gradients, strategy.outputs, strict=True)
    ]

    def rank_work(rank: int) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        mine = call.leaves_of([parts[rank] for parts in inputs])
        outputs = interpret(graph, mine)
        grads = [None if parts is None else parts[rank] for parts in returned]
        return [y.detach() for y in outputs], _gradients(mine, outputs, grads)

    found = (threads.run if _communicates(graph) else threads.run_alone)(rank_work)
    for i, (y, spec) in enumerate(zip(expected, strategy.outputs, strict=True)):
        _compare(f"{name}: result {i}", [f[0][i] for f in found], y.detach(), spec, threads)
    for i, (grad, spec) in enumerate(zip(wanted, strategy.inputs, strict=True)):
        if call.whole[i].requires_grad:
            zero = torch.zeros_like(inputs[i][0])
            given = [f[1][i] for f in found]
            parts = [zero if part is None else part for part in given]
            full = torch.zeros_like(call.tensors[i]) if grad is None else grad
            _compare(f"{name}: gradient of input {i}", parts, full, spec.gradient(), threads)
    return graph


def replicated(call: OpCall, n_axes: int) -> Strategy:
    """The strategy that computes the whole op everywhere: what a test changes one state of."""
    op = OpView(call.node)
    whole = ShardingSpec((R,) * n_axes)
    return Strategy((whole,) * len(op.shapes), (whole,) * len(op.results), ("",) * n_axes)


def _tensors(value: Any) -> list[torch.Tensor]:
    items = value if isinstance(value, (list, tuple)) else (value,)
    return [v for v in items if isinstance(v, torch.Tensor)]


def interpret(graph: fx.Graph, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Runs the graph of an op on one rank's inputs: its tensor results."""
    values: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(feed)
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "output":
            return _tensors(args[0])
        values[node] = node.target(*args, **kwargs)
    raise AssertionError("a graph without output")


def _gradients(
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    asked = [x for x in inputs if x.requires_grad]
    pairs = [
        (y, g)
        for y, g in zip(outputs, grads, strict=True)
        if y.requires_grad and y.grad_fn is not None and g is not None
    ]
    if not asked or not pairs:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad([y for y, _ in pairs], asked, [g for _, g in pairs], allow_unused=True)
    )
    return [next(found) if x.requires_grad else None for x in inputs]


def _communicates(graph: fx.Graph) -> bool:
    return any(
        node.target is torch.ops.raypar.convert.default
        and (node.args[1] in COLLECTIVES or node.args[2] in COLLECTIVES)
        for node in graph.nodes
    )


def _compare(
    what: str,
    parts: Sequence[torch.Tensor],
    expected: torch.Tensor,
    spec: ShardingSpec,
    mesh: ThreadMesh,
) -> None:
    try:
        value = collect(parts, spec, mesh)
    except PlanError as error:
        raise AssertionError(f"{what}, which lies as {spec}: {error}") from None
    if value.shape != expected.shape or value.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: joined as {spec} it is {value.dtype} {list(value.shape)}, "
            f"not {expected.dtype} {list(expected.shape)}"
        )
    if expected.is_floating_point() or expected.is_complex():
        same = torch.allclose(value, expected, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
    else:
        same = torch.equal(value, expected)
    if not same:
        gap = (value.to(torch.complex128) - expected).abs().max().item()
        raise AssertionError(f"{what}: joined as {spec} it is off by up to {gap:.3g}")
