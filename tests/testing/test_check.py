"""The check is checked: every fault that is put in makes `assert_plan_equivalent` raise."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import raypar as rp
from raypar.schedules.instructions import Kind
from raypar.stages import interpreter
from raypar.stages.gradients import GradientStore
from raypar.stages.interpreter import RankRunner
from raypar.stages.transfers import Transfers
from raypar.testing import assert_plan_equivalent, random_plan
from raypar.testing.equivalence import RunRecord, gaps


class Skips(nn.Module):
    """Three layers with a skip over the second, batch statistics, and no mixing of samples else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        first = torch.tanh(self.first(x))
        second = torch.tanh(self.second(first))
        return (self.third(first + second) ** 2).mean()


class Norms(Skips):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return super().forward(self.norm(x))


def skips() -> nn.Module:
    return Skips().double()


def norms() -> nn.Module:
    return Norms().double()


BATCH = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double()


def _check(model_fn=skips, *, replicas=1, optimizer=None, **options):
    """Runs the check on a plan with a stage per layer, two microbatches and all forwards first."""
    graph = rp.capture(model_fn, BATCH)
    cuts = [k + 1 for k, op in enumerate(graph.ops) if "tanh" in op.id]
    assert len(cuts) == 2
    assert set(cuts) <= set(graph.cuts)
    plan = random_plan(
        graph, rp.Cluster.local(6), stages=3, replicas=replicas, microbatches=2, schedules=["gpipe"]
    )
    bounds = [0, *cuts, len(graph.ops)]
    stages = tuple(
        dataclasses.replace(
            plan.stages[0], first=graph.ops[bounds[s]].id, last=graph.ops[bounds[s + 1] - 1].id,
            mesh=dataclasses.replace(
                plan.stages[0].mesh, devices=tuple(range(s * replicas, (s + 1) * replicas))
            ),
        )
        for s in range(3)
    )  # fmt: skip
    schedule = dataclasses.replace(plan.schedule, placement=((0, 0), (1, 0), (2, 0)))
    plan = dataclasses.replace(plan, stages=stages, schedule=schedule)
    assert_plan_equivalent(model_fn, BATCH, plan, optimizer=optimizer, **options)


@pytest.mark.parametrize(("model_fn", "replicas"), [(skips, 1), (skips, 2), (norms, 1)])
def test_without_a_fault_it_passes_and_prints_its_tolerance(model_fn, replicas, capsys):
    _check(model_fn, replicas=replicas)
    assert "tolerance 1e-09 (dtypes float64): 0 differences" in capsys.readouterr().out


def test_a_skipped_all_reduce(monkeypatch):
    whole = GradientStore.__init__

    def lonely(self, spec, holdings, world, replicas):
        whole(self, spec, holdings, world, None)

    monkeypatch.setattr(GradientStore, "__init__", lonely)
    with pytest.raises(AssertionError, match=r"gradient of step 0: third.weight differs"):
        _check(replicas=2)


def test_swapped_microbatch_gradients(monkeypatch):
    send = Transfers.send

    def swapped(self, now, value):
        if now.kind is Kind.SEND_BACKWARD and now.peer == 0:
            now = dataclasses.replace(now, microbatch=1 - now.microbatch)
        send(self, now, value)

    monkeypatch.setattr(Transfers, "send", swapped)
    with pytest.raises(AssertionError, match=r"gradient of step 0: first.weight differs"):
        _check()


@pytest.mark.parametrize("kind", [Kind.RECV_FORWARD, Kind.RECV_BACKWARD])
def test_a_dropped_skip_edge(monkeypatch, kind):
    receive = Transfers.receive

    def deaf(self, now):
        value = receive(self, now)
        return torch.zeros_like(value) if now.kind is kind and _skips(now) else value

    monkeypatch.setattr(Transfers, "receive", deaf)
    with pytest.raises(AssertionError, match=r"gradient of step 0: first.weight differs"):
        _check()


def _skips(now) -> bool:
    return abs(now.peer - now.stage) > 1


def test_a_stale_buffer(monkeypatch):
    forward = RankRunner._forward

    def forgetful(self, now):
        before = dict(self._holdings.buffers)
        forward(self, now)
        if now.microbatch == 1:
            self._holdings.buffers.update(before)

    monkeypatch.setattr(RankRunner, "_forward", forgetful)
    with pytest.raises(AssertionError, match=r"state: norm.running_mean differs"):
        _check(norms)


@pytest.mark.parametrize("name", ["third.weight", "second.bias", "first.weight"])
def test_a_gradient_scaled_by_a_millionth(monkeypatch, name):
    finish = GradientStore.finish

    def scaled(self, *args):
        squares = finish(self, *args)
        if name in self._grads:
            self._grads[name] = self._grads[name] * (1 + 1e-6)
        return squares

    monkeypatch.setattr(GradientStore, "finish", scaled)
    with pytest.raises(AssertionError, match=rf"gradient of step 0: {name} differs"):
        _check()


def test_a_small_gradient_scaled_by_a_millionth(monkeypatch):
    """Gradients far below 1 are held to their own size."""

    def faint() -> nn.Module:
        model = Skips().double()
        with torch.no_grad():
            model.third.weight *= 1e-4
            model.third.bias *= 1e-4
        return model

    _check(faint)
    finish = GradientStore.finish

    def scaled(self, *args):
        squares = finish(self, *args)
        if "first.weight" in self._grads:
            self._grads["first.weight"] = self._grads["first.weight"] * (1 + 1e-6)
        return squares

    monkeypatch.setattr(GradientStore, "finish", scaled)
    with pytest.raises(AssertionError, match=r"gradient of step 0: first.weight differs"):
        _check(faint, optimizer=lambda params: torch.optim.SGD(params, lr=1e-2))


def test_a_microbatch_seen_twice(monkeypatch):
    rows = interpreter.microbatch_rows
    monkeypatch.setattr(
        interpreter, "microbatch_rows", lambda tensor, dim, mb, parts: rows(tensor, dim, 0, parts)
    )
    with pytest.raises(AssertionError, match="loss of step 0"):
        _check()


def test_a_missed_optimizer_step(monkeypatch):
    optimize = RankRunner._optimize

    def lazy(self, now):
        if self._step < 2:
            optimize(self, now)

    monkeypatch.setattr(RankRunner, "_optimize", lazy)
    with pytest.raises(AssertionError, match=r"state: first.weight differs"):
        _check()


# -- the comparison itself --------------------------------------------------------------------


def _record(**changes) -> RunRecord:
    ones = {"w": torch.ones(2).double()}
    record = RunRecord([1.0], [dict(ones)], state_dict=dict(ones))
    return dataclasses.replace(record, **changes)


NAN = float("nan")


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (_record(losses=[NAN]), "loss of step 0"),
        (_record(losses=[1.0, 1.0]), "steps"),
        (_record(gradients=[{}]), "missing from the plan"),
        (_record(gradients=[{"w": torch.ones(2).double(), "v": torch.ones(1)}]), "the reference"),
        (_record(gradients=[{"w": torch.ones(2)}]), "float32"),
        (_record(gradients=[{"w": torch.tensor([1.0, NAN]).double()}]), "gradient of step 0: w"),
        (_record(state_dict={"w": torch.ones(1, 2).double()}), "state: w"),
        (_record(state_dict={"w": torch.ones(2).double() + 1e-8}), "differs by 1.000e-08"),
    ],
)
def test_every_kind_of_difference_is_seen(found, text):
    wrong = [f"{g.what} {g.text}" for g in gaps(found, _record()) if not g.ratio <= 1e-9]
    assert len(wrong) == 1
    assert text in wrong[0]


def test_equal_records_and_integers():
    assert all(g.ratio == 0 for g in gaps(_record(), _record()))
    counts = _record(state_dict={"n": torch.tensor(3), "b": torch.tensor(True)})
    assert all(g.ratio == 0 for g in gaps(counts, counts))
    more = _record(state_dict={"n": torch.tensor(4), "b": torch.tensor(True)})
    assert max(g.ratio for g in gaps(more, counts)) > 0.2
