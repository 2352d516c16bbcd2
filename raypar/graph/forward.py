"""A model captured as it is evaluated: in eval mode, without gradients, for results of a choice.

Dropout is off and batch norm takes its running statistics, so these are other ops than those that
train. New values that a forward pass would give to buffers are dropped: who looks at a model leaves
it as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from raypar.compat import TorchDispatchMode, is_mutable, pytree, schema_name
from raypar.errors import CaptureError
from raypar.graph.batchspec import BatchSpec
from raypar.graph.build import CleanGraph, NeedsRealTensors, build_graph
from raypar.graph.capture import LossFn, build_model, call_model, loss_from
from raypar.graph.opgraph import OpGraph
from raypar.graph.passes.emit import is_op, op_name
from raypar.graph.states import Const
from raypar.graph.turns import in_turn

Metric = Callable[[Any, Any], Any]
"""``metric(outputs, batch)``: one number, as a tensor, written with tensor ops."""
ResultsOf = Callable[[Callable[..., Any], Any], list[torch.Tensor]]

_PLAIN = (type(None), bool, int, float, complex, str)
# Ops that leave one number what it is, or multiply it with one that is the same in every batch.
_PASSED = frozenset({"reshape", "_to_copy", "to", "clone", "mul", "div", "neg", "squeeze", "alias"})


class ForwardGraph(OpGraph):
    """A model that is evaluated, at the size of one batch.

    Its first results, the scalars, are numbered as `names`; or its results are the leaves of the
    model's output (`capture_outputs`).

    Attributes:
        names: Names of the scalar results: ``loss``, then those of the metrics.
        structure: Structure of the output, where that is what was captured.
        plain: Leaves of the output that are no tensors, by their number.
    """

    _per_sample = True

    def __init__(
        self,
        graph: OpGraph,
        model: nn.Module,
        results_of: ResultsOf,
        spec: BatchSpec,
        names: tuple[str, ...] = (),
    ) -> None:
        self.names = names
        self.structure: Any = None
        self.plain: dict[int, Any] = {}
        self._results_of = results_of
        clean = _trace(model, results_of, spec, spec.size)
        super().__init__(clean, model, graph._loss_of, spec, graph.model_fn, graph.loss_fn)

    def _build(self, local_batch: int) -> CleanGraph:
        return _trace(self._model, self._results_of, self.spec, local_batch)

    def count_of_loss(self) -> fx.Node | None:
        """What the loss is a mean over, where it is a sum over a count that follows the batch.

        A mean over the tokens that are not masked out, for example. Factors that are the same in
        every batch do not matter.
        """
        node: Any = self.clean.loss
        while isinstance(node, fx.Node) and is_op(node):
            tensors = [a for a in node.args if isinstance(a, fx.Node)]
            if op_name(node) == "div" and len(tensors) == 2:
                count = tensors[1]
                return count if self._counts_samples(count) else None
            if op_name(node) not in _PASSED or len(tensors) != 1:
                return None
            node = tensors[0]
        return None

    def _counts_samples(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node.meta["val"].numel() != 1:
            return False
        if node not in self.param_free or not _reads_inputs(node):
            return False
        # Of a batch that is cut, every part has to know the count of the whole.
        known = node.meta["id"] in self.analysis.globals
        same = self.analysis.states[node.meta["id"]] == Const()
        return known or same or not self.analysis.exact


def capture_losses(
    graph: OpGraph, batch: Any, metrics: Mapping[str, Metric] | None = None, batch_dims: Any = None
) -> ForwardGraph:
    """Captures loss and metrics of a model in eval mode.

    Args:
        graph: The model as it trains.
        batch: An example of what it is evaluated on; any number of samples.
        metrics: Name → function of the module's output and the batch.
        batch_dims: As for `raypar.capture`; default: those of `graph`.

    Raises:
        CaptureError: The model, or a metric, cannot be captured.
    """
    wanted = dict(metrics or {})

    def of_model(model: nn.Module) -> ResultsOf:
        def results_of(call: Callable[..., Any], values: Any) -> list[torch.Tensor]:
            output = call_model(model, graph.loss_fn, call, values)
            found = [loss_from(model, graph.loss_fn, output, values)]
            return found + [_number(n, f(output, values)) for n, f in wanted.items()]

        return results_of

    spec = BatchSpec.of(batch, list(graph.batch_dims) if batch_dims is None else batch_dims)
    return _capture(graph, of_model, spec, ("loss", *wanted))


def capture_outputs(
    graph: OpGraph,
    batch: Any,
    batch_dims: Any = None,
    select: Callable[[Any], Any] | None = None,
) -> ForwardGraph:
    """Captures a model in eval mode for its output; the loss is not computed.

    Args:
        graph: The model as it trains.
        batch: An example of what it gets; what only the loss function takes may be left out.
        batch_dims: As for `raypar.capture`; default: those of `graph` where the batch has as many
            tensors, else its default.
        select: What is wanted of the module's output; default: all.

    Raises:
        CaptureError: The model cannot be captured, or returns something other than tensors and
            plain values in tuples, lists and dicts.
    """
    forms: list[tuple[Any, dict[int, Any]]] = []

    def of_model(model: nn.Module) -> ResultsOf:
        def results_of(call: Callable[..., Any], values: Any) -> list[torch.Tensor]:
            output = call_model(model, graph.loss_fn, call, values)
            leaves, structure = pytree.tree_flatten(output if select is None else select(output))
            plain = {i: x for i, x in enumerate(leaves) if not isinstance(x, torch.Tensor)}
            _check_leaves(plain)
            if len(plain) == len(leaves):
                raise CaptureError(
                    f"{'the module' if select is None else 'select'} returned no tensor; predict "
                    "tells tensors of the module's output, for example select=lambda output: "
                    "output.logits"
                )
            forms[:] = [(structure, plain)]
            return [x for x in leaves if isinstance(x, torch.Tensor)]

        return results_of

    tensors = [x for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor)]
    if batch_dims is None and len(tensors) == len(graph.batch_dims):
        batch_dims = list(graph.batch_dims)
    found = _capture(graph, of_model, BatchSpec.of(batch, batch_dims), ())
    found.structure, found.plain = forms[0]
    return found


def _capture(
    graph: OpGraph,
    of_model: Callable[[nn.Module], ResultsOf],
    spec: BatchSpec,
    names: tuple[str, ...],
) -> ForwardGraph:
    model = graph.model
    try:
        return ForwardGraph(graph, model, of_model(model), spec, names)
    except (CaptureError, NeedsRealTensors):
        if not any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            raise
    # Code that runs in eval mode alone may look at tensors that the meta device does not have.
    model = build_model(graph.model_fn, on_meta=False)
    return ForwardGraph(graph, model, of_model(model), spec, names)


@in_turn
def _trace(model: nn.Module, results_of: ResultsOf, spec: BatchSpec, size: int) -> CleanGraph:
    with _evaluating(model):
        return build_graph(model, results_of, spec, size, training=False)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """While open, the model is in eval mode; afterwards every module is in the mode it was in.

    Raises:
        CaptureError: ``eval()`` makes other parameters, or writes to them (weights that are merged
            for inference): those that train are then not the ones that would be evaluated.
    """
    before = [(module, module.training) for module in model.modules()]
    names = [name for name, _ in model.named_parameters()]
    writes = _Writes()
    try:
        with writes:
            model.eval()
        other = sorted(set(names) ^ {name for name, _ in model.named_parameters()})
        if other or writes.ops:
            what = f"other parameters ({other[0]!r})" if other else f"new values ({writes.ops[0]})"
            raise CaptureError(
                f"{type(model).__name__}.eval() gives the model {what}; evaluation runs on the "
                "parameters that are trained: leave them as they are in eval(), and merge weights "
                "in the exported model"
            )
        yield
    finally:
        model.train(before[0][1])  # what the model's own train() or eval() did is undone by it
        for module, training in before:
            module.training = training


class _Writes(TorchDispatchMode):
    """Notes the ops that write into tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_mutable(func):
            self.ops.append(schema_name(func))
        return func(*args, **(kwargs or {}))


def _number(name: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.is_complex():
        what = (
            f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
            if isinstance(value, torch.Tensor)
            else type(value).__name__
        )
        raise CaptureError(
            f"metric {name!r} returned {what}; it must return one number as a tensor, for example "
            "(outputs.argmax(-1) == batch[1]).double().mean(); what needs Python or NumPy is "
            "computed from what predict returns"
        )
    value = value.reshape(())
    return value if value.is_floating_point() else value.double()


def _check_leaves(plain: Mapping[int, Any]) -> None:
    for value in plain.values():
        if not isinstance(value, _PLAIN):
            raise CaptureError(
                f"the module returned a {type(value).__name__}, which is neither a tensor nor made "
                "of tuples, lists and dicts of them; say what predict shall return, for example "
                "select=lambda output: output.logits"
            )


def _reads_inputs(node: fx.Node) -> bool:
    seen, pending = set(), [node]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder" and str(current.meta["id"]).startswith("in:"):
            return True
        pending.extend(current.all_input_nodes)
    return False


__all__ = ["ForwardGraph", "LossFn", "Metric", "capture_losses", "capture_outputs"]
