"""Every way of sharding that people ask for by name, as a plan that is given by hand.

Each plan trains like the unsplit model, its ranks hold parts of the stated shapes, the stated
collectives stand in its programs, and `raypar.explain` calls it by its name.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import raypar as rp
from raypar.lowered import LoweredPlan, lower_plan
from raypar.plan import MemoryPolicy, MeshSlice, Plan
from raypar.search.simulate import simulate
from raypar.testing.equivalence import compare, reference_run, run_graph
from tests.sharding import form_models as zoo
from tests.sharding.form_models import ids, real

HEADS = {
    "/reshape#0": "S2 > S2",
    "/reshape#1": "S2 > S2",
    "/reshape#2": "S2 > S2",
    "/transpose#0": "S2 > S1",
    "/transpose#1": "S2 > S1",
    "/transpose#2": "S2 > S1",
    "/scaled_dot_product_attention#0": "S1 S1 S1 > S1",
    "/transpose#3": "S1 > S2",
    "/reshape#3": "S2 > S2",
    "out/linear#0": "S2 S1 P > P",
}
COLUMNS = {f"{name}/linear#0": "Rg S0 S0 > S2" for name in "qkv"}


@dataclass(frozen=True)
class Form:
    """A forced plan and what must be true of it.

    Attributes:
        name: What the test is called.
        words: What `explain` must say.
        model: Builds the model.
        batch: One global batch.
        sharding: Op id → strategy, as a plan has it.
        shapes: Parameter → shape of the part that programs take.
        forward: Collectives of the forward program.
        backward: Collectives of the backward program.
        zero: ZeRO level.
        stored: Parameter → shape of the part that the optimizer holds, where it is another.
    """

    name: str
    words: tuple[str, ...]
    model: Callable[[], nn.Module]
    batch: Any
    sharding: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    forward: Mapping[str, int] = field(default_factory=dict)
    backward: Mapping[str, int] = field(default_factory=dict)
    zero: int = 0
    stored: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def _tile(dim: int) -> dict[str, str]:
    both = {f"{n}/conv2d#0": f"S{dim} Rg Rg > S{dim}" for n in ("one", "two")}
    return both | {
        "/relu#0": f"S{dim} > S{dim}",
        "/square#0": f"S{dim} > S{dim}",
        "/mean#0": f"S{dim} > P",
    }


def _zero(level: int, **more: Any) -> Form:
    cut = {"up.weight": (4, 6), "up.bias": (4,), "down.weight": (3, 8), "down.bias": (3,)}
    whole = {"up.weight": (8, 6), "up.bias": (8,), "down.weight": (6, 8), "down.bias": (6,)}
    batch = {
        "up/linear#0": "S0 Rg Rg > S0",
        "/gelu#0": "S0 > S0",
        "down/linear#0": "S0 Rg Rg > S0",
        "/square#0": "S0 > S0",
        "/mean#0": "S0 > P",
    }
    taken = cut if level == 3 else whole
    words = ("batch", f"ZeRO-{level}")
    return Form(
        f"ZeRO-{level}", words, zoo.Perceptron, real(4, 6), batch, taken,
        zero=level, stored=cut, **more,
    )  # fmt: skip


FORMS = [
    Form(
        "column- and row-parallel linear",
        ("column-parallel", "row-parallel"),
        zoo.Perceptron,
        real(4, 6),
        {
            "up/linear#0": "Rg S0 S0 > S1",
            "/gelu#0": "S1 > S1",
            "down/linear#0": "S1 S1 P > P",
        },
        {"up.weight": (4, 6), "up.bias": (4,), "down.weight": (6, 4), "down.bias": (6,)},
        {"all_reduce": 1},
    ),
    Form(
        "attention over heads",
        ("heads", "3 linear"),
        zoo.Attention,
        real(4, 4, 8),
        COLUMNS | HEADS,
        {"q.weight": (4, 8), "v.bias": (4,), "out.weight": (8, 4)},
        {"all_reduce": 1},
    ),
    Form(
        "grouped-query attention over heads",
        ("heads",),
        lambda: zoo.Attention(2),
        real(4, 4, 8),
        COLUMNS | HEADS,
        {"q.weight": (4, 8), "k.weight": (2, 8), "out.weight": (8, 4)},
        {"all_reduce": 1},
    ),
    Form(
        "fused attention over heads",
        ("heads", "column-parallel"),
        zoo.FusedAttention,
        real(4, 4, 8),
        {"qkv/linear#0": "Rg S0/3 S0/3 > S2/3", "/chunk#0": "S2/3 > S2 S2 S2", **HEADS},
        {"qkv.weight": (12, 8), "qkv.bias": (12,), "out.weight": (8, 4)},
        {"all_reduce": 1},
    ),
    Form(
        "vocabulary-parallel embedding and cross-entropy",
        ("vocabulary-parallel (table rows)", "vocabulary-parallel", "1 cross_entropy_loss"),
        zoo.Vocabulary,
        (ids(10, 4, 4), ids(10, 4, 4)),
        {
            "table/embedding#0": "S0 R > P",
            "head/linear#0": "Rg S0 > S2",
            "/reshape#0": "S2 > S1",
            "/cross_entropy_loss#0": "S1 R > R",
        },
        {"table.weight": (5, 6), "head.weight": (5, 6)},
        {"all_reduce": 3, "all_max": 1},  # embedding; sum of exponentials, the target's logit
        {"all_reduce": 1},
    ),
    Form(
        "sequence parallelism of norm and dropout",
        ("sequence", "column-parallel", "row-parallel"),
        zoo.Branch,
        real(4, 4, 6),
        {
            "norm/layer_norm#0": "S1 Rg Rg > S1",
            "up/linear#0": "Rg S0 S0 > S2",
            "/gelu#0": "S2 > S2",
            "down/linear#0": "S2 S1 P > P",
            "drop/seeded#0": "R > S1",
            "drop/apply_mask#0": "S1 S1 > S1",
            "/add#0": "S1 S1 > S1",
            "/square#0": "S1 > S1",
            "/mean#0": "S1 > P",
        },
        {"norm.weight": (6,), "up.weight": (4, 6), "down.weight": (6, 4)},
        {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 1},
        {"reduce_scatter": 1, "all_gather": 1},
    ),
    Form(
        "convolution over the batch",
        ("batch",),
        zoo.Convolutions,
        real(4, 4, 8, 8),
        _tile(0),
        {"one.weight": (8, 4, 3, 3), "two.weight": (4, 8, 3, 3)},
        {"all_reduce": 1},
    ),
    Form(
        "convolution over channels",
        ("output channels", "input channels"),
        zoo.Convolutions,
        real(4, 4, 8, 8),
        {
            "one/conv2d#0": "Rg S0 S0 > S1",
            "/relu#0": "S1 > S1",
            "two/conv2d#0": "S1 S1 P > P",
        },
        {"one.weight": (4, 4, 3, 3), "one.bias": (4,), "two.weight": (4, 4, 3, 3)},
        {"all_reduce": 1},
    ),
    Form(
        "convolution over tiles of the image",
        ("image tiles (spatial)",),
        zoo.Convolutions,
        real(4, 4, 8, 8),
        _tile(2),
        {"one.weight": (8, 4, 3, 3), "two.weight": (4, 8, 3, 3)},
        {"all_gather": 2, "all_reduce": 1},  # a halo for each convolution; the loss
        {"all_gather": 1},  # the image itself needs no gradient
    ),
    Form(
        "BatchNorm over the batch",
        ("batch, statistics put together",),
        zoo.Normed,
        real(4, 3, 6, 6),
        {
            "conv/conv2d#0": "S0 Rg Rg > S0",
            "norm/_native_batch_norm_legit_functional#0": "S0 Rg Rg R R > S0 R R R R",
            "/relu#0": "S0 > S0",
            "/square#0": "S0 > S0",
            "/mean#0": "S0 > P",
        },
        {"conv.weight": (4, 3, 3, 3), "norm.weight": (4,)},
        {"all_gather": 1, "all_reduce": 1},
        {"reduce_scatter": 1},
    ),
    Form(
        "einsum over heads",
        ("row-parallel", "1 einsum"),
        zoo.Einsums,
        real(4, 4, 6),
        {"/einsum#0": "Rg S1 > S1", "/tanh#0": "S1 > S1", "/einsum#1": "S1 S0 > P"},
        {"into": (6, 2, 2), "back": (2, 2, 6)},
        {"all_reduce": 1},
    ),
    Form(
        "experts by all-to-all",
        ("experts",),
        zoo.Experts,
        real(4, 5, 6),
        {
            "/einsum#0": "S0 S0 > S1",
            "/einsum#1": "S0 S0 > S0",
            "/gelu#0": "S0 > S0",
            "/einsum#2": "S0 S0 > S0",
            "/einsum#3": "S0 S1 > S0",
            "/sub#1": "S0 S0 > S0",
            "/square#0": "S0 > S0",
            "/mean#0": "S0 > P",
        },
        {"gate": (6, 4), "w1": (2, 6, 8), "w2": (2, 8, 6)},
        {"all_to_all": 2, "all_reduce": 1},
        {"all_to_all": 1, "all_gather": 1},  # the tokens that go there need no gradient
    ),
    Form(
        "tables by row",
        ("vocabulary-parallel (table rows)", "1 embedding_bag"),
        zoo.Tables,
        (ids(10, 4, 4), ids(8, 4, 3)),
        {"words/embedding#0": "S0 R > P", "bags/embedding_bag#0": "S0 R R > P R R R"},
        {"words.weight": (5, 6), "bags.weight": (4, 6)},
        {"all_reduce": 2},
    ),
    Form(
        "tables by column",
        ("table columns",),
        zoo.Tables,
        (ids(10, 4, 4), ids(8, 4, 3)),
        {
            "words/embedding#0": "S1 R > S2",
            "/sum#0": "S2 > S1",
            "bags/embedding_bag#0": "S1 R R > S1 R R R",
            "/mul#0": "S1 S1 > S1",
            "/square#0": "S1 > S1",
            "/mean#0": "S1 > P",
        },
        {"words.weight": (10, 3), "bags.weight": (8, 3)},
        {"all_reduce": 1},
    ),
    _zero(1, forward={"all_reduce": 1}),
    _zero(2, forward={"all_reduce": 1}),
    _zero(
        3,
        forward={"all_gather": 4, "all_reduce": 1},
        backward={"reduce_scatter": 4, "all_gather": 1},
    ),
]


def forced(graph: rp.OpGraph, sharding: Mapping[str, str], zero: int = 0) -> Plan:
    """One stage on a mesh ("x",) of two devices that runs its ops as given."""
    cluster = rp.Cluster.local(2)
    options = rp.SearchConfig(planner="uniform", stages=1, replicas=1, microbatches=1)
    base = rp.plan(graph, cluster, options)
    (stage,) = base.stages
    mesh, memory = MeshSlice((0, 1), (2,), ("x",)), MemoryPolicy(zero=zero)
    made = dataclasses.replace(stage, mesh=mesh, memory=memory, sharding=dict(sharding))
    return dataclasses.replace(base, stages=(made,))


@pytest.fixture(autouse=True)
def _double() -> Any:
    """Models are built in double precision, and ranks are told the default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def _shapes(lowered: LoweredPlan) -> dict[str, tuple[int, ...]]:
    (stage,) = lowered.stages
    return {
        n.meta["id"].removeprefix("param:"): tuple(n.meta["val"].shape)
        for n in stage.graph.nodes
        if n.op == "placeholder" and n.meta["id"].startswith("param:")
    }


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name.replace(" ", "-"))
def test_a_form_trains_in_parts_with_its_collectives_and_its_name(form: Form) -> None:
    graph = rp.capture(form.model, form.batch)
    plan = forced(graph, form.sharding, form.zero)
    lowered = lower_plan(graph, plan)

    shapes = _shapes(lowered)
    assert {name: shapes[name] for name in form.shapes} == form.shapes
    (layouts,) = lowered.layouts
    stored = {n: layouts[n].stored.local_shape(layouts[n].shape, [2]) for n in form.stored}
    assert stored == form.stored

    cluster = rp.Cluster.local(2)
    (cost,) = simulate(graph, plan, cluster, lowered=lowered).setting.costs
    assert Counter(c.kind for c in cost.forward_comm) == form.forward
    assert Counter(c.kind for c in cost.backward_comm) == form.backward
    text = rp.explain(plan, graph, cluster, lists=True)
    for words in form.words:
        assert words in text
    listed = {line.split()[0]: line for line in text[text.index("rank group 0, ") :].splitlines()}
    for word, kinds in (("0F0", form.forward), ("0B0", form.backward)):
        assert bool(kinds) == ("over x" in listed[word])

    found = run_graph(graph, form.batch, plan, steps=2)
    wanted = reference_run(graph, form.batch, plan, steps=2)
    assert compare(found, wanted, 1e-9, strict=True) == []
