"""From raw trace to clean graph: runs the passes in order and gives every op its canonical id."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from raypar.compat import is_mutable
from raypar.errors import CaptureError
from raypar.graph.batchspec import BatchSpec
from raypar.graph.passes.canonical import canonicalize
from raypar.graph.passes.emit import Emitter, aten, drop_unused, is_op, op_name
from raypar.graph.passes.functionalize import functionalize
from raypar.graph.passes.randomness import seed_random_ops
from raypar.graph.passes.regions import drop_regions
from raypar.graph.trace import LossOf, RawTrace, trace_forward


class NeedsRealTensors(Exception):
    """The model holds tensors outside its parameters and buffers, so it must be built for real."""


@dataclass
class CleanGraph:
    """A pure forward graph: placeholders in, (results..., buffer updates...) out.

    Every node carries ``meta``: ``val`` (fake value), ``id`` (canonical id of ops; key of
    placeholders: ``param:NAME``, ``buffer:NAME``, ``in:I``, ``const:K``, ``rng``),
    ``module_path``, ``source``, and ``autocast`` inside an autocast region.

    Attributes:
        graph: The fx graph.
        params: Parameter name → placeholder.
        buffers: Buffer name → placeholder.
        inputs: Placeholders of the example tensors.
        constants: Constant name → (placeholder, tensor).
        rng: Placeholder of the random state.
        updates: Buffer name → node of its new value; none in a graph that is only evaluated.
        results: The loss; of a graph that is only evaluated whatever was asked for.
    """

    graph: fx.Graph
    params: dict[str, fx.Node]
    buffers: dict[str, fx.Node]
    inputs: list[fx.Node]
    constants: dict[str, tuple[fx.Node, torch.Tensor]]
    rng: fx.Node
    updates: dict[str, fx.Node]
    results: tuple[fx.Node, ...]

    @property
    def loss(self) -> fx.Node:
        """The loss node: the first result."""
        return self.results[0]

    @property
    def ops(self) -> list[fx.Node]:
        """Every call node, in order."""
        return [n for n in self.graph.nodes if n.op == "call_function"]


def build_graph(
    model: nn.Module,
    loss_of: LossOf,
    spec: BatchSpec,
    batch_size: int,
    *,
    training: bool = True,
) -> CleanGraph:
    """Traces and cleans the model at one batch size.

    Args:
        model: The module.
        loss_of: Called with the (functional) model and the batch; returns the loss, or all results.
        spec: Form of the batch.
        batch_size: Samples of the traced batch.
        training: Whether gradients will be taken. If not, nothing is detached and new values of
            buffers are dropped: what only looks at a model leaves it as it is.

    Raises:
        CaptureError: The model cannot be captured.
        NeedsRealTensors: It was built on the meta device and uses unregistered tensors.
    """
    raw = trace_forward(model, loss_of, spec, batch_size, training=training)
    graph = raw.module.graph
    constants = _lift_constants(raw)
    rng = _add_rng(graph, raw)
    drop_regions(graph)
    canonicalize(graph)
    updates = functionalize(graph, raw.params, raw.buffers)
    seed_random_ops(graph, rng)
    _drop_aliases(graph, () if training else (aten.detach.default,))
    output = next(n for n in graph.nodes if n.op == "output")
    results = _results(graph, raw, output, training)
    if training:
        updates.update(_reassigned(graph, raw, output))
        updates = {name: _resolve(node) for name, node in updates.items()}
    else:
        updates = {}
    output.args = ((*results, *updates.values()),)
    output.meta["results"] = len(results)
    output.meta["updates"] = list(updates)
    drop_unused(graph)
    _name(raw)
    assign_ids(graph)
    graph.lint()
    return CleanGraph(graph, raw.params, raw.buffers, raw.inputs, constants, rng, updates, results)


def _results(
    graph: fx.Graph, raw: RawTrace, output: fx.Node, training: bool
) -> tuple[fx.Node, ...]:
    returned: Any = output.args[0]
    found = []
    for node in returned[: raw.n_results]:
        if not isinstance(node, fx.Node) or (node.op == "placeholder" and training):
            raise CaptureError("the loss does not depend on any op of the model")
        # Stages return what their ops make: a model that hands on an input gets an op for it.
        copied = node.op == "placeholder"
        found.append(Emitter(graph, output)(aten.clone.default, node) if copied else node)
    return tuple(found)


def _reassigned(graph: fx.Graph, raw: RawTrace, output: fx.Node) -> dict[str, fx.Node]:
    """New values of the buffers that the module replaced by another tensor."""
    returned: Any = output.args[0]
    values = returned[raw.n_results :] if raw.reassigned else ()
    found = {}
    for name, node in zip(raw.reassigned, values, strict=True):
        assert isinstance(node, fx.Node)
        emit = Emitter(graph, output)
        # A copy: the new value may be an input, a parameter or another buffer.
        found[name] = emit(aten.clone.default, node) if node.op == "placeholder" else node
    return found


def _lift_constants(raw: RawTrace) -> dict[str, tuple[fx.Node, torch.Tensor]]:
    graph = raw.module.graph
    last = raw.inputs[-1]
    found: dict[str, tuple[fx.Node, torch.Tensor]] = {}
    by_target: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        target = str(node.target)
        if target not in by_target:
            value = raw.module
            for part in target.split("."):
                value = getattr(value, part)
            if not isinstance(value, torch.Tensor):
                raise CaptureError(
                    f"{node.meta.get('source')}: the model uses a {type(value).__name__} that "
                    "cannot be captured (control flow or a custom higher-order op); write it with "
                    "tensor ops"
                )
            if value.is_meta:
                raise NeedsRealTensors
            if value.requires_grad:
                raise CaptureError(
                    f"{node.meta.get('source')}: a tensor of shape {tuple(value.shape)} that "
                    "requires grad is used but is not a registered parameter; register it with "
                    "nn.Parameter on a module that model_fn returns (gradients taken inside the "
                    "forward pass, as by torch.func.grad, cannot be captured)"
                )
            with graph.inserting_after(last):
                holder = graph.placeholder(f"const_{len(found)}")
            holder.meta = {"val": node.meta["val"], "id": f"const:{len(found)}"}
            found[f"const:{len(found)}"] = (holder, value.detach())
            by_target[target] = last = holder
        node.replace_all_uses_with(by_target[target])
        graph.erase_node(node)
    return found


def _add_rng(graph: fx.Graph, raw: RawTrace) -> fx.Node:
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        rng = graph.placeholder("rng")
    mode = next(n.meta["val"] for n in raw.inputs).fake_mode
    with mode:
        rng.meta["val"] = torch.empty(3, dtype=torch.int64)
    rng.meta["id"] = "rng"
    return rng


def _drop_aliases(graph: fx.Graph, others: tuple[Any, ...]) -> None:
    plain = (aten.alias.default, aten.lift_fresh.default, aten.contiguous.default, *others)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in plain:
            node.meta["replaced_by"] = node.args[0]
            node.replace_all_uses_with(node.args[0])


def _resolve(node: fx.Node) -> fx.Node:
    while "replaced_by" in node.meta:
        node = node.meta["replaced_by"]
    return node


def _name(raw: RawTrace) -> None:
    for name, node in raw.params.items():
        node.meta["id"] = f"param:{name}"
    for name, node in raw.buffers.items():
        node.meta["id"] = f"buffer:{name}"
    for i, node in enumerate(raw.inputs):
        node.meta["id"] = f"in:{i}"


def assign_ids(graph: fx.Graph) -> None:
    """Canonical ids: module path, op name, occurrence; pieces of a tuple add their index."""
    seen: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if is_op(node) and is_mutable(node.target):
            raise CaptureError(
                f"{node.meta.get('source')}: {op_name(node)} changes its argument in place in a "
                "way that cannot be captured; use the out-of-place op"
            )
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            key = f"{node.args[0].meta['id']}.{node.args[1]}"
            again = seen[key]
            seen[key] += 1
            node.meta["id"] = key if not again else f"{key}~{again}"
            continue
        path = node.meta.get("module_path", "")
        key = f"{path}/{op_name(node)}"
        node.meta["id"] = f"{key}#{seen[key]}"
        seen[key] += 1
