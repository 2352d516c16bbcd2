"""The unsplit model as an outsider would train it, beside random plans."""

from __future__ import annotations

import torch

import raypar
from raypar.testing.equivalence import run_plan
from raypar.testing.plans import random_plan

STEPS = 2


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def eager(model_fn, batch, parts):
    torch.manual_seed(0)
    model = model_fn()
    optimizer = sgd(model.parameters())
    losses, gradients = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for k in range(parts):
            loss = model(*(t.chunk(parts)[k] for t in batch)) / parts
            loss.backward()
            total += loss.item()
        losses.append(total)
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        optimizer.step()
    return losses, gradients, dict(model.state_dict())


def trains_alike(model_fn, batch, *, exact, plans=3):
    graph = raypar.capture(model_fn, batch)
    assert (graph.max_replicas > 1) is exact, graph.analysis.blockers
    cluster = raypar.Cluster.local(4)
    drawn = [random_plan(graph, cluster, seed=s) for s in range(plans)]
    if exact:
        stages = min(2, len(graph.cuts) + 1)
        drawn.append(random_plan(graph, cluster, seed=9, stages=stages, replicas=2))
    for plan in drawn:
        parts = 1 if exact else plan.microbatches
        losses, gradients, state = eager(model_fn, batch, parts)
        record = run_plan(model_fn, batch, plan, optimizer=sgd, steps=STEPS)
        close(torch.tensor(record.losses), torch.tensor(losses))
        for mine, theirs in zip(record.gradients, gradients, strict=True):
            assert set(mine) == set(theirs)
            for name in theirs:
                close(mine[name], theirs[name])
        assert set(record.state_dict) == set(state)
        for name in state:
            close(record.state_dict[name], state[name])


def close(found, wanted):
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    bound = 1e-9 * max(1.0, wanted.abs().max().item())
    assert (found - wanted).abs().max().item() <= bound
