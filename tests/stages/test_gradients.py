"""Parameters and gradients on meshes: ZeRO, tied parameters, parts put together, memory."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear

import raypar as rp
from raypar.comm.group import Group
from raypar.compat import TorchDispatchMode
from raypar.errors import OptimizerError, PlanError, TrainingError
from raypar.graph.capture import capture
from raypar.graph.opgraph import OpGraph
from raypar.plan import MemoryPolicy, MeshSlice, Plan, ScheduleSpec, StagePlan
from raypar.schedules.instructions import Instruction
from raypar.sharding.layout import Axes, ParamLayout, layout_of
from raypar.sharding.spec import RG, R, ShardingSpec, is_shard
from raypar.stages import gradients
from raypar.stages.accounts import measured_memory, predicted_memory
from raypar.stages.compile import compile_plan
from raypar.stages.consolidate import assemble
from raypar.stages.gradients import GradientStore
from raypar.stages.holdings import Workshop
from raypar.stages.interpreter import RankRunner
from raypar.stages.layouts import is_view, reports, stored_piece, taken_ranges, way_of
from raypar.stages.local import LocalRun
from raypar.stages.optimizers import ELEMENTWISE, is_elementwise
from raypar.stages.recipe import Recipe
from raypar.stages.run import StepResult
from raypar.stages.spec import RankSpec
from raypar.testing import assert_plan_equivalent
from raypar.testing.backends import RepeatFeed, start_run
from raypar.testing.equivalence import default_optimizer
from raypar.train.optimizer import check_optimizer_on
from tests._tiers import examples

Mesh = tuple[tuple[int, ...], tuple[str, ...]]

BATCH = (
    torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    torch.randn(8, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
)


class Net(nn.Module):
    """Parameters that divide in dim 0, in dim 1 alone, and not at all; one of them tied."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.tied = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8, bias=False)
        self.again.weight = self.tied.weight
        self.last = nn.Linear(8, 7)
        self.odd = nn.Parameter(torch.randn(7))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.second(torch.tanh(self.first(x))))
        hidden = torch.relu(self.tied(hidden)) + hidden
        hidden = self.last(torch.tanh(self.again(hidden))) * self.odd
        return ((hidden - y) ** 2).mean()


def net() -> nn.Module:
    return Net().double()


@pytest.fixture(scope="module")
def graph() -> OpGraph:
    torch.set_num_threads(1)
    return capture(net, BATCH)


def make_plan(
    graph: OpGraph,
    meshes: Sequence[Mesh],
    zero: Sequence[int],
    *,
    schedule: str = "1f1b",
    cut: str = "again/linear#0",
    microbatches: int = 2,
) -> Plan:
    """One stage, or two of which the second begins with op `cut`."""
    ids = [op.id for op in graph.ops]
    bounds = [0, ids.index(cut), len(ids)] if len(meshes) == 2 else [0, len(ids)]
    stages, taken = [], 0
    for i, (shape, axes) in enumerate(meshes):
        devices = tuple(range(taken, taken + math.prod(shape)))
        taken += len(devices)
        stages.append(
            StagePlan(
                ids[bounds[i]],
                ids[bounds[i + 1] - 1],
                MeshSlice(devices, shape, axes),
                MemoryPolicy("none", zero[i]),
            )
        )
    config = rp.SearchConfig(stages=1, replicas=1, microbatches=microbatches)
    return dataclasses.replace(
        rp.plan(graph, rp.Cluster.local(1), config),
        cluster=(taken,),
        stages=tuple(stages),
        schedule=ScheduleSpec(schedule, tuple((i, 0) for i in range(len(meshes)))),
    )


DATA2: Mesh = ((2,), ("data",))
X2: Mesh = ((2,), ("x",))
GRID: Mesh = ((2, 2), ("data", "x"))
FLAT: Mesh = ((1, 2), ("data", "x"))


# ---- a plan trains like the unsplit model ---------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "zero"),
    [
        pytest.param(mesh, zero, marks=[pytest.mark.thorough] * (zero not in first))
        for mesh, first in ((DATA2, (0, 1, 2, 3)), (X2, (1,)), (GRID, (0, 3)), (FLAT, (2,)))
        for zero in range(4)
    ],
)
def test_one_mesh(graph: OpGraph, mesh: Mesh, zero: int) -> None:
    assert_plan_equivalent(
        net, BATCH, make_plan(graph, [mesh], [zero]), recipe=Recipe(clip_norm=0.05)
    )


@pytest.mark.parametrize(
    ("meshes", "zero"),
    [
        ([DATA2, DATA2], [0, 0]),
        ([DATA2, DATA2], [1, 1]),
        ([GRID, GRID], [2, 2]),
        ([DATA2, DATA2], [3, 1]),
        ([GRID, DATA2], [1, 2]),
        ([X2, ((4,), ("x",))], [1, 3]),
        ([((1,), ("data",)), X2], [0, 2]),
    ],
)
@pytest.mark.parametrize(
    "schedule", ["1f1b", pytest.param("zero_bubble_h1", marks=pytest.mark.thorough)]
)
def test_a_tied_parameter_on_two_meshes(
    graph: OpGraph, meshes: list[Mesh], zero: list[int], schedule: str
) -> None:
    plan = make_plan(graph, meshes, zero, schedule=schedule)
    assert_plan_equivalent(net, BATCH, plan, recipe=Recipe(clip_norm=0.05), steps=2)


class Detached(Net):
    """The second reader of the tied parameter gives it no gradient."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.tied(self.norm(self.second(torch.tanh(self.first(x))))))
        hidden = self.last(hidden @ self.again.weight.detach()) * self.odd
        return ((hidden - y) ** 2).mean()


def detached() -> nn.Module:
    return Detached().double()


@pytest.mark.parametrize(
    ("meshes", "zero"),
    [
        ([DATA2, DATA2], [0, 0]),
        ([DATA2, DATA2], [2, 2]),
        ([GRID, DATA2], [1, 2]),
        ([X2, X2], [1, 0]),
    ],
)
def test_a_tied_parameter_without_a_gradient_on_one_mesh(
    meshes: list[Mesh], zero: list[int]
) -> None:
    plan = make_plan(capture(detached, BATCH), meshes, zero, cut="/detach#0")
    assert_plan_equivalent(detached, BATCH, plan, steps=2)


def _two_chunks(graph: OpGraph, zero: Sequence[int]) -> Plan:
    """Both stages on the same ranks."""
    plan = make_plan(graph, [GRID, GRID], zero, schedule="interleaved_1f1b")
    mesh = plan.stages[0].mesh
    return dataclasses.replace(
        plan,
        cluster=(4,),
        stages=tuple(dataclasses.replace(stage, mesh=mesh) for stage in plan.stages),
        schedule=ScheduleSpec("interleaved_1f1b", ((0, 0), (0, 1))),
    )


@pytest.mark.parametrize("zero", [(1, 1), (2, 2), (2, 3)])
def test_a_parameter_that_two_stages_of_a_rank_share(graph: OpGraph, zero: tuple[int, int]) -> None:
    plan = _two_chunks(graph, zero)
    assert_plan_equivalent(net, BATCH, plan, recipe=Recipe(clip_norm=0.05), steps=2)


def test_updated_parameters_arrive_stage_by_stage(graph: OpGraph) -> None:
    runners = _train(graph, _two_chunks(graph, (1, 1)), steps=1)
    stored = [{n: p.detach() for n, p in r._holdings.stored.items()} for r in runners]
    whole = assemble([r.spec for r in runners], stored)
    outdated = []
    for runner in runners:
        held = runner._holdings
        for stage in (0, 1):
            names = {k[6:] for k in held.stages[stage].program.inputs if k.startswith("param:")}

            def current(name: str, runner: RankRunner = runner) -> bool:
                piece = runner._kept._taken_piece(name)
                return torch.equal(runner._holdings.params[name].detach(), piece.read(whole[name]))

            outdated.append(not all(map(current, names)))
            assert runner._gradients.arrived(stage)
            assert all(map(current, names))
            assert not runner._gradients.arrived(stage)
    assert all(outdated)


def test_both_copies_of_a_tied_parameter_keep_the_same_bits(graph: OpGraph) -> None:
    plan = make_plan(graph, [GRID, DATA2], [1, 2])
    runners = _train(graph, plan, steps=3)
    parts = [{"tied.weight": r._holdings.stored["tied.weight"].detach()} for r in runners]
    whole = []
    for group in (0, 1):
        chosen = [
            part if r.spec.group == group else {} for r, part in zip(runners, parts, strict=True)
        ]
        whole.append(assemble([r.spec for r in runners], chosen)["tied.weight"])
    assert torch.equal(whole[0], whole[1])
    for runner in runners:  # and what programs take is up to date everywhere
        runner._gradients.all_arrived()
        taken = runner._holdings.params["tied.weight"].detach()
        assert torch.equal(taken, whole[0])


def _train(
    graph: OpGraph,
    plan: Plan,
    *,
    steps: int,
    batch: Sequence[torch.Tensor] = BATCH,
    optimizer: Callable[..., torch.optim.Optimizer] = default_optimizer,
) -> list[RankRunner]:
    """Runs a plan on threads and hands out the ranks."""
    specs = compile_plan(graph, plan, optimizer=optimizer)
    runners: dict[int, RankRunner] = {}
    workshop = Workshop()

    def make(spec: RankSpec, world: Group) -> RankRunner:
        runners[spec.rank] = RankRunner(spec, world, workshop=workshop)
        return runners[spec.rank]

    feed = partial(RepeatFeed, tensors=list(batch))
    with LocalRun(specs, feed=feed, runner=make) as run:
        run.train(0, steps)
    return [runners[rank] for rank in range(len(specs))]


def test_the_norm_counts_every_element_once(graph: OpGraph) -> None:
    model = _seeded()
    model(*BATCH).backward()
    expected = nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    for meshes, zero in (([DATA2], [0]), ([GRID], [1]), ([GRID], [3]), ([GRID, DATA2], [2, 1])):
        specs = compile_plan(graph, make_plan(graph, meshes, zero), optimizer=default_optimizer)
        found: list[StepResult] = []
        with start_run("local", specs, list(BATCH)) as run:
            run.train(0, 1, found.append)
        assert found[0].grad_norm == pytest.approx(expected, rel=1e-11)


def _seeded() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return net()


def test_updated_parts_must_come_back(graph: OpGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above would notice a gather that is left out."""
    monkeypatch.setattr(GradientStore, "spread", lambda self: None)
    with pytest.raises(AssertionError, match="step 1"):
        assert_plan_equivalent(net, BATCH, make_plan(graph, [DATA2], [1]))


class _Ops(TorchDispatchMode):  # type: ignore[misc]
    """Counts ops by the shape of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.seen[str(function).removeprefix("aten."), tuple(made.shape)] += 1
        return made


@pytest.mark.parametrize(
    ("meshes", "zero", "first", "schedule"),
    [
        ([((1,), ("data",))] * 2, 0, "mm.default", "1f1b"),
        ([DATA2, DATA2], 0, "mm.out", "zero_bubble_h1"),
        ([DATA2, DATA2], 1, "mm.out", "1f1b"),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in (
                ([((1,), ("data",))] * 2, 0, "mm.default", "zero_bubble_h1"),
                ([DATA2, DATA2], 0, "mm.out", "1f1b"),
                ([DATA2, DATA2], 1, "mm.out", "zero_bubble_h1"),
            )
        ),
    ],
)
def test_products_are_added_to_their_sums_as_they_are_made(
    graph: OpGraph,
    meshes: list[Mesh],
    zero: int,
    first: str,
    schedule: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total: Counter[tuple[str, tuple[int, ...]]] = Counter()
    lock = threading.Lock()

    def watch(name: str) -> None:
        backward = getattr(RankRunner, name)

        def watched(self: RankRunner, now: Instruction) -> None:
            with _Ops() as ops:
                backward(self, now)
            with lock:
                total.update(ops.seen)

        monkeypatch.setattr(RankRunner, name, watched)

    monkeypatch.setattr(gradients, "_BUCKET", 1)  # where parts are summed, large ones are meant
    for name in ("_backward", "_backward_input", "_backward_weight"):
        watch(name)
    plan = make_plan(graph, meshes, [zero, zero], microbatches=4, schedule=schedule)
    assert_plan_equivalent(net, BATCH, plan, steps=1)
    replicas = math.prod(meshes[0][0])
    shapes = [(12, 8), (8, 12), (7, 8)]  # each of one weight, on one of the two stages
    if zero:  # the last is cut in columns: its sum lies turned
        shapes[-1] = shapes[-1][::-1]
    for shape in shapes:
        assert total[first, shape] == replicas
        assert total["addmm_.default", shape] == 3 * replicas
        assert not total["add_.Tensor", shape] + total["add.Tensor", shape]


# ---- layouts --------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ParamLayout, Axes]:
    """A parameter that an op reads in some sharding, on a mesh of one to three axes."""
    sizes = draw(st.lists(st.sampled_from((1, 2, 3)), min_size=1, max_size=3))
    axes = tuple(zip(("data", "x", "y"), sizes, strict=False))
    shape = tuple(draw(st.lists(st.sampled_from((1, 2, 6, 12, 7)), max_size=3)))
    choices = [R, RG, *(f"S{d}" for d in range(len(shape))), "S0/2"]
    held = ShardingSpec(draw(st.lists(st.sampled_from(choices), min_size=len(axes), max_size=3)))
    held = ShardingSpec((RG, *held[1 : len(axes)]))
    if not held.fits(shape, sizes):
        held = ShardingSpec((RG,) * len(axes))
    return layout_of(shape, held, axes, draw(st.integers(0, 3))), axes


def _coordinates(axes: Axes) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(size) for _, size in axes)))


@settings(max_examples=examples(50, 200), deadline=None)
@given(case=layouts())
def test_parts_along_the_gathered_axes_make_up_what_programs_take(
    case: tuple[ParamLayout, Axes],
) -> None:
    layout, axes = case
    whole = torch.arange(math.prod(layout.shape)).view(layout.shape)
    for at in _coordinates(axes):
        way = way_of(layout, axes, at)
        taken = _read(whole, layout, axes, at)
        assert tuple(taken.shape) == way.taken
        own = way.own.read(taken)
        assert torch.equal(own, stored_piece(layout, axes, at).read(whole))
        assert way.cut == (own.numel() < taken.numel())
        assert not is_view(way) or way.own.read(torch.empty(way.taken)).is_contiguous()
        line = [c for c in _coordinates(axes) if _apart(axes, c, at) <= set(way.gather)]
        back = torch.full(way.taken, -1)
        for part, place in zip(way.parts, line, strict=True):
            part.write(back, stored_piece(layout, axes, place).read(whole))
        assert torch.equal(back, taken)


def _read(
    whole: torch.Tensor, layout: ParamLayout, axes: Axes, at: tuple[int, ...]
) -> torch.Tensor:
    for dim, ranges in enumerate(taken_ranges(layout, axes, at)):
        whole = torch.cat([whole.narrow(dim, a, b - a) for a, b in ranges], dim)
    return whole


def _apart(axes: Axes, a: tuple[int, ...], b: tuple[int, ...]) -> set[str]:
    return {name for (name, _), i, j in zip(axes, a, b, strict=True) if i != j}


@settings(max_examples=examples(50, 200), deadline=None)
@given(case=layouts())
def test_every_axis_of_a_partial_gradient_is_summed_over_once(
    case: tuple[ParamLayout, Axes],
) -> None:
    layout, axes = case
    way = way_of(layout, axes, (0,) * len(axes))
    partial_over = {
        n for (n, size), s in zip(axes, layout.held, strict=True) if s == RG and size > 1
    }
    if layout.in_program:
        assert not way.scatter + way.reduce + way.gather
    else:
        assert sorted(way.scatter + way.reduce) == sorted(partial_over)
        assert set(way.scatter) <= set(way.gather)
        assert layout.zero or not way.gather


@settings(max_examples=examples(25, 100), deadline=None)
@given(case=layouts())
def test_reported_parts_cover_a_parameter_once(case: tuple[ParamLayout, Axes]) -> None:
    layout, axes = case
    whole = torch.randn(layout.shape, generator=torch.Generator().manual_seed(0))
    specs, parts, count = [], [], 0
    for rank, at in enumerate(_coordinates(axes)):
        spec = _spec(rank, axes, {"p": layout})
        specs.append(spec)
        part = stored_piece(layout, axes, at).read(whole) if reports(spec, "p") else None
        parts.append({} if part is None else {"p": part})
        count += 0 if part is None else part.numel()
    assert count == whole.numel()
    assert torch.equal(assemble(specs, parts)["p"], whole)
    if any(is_shard(s) and size > 1 for s, (_, size) in zip(layout.stored, axes, strict=True)):
        last = max(i for i, part in enumerate(parts) if part)
        parts[last] = {}
        with pytest.raises(TrainingError, match="elements of 'p'"):
            assemble(specs, parts)


def test_a_frozen_parameter_may_come_from_two_rank_groups() -> None:
    whole, axes = torch.arange(4.0), (("data", 2),)
    cut = ParamLayout((4,), ShardingSpec((RG,)), ShardingSpec(("S0",)), zero=1)
    specs = [_spec(rank, axes, {"p": cut}) for rank in range(2)]
    specs.append(_spec(0, (("data", 1),), {"p": layout_of((4,), cut.held, (("data", 1),), 0)}))
    parts = [{"p": whole[:2]}, {"p": whole[2:]}, {"p": whole.clone()}]
    for order in itertools.permutations(range(3)):
        found = assemble([specs[i] for i in order], [parts[i] for i in order])
        assert torch.equal(found["p"], whole)
    with pytest.raises(TrainingError, match=r"rank 1 sent \(3,\) of 'p'.*is \(2,\)"):
        assemble(specs[:2], [parts[0], {"p": whole[:3]}])


def _spec(rank: int, axes: Axes, params: Mapping[str, ParamLayout]) -> RankSpec:
    size = math.prod(n for _, n in axes)
    fields: dict[str, Any] = dict.fromkeys((f.name for f in dataclasses.fields(RankSpec)), ())
    fields |= {"rank": rank, "world": size, "group": 0, "meshes": (axes,), "bases": (0,)}
    return RankSpec(**fields | {"params": dict(params), "shared": {}})


def test_a_stored_part_outside_of_what_programs_take_is_refused() -> None:
    layout = ParamLayout((4, 3), ShardingSpec.parse("Rg,S0"), ShardingSpec.parse("S0,S0"), zero=1)
    with pytest.raises(PlanError, match=r"stored as S0,S0.*not part of Rg,S0.*zero to 0"):
        way_of(layout, (("data", 2), ("x", 2)), (1, 0))


# ---- memory ---------------------------------------------------------------------------------


def wide() -> nn.Module:
    """12 MB of parameters: some 3 buckets."""
    return nn.Sequential(*(nn.Linear(512, 512) for _ in range(12)))


@pytest.fixture(scope="module")
def wide_graph() -> OpGraph:
    return capture(wide, (torch.ones(8, 512),), lambda out: out.square().mean())


def _measured(graph: OpGraph, mesh: Mesh, zero: int) -> tuple[dict[str, int], dict[str, int]]:
    plan = make_plan(graph, [mesh], [zero])
    runners = _train(graph, plan, steps=1, batch=(torch.ones(8, 512),))
    found = [r.memory() for r in runners]
    assert all(f == found[0] for f in found[1:])
    spec = runners[0].spec
    return found[0], predicted_memory(spec.params, spec.axes, 2)


def test_memory_is_what_the_layouts_say_and_zero_cuts_it(wide_graph: OpGraph) -> None:
    alone, expected = _measured(wide_graph, ((1,), ("data",)), 0)
    assert alone["total"] == pytest.approx(expected["total"], rel=0.02)
    shares = []
    for zero in range(4):
        found, expected = _measured(wide_graph, ((4,), ("data",)), zero)
        for part, nbytes in expected.items():
            assert found[part] == pytest.approx(nbytes, rel=0.02), (zero, part)
        shares.append(found["total"] / alone["total"])
    assert shares[0] == pytest.approx(1.0, rel=0.02)
    assert shares[1] == pytest.approx((1 + 1 + 2 / 4) / 4, rel=0.02)
    assert shares[2] < shares[1]
    assert shares[3] <= 0.27


def test_storages_are_measured_once() -> None:
    base = torch.zeros(10)
    found = measured_memory(parameters=[base, base[:4]], gradients=[base, torch.ones(3)])
    assert found == {"parameters": 40, "gradients": 12, "total": 52}


# ---- optimizers -----------------------------------------------------------------------------


class Kept(torch.optim.Adam):
    """Adds nothing."""


class Own(torch.optim.Adam):
    """Has a step of its own."""

    def step(self, closure: Any = None) -> Any:
        """Calls Adam's."""
        return super().step(closure)


class Declared(Own):
    """Says that it is element-wise."""

    elementwise = True


class Crossed(nn.Module):
    """Two parameters of several stages; each is read without gradient where the other has one."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8, bias=False)
        self.two = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        one, two = self.one.weight, self.two.weight
        x = torch.tanh(linear(x, one) + linear(x, two.detach()))
        x = torch.sin(linear(x, two) + linear(x, one.detach()))
        return (linear(x, two).sum() - target.sum()).square()


def crossed() -> nn.Module:
    return Crossed().double()


def test_owners_wait_for_shared_parameters_in_one_order() -> None:
    graph = capture(crossed, BATCH)
    config = rp.SearchConfig(stages=3, replicas=1, microbatches=1)
    plan = rp.plan(graph, rp.Cluster.local(3), config)
    ids = [op.id for op in graph.ops]
    cuts = [ids.index("/tanh#0") + 1, ids.index("/sin#0") + 1]
    ends = zip([0, *cuts], [*cuts, len(ids)], strict=True)
    stages = tuple(
        dataclasses.replace(stage, first=ids[first], last=ids[end - 1])
        for stage, (first, end) in zip(plan.stages, ends, strict=True)
    )
    plan = dataclasses.replace(plan, stages=stages)
    specs = compile_plan(graph, plan, optimizer=default_optimizer)
    assert specs[0].shared == {"one.weight": (0, 1), "two.weight": (0, 1, 2)}
    assert_plan_equivalent(crossed, BATCH, plan, steps=2)


def test_which_optimizers_are_elementwise() -> None:
    kind: Any
    for kind in ELEMENTWISE:
        kind([nn.Parameter(torch.ones(2))])  # torch wraps `step` when one is first made
        assert is_elementwise(kind), kind
    assert is_elementwise(Kept)
    assert is_elementwise(Declared)
    assert not is_elementwise(Own)
    assert not is_elementwise(torch.optim.Adafactor)
    assert not is_elementwise(torch.optim.Muon)


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_elementwise_optimizers_are_exact_on_parts(graph: OpGraph, kind: Any) -> None:
    plan = make_plan(graph, [DATA2], [2])
    assert_plan_equivalent(net, BATCH, plan, optimizer=lambda p: kind(p, lr=1e-3), steps=2)


def test_an_optimizer_that_needs_whole_parameters_is_refused(graph: OpGraph) -> None:
    optimizer = torch.optim.Adafactor
    for zero in (1, 2, 3):
        specs = compile_plan(graph, make_plan(graph, [DATA2], [zero]), optimizer=optimizer)
        with pytest.raises(
            OptimizerError, match=r"Adafactor.*first.weight.*memory.zero = 0.*AdamW"
        ):
            check_optimizer_on(specs)
        with (
            pytest.raises(OptimizerError, match="Adafactor is not known"),
            start_run("local", specs, list(BATCH)),
        ):
            pass
    check_optimizer_on(compile_plan(graph, make_plan(graph, [DATA2], [0]), optimizer=optimizer))
    assert_plan_equivalent(net, BATCH, make_plan(graph, [GRID], [0]), optimizer=optimizer, steps=2)
