"""Evaluation and prediction equal the unsplit model in eval mode, and leave training alone."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from torch import nn

import raypar as rp
from raypar.compat import pytree
from raypar.errors import ConfigError, DataError, OptimizerError, PlanError
from raypar.graph.capture import call_model
from raypar.stages.compile import compile_plan
from raypar.stages.consolidate import consolidate
from raypar.stages.recipe import Recipe
from raypar.testing import models, random_plan, random_sharding
from raypar.testing.backends import start_run
from raypar.train._evaluation_io import read_batches
from raypar.train.evaluate import Evaluator

CLUSTER = rp.Cluster.local(8)
EXACT = 1e-9


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2)


@cache
def _captured(name):
    case = models.case(name)
    batch = case.batch(0, 8)
    return case, batch, rp.capture(case.model_fn, batch, case.loss_fn, case.batch_dims)


def _tensors(tree):
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _started(graph, plan, batch, recipe=None):
    specs = compile_plan(graph, plan, optimizer=adamw, recipe=recipe or Recipe())
    return specs, start_run("local", specs, _tensors(batch))


def _eager(graph, state, batches):
    """(loss, outputs) of each batch, by one process in eval mode."""
    model = graph.model_fn()
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        return [
            (float(graph.loss_of(model, b)), call_model(model, graph.loss_fn, model, b))
            for b in batches
        ]


def _gap(found, wanted):
    pairs = zip(_tensors(found), _tensors(wanted), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


LAW = [
    ("mlp", 2, True),
    ("cnn", 0, False),
    ("contrastive", 0, False),
    pytest.param("cnn", 0, True, marks=pytest.mark.thorough),
    pytest.param("moe_dense", 1, False, marks=pytest.mark.thorough),
    pytest.param("gpt_dropout", 2, True, marks=pytest.mark.thorough),
    pytest.param("t5", 0, False, marks=pytest.mark.thorough),
]


@pytest.mark.parametrize(("name", "seed", "sharded"), LAW)
def test_random_plans_evaluate_and_predict_like_the_unsplit_model(name, seed, sharded):
    case, batch, graph = _captured(name)
    plan = random_plan(graph, CLUSTER, seed=seed)
    if sharded:
        plan = random_sharding(graph, plan, CLUSTER, seed=seed)
    sizes = (8, 8, 3) if sharded else (8, 8, 8)
    data = [case.batch(5 + i, n) for i, n in enumerate(sizes)]
    specs, run = _started(graph, plan, batch)
    with run:
        run.train(0, 1)
        evaluator = Evaluator(graph, plan, specs)
        found = evaluator.evaluate(run, data)
        outputs = list(evaluator.predict(run, data[1:]))
        wanted = _eager(graph, run.state_dict(), data)
    mean = sum(loss * n for (loss, _), n in zip(wanted, sizes, strict=True)) / sum(sizes)
    assert abs(found["loss"] - mean) <= EXACT * max(1.0, abs(mean))
    assert (found["samples"], found["batches"]) == (sum(sizes), 3)
    for output, (_, other) in zip(outputs, wanted[1:], strict=True):
        assert _gap(output, other) <= EXACT


@pytest.mark.parametrize("name", ["cnn", "feature_dropout"])
def test_training_goes_on_bit_for_bit_as_if_nothing_had_been_evaluated(name):
    case, batch, graph = _captured(name)
    plan = random_plan(graph, CLUSTER, seed=2, microbatches=2)
    records = []
    for evaluates in (False, True):
        specs, run = _started(graph, plan, batch, Recipe(ema_decay=0.5))
        losses: list[float] = []
        with run:
            evaluator = Evaluator(graph, plan, specs)
            for step in range(2):
                run.train(step, 1, lambda report, into=losses: into.append(report.loss))
                if evaluates:
                    before = torch.get_rng_state()
                    evaluator.evaluate(run, [case.batch(9, 8)])
                    evaluator.evaluate(run, [case.batch(9, 8)], weights="ema")
                    assert torch.equal(torch.get_rng_state(), before)
            records.append((losses, run.state_dict(), consolidate(specs, run.call("ema_state"))))
    (plain, *before), (evaluated, *after) = records
    assert plain == evaluated
    for a, b in zip(before, after, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_averaged_weights_are_evaluated_where_the_run_keeps_them():
    case, batch, graph = _captured("mlp")
    plan = random_sharding(graph, random_plan(graph, CLUSTER, seed=3), CLUSTER, seed=3)
    data = [case.batch(5, 8)]
    specs, run = _started(graph, plan, batch, Recipe(ema_decay=0.5))
    with run:
        run.train(0, 3)
        evaluator = Evaluator(graph, plan, specs)
        found = evaluator.evaluate(run, data, weights="ema")["loss"]
        live = evaluator.evaluate(run, data)["loss"]
        ((wanted, _),) = _eager(graph, consolidate(specs, run.call("ema_state")), data)
    assert abs(found - wanted) <= EXACT
    assert abs(found - live) > 1e-6


@pytest.mark.parametrize(("weights", "text"), [("ema", "set ema_decay"), ("best", "'live'")])
def test_weights_that_are_not_there(weights, text):
    case, batch, graph = _captured("mlp")
    plan = random_plan(graph, CLUSTER, seed=0)
    specs, run = _started(graph, plan, batch)
    with run, pytest.raises(OptimizerError, match=text):
        Evaluator(graph, plan, specs).evaluate(run, [case.batch(5, 8)], weights=weights)


def test_a_mean_over_what_is_counted_is_exact_over_all_batches():
    case, batch, graph = _captured("masked_mean")
    whole = case.batch(3, 14)
    rows = _tensors(whole)
    parts = [graph.spec.rebuild([t[a:b] for t in rows]) for a, b in ((0, 8), (8, 14))]
    plan = random_plan(graph, CLUSTER, seed=1, stages=2, replicas=2)
    specs, run = _started(graph, plan, batch)
    with run:
        found = Evaluator(graph, plan, specs).evaluate(run, parts)["loss"]
        ((wanted, _),) = _eager(graph, run.state_dict(), [whole])
    assert abs(found - wanted) <= EXACT


def _share_right(outputs, batch):
    return (outputs.argmax(-1) == batch[1]).double().mean()


def _spread_of_all(outputs, batch):
    return outputs.std()  # mixes samples: such a batch may not be cut


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def _labelled(seed, samples):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 6, generator=generator)
    return x, torch.randint(0, 5, (samples,), generator=generator)


def test_metrics_are_those_of_whole_batches_for_every_cut():
    batch = _labelled(0, 8)
    graph = rp.capture(_Classifier, batch, nn.functional.cross_entropy)
    plan = random_plan(graph, CLUSTER, seed=1, stages=2, replicas=2, microbatches=2)
    data = [_labelled(1, 8), _labelled(2, 12)]
    metrics = {"accuracy": _share_right, "spread": _spread_of_all}
    specs, run = _started(graph, plan, batch)
    with run:
        found = Evaluator(graph, plan, specs, metrics=metrics).evaluate(run, data)
        only = Evaluator(graph, plan, specs, metrics={"accuracy": _share_right})
        cut = only.evaluate(run, data)
        outputs = [o for _, o in _eager(graph, run.state_dict(), data)]
    for name, metric in metrics.items():
        values = [float(metric(o, b)) for o, b in zip(outputs, data, strict=True)]
        assert abs(found[name] - (8 * values[0] + 12 * values[1]) / 20) < 1e-6
    assert cut["accuracy"] == found["accuracy"]


class _EvalOnly(nn.Module):
    """Reads a parameter and a buffer in eval mode that training never does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        self.calibration = nn.Parameter(torch.linspace(0.5, 1.5, 5))
        self.register_buffer("shift", torch.arange(5.0))

    def forward(self, x):
        y = self.body(x)
        return y if self.training else y * self.calibration + self.shift


def test_what_training_does_not_hold_where_it_is_needed_is_moved_there():
    batch = _labelled(0, 8)
    graph = rp.capture(_EvalOnly, batch, nn.functional.cross_entropy)
    plan = random_plan(graph, CLUSTER, seed=1, stages=3, replicas=2, microbatches=2)
    data = [_labelled(4, 8)]
    specs, run = _started(graph, plan, batch)
    with run:
        found = next(Evaluator(graph, plan, specs).predict(run, [data[0][0]]))
        ((_, wanted),) = _eager(graph, run.state_dict(), data)
    assert _gap(found, wanted) < 1e-6


def test_bad_input_is_told():
    case, batch, graph = _captured("mlp")
    plan = random_plan(graph, CLUSTER, seed=0)
    specs, run = _started(graph, plan, batch)
    x, y = batch

    def broken():
        yield batch
        raise OSError("disk gone")

    with pytest.raises(ConfigError, match="none of batches, loss, samples"):
        Evaluator(graph, plan, specs, metrics={"loss": _share_right})
    other = dataclasses.replace(plan, params_hash="0", graph_hash="0")
    with pytest.raises(PlanError, match="other parameters"):
        Evaluator(graph, other, specs)
    evaluator = Evaluator(graph, plan, specs)
    with run:
        for data, text in (
            ([], "hold no batch"),
            ([x], "another structure"),
            ([(x.float(), y)], r"tensor 0 .* torch.float32 of shape"),
            (broken, "failed with OSError after 1 batches: disk gone"),
            (3, "TypeError"),
        ):
            with pytest.raises(DataError, match=text):
                evaluator.evaluate(run, data)
        assert evaluator.evaluate(run, [case.batch(1, 5)])["samples"] == 5


def test_data_of_another_shape_than_the_models_are_told_without_a_traceback(capfd):
    _, batch, graph = _captured("mlp")
    plan = random_plan(graph, CLUSTER, seed=0)
    specs, run = _started(graph, plan, batch)
    narrow = batch[0][:, :-1], batch[1]
    with run, pytest.raises(DataError, match=r"tensor 0 .*has shape \(8, \d+\), the model trains"):
        Evaluator(graph, plan, specs).evaluate(run, [narrow])
    assert not capfd.readouterr().err


def test_batches_may_be_lists_or_arrays_where_training_has_tuples_of_tensors():
    _, batch, graph = _captured("mlp")
    plan = random_plan(graph, CLUSTER, seed=0)
    specs, run = _started(graph, plan, batch)
    with run:
        evaluator = Evaluator(graph, plan, specs)
        wanted = evaluator.evaluate(run, [batch])
        for other in (list(batch), [t.numpy() for t in batch]):
            assert evaluator.evaluate(run, [other]) == wanted


def test_reading_the_data_draws_nothing_and_gives_the_same_in_every_evaluation():
    loader = torch.utils.data.DataLoader(range(12), batch_size=4, shuffle=True)
    drawn = []
    for evaluates in (False, True):
        torch.manual_seed(7)
        numbers, read = [], []
        for _ in range(2):
            numbers.append(torch.rand(2))
            if evaluates:
                reading = read_batches(loader, 3)
                read.append([next(reading)])
                numbers.append(torch.rand(2))  # what training draws between two batches
                read[-1] += list(reading)
            else:
                numbers.append(torch.rand(2))
        drawn.append(torch.stack(numbers))
    assert torch.equal(*drawn)
    assert torch.equal(torch.stack(read[0]), torch.stack(read[1]))
    assert torch.stack(read[0]).flatten().tolist() != list(range(12))


def test_forms_that_were_not_used_for_long_are_dropped(monkeypatch):
    monkeypatch.setattr("raypar.train.evaluate._MOST_FORMS", 2)
    case, batch, graph = _captured("mlp")
    plan = random_plan(graph, CLUSTER, seed=1)
    specs, run = _started(graph, plan, batch)
    with run:
        evaluator = Evaluator(graph, plan, specs)
        means = [evaluator.evaluate(run, [case.batch(1, n)])["loss"] for n in (2, 3, 4, 5, 2)]
    assert means[0] == means[-1]
