"""Evaluation on Ray actors: what threads of one process find, between steps that train."""

from __future__ import annotations

import torch

import raypar as rp
from raypar.compat import pytree
from raypar.stages.compile import compile_plan
from raypar.testing import models
from raypar.testing.backends import start_run
from raypar.train.evaluate import Evaluator


def sgd(params):
    return torch.optim.SGD(params, lr=1e-2)


def test_actors_evaluate_and_predict_as_threads_do(ray_session: str) -> None:
    case = models.case("mlp")
    batch = case.batch(0, 8)
    graph = rp.capture(case.model_fn, batch, case.loss_fn, case.batch_dims)
    search = rp.SearchConfig(stages=2, replicas=1, microbatches=2)
    plan = rp.plan(graph, rp.Cluster.local(2), search)
    specs = compile_plan(graph, plan, optimizer=sgd)
    tensors = pytree.tree_leaves(batch)
    data = [case.batch(5, 8), case.batch(6, 3)]
    found = []
    for backend in ("local", "ray"):
        losses: list[float | None] = []
        with start_run(backend, specs, tensors) as run:
            run.train(0, 1, lambda report, into=losses: into.append(report.loss))
            evaluator = Evaluator(graph, plan, specs)
            means = evaluator.evaluate(run, data)
            outputs = list(evaluator.predict(run, [case.batch(7, 8)[0]]))
            run.train(1, 1, lambda report, into=losses: into.append(report.loss))
        found.append((means, losses, outputs))
    (means, losses, outputs), (means_ray, losses_ray, outputs_ray) = found
    assert means == means_ray
    assert losses == losses_ray
    assert torch.equal(outputs[0], outputs_ray[0])
