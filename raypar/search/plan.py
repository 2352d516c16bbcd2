"""`raypar.plan`: the one door to all planners."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from typing import NamedTuple

from raypar.errors import NothingFitsError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration_files import load_calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.cache import PlanCache, Question, question_of
from raypar.search.config import SearchConfig
from raypar.search.lowering import forget_lowered
from raypar.search.measure import Measurer, StageProfiler
from raypar.search.need import check_state, does_not_fit
from raypar.search.planners.base import get_planner
from raypar.search.record import INTERRUPTED, SearchRecord, TrialRecord

_DIRECT = ("uniform", "manual")
"""Planners that search nothing: asking them again costs less than a look into the cache."""


class Found(NamedTuple):
    """What a search ends with.

    Attributes:
        plan: The plan.
        record: How it was found.
    """

    plan: Plan
    record: SearchRecord

    def _repr_html_(self) -> str:
        return self.plan._repr_html_() + self.record._repr_html_()


Progress = Callable[[TrialRecord, TrialRecord | None], None]
"""Called with every trial and the best one so far."""


def plan(graph: OpGraph, cluster: Cluster, config: SearchConfig | None = None) -> Plan:
    """Finds a plan for a captured model on a cluster.

    Args:
        graph: From `raypar.capture`.
        cluster: The devices.
        config: What to search; default: everything ``auto``.

    Raises:
        PlanError: What was asked for does not fit the graph or the cluster.
        ConfigError: No such planner.
    """
    return search(graph, cluster, config).plan


def search(
    graph: OpGraph,
    cluster: Cluster,
    config: SearchConfig | None = None,
    *,
    measurer: Measurer | None = None,
    profiler: StageProfiler | None = None,
    executor: Executor | None = None,
    capture: Callable[[], OpGraph] | None = None,
    progress: Progress | None = None,
) -> Found:
    """Finds a plan, and tells how it was found.

    Args:
        graph: From `raypar.capture`.
        cluster: The devices.
        config: What to search; default: everything ``auto``.
        measurer: Runs steps of plans that could be the best; without one, predictions decide.
        profiler: Runs single stages of them before that; without one, this process does where
            `SearchConfig.profile` says how many.
        executor: Looks at proposals side by side, elsewhere; needs `capture`.
        capture: Captures the model where the executor runs functions.
        progress: Is told of every trial of a study.

    Raises:
        PlanError: What was asked for does not fit the graph or the cluster.
        ConfigError: No such planner.
    """
    config = config or SearchConfig()

    def run() -> Found:
        try:
            return asked()
        finally:
            forget_lowered(graph)

    def asked() -> Found:
        if config.chosen_planner not in _DIRECT:
            check_state(graph, cluster, config, load_calibration(cluster))
        if config.chosen_planner == "optuna":
            from raypar.search.study.study import StudySearch

            study = StudySearch(
                graph, cluster, config, measurer=measurer, profiler=profiler, executor=executor,
                capture=capture, progress=progress,
            )  # fmt: skip
            return study.run()
        began = time.perf_counter()
        try:
            made = get_planner(config.chosen_planner).plan(graph, cluster, config)
        except NothingFitsError:
            raise does_not_fit(graph, cluster, config, load_calibration(cluster)) from None
        return Found(made, _alone(made, cluster, time.perf_counter() - began))

    if config.seeds != "auto":
        for name in config.seeds:
            get_planner(name)
    if not config.cache or config.chosen_planner in _DIRECT:
        return run()
    cache = PlanCache(config.cache if isinstance(config.cache, str) else None)
    measured = measurer is not None or profiler is not None
    question = question_of(graph, cluster, config, measured=measured)
    with cache.only_one(question):
        return _remembered(graph, cluster, config, cache, question, run)


def _remembered(
    graph: OpGraph,
    cluster: Cluster,
    config: SearchConfig,
    cache: PlanCache,
    question: Question,
    run: Callable[[], Found],
) -> Found:
    """What the plan cache holds, else what is found, which goes into it.

    A search with a journal always runs, since it goes on from there.
    """
    note = ""
    if config.storage is None:
        known, note = cache.get(question, graph, cluster)
        if known is not None:
            return Found(known.plan, known.record)
    found = run()
    notes = [note]
    if found.record.stopped != INTERRUPTED:
        notes.append(cache.put(question, found.plan, found.record))
    told = (*found.record.notes, *filter(None, notes))
    return Found(found.plan, replace(found.record, notes=told))


def _alone(made: Plan, cluster: Cluster, seconds: float) -> SearchRecord:
    """The record of a planner that makes one plan."""
    from raypar.search.interop.contest import in_words

    figures = made.predicted
    step_s = {"simulated": figures["step_s"]} if "step_s" in figures else {}
    peak = int(figures.get("peak_bytes", 0))
    trial = TrialRecord(
        0, made.planner, {}, "kept", step_s, peak, 0.0, len(made.devices), "", in_words(made),
        seconds,
    )  # fmt: skip
    return SearchRecord(made.planner, "", 0, (trial,), 0, seconds)
