"""The interpreter: one rank walks its instruction list.

The same code runs in a stage actor and in a thread of the in-process backend.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import torch

from raypar.comm.group import Group
from raypar.graph.replay import replay
from raypar.graph.turns import TRACING
from raypar.plan import DATA
from raypar.schedules.instructions import Instruction, Kind
from raypar.sharding.collectives import set_context
from raypar.stages.ahead import compile_ahead
from raypar.stages.batch import first_sample, microbatch_rows
from raypar.stages.compiled import COMPILING_S
from raypar.stages.holdings import HeldStage, Workshop
from raypar.stages.meters import FiniteWatch, SavedMeter
from raypar.stages.pinned import Inputs
from raypar.stages.rank import Rank
from raypar.stages.spec import RankSpec, StepReport
from raypar.stages.transfers import Transfers

GRAD = "grad:"
FORWARD, BACKWARD = 0, 1


class RankRunner(Rank):
    """Holds one rank's stages and runs steps.

    Args:
        spec: What the rank is.
        world: All ranks of the run; subgroups are made here, by all ranks in the same order.
        workshop: Shared by the ranks of one process.

    Raises:
        PlanError: The plan's graph does not fit the model that `model_fn` builds.
        OptimizerError: The optimizer cannot be built on this rank's parameters.
    """

    def __init__(self, spec: RankSpec, world: Group, *, workshop: Workshop | None = None) -> None:
        super().__init__(spec, world, workshop)
        self._replicas = self._mesh.along((DATA,))
        self._transfers = Transfers(spec, world)
        self._arrivals = Inputs.to(self._device)
        self._scaled_by = self._update.scaler.scale
        self._tangents = self._loss_tangents()
        self._at = -1
        self._step = -1
        self._meter = SavedMeter()
        self._handlers: dict[Kind, Callable[[Instruction], None]] = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.BACKWARD_INPUT: self._backward_input,
            Kind.BACKWARD_WEIGHT: self._backward_weight,
            Kind.RECV_FORWARD: self._receive,
            Kind.RECV_BACKWARD: self._receive,
            Kind.SEND_FORWARD: self._send,
            Kind.SEND_BACKWARD: self._send,
            Kind.FREE: self._free,
            Kind.GLOBALS: self._make_globals,
            Kind.GRAD_SYNC: self._sync,
            Kind.NORM: self._norm,
            Kind.OPTIMIZER: self._optimize,
        }
        self._usual_timeout_s: float | None = None
        if spec.engine == "compiled":
            self._usual_timeout_s = world.timeout_s
            world.timeout_s = max(world.timeout_s, COMPILING_S)
            self._compile_ahead()

    # -- set-up -----------------------------------------------------------------------------

    def _compile_ahead(self) -> None:
        set_context(self._mesh)
        self._params = self._parameters()
        with torch.no_grad(), TRACING:  # ranks of one process take turns
            for index, stage in self._holdings.stages.items():
                kinds = {now.kind for now in self.spec.instructions if now.stage == index}
                compile_ahead(stage, kinds, self._device, lambda key: self._argument(key, 0))

    def _parameters(self) -> dict[str, torch.Tensor]:
        return {f"param:{k}": p.detach() for k, p in self._holdings.params.items()}

    def _loss_tangents(self) -> dict[int, torch.Tensor]:
        """Stage → gradient of the scaled global loss by the stage's loss of one microbatch."""
        found = {}
        for stage in self._holdings.stages.values():
            if stage.spec.loss_scale is not None:
                dtype = getattr(torch, stage.spec.nodes["loss_dtype"])
                # Rounded one after the other: a scale that the loss's dtype cannot hold overflows
                # for every M, as it does where the whole batch is computed at once.
                scale = torch.tensor(self._scaled_by, dtype=dtype, device=self._device)
                found[stage.spec.index] = scale * stage.spec.loss_scale
        return found

    # -- a step -----------------------------------------------------------------------------

    def step(self, step: int, inputs: Mapping[str, torch.Tensor]) -> StepReport:
        """Runs one step.

        Args:
            step: Step number, 0-based; part of the key of every random number.
            inputs: What `raypar.stages.batch.shard_batch` picks for this rank.

        Raises:
            CommError: A peer is gone, a deadline passed or the group was aborted.
            OptimizerError: The optimizer raised.
        """
        self._step = step
        self._inputs = self._arrivals.put(inputs)
        scaler = self._update.scaler
        if scaler.scale != self._scaled_by:
            self._scaled_by = scaler.scale
            self._tangents = self._loss_tangents()
        self._report = StepReport(
            step,
            lr=self._update.learning_rate,
            loss_scale=scaler.scale if scaler.active else None,
        )
        self._values: dict[tuple[str, int], torch.Tensor] = {}
        self._saved: dict[tuple[int, int], list[Any]] = {}
        self._halves: dict[tuple[int, int], list[Any]] = {}
        self._globals: dict[str, torch.Tensor] = {}
        self._watch = FiniteWatch()
        self._seconds = dict.fromkeys(("compute", "recv", "sync", "optimizer"), 0.0)
        self._passes = {index: [0.0, 0.0] for index in self._holdings.stages}
        self._old_buffers = dict(self._holdings.buffers)
        self._params = self._parameters()
        self._gradients.begin()
        set_context(self._mesh)
        began = time.perf_counter()
        stamps = array("d", (began,))
        with torch.no_grad():
            for position, instruction in enumerate(self.spec.instructions):
                self._at = position
                self._transfers.post(position)
                self._handlers[instruction.kind](instruction)
                stamps.append(time.perf_counter())
                self._meter.mark()
            self._transfers.finish()
        stamps.append(time.perf_counter())
        self._report.stamps = stamps.tobytes()
        self._seconds["total"] = time.perf_counter() - began
        self._report.seconds = self._seconds
        self._report.passes = {i: (both[0], both[1]) for i, both in self._passes.items()}
        if self._meter.open:
            self._report.peak_saved = dict(self._meter.peaks)
            self._report.most_saved = self._meter.most
            self._report.saved_over = tuple(self._meter.marks)
            self._report.held = self.memory()
            self._meter.close()
        self._old_buffers = {}
        self._at = -1
        if self._usual_timeout_s is not None:  # all that is to be compiled is
            self._world.timeout_s, self._usual_timeout_s = self._usual_timeout_s, None
        return self._report

    def _forward(self, now: Instruction) -> None:
        stage, microbatch = self._stage(now)
        self._await_parameters(stage.spec.index)
        began = time.perf_counter()
        program = stage.program
        arguments = [self._argument(key, microbatch) for key in program.inputs]
        kept = [arguments[i] for i in program.kept]
        results = program.forward(arguments)
        saved = results[program.n_outputs :]
        index = stage.spec.index
        if program.tangent_outputs:
            self._saved[index, microbatch] = kept + saved
            self._measure(stage, microbatch, kept + saved)
        outputs = results[: program.n_outputs]
        for edge, value in zip(stage.spec.edges_out, outputs, strict=False):
            value = value.contiguous()
            self._values[edge, microbatch] = value
            self._watch.activation(index, value)
        place = len(stage.spec.edges_out)
        if stage.spec.loss_scale is not None:
            self._watch.loss(index, outputs[place])
            place += 1
        for name, value in zip(stage.spec.updates, outputs[place:], strict=True):
            self._holdings.buffers[name] = value
        self._computed(index, FORWARD, began)

    def _await_parameters(self, stage: int) -> None:
        """What the optimizers of other ranks changed arrives while earlier stages go forward."""
        began = time.perf_counter()
        if self._gradients.arrived(stage):
            waited = time.perf_counter() - began
            self._seconds["sync"] += waited
            self._report.awaited += waited

    def _computed(self, stage: int, which: int, began: float) -> None:
        took = time.perf_counter() - began
        self._seconds["compute"] += took
        self._passes[stage][which] += took

    def _argument(self, key: str, microbatch: int) -> torch.Tensor:
        kind, _, name = key.partition(":")
        if kind == "param":
            return self._params[key]
        if kind == "edge":
            return self._values[name, microbatch]
        if kind == "buffer":
            return self._holdings.buffers[name]
        if kind == "in":
            dim = self.spec.batch_dims[int(name)]
            return microbatch_rows(self._inputs[key], dim, microbatch, self.spec.microbatches)
        if kind == "global":
            return self._globals[name]
        if kind == "const":
            return self._holdings.constants[key]
        return torch.tensor(
            [self.spec.seed, self._step, first_sample(self.spec, microbatch)], dtype=torch.int64
        )

    def _backward(self, now: Instruction) -> None:
        stage, microbatch = self._stage(now)
        began = time.perf_counter()
        box = self._backward_box(stage, microbatch)
        if box is not None:
            gradients = stage.program.backward(box, self._gradients.sink(stage.spec.index))
            self._give_back(stage, microbatch, gradients)
        else:  # what it received decides over indices only: peers still wait for gradients
            self._give_back(stage, microbatch, [])
        self._meter.drop(stage.spec.index, microbatch)
        self._computed(stage.spec.index, BACKWARD, began)

    def _backward_box(self, stage: HeldStage, microbatch: int) -> list[Any] | None:
        box = self._saved.pop((stage.spec.index, microbatch), None)
        if box is None:
            return None
        edges = stage.spec.edges_out
        for position in stage.program.tangent_outputs:
            if position < len(edges):
                box.append(self._values[GRAD + edges[position], microbatch])
            else:
                box.append(self._tangents[stage.spec.index])
        return box

    def _give_back(self, stage: HeldStage, microbatch: int, gradients: list[Any]) -> None:
        found = stage.program.input_gradients
        for edge in stage.spec.differentiable:
            index = found.get(edge)
            gradient = None if index is None else gradients[index]
            if gradient is None:
                shape, dtype = self.spec.shapes[edge]
                sizes = [size for name, size in self.spec.axes if name != DATA]
                local = stage.spec.arrivals[edge].local_shape(shape, sizes)
                gradient = torch.zeros(local, dtype=getattr(torch, dtype), device=self._device)
            self._accumulate((GRAD + edge, microbatch), gradient)

    def _accumulate(self, key: tuple[str, int], gradient: torch.Tensor) -> None:
        known = self._values.get(key)
        self._values[key] = gradient.contiguous() if known is None else known + gradient

    def _backward_input(self, now: Instruction) -> None:
        stage, microbatch = self._stage(now)
        began = time.perf_counter()
        box = self._backward_box(stage, microbatch)
        program = stage.program
        if box is not None and not program.input_gradients:
            self._give_back(
                stage, microbatch, program.backward(box, self._gradients.sink(stage.spec.index))
            )
            self._meter.drop(stage.spec.index, microbatch)
        elif box is not None:
            later = [box[i] for i in program.weight_kept]
            results = program.backward_input(box)
            count = program.n_inputs_grad
            self._halves[stage.spec.index, microbatch] = later + results[count:]
            self._measure(stage, microbatch, later + results[count:])
            self._give_back(stage, microbatch, results[:count])
        else:
            self._give_back(stage, microbatch, [])
        self._computed(stage.spec.index, BACKWARD, began)

    def _backward_weight(self, now: Instruction) -> None:
        stage, microbatch = self._stage(now)
        began = time.perf_counter()
        box = self._halves.pop((stage.spec.index, microbatch), None)
        if box is not None:
            stage.program.backward_weight(box, self._gradients.sink(stage.spec.index))
        self._meter.drop(stage.spec.index, microbatch)
        self._computed(stage.spec.index, BACKWARD, began)

    # -- transfers --------------------------------------------------------------------------

    def _receive(self, now: Instruction) -> None:
        began = time.perf_counter()
        value = self._transfers.receive(now)
        assert now.value is not None and now.microbatch is not None
        if now.kind is Kind.RECV_FORWARD:
            self._values[now.value, now.microbatch] = value
        else:
            self._accumulate((GRAD + now.value, now.microbatch), value)
        self._seconds["recv"] += time.perf_counter() - began

    def _send(self, now: Instruction) -> None:
        assert now.value is not None and now.microbatch is not None
        name = now.value if now.kind is Kind.SEND_FORWARD else GRAD + now.value
        self._transfers.send(now, self._values[name, now.microbatch])

    def _free(self, now: Instruction) -> None:
        assert now.value is not None and now.microbatch is not None
        self._values.pop((now.value, now.microbatch), None)

    # -- once a step ------------------------------------------------------------------------

    def _make_globals(self, now: Instruction) -> None:
        """Counts of the whole batch (masked means and the like), before the first forward."""
        parts = self.spec.microbatches * self.spec.replicas
        for stage in self._holdings.stages.values():
            graph = stage.globals_program
            if graph is None:
                continue
            holders = [n for n in graph.nodes if n.op == "placeholder"]
            totals: list[torch.Tensor] = []
            for microbatch in range(self.spec.microbatches):
                given = {n: self._argument(n.meta["id"], microbatch) for n in holders}
                shares = replay(graph, given)
                if totals:
                    totals = [t + s for t, s in zip(totals, shares, strict=True)]
                else:
                    totals = list(shares)
            for (name, power), total in zip(stage.spec.globals, totals, strict=True):
                if self._replicas is not None:
                    total = total.contiguous().clone()
                    self._replicas.all_reduce(total, name=f"count {name}").wait()
                self._globals[name] = total * float(parts) ** power if power else total

    def _sync(self, now: Instruction) -> None:
        """A stage's gradients are complete: its last buckets travel while other stages work.

        They are waited for in NORM, together with all others.
        """
        assert now.stage is not None
        self._gradients.check_complete(now.stage)

    def _norm(self, now: Instruction) -> None:
        """Global loss and gradient norm, on every rank; one that is not finite is not applied."""
        began = time.perf_counter()
        scales = {i: s.spec.loss_scale or 0.0 for i, s in self._holdings.stages.items()}
        loss = self._watch.global_share(scales)
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        totals[0] = self._gradients.finish(self._device)
        own = float(totals[0])
        if loss is not None:  # of the ranks of a replica one counts; NaN or infinity of any does
            totals[1] = loss if self.spec.leads else loss * 0.0
        if self._world.size > 1:
            self._world.all_reduce(totals, name="gradient norm and loss").wait()
        squares, self._loss = totals.tolist()
        report = self._report
        factor = self._update.scaler.inverse
        report.grad_norm = norm = squares**0.5 * factor
        report.loss = loss if self.spec.leads else None
        if not (isfinite(squares) and isfinite(self._loss)):
            report.applied = False
            report.non_finite = self._watch.blame(self._holdings.stages, isfinite(own))
            self._overflowed(report)
        if self.spec.keep_gradients:
            self._gradients.scale(factor)
            self._gradients.keep()
            factor = 1.0
        if report.applied:
            limit = self.spec.recipe.clip_norm
            self._gradients.scale(factor * min(1.0, limit / (norm + 1e-6)) if limit else factor)
        self._seconds["sync"] += time.perf_counter() - began

    def _overflowed(self, report: StepReport) -> None:
        """A step that is not finite: skipped where a smaller loss scale may help, else the end.

        Buffers are what forward made of them, as they are in torch after a step that its scaler
        skips, unless forward itself was not finite.
        """
        report.skipped = self._update.scaler.overflowed()
        if not report.skipped and report.non_finite is not None:
            report.non_finite += self._update.scaler.story()
        if not (report.skipped and isfinite(self._loss)):
            self._holdings.buffers.update(self._old_buffers)

    def _optimize(self, now: Instruction) -> None:
        if not self._report.applied:
            return
        began = time.perf_counter()
        self._gradients.assign()
        self._update.step(self._step)
        self._gradients.spread()
        self._update.applied(self._step, self._loss)
        self._seconds["optimizer"] += time.perf_counter() - began

    # -- what is held between forward and backward ------------------------------------------

    def _measure(self, stage: HeldStage, microbatch: int, box: list[Any]) -> None:
        if not self._meter.open:
            return
        free = [
            *self._params.values(), *self._inputs.values(), *self._globals.values(),
            *self._holdings.constants.values(), *self._tangents.values(),
            *(b for n, b in self._holdings.buffers.items() if n not in stage.spec.updates),
        ]  # fmt: skip
        self._meter.hold(stage.spec.index, microbatch, box, free)

    def _stage(self, now: Instruction) -> tuple[HeldStage, int]:
        assert now.stage is not None and now.microbatch is not None
        return self._holdings.stages[now.stage], now.microbatch

    # -- from outside -----------------------------------------------------------------------

    def positions(self) -> str:
        """The instruction it stands at; safe from any thread."""
        at = self._at
        if at < 0:
            if self._forwards.standing:
                return self._forwards.standing
            return f"between steps (last step {self._step})"
        return f"step {self._step}, instruction {at} of {len(self.spec.instructions)}: " + str(
            self.spec.instructions[at]
        )
