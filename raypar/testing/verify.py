"""Where does a plan first differ from the unsplit model?

The law says that it nowhere does (`raypar.testing.assert_plan_equivalent`). Where it is broken, by
a sharding rule that is not true, a fault in a program or a transfer, this names the first value
that differs: values at the borders of stages are compared as a run makes them, microbatch by
microbatch, forward and then backward; the stage between the last right border and the first wrong
one is then run again op by op.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from raypar.compat import pytree
from raypar.errors import DataError
from raypar.graph.capture import build_model
from raypar.graph.opgraph import OpGraph
from raypar.graph.passes.randomness import SEEDED
from raypar.lowered import LoweredPlan, lower_plan
from raypar.plan import MeshSlice, Plan
from raypar.sharding.spec import ShardingSpec
from raypar.stages.compile import compile_plan, loss_scale
from raypar.stages.holdings import Workshop
from raypar.stages.local import LocalRun
from raypar.stages.optimizers import call_optimizer
from raypar.stages.run import StepResult
from raypar.stages.spec import OptimizerFn
from raypar.testing._compare import SMALL, Compare, compare_joined, comparer
from raypar.testing._parts import Part, PartwiseModel, Reference
from raypar.testing._stage_replay import Culprit, StageReplay
from raypar.testing._watched import Seen, TurnFeed, WatchedRunner
from raypar.testing.equivalence import (
    RunRecord,
    default_optimizer,
    gaps,
    reference_run,
    tolerance,
)


@dataclass(frozen=True)
class Difference:
    """The first value in which a plan and the unsplit model differ.

    Attributes:
        kind: ``capture`` (the captured graph is not the model), ``activation``, ``received`` (an
            activation after its transfer), ``loss``, ``gradient``, ``parameter gradient``, or
            ``state`` (a parameter or buffer after the step).
        tensor: What differs: the id of a value, or the name of a parameter or buffer.
        step: The step, counted from 0.
        stage: The stage that made it wrong; None where it is no single one.
        microbatch: The microbatch; None for what belongs to the whole step.
        replica: The replica; None for what belongs to all.
        op: The op that is at fault; None where the stage's ops are right one by one, so that its
            compiled program or a transfer is at fault.
        strategy: How that op runs on the stage's mesh; empty where it runs whole.
        source: ``file:line`` of the op in the model's code.
        text: What is wrong, with numbers.
    """

    kind: str
    tensor: str
    step: int
    text: str
    stage: int | None = None
    microbatch: int | None = None
    replica: int | None = None
    op: str | None = None
    strategy: str = ""
    source: str = ""

    def __str__(self) -> str:
        place = f"step {self.step}"
        for name in ("stage", "microbatch", "replica"):
            value = getattr(self, name)
            place += "" if value is None else f", {name} {value}"
        if self.op is None:
            return f"{place}: {self.kind} {self.tensor!r} {self.text}"
        how = f" as {self.strategy!r}" if self.strategy else ""
        return (
            f"{place}: op {self.op!r}{how} ({self.source}): {self.text}; seen in the {self.kind} "
            f"{self.tensor!r}"
        )


def first_difference(
    graph: OpGraph,
    plan: Plan,
    batches: Sequence[Any],
    *,
    steps: int = 1,
    optimizer: OptimizerFn | None = None,
    seed: int = 0,
    rtol: float | None = None,
) -> Difference | None:
    """Trains some steps with a plan, on threads of this process, beside the unsplit model.

    Every value that the unsplit model makes in a step is held in memory.

    Args:
        graph: The captured model.
        plan: A plan for it.
        batches: Global batches of the graph's form; used in turn.
        steps: Optimizer steps.
        optimizer: Builds the optimizer from parameters; default AdamW.
        seed: Seed of initialisation and of random masks.
        rtol: Bound on max|Δ| over the largest number of the tensor (or a hundredth of the largest
            one at the same kind of border, if that is more); default: by the graph's dtypes.

    Returns:
        The first difference, or None where all values agree.

    Raises:
        DataError: There are no batches.
        PlanError: The plan does not fit the graph.
    """
    if not batches or steps < 1:
        raise DataError(f"{len(batches)} batches and steps={steps}: give at least one of each")
    bound = tolerance(graph) if rtol is None else rtol
    return _Verification(graph, plan, batches, optimizer or default_optimizer, seed, bound).run(
        steps
    )


class _Verification:
    def __init__(
        self,
        graph: OpGraph,
        plan: Plan,
        batches: Sequence[Any],
        optimizer: OptimizerFn,
        seed: int,
        bound: float,
    ) -> None:
        self._graph = graph
        self._plan = plan
        self._batches = batches
        self._optimizer = optimizer
        self._seed = seed
        self._bound = bound
        self._low: LoweredPlan = lower_plan(graph, plan)
        self._groups = [group for group, _ in plan.schedule.placement]
        self._tensors = [
            [x for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor)]
            for batch in batches
        ]

    def run(self, steps: int) -> Difference | None:
        model = self._model()
        made = call_optimizer(self._optimizer, model.named_parameters())
        unsplit = PartwiseModel(self._graph, self._plan, self._seed)
        specs = compile_plan(
            self._graph,
            self._plan,
            optimizer=self._optimizer,
            seed=self._seed,
            keep_gradients=True,
        )
        seen = Seen()
        feed = partial(TurnFeed, batches=self._tensors)
        runner = partial(WatchedRunner, seen=seen, workshop=Workshop())
        with LocalRun(specs, feed=feed, runner=runner) as run:
            for step in range(steps):
                buffers = dict(model.named_buffers())
                wanted = unsplit.step(
                    step,
                    dict(model.named_parameters()),
                    buffers,
                    self._tensors[step % len(self._tensors)],
                )
                found = self._capture(wanted) if step == 0 else None
                if found is not None:
                    return found
                seen.values.clear()
                losses: list[float | None] = []
                run.train(step, 1, partial(_note_loss, losses))
                found = self._in_step(step, seen, wanted, losses[0] or 0.0, run.gradients())
                if found is not None:
                    return found
                _apply(model, made, wanted)
                found = self._state(step, run.state_dict(), model)
                if found is not None:
                    return found
        return None

    def _model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            model = build_model(self._graph.model_fn, on_meta=False)
        given = isinstance(self._graph.model_fn, nn.Module)
        return copy.deepcopy(model) if given else model

    def _capture(self, wanted: Reference) -> Difference | None:
        """The captured graph, part by part, beside the model itself on its first batch."""
        if any(n.target is SEEDED for n in self._graph.clean.ops):
            return None  # the model's own random numbers are others
        eager = reference_run(
            self._graph,
            self._batches[0],
            self._plan,
            optimizer=self._optimizer,
            steps=1,
            seed=self._seed,
        )
        mine = RunRecord([wanted.loss], [wanted.gradients])
        for gap in gaps(mine, RunRecord(eager.losses, eager.gradients)):
            if not gap.ratio <= self._bound:
                text = f"{gap.text}: the captured graph, cut into parts, is not the model"
                return Difference("capture", gap.what, 0, text)
        return None

    # ---- one step -------------------------------------------------------------------------

    def _in_step(
        self,
        step: int,
        seen: Seen,
        wanted: Reference,
        loss: float,
        gradients: Mapping[str, torch.Tensor],
    ) -> Difference | None:
        found = next(
            itertools.chain(
                self._forwards(step, seen, wanted),
                self._losses(step, loss, wanted),
                self._backwards(step, seen, wanted),
            ),
            None,
        )
        if found is not None:
            return found
        largest = max((float(g.abs().max()) for g in wanted.gradients.values()), default=0.0)
        compare = self._compare(largest)
        for name in sorted({*gradients, *wanted.gradients}):
            if name not in gradients or name not in wanted.gradients:
                text: str | None = "is missing"
            else:
                text = compare(gradients[name], wanted.gradients[name])
            if text is not None:
                return self._parameter(step, name, text, wanted, compare)
        return None

    def _forwards(self, step: int, seen: Seen, wanted: Reference) -> Iterator[Difference]:
        compare = self._compare(0.0)
        for part in wanted.parts:
            for stage in self._low.stages:
                s = stage.index
                for edge in stage.keys("edge:"):
                    text = self._border("received", edge, s, part, seen, part.values, compare)
                    if text is not None:
                        yield self._difference("received", edge, step, s, part, text)
                for edge in stage.edges_out:
                    text = self._border("activation", edge, s, part, seen, part.values, compare)
                    if text is not None:
                        culprit = self._replay(s, part.microbatch, wanted).wrong_forward(compare)
                        yield self._difference("activation", edge, step, s, part, text, culprit)

    def _losses(self, step: int, loss: float, wanted: Reference) -> Iterator[Difference]:
        compare = self._compare(0.0)
        text = compare(torch.tensor(loss).double(), torch.tensor(wanted.loss).double())
        if text is None:
            return
        last = next(s.index for s in self._low.stages if s.has_loss)
        name = self._graph.clean.loss.meta["id"]
        for microbatch in range(self._plan.microbatches):
            culprit = self._replay(last, microbatch, wanted).wrong_forward(compare)
            if culprit is not None:
                part = wanted.parts[microbatch * self._plan.replicas + culprit.replica]
                yield self._difference("loss", name, step, last, part, text, culprit)
        yield Difference("loss", name, step, text, stage=last)

    def _backwards(self, step: int, seen: Seen, wanted: Reference) -> Iterator[Difference]:
        targets = {v.id: v.targets for v in self._low.values}
        for part in wanted.parts:
            largest = max((float(g.abs().max()) for g in part.gradients.values()), default=0.0)
            compare = self._compare(largest)
            for stage in reversed(self._low.stages):
                for edge in stage.edges_out:
                    if edge not in self._low.flow or edge not in part.borders:
                        continue
                    s = stage.index
                    text = self._border("gradient", edge, s, part, seen, part.borders, compare)
                    if text is None:
                        continue
                    for reader in reversed(targets[edge]):
                        replay = self._replay(reader, part.microbatch, wanted)
                        culprit = replay.wrong_backward(compare, [])
                        if culprit is not None:
                            yield self._difference(
                                "gradient", edge, step, reader, part, text, culprit
                            )
                    culprit = self._replay(
                        targets[edge][-1], part.microbatch, wanted
                    ).wrong_backward(compare, [f"edge:{edge}"])
                    yield self._difference(
                        "gradient", edge, step, targets[edge][-1], part, text, culprit
                    )

    def _parameter(
        self,
        step: int,
        name: str,
        text: str,
        wanted: Reference,
        compare: Compare,
    ) -> Difference:
        readers = [s.index for s in self._low.stages if name in s.keys("param:")]
        kind = "parameter gradient"
        for stage in reversed(readers):
            for suspects in ([], [f"param:{name}"]):
                culprit = self._replay(stage, 0, wanted).wrong_backward(compare, suspects)
                if culprit is not None:
                    return self._difference(kind, name, step, stage, None, text, culprit)
        return Difference(kind, name, step, text, stage=readers[-1] if readers else None)

    def _state(
        self, step: int, found: Mapping[str, torch.Tensor], model: nn.Module
    ) -> Difference | None:
        compare = self._compare(1.0 / SMALL)  # updates are compared against a scale of at least 1
        for name, value in model.state_dict().items():
            text = compare(found[name], value.detach())
            if text is not None:
                return Difference("state", name, step, f"{text}, after the optimizer step")
        return None

    # ---- helpers --------------------------------------------------------------------------

    def _border(
        self,
        what: str,
        edge: str,
        stage: int,
        part: Part,
        seen: Seen,
        wanted: Mapping[str, Any],
        compare: Compare,
    ) -> str | None:
        """Compares a value at a border, put together from the ranks of one replica."""
        group, mesh = self._groups[stage], self._plan.stages[stage].mesh
        first = sum(len(self._slice(g).devices) for g in range(group))
        count = len(mesh.devices) // mesh.replicas
        ranks = range(first + part.replica * count, first + (part.replica + 1) * count)
        keys = [(what, edge, stage, part.microbatch, rank) for rank in ranks]
        pieces = [seen.values[key] for key in keys if key in seen.values]
        if len(pieces) < count:
            return "is not there on every rank"
        spec: ShardingSpec = self._low.edge_specs[edge, group]
        return compare_joined(pieces, spec, mesh.inner, wanted[edge], compare)

    def _slice(self, group: int) -> MeshSlice:
        return self._plan.stages[self._groups.index(group)].mesh

    def _replay(self, stage: int, microbatch: int, wanted: Reference) -> StageReplay:
        own = [p for p in wanted.parts if p.microbatch == microbatch]
        scale = loss_scale(self._graph, self._plan)
        return StageReplay(self._plan, self._low, stage, own, scale)

    def _difference(
        self,
        kind: str,
        tensor: str,
        step: int,
        stage: int,
        part: Part | None,
        text: str,
        culprit: Culprit | None = None,
    ) -> Difference:
        microbatch = None if part is None else part.microbatch
        replica = None if part is None else part.replica
        if culprit is None:
            return Difference(kind, tensor, step, text, stage, microbatch, replica)
        place = self._graph.index.get(culprit.op)
        source = "" if place is None else self._graph.ops[place].source
        return Difference(
            kind, tensor, step, culprit.text, stage, microbatch, replica, culprit.op,
            culprit.strategy, source,
        )  # fmt: skip

    def _compare(self, largest: float) -> Compare:
        return comparer(self._bound, largest)


def _note_loss(losses: list[float | None], report: StepResult) -> None:
    losses.append(report.loss)


def _apply(model: nn.Module, optimizer: torch.optim.Optimizer, wanted: Reference) -> None:
    """The optimizer step of the unsplit model, and its new buffers."""
    for name, p in model.named_parameters():
        p.grad = wanted.gradients.get(name)
    optimizer.step()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(wanted.buffers[name])


__all__ = ["Difference", "first_difference"]
