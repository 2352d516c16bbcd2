"""Conversions move a value from any sharding to any other, and its gradient back."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.sharding.convert import COLLECTIVES, conversion, state_after
from raypar.sharding.spec import RG, P, R, S, ShardingSpec
from raypar.testing.mesh_threads import ThreadMesh, collect, distribute
from tests._tiers import THOROUGH, examples

SOURCES = (R, P, S(0), S(1), S(0, 2), S(1, 3))
TARGETS = (*SOURCES, RG)
SHAPE = (16, 24)


def _check(source: ShardingSpec, target: ShardingSpec, sizes: tuple[int, ...]) -> None:
    mesh = ThreadMesh([(f"a{i}", n) for i, n in enumerate(sizes)])
    generator = torch.Generator().manual_seed(len(str(source)) + 7 * len(str(target)))
    value = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    grad = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    inputs = distribute(value, source.value(), mesh, generator)
    grads = distribute(grad, target.gradient(), mesh, generator)
    steps = conversion(source, target)

    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = inputs[rank].requires_grad_()
        y = x.clone()
        for step in steps:
            y = torch.ops.raypar.convert(
                y,
                step.forward,
                step.backward,
                step.cut,
                step.to,
                mesh.names[step.axis],
                mesh.sizes[step.axis],
            )
        (back,) = torch.autograd.grad(y, x, grads[rank])
        return y.detach(), back

    talks = any(s.forward in COLLECTIVES or s.backward in COLLECTIVES for s in steps)
    found = (mesh.run if talks else mesh.run_alone)(work)
    text = f"{source} -> {target} on {sizes}: {steps}"
    moved = collect([y for y, _ in found], target.value(), mesh)
    back = collect([g for _, g in found], source.gradient(), mesh)
    assert torch.allclose(moved, value, atol=1e-9), text
    assert torch.allclose(back, grad, atol=1e-9), f"gradient of {text}"


@pytest.mark.parametrize("size", [2, 4])
def test_every_pair_on_one_axis(size: int) -> None:
    for a, b in itertools.product(SOURCES, TARGETS):
        source, target = ShardingSpec((a,)), ShardingSpec((b,))
        if source.fits(SHAPE, (size,)) and target.fits(SHAPE, (size,)):
            _check(source, target, (size,))


def test_every_pair_on_two_axes() -> None:
    mesh = (2, 2)
    pairs = itertools.product(
        itertools.product(SOURCES[:5], repeat=2), itertools.product((*SOURCES[:5], RG), repeat=2)
    )
    # Every seventh of them has every state on both sides and both axes.
    for a, b in itertools.islice(pairs, 0, None, 1 if THOROUGH else 7):
        source, target = ShardingSpec(a), ShardingSpec(b)
        if source.fits(SHAPE, mesh) and target.fits(SHAPE, mesh):
            _check(source, target, mesh)


@settings(max_examples=examples(20, 60), deadline=None)
@given(
    a=st.tuples(*[st.sampled_from(SOURCES)] * 3),
    b=st.tuples(*[st.sampled_from(TARGETS)] * 3),
    mesh=st.sampled_from([(2, 2, 2), (2, 1, 2), (1, 2, 3), (2, 2, 1)]),
)
def test_pairs_on_three_axes(a: tuple[str, ...], b: tuple[str, ...], mesh: tuple[int, ...]) -> None:
    source, target = ShardingSpec(a), ShardingSpec(b)
    if source.fits(SHAPE, mesh) and target.fits(SHAPE, mesh):
        _check(source, target, mesh)


@pytest.mark.parametrize(
    ("source", "target", "forward", "backward"),
    [
        ("R", "Rg", "none", "all_reduce"),
        ("S0", "Rg", "all_gather", "reduce_scatter"),
        ("S0", "S1", "all_to_all", "all_to_all"),
        ("P", "R", "all_reduce", "none"),
        ("P", "S1", "reduce_scatter", "all_gather"),
        ("P", "Rg", "all_reduce", "all_reduce"),
        ("R", "P", "mask", "none"),
        ("S0", "P", "pad", "shard"),
    ],
)
def test_one_step_does(source: str, target: str, forward: str, backward: str) -> None:
    steps = conversion(ShardingSpec.parse(source), ShardingSpec.parse(target))
    assert [(s.forward, s.backward) for s in steps] == [(forward, backward)]


def test_equal_shardings_need_nothing() -> None:
    for spec in itertools.product(SOURCES, repeat=2):
        assert conversion(ShardingSpec(spec), ShardingSpec(spec)) == ()


def test_steps_lead_to_the_target() -> None:
    states = (R, P, S(0), S(1), S(0, 2))
    for source, target in itertools.product(itertools.product(states, repeat=2), repeat=2):
        now = list(source)
        for step in conversion(ShardingSpec(source), ShardingSpec(target)):
            now[step.axis] = state_after(step, now[step.axis])
        assert tuple(now) == target
