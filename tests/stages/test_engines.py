"""Stages that are compiled, or replayed from graphs whose memory is static, train the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import raypar as rp
from raypar.errors import PlanError
from raypar.programs.wire import communicates
from raypar.search.config import SearchConfig
from raypar.search.plan import plan as make_plan
from raypar.stages import compiled, engines, interpreter
from raypar.stages.compile import compile_plan
from raypar.stages.graphed import GraphedStage, Graphs
from raypar.stages.spec import RankSpec
from raypar.testing import models
from raypar.testing.backends import start_run
from raypar.testing.equivalence import (
    RunRecord,
    _note,
    compare,
    default_optimizer,
    reference_run,
    tolerance,
)

SHAPES: tuple[dict[str, Any], ...] = (
    {"stages": 1, "replicas": 1, "microbatches": 1},
    {"stages": 2, "replicas": 1, "microbatches": 4, "schedule": "1f1b"},
    {"stages": 2, "replicas": 2, "microbatches": 2, "schedule": "gpipe"},
    {"stages": 2, "replicas": 1, "microbatches": 2, "recompute": "full"},
    {"stages": 2, "replicas": 1, "microbatches": 4, "schedule": "zero_bubble_h1"},
    {"stages": 1, "replicas": 1, "tensor": 2, "microbatches": 2},
    {"stages": 1, "replicas": 2, "zero": 3, "microbatches": 2},  # forward gathers parameters
)


class StaticMemory:
    """Graphs without a GPU: nothing runs at capture, and each replay writes the same memory."""

    def __init__(self) -> None:
        self.replays = 0

    def capture(
        self, work: Callable[[], list[torch.Tensor]]
    ) -> tuple[list[torch.Tensor], Callable[[], None]]:
        first = work()
        # Views of what enters keep their memory; what is made gets some, full of rubbish.
        known = {t.data_ptr() for t in work()} & {t.data_ptr() for t in first}
        static = [
            t if t.data_ptr() in known or not t.numel() else torch.full_like(t, 77) for t in first
        ]

        def replay() -> None:
            self.replays += 1
            for held, made in zip(static, work(), strict=True):
                if held.data_ptr() != made.data_ptr():
                    held.copy_(made)

        return static, replay


def specs_of(name: str, shape: dict[str, Any], engine: Any) -> tuple[Any, Any, Any, list[RankSpec]]:
    case = models.case(name)
    batch = case.batch(0, 8)
    graph = rp.capture(case.model_fn, batch, case.loss_fn, case.batch_dims)
    chosen = make_plan(graph, rp.Cluster.local(4), SearchConfig(**shape))
    specs = compile_plan(
        graph, chosen, optimizer=default_optimizer, keep_gradients=True, engine=engine
    )
    return graph, batch, chosen, specs


def assert_trains_the_same(name: str, shape: dict[str, Any], engine: str) -> None:
    graph, batch, chosen, specs = specs_of(name, shape, engine)
    record = RunRecord()
    with start_run("local", specs, models.tensors(batch)) as run:
        for step in range(3):
            run.train(step, 1, lambda result: _note(record, result))
            record.gradients.append(run.gradients())
        record.state_dict = run.state_dict()
    assert not compare(record, reference_run(graph, batch, chosen), tolerance(graph))


@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_train_the_same(shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StaticMemory] = []

    def fake(device: torch.device) -> Graphs:
        made.append(StaticMemory())
        return made[-1]

    monkeypatch.setattr(engines, "graphs_for", fake)
    assert_trains_the_same("mlp", shape, "cuda_graph")
    graphs = sum(g.replays for g in made)
    plain = shape.get("schedule") == "zero_bubble_h1" or shape.get("zero") == 3
    assert (graphs == 0) == plain


def test_buffers_that_change_enter_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norm's running statistics are new tensors in every forward."""
    monkeypatch.setattr(engines, "graphs_for", lambda device: StaticMemory())
    assert_trains_the_same("cnn", {"stages": 2, "replicas": 1, "microbatches": 4}, "cuda_graph")


def test_a_tied_embedding_enters_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "graphs_for", lambda device: StaticMemory())
    assert_trains_the_same("gpt", {"stages": 2, "replicas": 1, "microbatches": 4}, "cuda_graph")


def test_a_slot_for_each_microbatch_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPipe holds all four at once, a single stage one: memory is not held for more."""
    stages: list[GraphedStage] = []
    made = GraphedStage.__init__

    def noted(self: GraphedStage, *args: Any) -> None:
        made(self, *args)
        stages.append(self)

    monkeypatch.setattr(GraphedStage, "__init__", noted)
    monkeypatch.setattr(engines, "graphs_for", lambda device: StaticMemory())
    assert_trains_the_same(
        "mlp", {"stages": 2, "replicas": 1, "microbatches": 4, "schedule": "gpipe"}, "cuda_graph"
    )
    assert [s.slots for s in stages] == [4, 4]
    stages.clear()
    assert_trains_the_same("mlp", {"stages": 1, "replicas": 1, "microbatches": 4}, "cuda_graph")
    assert [s.slots for s in stages] == [1]


def test_what_cannot_be_captured_runs_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing:
        def capture(self, work: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(engines, "graphs_for", lambda device: Refusing())
    assert_trains_the_same("mlp", {"stages": 1, "replicas": 1, "microbatches": 4}, "cuda_graph")
    assert "not permitted when stream is capturing" in caplog.text


def test_dropout_is_not_graphed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key is read by the host: a graph would draw the same numbers for ever."""
    monkeypatch.setattr(engines, "graphs_for", lambda device: StaticMemory())
    told: list[str] = []
    monkeypatch.setattr(engines._log, "warning", lambda text, *values: told.append(text % values))
    assert_trains_the_same(
        "gpt_dropout", {"stages": 1, "replicas": 1, "microbatches": 4}, "cuda_graph"
    )
    assert "random numbers" in told[0]


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4], SHAPES[5]])
def test_traced_programs_train_the_same(
    shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
        traced.append(graph)
        return graph

    monkeypatch.setattr(compiled, "compile_fixed", keep)
    assert_trains_the_same("mlp", shape, "compiled")
    assert traced


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(("mlp", shape) for shape in SHAPES[3:6]),
        ("gpt_dropout", SHAPES[2]),  # a key for random numbers
        ("masked_mean", SHAPES[2]),  # counts of the whole batch
        ("cnn", SHAPES[4]),  # buffers that forward replaces
    ],
)
def test_steps_give_programs_what_they_were_compiled_for(
    name: str, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is made before the first step, and no step comes with another form, to compile anew."""
    forms: dict[int, list[Any]] = {}
    steps: list[int] = []

    def noting(graph: torch.fx.GraphModule) -> Callable[..., Any]:
        assert not steps
        own = forms.setdefault(len(forms), [])

        def run(*tensors: torch.Tensor) -> Any:
            own.append([(t.shape, t.stride(), t.dtype, t.requires_grad) for t in tensors])
            return graph(*tensors)

        return run

    step = interpreter.RankRunner.step

    def noted(runner: Any, number: int, inputs: Any) -> Any:
        steps.append(number)
        return step(runner, number, inputs)

    monkeypatch.setattr(compiled, "compile_fixed", noting)
    monkeypatch.setattr(interpreter.RankRunner, "step", noted)
    assert_trains_the_same(name, shape, "compiled")
    assert steps
    for own in forms.values():
        assert len(own) > 1
        assert all(form == own[0] for form in own)


def test_what_cannot_run_on_made_up_values_is_compiled_in_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A division by integers of the batch, which are made up as zeros."""

    class Averaged(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(16, 4)

        def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return self.table(ids // lengths).square().mean()

    made: list[torch.fx.GraphModule] = []
    monkeypatch.setattr(compiled, "compile_fixed", lambda graph: made.append(graph) or graph)
    batch = (torch.arange(8) + 3, torch.full((8,), 2))
    graph = rp.capture(Averaged, batch)
    chosen = make_plan(graph, rp.Cluster.local(1), SearchConfig(stages=1, microbatches=2))
    specs = compile_plan(graph, chosen, optimizer=default_optimizer, engine="compiled")
    record = RunRecord()
    with start_run("local", specs, models.tensors(batch)) as run:
        assert len(made) == 1
        run.train(0, 2, lambda result: _note(record, result))
    reference = reference_run(graph, batch, chosen)
    assert record.losses == pytest.approx(reference.losses[:2], rel=1e-5)
    assert len(made) == 3  # forward again, and backward


@pytest.mark.parametrize("shape", [{"stages": 1, "zero": 3}, {"stages": 2, "zero": 3}])
def test_stages_that_exchange_values_wait_for_the_first_step(
    shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-3 forward gathers parameters: all its ranks have to be there."""
    monkeypatch.setattr(compiled, "compile_fixed", lambda graph: graph)
    shape = {"replicas": 2, "microbatches": 2, **shape}
    _, _, _, specs = specs_of("mlp", shape, "compiled")
    assert all(communicates(stage.nodes["graph"]) for spec in specs for stage in spec.stages)
    assert_trains_the_same("mlp", shape, "compiled")


def test_the_usual_deadline_holds_after_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compile_fixed", lambda graph: graph)
    _, batch, _, specs = specs_of("mlp", SHAPES[1], "compiled")
    seen: list[tuple[float, float]] = []
    step = interpreter.RankRunner.step

    def noted(runner: Any, number: int, inputs: Any) -> Any:
        before = runner._world.timeout_s
        report = step(runner, number, inputs)
        seen.append((before, runner._world.timeout_s))
        return report

    monkeypatch.setattr(interpreter.RankRunner, "step", noted)
    with start_run("local", specs, models.tensors(batch)) as run:
        run.train(0, 2)
    usual = min(after for _, after in seen)
    assert usual < compiled.COMPILING_S
    assert sorted(seen) == [(usual, usual)] * 2 + [(compiled.COMPILING_S, usual)] * 2


@pytest.mark.parametrize(
    "engine", ["compiled", pytest.param("cuda_graph", marks=pytest.mark.thorough)]
)
def test_what_has_data_dependent_sizes_runs_as_it_is(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that is made for one microbatch's sizes would be wrong for the next."""
    told: list[str] = []
    monkeypatch.setattr(engines._log, "warning", lambda text, *values: told.append(text % values))
    monkeypatch.setattr(engines, "graphs_for", lambda device: StaticMemory())
    monkeypatch.setattr(compiled, "compile_fixed", lambda graph: graph)
    assert_trains_the_same("moe_sparse", SHAPES[1], engine)
    assert any("sizes in it depend on the data" in text for text in told)


@pytest.mark.thorough  # the compiler itself takes 25 s; what it is given is shown above
@pytest.mark.slow
def test_compiled_programs_train_the_same() -> None:
    assert_trains_the_same("mlp", {"stages": 2, "replicas": 1, "microbatches": 2}, "compiled")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("no such kernel\n\nSet TORCHDYNAMO_VERBOSE=1 for", r"RuntimeError: no such kernel\)"),
        ("No working C++ compiler found in torch", r"install g\+\+, or name one in .* CXX"),
    ],
)
def test_a_compiler_that_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, said: str, told: str
) -> None:
    def fail(graph: torch.fx.GraphModule) -> Any:
        raise RuntimeError(said)

    monkeypatch.setattr(compiled, "compile_fixed", fail)
    with pytest.raises(PlanError, match=rf"stage 0 forward.*{told}.*engine = 'eager'"):
        assert_trains_the_same("mlp", {"stages": 1, "replicas": 1, "microbatches": 1}, "compiled")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where no GPU is")
def test_graphs_need_a_gpu() -> None:
    with pytest.raises(PlanError, match=r"'cuda_graph' needs ranks on GPUs.*'eager'"):
        assert_trains_the_same("mlp", {"stages": 1, "replicas": 1, "microbatches": 1}, "cuda_graph")


def test_what_is_traced_can_be_compiled_while_another_thread_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then torch makes graph modules whose code is written late, which Dynamo refuses."""
    kinds: list[type] = []

    def keep(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
        kinds.extend(type(graph).__mro__)
        return graph

    monkeypatch.setattr(compiled, "compile_fixed", keep)
    monkeypatch.setattr("torch.fx._lazy_graph_module._use_lazy_graph_module_flag", True)
    assert_trains_the_same("mlp", {"stages": 1, "replicas": 1, "microbatches": 1}, "compiled")
    assert kinds
    assert not [kind for kind in kinds if "Lazy" in kind.__name__]


def test_the_backward_of_a_recurrent_layer_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch 2.13 fails in it: its compiled programs trip over the engine of autograd."""
    ops: list[set[Any]] = []

    def keep(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
        ops.append({node.target for node in graph.graph.nodes})
        return graph

    told: list[str] = []
    monkeypatch.setattr(compiled, "compile_fixed", keep)
    monkeypatch.setattr(compiled._log, "warning", lambda text, *given: told.append(text % given))
    assert_trains_the_same("lstm", {"stages": 1, "replicas": 1, "microbatches": 1}, "compiled")
    (forward,) = ops
    assert torch.ops.raypar.recurrent.default in forward
    assert told == [
        "stage 0 backward is not compiled: torch.compile fails in the backward of a recurrent layer"
    ]


def test_an_unknown_engine_is_told() -> None:
    with pytest.raises(PlanError, match=r"'cuda_graphs'.*Did you mean 'cuda_graph'"):
        assert_trains_the_same(
            "mlp", {"stages": 1, "replicas": 1, "microbatches": 1}, "cuda_graphs"
        )
