"""Plans that were found before: found again for the same question only, and never half written."""

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from raypar.errors import ConfigError
from raypar.graph.capture import capture
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import table_calibration
from raypar.mesh.calibration_files import CACHE_VARIABLE
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search import cache as cache_module
from raypar.search.cache import PlanCache, Question, question_of
from raypar.search.config import SearchConfig
from raypar.search.plan import search
from raypar.search.planners import base
from raypar.search.planners.base import Planner
from raypar.search.planners.uniform import UniformPlanner
from raypar.search.record import INTERRUPTED, SearchRecord, TrialRecord

CLUSTER = Cluster.virtual(1, 2)
CONFIG = SearchConfig(cache=True)
RECORD = SearchRecord(
    planner="optuna",
    sampler="tpe",
    seed=3,
    trials=(TrialRecord(0, "alpa", {"stages": 2}, "kept", {"simulated": 0.5}),),
    winner=0,
    seconds=1.5,
    notes=("a note",),
)


def graph_of(width: int = 8, batch: int = 4) -> OpGraph:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    return capture(build, torch.randn(batch, width), lambda out: out.sum())


@pytest.fixture(scope="module")
def graph() -> OpGraph:
    return graph_of()


@pytest.fixture(scope="module")
def plan(graph: OpGraph) -> Plan:
    return UniformPlanner().plan(graph, CLUSTER, CONFIG)


@pytest.fixture
def question(graph: OpGraph) -> Question:
    return question_of(graph, CLUSTER, CONFIG)


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path)


def test_what_was_put_is_found_with_its_record(
    cache: PlanCache, question: Question, graph: OpGraph, plan: Plan
) -> None:
    assert cache.get(question, graph, CLUSTER) == (None, "")
    assert cache.put(question, plan, RECORD) == ""
    found, note = cache.get(question, graph, CLUSTER)
    assert found is not None
    assert note == ""
    assert found.plan == plan
    assert dataclasses.replace(found.record, notes=("a note",)) == RECORD
    assert found.record.notes[-1].startswith(f"taken from the plan cache (made {found.made})")


def test_a_plan_answers_its_own_question_only(question: Question, graph: OpGraph) -> None:
    node = dataclasses.replace(CLUSTER.nodes[0], devices=4)
    slow = dataclasses.replace(table_calibration(CLUSTER), inside=table_calibration(CLUSTER).across)
    others = [
        question_of(graph_of(width=6), CLUSTER, CONFIG),
        question_of(graph_of(batch=6), CLUSTER, CONFIG),
        question_of(graph, Cluster((node,)), CONFIG),
        question_of(graph, Cluster.virtual(2, 1), CONFIG),
        question_of(graph, Cluster.virtual(1, 2, "A100"), CONFIG),
        question_of(graph, CLUSTER, dataclasses.replace(CONFIG, trials=7)),
        question_of(graph, CLUSTER, dataclasses.replace(CONFIG, seed=1)),
        question_of(graph, CLUSTER, dataclasses.replace(CONFIG, microbatches=2)),
        question_of(graph, CLUSTER, dataclasses.replace(CONFIG, seeds=("alpa",))),
        question_of(graph, CLUSTER, CONFIG, measured=True),
        question_of(graph, CLUSTER, CONFIG, calibration=slow),
    ]
    texts = [json.dumps(q, sort_keys=True) for q in [question, *others]]
    assert len(set(texts)) == len(texts)


def test_names_and_how_it_is_searched_are_no_part_of_the_question(
    question: Question, graph: OpGraph
) -> None:
    renamed = Cluster((dataclasses.replace(CLUSTER.nodes[0], name="x", id="7"),), "other")
    how = dataclasses.replace(CONFIG, cache=False, storage="study.journal")
    assert question_of(graph, renamed, how) == question


def test_another_raypar_searches_again(
    monkeypatch: pytest.MonkeyPatch, question: Question, graph: OpGraph
) -> None:
    monkeypatch.setattr(cache_module, "__version__", "99")
    assert question_of(graph, CLUSTER, CONFIG) != question
    monkeypatch.undo()
    monkeypatch.setattr(cache_module, "_code", lambda: "changed")
    assert question_of(graph, CLUSTER, CONFIG) != question


def _cut(text: str) -> str:
    return text[: len(text) // 2]


def _other_question(text: str) -> str:
    entry = json.loads(text)
    entry["question"]["seed"] = 99
    return json.dumps(entry)


def _no_fit(text: str) -> str:
    entry = json.loads(text)
    entry["plan"]["stages"][0]["mesh"]["devices"] = [0, 5]
    entry["plan"]["stages"][0]["mesh"]["shape"] = [2]
    return json.dumps(entry)


def _no_record(text: str) -> str:
    return json.dumps({**json.loads(text), "record": {"format": 1}})


@pytest.mark.parametrize(
    "spoil",
    [_cut, _other_question, _no_fit, _no_record, lambda _: "[]", lambda _: "", lambda _: "\0"],
)
def test_a_corrupt_entry_is_set_aside_and_told(
    cache: PlanCache, question: Question, graph: OpGraph, plan: Plan, spoil: object
) -> None:
    cache.put(question, plan, RECORD)
    (path,) = cache.folder.iterdir()
    path.write_text(spoil(path.read_text()))  # type: ignore[operator]
    found, note = cache.get(question, graph, CLUSTER)
    assert found is None
    assert "searched again" in note
    (aside,) = cache.folder.iterdir()
    assert aside.suffix == ".bad"
    assert str(aside) in note
    assert cache.get(question, graph, CLUSTER) == (None, "")
    cache.put(question, plan, RECORD)
    assert cache.get(question, graph, CLUSTER)[0] is not None


def test_bytes_that_are_no_text_are_set_aside(
    cache: PlanCache, question: Question, graph: OpGraph, plan: Plan
) -> None:
    cache.put(question, plan, RECORD)
    (path,) = cache.folder.iterdir()
    path.write_bytes(b"\xff\xfe\x00")
    assert "kept as" in cache.get(question, graph, CLUSTER)[1]


def test_what_was_not_used_for_longest_goes(
    tmp_path: Path, question: Question, graph: OpGraph, plan: Plan
) -> None:
    cache = PlanCache(tmp_path, most=3)
    asked = [{**question, "n": n} for n in range(4)]
    for age, one in zip((40, 30, 20), asked, strict=False):
        cache.put(one, plan, RECORD)
        path = cache._path(one)
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    assert cache.get(asked[0], graph, CLUSTER)[0] is not None  # the oldest is used again
    stale = tmp_path / "x.json.tmp"
    stale.write_text("")
    os.utime(stale, (1.0, 1.0))
    cache.put(asked[3], plan, RECORD)
    kept = [cache.get(one, graph, CLUSTER)[0] is not None for one in asked]
    assert kept == [True, False, True, True]
    assert not stale.exists()


def test_many_writers_and_readers_share_a_folder(
    tmp_path: Path, question: Question, graph: OpGraph, plan: Plan
) -> None:
    def work(n: int) -> str:
        cache = PlanCache(tmp_path, most=2)
        asked = {**question, "n": n % 4}
        notes = [cache.put(asked, plan, RECORD)]
        notes += [cache.get({**question, "n": k}, graph, CLUSTER)[1] for k in range(4)]
        return "".join(notes)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(64))) == {""}
    PlanCache(tmp_path, most=2).put(question, plan, RECORD)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_made_is_told(
    tmp_path: Path, question: Question, graph: OpGraph, plan: Plan
) -> None:
    (tmp_path / "file").write_text("")
    cache = PlanCache(tmp_path / "file" / "plans")
    assert "was not kept" in cache.put(question, plan, RECORD)
    endless = dataclasses.replace(RECORD, seconds=float("inf"))
    assert "was not kept" in PlanCache(tmp_path / "plans").put(question, plan, endless)


def test_it_lies_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "own"))
    assert PlanCache().folder == tmp_path / "own" / "plans"


# -- as `search` uses it -------------------------------------------------------------------------


@pytest.fixture
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return tmp_path / "plans"


class _Counting(Planner):
    """Counts how often it is asked."""

    name = "counting"
    asked = 0

    def plan(self, graph: OpGraph, cluster: Cluster, config: SearchConfig) -> Plan:
        """What `uniform` makes."""
        _Counting.asked += 1
        return UniformPlanner().plan(graph, cluster, config)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[_Counting]:
    monkeypatch.setitem(base._PLANNERS, "counting", _Counting)
    monkeypatch.setattr(_Counting, "asked", 0)
    return _Counting


def test_the_same_question_is_searched_for_once(
    own_folder: Path, graph: OpGraph, counting: type[_Counting]
) -> None:
    config = SearchConfig(planner="counting", cache=True)
    first = search(graph, CLUSTER, config)
    again = search(graph_of(), CLUSTER, config)  # another capture of the same model
    assert counting.asked == 1
    assert again.plan == first.plan
    assert again.record.notes[-1].endswith("--no-cache searches again")
    assert not first.record.notes
    search(graph, CLUSTER, dataclasses.replace(config, cache=False))
    search(graph, CLUSTER, dataclasses.replace(config, storage="study.journal"))
    assert counting.asked == 3
    assert len(list(own_folder.iterdir())) == 1


def test_a_corrupt_entry_is_told_and_written_again(
    own_folder: Path, graph: OpGraph, counting: type[_Counting]
) -> None:
    config = SearchConfig(planner="counting", cache=True)
    search(graph, CLUSTER, config)
    (path,) = own_folder.iterdir()
    path.write_text("{")
    found = search(graph, CLUSTER, config)
    assert "searched again" in found.record.notes[0]
    assert counting.asked == 2
    search(graph, CLUSTER, config)
    assert counting.asked == 2


def test_an_interrupted_search_is_no_answer_to_keep(own_folder: Path, graph: OpGraph) -> None:
    def stop(trial: TrialRecord, best: TrialRecord | None) -> None:
        if best is not None:
            raise KeyboardInterrupt

    config = SearchConfig(planner="optuna", cache=True, seeds=("alpa",), trials=4)
    found = search(graph, CLUSTER, config, progress=stop)
    assert found.record.stopped == INTERRUPTED
    assert not own_folder.exists()


def test_an_unknown_planner_among_the_seeds_is_refused(graph: OpGraph) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'alpa'"):
        search(graph, CLUSTER, SearchConfig(seeds=("alpha",)))
