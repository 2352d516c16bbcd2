"""Piper's program against all pipelines of tiny workloads, and its parts against plain ones."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.errors import PlanError
from raypar.graph._workloads_piper import parse_layer_workload
from raypar.search.exact import _piper_knapsack as knapsack
from raypar.search.exact import piper
from raypar.search.exact._piper_lattice import Family, Order, nearest, thinned
from raypar.search.exact.piper import PiperPipeline, PiperSetting, solve_piper
from tests._tiers import examples
from tests.search.exact import piper_by_hand as by_hand


def stages_of(raw: by_hand.Raw, found: PiperPipeline) -> list[by_hand.Stage]:
    """A pipeline as `by_hand.objective` takes it."""
    return [(s.layers, s.replicas, s.degree, s.variants) for s in found.stages]


def check(raw: by_hand.Raw, k: int, M: float, B: int, W: float) -> None:
    """The program finds the optimum, and says truly what it found."""
    found = solve_piper(parse_layer_workload(raw), PiperSetting(k, M, B, W))
    wanted = by_hand.best(raw, k, M, B, W)
    assert found.objective == pytest.approx(wanted, rel=1e-9)
    assert bool(found.stages) == math.isfinite(wanted)
    assert found.bound <= found.objective
    if found.stages:
        own = by_hand.objective(raw, stages_of(raw, found), k, M, B, W)
        assert own == pytest.approx(found.objective, rel=1e-12)


@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 5),
    memory=st.integers(4, 60),
    B=st.sampled_from([1, 2, 4, 6, 12]),
    W=st.sampled_from([0.5, 3.0, 100.0]),
)
@settings(max_examples=examples(20, 60), deadline=None)
def test_it_finds_the_optimum(seed: int, k: int, memory: int, B: int, W: float) -> None:
    check(by_hand.workload(seed), k, float(memory), B, W)


@pytest.mark.parametrize("seed", range(12))
def test_it_finds_the_optimum_where_variants_differ_in_everything(seed: int) -> None:
    rng = random.Random(seed)
    raw = by_hand.workload(seed, uneven=True)
    check(raw, rng.randint(1, 4), float(rng.randint(8, 40)), 6, rng.choice([0.5, 3.0]))


@pytest.mark.parametrize("seed", range(6))
def test_five_layers_of_one_degree(seed: int) -> None:
    raw = by_hand.workload(seed, layers=5, degrees=1)
    check(raw, 4, 15.0 + 5 * seed, 12, 3.0)


@pytest.mark.parametrize("seed", range(8))
def test_parts_of_a_lattice_change_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piper, "_LARGE", 4)
    monkeypatch.setattr(piper, "_COARSE", 3)
    monkeypatch.setattr(piper, "_FINE", 6)
    monkeypatch.setattr("raypar.search.exact._piper_sweep._DENSE", 0)
    check(by_hand.workload(seed), 4, 25.0, 12, 3.0)


def test_more_downsets_than_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = by_hand.workload(3, layers=8, degrees=1)
    workload = parse_layer_workload(raw)
    setting = PiperSetting(4, 60.0, 12, 3.0)
    whole = solve_piper(workload, setting)
    monkeypatch.setattr(piper, "_MOST_DOWNSETS", 12)
    found = solve_piper(workload, setting)
    own = by_hand.objective(raw, stages_of(raw, found), 4, 60.0, 12, 3.0)
    assert own == pytest.approx(found.objective)
    assert whole.objective * (1 - 1e-9) <= found.objective
    assert found.bound <= whole.objective


def test_out_of_time_the_best_so_far_is_kept() -> None:
    workload = parse_layer_workload(by_hand.workload(1))
    found = solve_piper(workload, PiperSetting(4, 60.0, 12, 3.0), seconds=0.0)
    assert found == PiperPipeline(bound=found.bound)


def test_only_the_replicas_that_are_allowed() -> None:
    workload = parse_layer_workload(by_hand.workload(2))
    found = solve_piper(workload, PiperSetting(4, 200.0, 12, 3.0), replicas=[2])
    assert {stage.replicas for stage in found.stages} == {2}
    assert not solve_piper(workload, PiperSetting(4, 200.0, 12, 3.0), replicas=[5]).stages


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (PiperSetting(0, 1.0, 1, 1.0), "devices is 0"),
        (PiperSetting(1, -1.0, 1, 1.0), "memory is -1"),
        (PiperSetting(1, 1.0, 0, 1.0), "microbatches is 0"),
        (PiperSetting(1, 1.0, 1, math.inf), "bandwidth is inf"),
    ],
)
def test_a_setting_out_of_range(setting: PiperSetting, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        solve_piper(parse_layer_workload(by_hand.workload(0)), setting)


@given(seed=st.integers(0, 10_000), layers=st.integers(1, 6))
@settings(max_examples=examples(20, 80), deadline=None)
def test_the_knapsack(seed: int, layers: int) -> None:
    rng = random.Random(seed)
    choices = [
        [(float(rng.randint(0, 6)), float(rng.randint(0, 9))) for _ in range(rng.randint(1, 3))]
        for _ in range(layers)
    ]
    memory = float(rng.randint(0, 6 * layers))
    fitting = [
        sum(c for c, _ in picks)
        for picks in itertools.product(*choices)
        if sum(m for _, m in picks) <= memory
    ]
    found = knapsack.solve(choices, memory)
    assert (found is None) == (not fitting)
    if found is None:
        return
    picks = [c[j] for c, j in zip(choices, found, strict=True)]
    assert sum(m for _, m in picks) <= memory
    assert sum(c for c, _ in picks) == min(fitting)
    cheap = [knapsack.cheapest(c) for c in choices]
    need = sum(m for _, m in cheap) - memory
    steps = knapsack.steps_of(choices)
    if need > 0 and len(steps.layer):
        inside = np.ones((1, layers), np.uint8)
        low, high = knapsack.bounds(steps.stacked(), inside, np.array([need]))
        extra = min(fitting) - sum(c for c, _ in cheap)
        assert low[0] <= extra * (1 + 1e-9) + 1e-9
        assert high[0] >= extra * (1 - 1e-9) - 1e-9


def test_steps_of_pairs_are_those_of_any() -> None:
    rng = np.random.default_rng(0)
    seconds, nbytes = (rng.integers(0, 5, (20, 2)).astype(np.float64) for _ in range(2))
    choices = [list(zip(s, b, strict=True)) for s, b in zip(seconds, nbytes, strict=True)]
    one, other = knapsack.steps_of_pairs(seconds, nbytes), knapsack.steps_of(choices)
    assert sorted(zip(one.layer, one.cost, one.saving, strict=True)) == sorted(
        zip(other.layer, other.cost, other.saving, strict=True)
    )


@pytest.mark.parametrize("seed", range(5))
def test_families_hold_downsets_alone(seed: int) -> None:
    raw = by_hand.workload(seed, layers=7)
    order = Order(parse_layer_workload(raw))
    masks = order.all_downsets(10_000)
    assert masks is not None
    edges = [(u, v) for u, targets in enumerate(order.after) for v in targets]
    wanted = {m for m in range(1 << 7) if not any(m >> v & 1 and not m >> u & 1 for u, v in edges)}
    assert masks == wanted
    family = Family(order, masks)
    weights = [float(v) for v in range(7)]
    for part in (thinned(family, weights, 4), nearest(family, [0b11], weights, 5)):
        assert {0, (1 << 7) - 1} <= set(part.masks) <= wanted
        assert len(part) < len(family) or len(family) <= 4


@pytest.mark.parametrize("seed", range(3))
def test_layers_that_take_no_time(seed: int) -> None:
    raw = by_hand.workload(seed)
    for node in raw["nodes"]:
        for variants in node["TMPCs"].values():
            for variant in variants:
                variant["timePerSample"] = 0.0
    check(raw, 3, 15.0, 12, 3.0)
    for edge in raw["edges"]:
        edge["communicationCost"] = 1e-7
    check(raw, 3, 25.0, 12, 100.0)
