"""Lower bounds: no plan is faster, and where nothing has to be lost they are what a plan takes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from raypar import Cluster, capture
from raypar.errors import PlanError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import MatmulCurve, MemoryCurve, default_rates, table_calibration
from raypar.mesh.cluster import Node
from raypar.mesh.devices import device_kind
from raypar.search.bounds import Bound, certificate, lower_bound
from raypar.search.bounds.kernels import kernels_of, trained_bytes
from raypar.search.bounds.one_op import Kernel
from raypar.search.bounds.rates import Devices, kernel_s
from raypar.search.config import SearchConfig
from raypar.search.planners.uniform import UniformPlanner
from raypar.search.simulate import simulate
from raypar.search.simulation import Simulation
from raypar.testing import random_plan, random_sharding
from raypar.testing.models import cases
from release.bounds import hold
from tests._tiers import examples


def _squares(out: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return out.square().mean()


def _mlp(width: int = 64, samples: int = 8) -> OpGraph:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    return capture(model, torch.zeros(samples, width), _squares)


# -- the bound holds --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["gpt", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("lstm", "moe_sparse"))],
)
def test_no_random_plan_is_faster(name):
    case = next(c for c in cases(hf=False) if c.name == name)
    graph = capture(lambda: case.model_fn(seed=0), case.batch(seed=0), case.loss_fn)
    cluster = Cluster((Node.of("V100", 4, name="a"), Node.of("H100", 4, name="b")))
    for seed in range(examples(1, 2)):
        plan = random_plan(graph, cluster, seed=seed)
        if 2 * len(plan.devices) <= 8:
            plan = random_sharding(graph, plan, cluster, seed=seed, meshes=[(2,), ()])
        step = simulate(graph, plan, cluster).step_s
        told = SearchConfig(replicas=plan.replicas, microbatches=plan.microbatches)
        own = lower_bound(graph, cluster, config=told).step_s
        assert 0 < lower_bound(graph, cluster).step_s <= own * (1 + 1e-9)
        assert own <= step


@pytest.mark.parametrize("seed", [1])
def test_no_plan_of_a_small_space_is_faster(seed):
    held = hold(seed, most=20)
    assert held is not None
    assert held.plans > 1
    assert held.holds


def test_a_device_that_is_busy_all_the_time_is_as_fast_as_the_bound():
    graph = _mlp(2048, 4096)
    cluster = Cluster.virtual(1, 1, "V100")
    config = SearchConfig(planner="uniform", stages=1, replicas=1, microbatches=1)
    step = simulate(graph, UniformPlanner().plan(graph, cluster, config), cluster).step_s
    bound = lower_bound(graph, cluster)
    assert bound.step_s <= step <= 1.08 * bound.step_s
    assert sum(bound.parts.values()) == pytest.approx(bound.step_s)


def test_twice_the_devices_halve_it_for_large_work():
    graph = _mlp(2048, 4096)
    one, two = (lower_bound(graph, Cluster.virtual(1, n, "V100")).step_s for n in (1, 2))
    assert one / 2 <= two * (1 + 1e-6) <= 0.52 * one


def test_few_microbatches_on_many_devices_are_bound_by_their_chain():
    """On 64 devices a tiny batch is no 64 times faster: kernels follow each other."""
    graph = _mlp()
    config = SearchConfig(microbatches=1, replicas=1)
    one = lower_bound(graph, Cluster.virtual(1, 1, "V100"), config=config)
    many = lower_bound(graph, Cluster.virtual(8, 8, "V100"), config=config)
    assert many.step_s > 0.3 * one.step_s
    assert "one after the other" in many.binding
    assert many.parts["chain"] > 0


# -- memory -----------------------------------------------------------------------------------


def _deep(width: int, samples: int, layers: int = 5) -> OpGraph:
    def model() -> nn.Module:
        made = [m for _ in range(layers) for m in (nn.Linear(width, width), nn.GELU())]
        return nn.Sequential(*made)

    return capture(model, torch.zeros(samples, width), _squares)


_DEEP = _deep(32, 64)
_TIGHT = Cluster((Node.of("CPU", 4, name="a"), Node.of("CPU", 2, name="b")))


def _fraction(found: Simulation) -> float:
    """The share of the memory that a plan just fits."""
    peaks = zip(found.lanes, found.peak_bytes, strict=True)
    return max(peak / lane.memory_limit for lane, peak in peaks)


@settings(max_examples=examples(4, 12))
@given(st.integers(0, 10**6), st.sampled_from(["none", "selective", "full"]), st.booleans())
def test_no_plan_that_just_fits_is_faster(seed, policy, sharded):
    plan = random_plan(_DEEP, _TIGHT, seed=seed)
    if sharded and 2 * len(plan.devices) <= 6:
        plan = random_sharding(_DEEP, plan, _TIGHT, seed=seed, meshes=[(2,), ()])
    stages = [
        dataclasses.replace(s, memory=dataclasses.replace(s.memory, recompute=policy))
        for s in plan.stages
    ]
    plan = dataclasses.replace(plan, stages=tuple(stages))
    found = simulate(_DEEP, plan, _TIGHT)
    config = SearchConfig(
        replicas=plan.replicas, microbatches=plan.microbatches, memory_fraction=_fraction(found)
    )
    assert lower_bound(_DEEP, _TIGHT, config=config).step_s <= found.step_s


def test_what_does_not_fit_is_computed_again():
    graph, cluster = _deep(256, 4096), Cluster.virtual(1, 1, "CPU")
    plan = UniformPlanner().plan(
        graph, cluster, SearchConfig(stages=1, recompute="full", microbatches=1)
    )
    found = simulate(graph, plan, cluster)
    values = 5 * 4 * 4096 * 256  # what the products make, in bytes
    states = 3 * 5 * 4 * (256 * 256 + 256)
    cut = SearchConfig(replicas=1, microbatches=1)
    free = lower_bound(graph, cluster, config=cut, fitting=False)
    memory = cluster.memory(0)
    for share in (1.0, 0.6, 0.2):
        told = dataclasses.replace(cut, memory_fraction=(states + share * values) / memory)
        bound = lower_bound(graph, cluster, config=told)
        more = bound.step_s - free.step_s
        assert more == pytest.approx((1 - share) * _forward_s(graph, cluster), rel=1e-6, abs=1e-12)
        assert bound.step_s <= found.step_s
        assert bound.parts.get("recompute", 0.0) == pytest.approx(more, rel=1e-6, abs=1e-12)
        assert ("computed again" in bound.binding) == (share < 1)


def _forward_s(graph: OpGraph, cluster: Cluster) -> float:
    """Seconds of all products forward."""
    devices = Devices.of(cluster, table_calibration(cluster))
    products = [k for k in kernels_of(graph, graph.global_batch) if k.matmul and not k.backward]
    return float(devices.seconds(products, 1)[:, 0] @ np.array([k.times for k in products]))


def test_more_microbatches_are_the_way_out_of_little_memory():
    graph, cluster = _deep(256, 4096), Cluster.virtual(1, 1, "CPU")
    few = 3 * 5 * 4 * (256 * 256 + 256) + 4 * 4096 * 256
    told = SearchConfig(memory_fraction=few / cluster.memory(0))
    assert lower_bound(graph, cluster, fitting=False).microbatches == 1
    bound = lower_bound(graph, cluster, config=told)
    assert bound.microbatches > 1
    assert "recompute" not in bound.parts


def test_what_backward_reads_of_products_counts_once():
    """Of GPT's layers: queries, keys, values, what attention makes, and what GELU reads."""
    case = next(c for c in cases(hf=False) if c.name == "gpt")
    graph = capture(lambda: case.model_fn(seed=0), case.batch(seed=0), case.loss_fn)
    kernels = kernels_of(graph, 2, exactly=True)
    assert all(k.matmul and not k.backward for k in kernels if k.kept)
    assert all(0 < k.most_kept <= k.kept <= k.times * k.most_kept for k in kernels if k.kept)
    plan = random_plan(graph, Cluster.virtual(1, 1, "CPU"), seed=0)
    found = simulate(graph, plan, Cluster.virtual(1, 1, "CPU"))
    saved = sum(cost.saved_bytes for cost in found.setting.costs)
    samples = graph.global_batch // plan.microbatches // plan.replicas
    assert 0 < sum(k.kept for k in kernels_of(graph, samples)) <= saved


# -- what it is made of -----------------------------------------------------------------------


def test_kernels_of_other_batch_sizes_lie_on_a_line():
    case = next(c for c in cases(hf=False) if c.name == "gpt")
    graph = capture(lambda: case.model_fn(seed=0), case.batch(seed=0), case.loss_fn)
    smallest = kernels_of(graph, 1)  # from two larger ones
    graph.memo.clear()
    exact = kernels_of(graph, 1, exactly=True)
    assert sorted(smallest) == sorted(exact)


def test_products_count_forward_and_both_gradients():
    kernels = [k for k in kernels_of(_mlp(64, 8), 8) if k.matmul]
    flops = sum(k.times * k.flops for k in kernels)
    # Two layers forward, two gradients of weights, and one of the values between them.
    assert flops == 5 * 2 * 8 * 64 * 64
    assert trained_bytes(_mlp(64, 8), 8) == {4 * 64 * 64: 2, 4 * 64: 2}


def test_a_fused_backward_kernel_counts_once():
    """It is taken apart only in stages that receive values: then there are more calls, not less."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 3))

    graph = capture(model, torch.zeros(4, 8, 16), _squares)
    calls = sum(k.times for k in kernels_of(graph, 4) if k.kind == "conv_backward")
    assert calls == 2
    cluster = Cluster.virtual(1, 1, "A100")
    plan = UniformPlanner().plan(graph, cluster, SearchConfig(stages=1))
    assert lower_bound(graph, cluster).step_s <= simulate(graph, plan, cluster).step_s


def test_frozen_layers_have_no_gradients():
    def model() -> nn.Module:
        made = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        for p in made[0].parameters():
            p.requires_grad_(False)
        return made

    graph = capture(model, torch.zeros(4, 16), _squares)
    flops = sum(k.times * k.flops for k in kernels_of(graph, 4) if k.matmul)
    assert flops == 3 * 2 * 4 * 16 * 16
    assert trained_bytes(graph, 4) == {4 * 16 * 16: 1, 4 * 16: 1}


@settings(max_examples=examples(13, 40))
@given(
    st.integers(1, 9), st.floats(0, 1e9), st.floats(1, 1e8), st.booleans(),
    st.floats(1e9, 1e12), st.floats(0.05, 1.0), st.floats(1e3, 1e7), st.integers(0, 2**31),
)  # fmt: skip
def test_no_sharing_out_takes_fewer_device_seconds(ranks, flops, nbytes, matmul, near, slow, knee,
                                                   seed):  # fmt: skip
    """Any shares that add up to the whole, on any number of ranks."""
    kind = device_kind("CPU")
    rates = dataclasses.replace(
        default_rates(kind),
        memory={"plain": MemoryCurve(near, slow * near, knee)},
        matmul={"float32": MatmulCurve(0.5, 1e6)},
    )
    form = "" if matmul else "plain"
    kernel = Kernel(1, flops if matmul else 0.0, nbytes, "float32", matmul, form, 1.0, False)
    shares = np.random.default_rng(seed).dirichlet(np.ones(ranks))
    total = 0.0
    for share in shares:
        moved = rates.memory["plain"].seconds(nbytes * share)
        curve = rates.curve("float32")
        product = curve.seconds(kernel.flops * share, kind.peak("float32"))
        total += rates.overhead + max(product, moved)
    assert kernel_s(kernel, kind, rates, ranks) <= total * (1 + 1e-9)


@settings(max_examples=examples(13, 40))
@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=12),
       st.integers(1, 8), st.integers(1, 8))  # fmt: skip
def test_unequal_devices_share_work_as_it_suits_them(rows, first, second):
    """Against the optimum for two kinds: rows in order of their ratio, split at one of them."""
    kinds = tuple((device_kind(k), default_rates(device_kind(k))) for k in ("V100", "H100"))
    work = np.array(rows)
    prices = Devices(kinds, (first, second)).prices(work)
    bound = float((work * prices).min(axis=1).sum())
    ordered = sorted(rows, key=lambda r: r[0] / r[1])
    loads = [0.0, sum(b for _, b in ordered) / second]
    best = loads[1]
    for a, b in ordered:
        need = (loads[1] - loads[0]) / (a / first + b / second)
        share = min(1.0, max(0.0, need))
        loads = [loads[0] + share * a / first, loads[1] - share * b / second]
        best = min(best, max(loads))
    assert 0.97 * best <= bound <= best * (1 + 1e-9)


# -- options, words, certificate ---------------------------------------------------------------


def test_fixed_options_can_only_raise_it():
    graph, cluster = _mlp(), Cluster.virtual(2, 2, "A100")
    free = lower_bound(graph, cluster).step_s
    for told in ({"replicas": 2}, {"microbatches": 4}, {"stages": 1, "tensor": 1}):
        assert lower_bound(graph, cluster, config=SearchConfig(**told)).step_s >= free * (1 - 1e-9)


def test_options_that_no_plan_has_are_refused():
    with pytest.raises(PlanError, match=r"search\.replicas 3.*microbatches=1 and replicas=1"):
        lower_bound(_mlp(), Cluster.virtual(1, 4, "A100"), config=SearchConfig(replicas=3))


def test_the_calibration_counts():
    graph, cluster = _mlp(), Cluster.virtual(1, 2, "A100")
    table = table_calibration(cluster)
    slow = {n: dataclasses.replace(r, overhead=1e-3) for n, r in table.devices.items()}
    slower = dataclasses.replace(table, devices=slow)
    assert lower_bound(graph, cluster, slower).step_s > 10 * lower_bound(graph, cluster).step_s


def test_a_certificate_says_how_far_from_the_best():
    found = certificate(1.2, Bound(1.0))
    assert found == {"lower_bound_s": 1.0, "gap": pytest.approx(0.2)}
    assert certificate(1.0, Bound(0.0)) == {}


def test_explain_tells_the_certificate():
    graph, cluster = _mlp(), Cluster.virtual(1, 2, "A100")
    plan = UniformPlanner().plan(graph, cluster, SearchConfig(stages=1))
    assert "best possible" not in plan.explain()
    told = dataclasses.replace(plan, certificate={"lower_bound_s": 0.5, "gap": 0.123})
    text = told.explain()
    assert "at most 12.3 % from the best possible under this cost model" in text
    assert "500 ms" in text
