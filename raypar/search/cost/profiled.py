"""The profiled cost model: the programs of a stage really run, on one device, on random inputs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx

from raypar.programs.stage import StageProgram, compile_stage
from raypar.programs.wire import Wire, pack
from raypar.search.cost.analytic import AnalyticCost
from raypar.search.cost.base import CostModel, StageCode, StageCost, register_cost_model
from raypar.search.cost.machine import MeshMachine
from raypar.sharding.collectives import join, part_of, set_context
from raypar.sharding.convert import ALL_GATHER, ALL_TO_ALL, REDUCE_SCATTER
from raypar.sharding.spec import State

_LEAST, _MOST = 5, 40
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
    device = torch.device("cpu")
    program = compile_stage(
        pack(stage.graph) if wire is None else wire,
        name="profiled",
        device=device,
        recompute=stage.recompute,
        trainable=stage.trainable,
        differentiable=stage.differentiable,
        outputs_with_grad=stage.outputs_with_grad,
        changing=stage.changing,
    )
    holders = list(stage.graph.find_nodes(op="placeholder"))
    generator = torch.Generator().manual_seed(0)
    inputs = [_random(node, generator) for node in holders]
    with one_thread(), _alone(dict(stage.axes)) as context, torch.no_grad():
        return _measure(program, inputs, context)


def _measure(program: StageProgram, inputs: list[torch.Tensor], context: _Alone) -> Seconds:
    made: list[Any] = []
    sums = _Sums()
    forward: list[float] = []
    backward: list[float] = []
    first: list[float] = []
    second: list[float] = []

    def timed(found: list[float], run: Callable[..., list[Any]], *arguments: Any) -> list[Any]:
        context.seconds = 0.0
        began = time.thread_time()  # of a core which nobody else is given
        results = run(*arguments)
        found.append(time.thread_time() - began - context.seconds)
        return results

    def box() -> list[Any]:
        tangents = [torch.ones_like(made[i]) for i in program.tangent_outputs]
        return [*(inputs[i] for i in program.kept), *made[program.n_outputs :], *tangents]

    began = time.perf_counter()
    while len(forward) < _LEAST or (
        time.perf_counter() - began < 3 * _BUDGET_S and len(forward) < _MOST
    ):
        made = timed(forward, program.forward, list(inputs))
        if not program.weight_gradients and not program.input_gradients:
            continue
        if program.input_gradients:
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
    return Seconds(_typical(forward), whole, _typical(first) if first else whole, _typical(second))


class _Sums:
    """A sink that adds gradients up, as a rank does over microbatches."""

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}

    def __call__(self, index: int, gradient: torch.Tensor) -> None:
        known = self._sums.get(index)
        if known is None:
            self._sums[index] = gradient.clone()
        else:
            known.add_(gradient)


def _typical(found: Sequence[float]) -> float:
    """The lower quartile of all runs but the first: what other programs disturb least."""
    kept = sorted(found[1:] or found)
    return kept[len(kept) // 4] if kept else 0.0


def _random(node: fx.Node, generator: torch.Generator) -> torch.Tensor:
    """A value for one input: floats near zero, indices that are in range wherever they are used."""
    fake: torch.Tensor = node.meta["val"]
    shape, dtype = tuple(int(n) for n in fake.shape), fake.dtype
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    if not dtype.is_floating_point:
        return torch.randint(0, _index_bound(node), shape, generator=generator, dtype=dtype)
    key = str(node.meta["id"])
    if key.startswith(("buffer:", "global:")):  # variances and counts are positive
        return torch.rand(shape, generator=generator).add_(0.5).to(dtype)
    return torch.randn(shape, generator=generator).mul_(0.05).to(dtype)


_LARGEST_INDEX = 1 << 15


def _index_bound(node: fx.Node) -> int:
    """Below this, an integer is a valid index wherever the graph uses it or what it becomes.

    Follows the value through integer ops to those that read float values beside it (tables,
    logits); the smallest dim of these is safe.
    """
    bound = _LARGEST_INDEX
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        at = stack.pop()
        for user in at.users:
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            for other in user.all_input_nodes:
                value = other.meta.get("val")
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    bound = min([bound, *(int(n) for n in value.shape)])
            made = user.meta.get("val")
            if isinstance(made, torch.Tensor) and not made.is_floating_point():
                bound = min([bound, *(int(n) for n in made.shape if "one_hot" in str(user.target))])
                stack.append(user)
    return max(bound, 1)


class _Alone:
    """A mesh of which only this rank is there: collectives give the right shapes, and are timed.

    Attributes:
        seconds: Time spent in collectives.
        sizes: Axis → ranks along it.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        self.seconds = 0.0
        self.sizes = sizes

    def coordinate(self, axis: str) -> int:
        """This rank is the first on every axis."""
        return 0

    def collective(
        self, kind: str, x: torch.Tensor, cut: State, to: State, axis: str
    ) -> torch.Tensor:
        """What the collective would give if all ranks held the same."""
        began = time.thread_time()
        size = self.sizes[axis]
        if kind == ALL_GATHER:
            result = join([x] * size, cut)
        elif kind == REDUCE_SCATTER:
            result = part_of(x, cut, 0, size).clone()
        elif kind == ALL_TO_ALL:
            result = join([part_of(x, to, 0, size)] * size, cut)
        else:
            result = x.clone()
        self.seconds += time.thread_time() - began
        return result


@contextmanager
def _alone(sizes: dict[str, int]) -> Iterator[_Alone]:
    context = _Alone(sizes)
    set_context(context)
    try:
        yield context
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
