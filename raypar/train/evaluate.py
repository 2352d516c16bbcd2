"""Evaluation and prediction with a plan that trains: on its ranks, on its live parameters."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raypar.compat import pytree
from raypar.errors import CaptureError, ConfigError, DataError
from raypar.fit import check_plan
from raypar.graph.forward import ForwardGraph, Metric, capture_losses, capture_outputs
from raypar.graph.opgraph import OpGraph
from raypar.graph.states import Const
from raypar.plan import Plan
from raypar.stages.batch import shard_batch
from raypar.stages.compile_forward import Cutting, compile_forward, cut_batch
from raypar.stages.evaluation import Outcome, Parcel
from raypar.stages.forward_spec import ForwardSpec
from raypar.stages.run import Run
from raypar.stages.spec import RankSpec
from raypar.train._evaluation_io import (
    EMPTY,
    Batches,
    check_dtypes,
    parcel,
    read_batches,
    whole_of,
)
from raypar.train.data.form import leaves_as

Select = Callable[[Any], Any]

_TAKEN = frozenset({"loss", "samples", "batches"})
_MOST_FORMS = 32  # programs of the least recently used form are dropped beyond
_AT_ONCE = 8  # batches in one call of the ranks
_BYTES_AT_ONCE = 32 << 20


@dataclass
class _Form:
    """One form of batch: its programs, and how its results come together.

    Attributes:
        key: What ranks know it as.
        graph: The model in eval mode.
        cutting: How such a batch is cut.
        specs: What every rank group runs.
    """

    key: str
    graph: ForwardGraph
    cutting: Cutting
    specs: dict[int, ForwardSpec]


class Evaluator:
    """Evaluates a model, and predicts with it, on the ranks of a run that trains it.

    The model is captured a second time, in eval mode (dropout off, batch norm by its running
    statistics), and runs forward on the same ranks, on the parameters and buffers that they hold.
    What it computes is what one process would: ``model.eval()`` under ``no_grad`` on whole batches.
    Training is not touched: not its random numbers, nor its buffers, nor its optimizer.

    A batch may have any number of samples, and every tensor any size in its other dims; each such
    form is compiled once. A batch is cut over the replicas where it divides by their number; else,
    and where the results depend on how it is cut, each replica evaluates all of it.

    Args:
        graph: The captured model, as it trains.
        plan: The plan that is run.
        specs: Every rank's spec of that run, by rank (`raypar.stages.compile.compile_plan`).
        metrics: Name → function of the module's output and the batch that returns one number, as a
            tensor, with tensor ops, for example
            ``lambda outputs, batch: (outputs.argmax(-1) == batch[1]).double().mean()``. It is part
            of what is captured, and runs where the outputs are.

    Raises:
        ConfigError: A metric has a name that is taken, or is none.
        PlanError: The plan is not for this graph: another model, or one with other parameters.
    """

    def __init__(
        self,
        graph: OpGraph,
        plan: Plan,
        specs: Sequence[RankSpec],
        *,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        check_plan(plan, graph)
        self._metrics = dict(metrics or {})
        for name, metric in self._metrics.items():
            if name in _TAKEN or not callable(metric):
                raise ConfigError(
                    f"metrics[{name!r}] is {metric!r}; give a function of (outputs, batch) a name "
                    f"that is none of {', '.join(sorted(_TAKEN))}, for example 'accuracy'"
                )
        self._graph = graph
        self._plan = plan
        self._specs = tuple(specs)
        self._forms: dict[object, _Form] = {}
        self._made = 0
        # Which forms the ranks of a run have: a run that is started anew has none.
        self._loaded: weakref.WeakKeyDictionary[Run, set[str]] = weakref.WeakKeyDictionary()

    def evaluate(self, run: Run, batches: Batches, *, weights: str = "live") -> dict[str, float]:
        """The mean loss, and the metrics, over all batches of a second data source.

        Each is the mean over the batches, weighted by their samples; where the loss is a sum over a
        count (cross-entropy over the tokens that are not ignored), the loss is weighted by that
        count, so that it is the mean over all that was counted.

        Args:
            run: The run, started, between two calls of `train`.
            batches: Whole batches of the form that the model trains on, of any sizes; an iterable,
                or a callable that returns one.
            weights: Which parameters: ``live``, those that are trained; ``ema``, their average,
                where the run keeps one.

        Returns:
            ``loss``, the metrics by name, ``samples`` and ``batches``.

        Raises:
            DataError: There are no batches, one has another structure or dtype than those that the
                model trains on, or reading them failed.
            CaptureError: The model in eval mode, or a metric, cannot be captured.
            TrainingError: A rank raised; errors of raypar keep their type.
        """
        totals: dict[str, float] = {}
        weighed: dict[str, float] = {}
        samples = count = 0
        for form, chunk in _chunks(read_batches(batches, self._specs[0].seed), self._losses):
            for outcome in self._run(run, form, chunk, count, weights):
                values = [float(v) for v in self._merged(form, outcome)]
                weights_of = dict.fromkeys(form.graph.names, float(form.graph.global_batch))
                if len(values) > len(weights_of):
                    weights_of["loss"] = values[-1]
                for (name, weight), value in zip(weights_of.items(), values, strict=False):
                    weighed[name] = weighed.get(name, 0.0) + weight
                    # Where nothing was counted the loss is 0/0, which is not part of the mean.
                    totals[name] = totals.get(name, 0.0) + (value * weight if weight else 0.0)
                samples += form.graph.global_batch
                count += 1
        if not count:
            raise DataError(EMPTY)
        means = {n: totals[n] / weighed[n] if weighed[n] else math.nan for n in totals}
        return {**means, "samples": samples, "batches": count}

    def predict(
        self,
        run: Run,
        batches: Batches,
        *,
        select: Select | None = None,
        batch_dims: Any = None,
        weights: str = "live",
    ) -> Iterator[Any]:
        """The module's outputs for one batch after the other, whole, on the CPU.

        Args:
            run: As for `evaluate`.
            batches: What the module gets; what only the loss function takes may be left out.
            select: What is wanted of the module's output, for example
                ``lambda output: output.logits``; default: all of it.
            batch_dims: Batch dim of every tensor, as for `raypar.capture`; default: as in training
                where a batch has as many tensors, else dim 0 of those that have the batch's size.
            weights: As for `evaluate`.

        Yields:
            The output of each batch, in their order.

        Raises:
            DataError: Reading the batches failed, or they hold another kind of numbers than those
                that the model trains on.
            CaptureError: The model cannot be captured in eval mode, or returns something other
                than tensors.
            TrainingError: A rank raised.
        """
        for number, batch in enumerate(read_batches(batches, self._specs[0].seed)):
            form, tensors = self._outputs(batch, select, batch_dims)
            (outcome,) = self._run(run, form, [tensors], number, weights)
            leaves: dict[int, Any] = dict(form.graph.plain)
            values = iter(self._merged(form, outcome))
            for i in range(form.graph.structure.num_leaves):
                if i not in leaves:
                    leaves[i] = next(values)
            yield pytree.tree_unflatten(
                [leaves[i] for i in range(len(leaves))], form.graph.structure
            )

    # ---- forms of batches -----------------------------------------------------------------

    def _losses(self, batch: Any) -> tuple[_Form, list[torch.Tensor]]:
        trained = self._graph.spec
        leaves = leaves_as(trained.structure, batch)
        if leaves is None:
            _, structure = pytree.tree_flatten(batch)
            raise DataError(
                "a batch of the evaluation data has another structure than those that the model "
                f"trains on: expected {pytree.treespec_pprint(trained.structure)}, found "
                f"{pytree.treespec_pprint(structure)}; yield batches of the same form, of any size"
            )
        tensors = [leaves[i] for i in trained.tensor_leaves]
        for i, (tensor, shape, dtype) in enumerate(
            zip(tensors, trained.shapes, trained.dtypes, strict=True)
        ):
            if not isinstance(tensor, torch.Tensor):
                found = type(tensor).__name__
            elif tensor.dtype != dtype or tensor.dim() != len(shape):
                found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            else:
                continue
            raise DataError(
                f"tensor {i} of a batch of the evaluation data is {found}; the model trains on "
                f"{dtype} of {len(shape)} dims, as {tuple(shape)}"
            )
        rest = [repr(x) for i, x in enumerate(leaves) if i not in trained.tensor_leaves]
        key = ("losses", *((tuple(t.shape), t.dtype) for t in tensors), *rest)
        like = pytree.tree_unflatten(leaves, trained.structure)
        return self._form(key, lambda: self._captured(like, tensors)), tensors

    def _captured(self, batch: Any, tensors: Sequence[torch.Tensor]) -> ForwardGraph:
        try:
            return capture_losses(self._graph, batch, self._metrics)
        except CaptureError as error:
            trained = self._graph.spec
            for i, (tensor, shape, dim) in enumerate(
                zip(tensors, trained.shapes, trained.batch_dims, strict=True)
            ):
                found = tuple(tensor.shape)
                if any(
                    n != m for d, (n, m) in enumerate(zip(found, shape, strict=True)) if d != dim
                ):
                    reason = str(error.__cause__ or error).rstrip(".")
                    raise DataError(
                        f"tensor {i} of a batch of the evaluation data has shape {found}, the "
                        f"model trains on {shape} and does not take the other: {reason}; yield "
                        "eval_data of that form, with any number of samples"
                    ) from error
            raise

    def _outputs(
        self, batch: Any, select: Select | None, batch_dims: Any
    ) -> tuple[_Form, list[torch.Tensor]]:
        check_dtypes(batch, self._graph.spec)
        leaves, structure = pytree.tree_flatten(batch)
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        shapes = [(tuple(t.shape), t.dtype) for t in tensors]
        rest = [repr(x) for x in leaves if not isinstance(x, torch.Tensor)]
        key = ("outputs", select, repr(batch_dims), repr(structure), *shapes, *rest)
        form = self._form(key, lambda: capture_outputs(self._graph, batch, batch_dims, select))
        return form, tensors

    def _form(self, key: object, make: Callable[[], ForwardGraph]) -> _Form:
        known = self._forms.pop(key, None)
        if known is None:
            graph = make()
            cutting = cut_batch(graph, self._plan)
            specs = compile_forward(graph, self._plan, self._graph, self._specs, cutting)
            self._made += 1
            known = _Form(f"form {self._made}", graph, cutting, specs)
        self._forms[key] = known  # the last one is the one that was used last
        if len(self._forms) > _MOST_FORMS:
            self._forms.pop(next(iter(self._forms)))
        return known

    # ---- on the ranks ---------------------------------------------------------------------

    def _run(
        self,
        run: Run,
        form: _Form,
        batches: Sequence[list[torch.Tensor]],
        first: int,
        weights: str,
    ) -> list[list[Outcome]]:
        """For every batch what each rank tells of it; `first` is the number of the first one."""
        loaded = self._loaded.setdefault(run, set())
        if form.key not in loaded:
            alive = {known.key for known in self._forms.values()}
            forgotten = sorted(loaded - alive)
            run.call("load_evaluation", form.key, form.specs, forgotten)
            loaded.difference_update(forgotten)
            loaded.add(form.key)
        rows = [self._parcels(run, form, batch) for batch in batches]
        by_rank = list(zip(*rows, strict=True))
        answers: list[list[Outcome]] = run.call("evaluate_steps", form.key, first, by_rank, weights)
        return [list(batch) for batch in zip(*answers, strict=True)]

    def _parcels(self, run: Run, form: _Form, tensors: list[torch.Tensor]) -> list[Parcel]:
        """A batch's rows for every rank; ranks that see the same share a parcel."""
        known: dict[tuple[int, int], Parcel] = {}
        found = []
        for spec in self._specs:
            cutting = form.specs[spec.group].cutting(spec)
            key = (spec.group, cutting.replica)
            if key not in known:
                known[key] = parcel(run, shard_batch(cutting, tensors))
            found.append(known[key])
        return found

    def _merged(self, form: _Form, outcome: Sequence[Outcome]) -> list[torch.Tensor]:
        """Every result of a batch, from its parts on all ranks."""
        parts = {key: value for told in outcome for key, value in told.items()}
        count = 1 + max(number for number, _ in parts)
        states = form.graph.analysis.results
        found = []
        for number in range(count):
            own = [parts[number, part] for part in range(form.cutting.parts)]
            # The last one may be a count, which every part knows of the whole batch.
            state = states[number] if number < len(states) else Const()
            found.append(whole_of(own, state))
        return found


def _chunks(
    batches: Iterator[Any], form_of: Callable[[Any], tuple[_Form, list[torch.Tensor]]]
) -> Iterator[tuple[_Form, list[list[torch.Tensor]]]]:
    """Batches that follow one another and have one form, a few at a time."""
    last: _Form | None = None
    held: list[list[torch.Tensor]] = []
    size = 0
    for batch in batches:
        form, tensors = form_of(batch)
        size += sum(t.nbytes for t in tensors)
        if last is not None and (
            form is not last or len(held) == _AT_ONCE or size > _BYTES_AT_ONCE
        ):
            yield last, held
            held, size = [], sum(t.nbytes for t in tensors)
        last = form
        held.append([t.detach().clone() for t in tensors])  # a loader may fill its buffer again
    if last is not None:
        yield last, held
