"""The profiled cost model: the programs of a stage really run, on one device, on random inputs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch

from raypar.programs.products import Gradient, Product, as_tensor
from raypar.programs.stage import StageProgram, compile_stage
from raypar.programs.wire import Wire, pack
from raypar.search.cost.analytic import AnalyticCost
from raypar.search.cost.base import CostModel, StageCode, StageCost, register_cost_model
from raypar.search.cost.machine import MeshMachine
from raypar.search.cost.stage_job import Alone, Clock, StageJob, job_of
from raypar.search.cost.working import most_held
from raypar.search.measure import ProfiledStage
from raypar.sharding.collectives import set_context

_LEAST, _MOST = 5, 40
_FEWEST = 3
"""Least runs where whoever asks has little time."""
_BUDGET_S = 0.4
"""Longest that one program is repeated, in seconds, once it ran `_LEAST` times."""


class Seconds(NamedTuple):
    """Measured compute of a stage's programs."""

    forward: float
    backward: float
    backward_input: float
    backward_weight: float


@register_cost_model
class ProfiledCost(CostModel):
    """Measures compute in this process, on one thread; all else is the analytic model's.

    Equal programs are measured once per process. Collectives are left out of the measured time (no
    other rank is there) and priced by the analytic model. What other devices of the same machine
    take away (memory bandwidth, a core's second thread) is not in the measurement.
    """

    name = "profiled"
    _known: ClassVar[dict[str, Seconds]] = {}

    def stage_cost(
        self, stage: StageCode, machine: MeshMachine, *, optimizer_states: int = 2
    ) -> StageCost:
        """What `stage` costs on one device of `machine`. See `CostModel`."""
        rest = AnalyticCost().stage_cost(stage, machine, optimizer_states=optimizer_states)
        wire = pack(stage.graph)
        key = program_hash(stage, wire)
        if key not in self._known:
            self._known[key] = profile(stage, wire)
        return rest.with_seconds(*self._known[key])


def program_hash(stage: StageCode, wire: Wire) -> str:
    """Equal for stages whose programs are equal; names of layers do not count."""
    holders = stage.graph.find_nodes(op="placeholder")
    marks = [_marks(stage, str(n.meta["id"])) for n in holders]
    calls = [(*node[:1], *node[2:]) for node in wire["nodes"]]
    form = (calls, wire["output"], marks, stage.recompute, stage.outputs_with_grad)
    return hashlib.sha256(repr((form, torch.__version__)).encode()).hexdigest()


def _marks(stage: StageCode, key: str) -> tuple[str, bool]:
    """What the programs depend on of an input's name."""
    kind, _, name = key.partition(":")
    return kind, name in stage.trainable or name in stage.differentiable or name in stage.changing


def profile(stage: StageCode, wire: Wire | None = None) -> Seconds:
    """Compiles a stage as its rank would and measures its programs on random inputs."""
    return Seconds(*profile_job(job_of(stage, wire)).seconds)


def profile_job(
    job: StageJob, device: torch.device | None = None, *, budget_s: float | None = None
) -> ProfiledStage:
    """Compiles a stage as its rank would, and measures its programs and what they hold.

    Args:
        job: The stage.
        device: Where; default: this process's CPU, of which one thread is used.
        budget_s: Seconds for which programs are repeated, once they ran a few times.
    """
    least = _LEAST if budget_s is None else _FEWEST
    budget_s = 3 * _BUDGET_S if budget_s is None else budget_s
    began = time.perf_counter()
    device = device or torch.device("cpu")
    program = compile_stage(
        job.wire,
        name="profiled",
        device=device,
        recompute=job.recompute,
        trainable=job.trainable,
        differentiable=job.differentiable,
        outputs_with_grad=job.outputs_with_grad,
        changing=job.changing,
    )
    inputs = job.inputs(device)
    context = Alone(dict(job.axes), Clock(device))
    with one_thread(), _in(context), torch.no_grad():
        sums = _Sums()
        bound = (least, budget_s)
        seconds = _measure(program, inputs, context, sums, bound, halves=job.halves)
        tangents = _tangents(program, program.forward(list(inputs)))
        given = [*inputs, *tangents, *sums.values()]
        sums.apart = True
        held = most_held(lambda: _once(program, inputs, tangents, sums), given, device)
    # Cost models count received values that backward reads among what is held for it.
    edges = [i for i in program.kept if program.inputs[i].startswith("edge:")]
    held += sum(inputs[i].nbytes for i in edges)
    return ProfiledStage(seconds, held, time.perf_counter() - began)


def _tangents(program: StageProgram, made: Sequence[Any]) -> list[torch.Tensor]:
    return [torch.ones_like(made[i]) for i in program.tangent_outputs]


def _once(
    program: StageProgram, inputs: list[torch.Tensor], tangents: list[torch.Tensor], sums: _Sums
) -> None:
    """One forward and backward pass that holds what a rank holds between them."""
    made = program.forward(list(inputs))
    if not program.weight_gradients and not program.input_gradients:
        return
    box = [*(inputs[i] for i in program.kept), *made[program.n_outputs :], *tangents]
    made.clear()
    program.backward(box, sums)


def _measure(
    program: StageProgram,
    inputs: list[torch.Tensor],
    context: Alone,
    sums: _Sums,
    bound: tuple[int, float],
    *,
    halves: bool,
) -> Seconds:
    least, budget_s = bound
    halves = halves and bool(program.input_gradients)
    made: list[Any] = []
    forward: list[float] = []
    backward: list[float] = []
    first: list[float] = []
    second: list[float] = []

    def timed(found: list[float], run: Callable[..., list[Any]], *arguments: Any) -> list[Any]:
        context.seconds = 0.0
        began = context.clock()
        results = run(*arguments)
        found.append(context.clock() - began - context.seconds)
        return results

    def box() -> list[Any]:
        kept = (inputs[i] for i in program.kept)
        return [*kept, *made[program.n_outputs :], *_tangents(program, made)]

    began = time.perf_counter()
    while len(forward) < least or (time.perf_counter() - began < budget_s and len(forward) < _MOST):
        made = timed(forward, program.forward, list(inputs))
        if not program.weight_gradients and not program.input_gradients:
            continue
        if halves:
            given = box()
            later = [given[i] for i in program.weight_kept]
            results = timed(first, program.backward_input, given)
            later += results[program.n_inputs_grad :]
            del results, given
            timed(second, program.backward_weight, later, sums)
        given = box()
        made.clear()
        timed(backward, program.backward, given, sums)
    whole = _typical(backward)
    if program.input_gradients and not halves:
        return Seconds(_typical(forward), whole, 0.0, 0.0)
    return Seconds(_typical(forward), whole, _typical(first) if first else whole, _typical(second))


class _Sums:
    """A sink that adds gradients up, as a rank does over microbatches.

    Attributes:
        apart: Whether products are made before they are added, as by ranks that cut their sums. So
            bytes are counted, to be on the safe side: which gradients are cut is not known here.
    """

    def __init__(self) -> None:
        self.apart = False
        self._sums: dict[int, torch.Tensor] = {}

    def __call__(self, index: int, gradient: Gradient) -> None:
        known = self._sums.get(index)
        if self.apart:
            gradient = as_tensor(gradient)
        if isinstance(gradient, Product):
            if known is None:
                self._sums[index] = gradient.tensor()
            else:
                gradient.add_to(known)
        elif known is None:
            self._sums[index] = gradient.clone()
        else:
            known.add_(gradient)

    def values(self) -> list[torch.Tensor]:
        """The sums."""
        return list(self._sums.values())


def _typical(found: Sequence[float]) -> float:
    """The lower quartile of all runs but the first: what other programs disturb least."""
    kept = sorted(found[1:] or found)
    return kept[len(kept) // 4] if kept else 0.0


@contextmanager
def _in(context: Alone) -> Iterator[None]:
    """Collectives are those of a mesh of one."""
    set_context(context)
    try:
        yield
    finally:
        set_context(None)


@contextmanager
def one_thread() -> Iterator[None]:
    """Has torch work on one thread for a while."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
