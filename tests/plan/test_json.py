"""The JSON form: exact, and nothing but plans or PlanErrors come out of edited text."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import raypar as rp
from raypar.errors import PlanError
from raypar.fit import check_plan
from raypar.plan import PLAN_FORMAT, MemoryPolicy, MeshSlice, Plan, ScheduleSpec, StagePlan
from raypar.testing import models, random_plan
from tests._tiers import examples

CLUSTER = rp.Cluster.local(4)


@cache
def _graph():
    case = models.case("mlp")
    return rp.capture(case.model_fn, case.batch(0, 8), case.loss_fn)


texts = st.text(max_size=8)
ints = st.integers(-(10**20), 10**20)
floats = st.floats(allow_nan=False, allow_infinity=False)
any_plans = st.builds(
    Plan,
    graph_hash=texts,
    params_hash=texts,
    torch=texts,
    cluster=st.lists(ints, max_size=3).map(tuple),
    device=texts,
    global_batch=ints,
    microbatches=ints,
    batch_dims=st.lists(st.none() | ints, max_size=3).map(tuple),
    schedule=st.builds(ScheduleSpec, texts, st.lists(st.tuples(ints, ints), max_size=3).map(tuple)),
    stages=st.lists(
        st.builds(
            StagePlan,
            first=texts,
            last=texts,
            mesh=st.builds(
                MeshSlice,
                devices=st.lists(ints, max_size=3).map(tuple),
                shape=st.lists(ints, max_size=3).map(tuple),
                axes=st.lists(texts, max_size=2).map(tuple),
            ),
            memory=st.builds(MemoryPolicy, texts),
            sharding=st.dictionaries(texts, texts, max_size=2),
            predicted=st.dictionaries(texts, floats, max_size=2),
        ),
        max_size=3,
    ).map(tuple),
    predicted=st.dictionaries(texts, floats, max_size=2),
    alternatives=st.dictionaries(texts, floats, max_size=2),
    planner=texts,
)


@given(any_plans)
@settings(max_examples=examples(20, 60))
def test_any_plan_comes_back_equal(plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert plan.diff(again) == []


@given(st.integers(0, 10**6))
@settings(max_examples=examples(10, 30))
def test_a_random_plan_comes_back_equal_and_hashes_of_types_hold(seed):
    plan = random_plan(_graph(), CLUSTER, seed=seed)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert all(isinstance(s.mesh.devices, tuple) for s in again.stages)
    check_plan(again, _graph(), CLUSTER)


def test_a_saved_plan_is_loaded_whatever_the_locale(tmp_path):
    plan = dataclasses.replace(random_plan(_graph(), CLUSTER), planner="größer 大")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(str(tmp_path / "plan.json")) == plan


def _paths(value, at=()):
    yield at
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _paths(item, (*at, key))


junk = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 3, 10**30, 0.5, math.inf, math.nan, "", "x", "gpipe", "full",
     "none", [], {}, [0], [[0, 0]], [1, 2], {"x": 1}, "10", [None], ["data"], [True]]
).map(copy.deepcopy)  # fmt: skip


@given(st.data())
@settings(max_examples=examples(75, 300))
def test_an_edited_plan_is_a_valid_plan_or_a_plan_error(data):
    plan = random_plan(_graph(), CLUSTER, seed=data.draw(st.integers(0, 19)))
    raw = json.loads(plan.to_json())
    for _ in range(data.draw(st.integers(1, 2))):
        *above, key = data.draw(st.sampled_from([p for p in _paths(raw) if p]))
        holder = raw
        for step in above:
            holder = holder[step]
        how = data.draw(st.sampled_from(("put", "drop", "add", "twice")))
        if how == "put":
            holder[key] = data.draw(junk)
        elif how == "drop":
            del holder[key]
        elif how == "twice" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif isinstance(holder, dict):
            holder[data.draw(st.sampled_from(("extra", "stage", "Stages", "")))] = data.draw(junk)
        if not raw:
            break
    try:
        edited = Plan.from_json(json.dumps(raw))
        check_plan(edited, _graph(), CLUSTER)
    except PlanError:
        return
    edited.explain(_graph())
    assert edited.microbatches * edited.replicas * edited.local_batch == edited.global_batch


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "a plan is a JSON object, found list"),
        ('{"format": 2}', "has format 2, this raypar reads up to 1"),
        ('{"format": 0}', "format"),
        ('{"format": "1"}', "format"),
        ("{}", "'graph_hash' is missing"),
        ("[" * 100_000, "JSON"),
        ('{"graph_hash": ' + "1" * 5000 + "}", "JSON"),
        ('{"microbatch": 2}', "unknown key 'microbatch'. Did you mean 'microbatches'"),
        ('{"graph_hash": "a", "graph_hash": "b"}', "twice"),
        ('{"predicted": {"step_s": NaN}}', "NaN"),
        ('{"predicted": {"step_s": 1e999}}', "too large for a number"),
    ],
)
def test_text_that_is_no_plan(text, error):
    with pytest.raises(PlanError, match=error):
        Plan.from_json(text)


def test_a_figure_that_is_no_number_is_not_written():
    plan = dataclasses.replace(random_plan(_graph(), CLUSTER), predicted={"step_s": math.inf})
    with pytest.raises(PlanError, match="predicted"):
        plan.to_json()


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"{"])
def test_a_file_that_is_no_plan_is_named(tmp_path, content):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(path)
    with pytest.raises(PlanError, match="cannot read"):
        Plan.load(tmp_path)


@pytest.mark.parametrize("number", range(1, PLAN_FORMAT + 1))
def test_plans_of_every_format_load(number):
    """Saved once by the raypar of that time."""
    plan = Plan.load(Path(__file__).parent / "golden" / f"format-{number}.json")
    assert plan.devices == (0, 1, 2, 3)
    assert plan.stages[0].mesh.devices == (3, 0, 2, 1)
    assert plan.stages[0].mesh.named == (("data", 2), ("x", 2))
    assert [s.memory.zero for s in plan.stages] == [3, 2]
    assert plan.stages[1].sharding["2/linear#0"] == "S1 S1 P > P"
    assert (plan.schedule.name, plan.microbatches, plan.global_batch) == ("1f1b", 4, 8)
    assert Plan.from_json(plan.to_json()) == plan
