"""From a plan that was found to its page: what `raypar plan --html` does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from raypar._launch import shared_cores
from raypar._targets import search_of, states_of
from raypar.config import Config
from raypar.graph.opgraph import OpGraph
from raypar.lowered import lower_plan
from raypar.mesh.calibration_files import load_calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.report.page import plan_page, save_page
from raypar.search.config import SearchConfig
from raypar.search.record import SearchRecord
from raypar.search.simulate import simulate
from raypar.search.what_if import what_if

_MOST_WORK = 20_000
"""Ops × devices up to which plans for changed clusters are made anew: that takes seconds each."""
_LIMIT_S = 30.0


def write_page(
    config: Config,
    plan: Plan,
    record: SearchRecord | None,
    graph: OpGraph,
    cluster: Cluster,
    path: str | Path,
    *,
    virtual: bool = False,
) -> None:
    """Writes the page of a plan, with what its search did and what other clusters would do.

    Args:
        config: The run.
        plan: Its plan.
        record: How it was found, where that is known.
        graph: Its model.
        cluster: The cluster of the plan.
        path: Where to write it.
        virtual: Whether the cluster was given as a file, and is not this machine.

    Raises:
        ConfigError: The file cannot be written.
        PlanError: The plan does not fit the model or the cluster.
    """
    search = search_of(config)
    calibration = load_calibration(cluster)
    cores = shared_cores(cluster, virtual=virtual)
    states = states_of(config)
    lowered = lower_plan(graph, plan)
    played = simulate(
        graph,
        plan,
        cluster,
        calibration=calibration,
        lowered=lowered,
        cores=cores,
        optimizer_states=states,
    )
    small = len(graph.ops) * cluster.n_devices <= _MOST_WORK
    changes = what_if(
        graph,
        plan,
        cluster,
        config=_quick(search) if small else None,
        calibration=calibration,
        optimizer_states=states,
        memory_fraction=search.memory_fraction,
        cores=cores,
        limit_s=_LIMIT_S,
    )
    page = plan_page(
        plan,
        graph,
        cluster,
        simulation=played,
        record=record,
        what_if=changes,
        lowered=lowered,
        model=config.model.target,
    )
    save_page(page, path)


def _quick(search: SearchConfig) -> SearchConfig:
    """The same options for a planner that needs no trials; a plan given by hand is set aside."""
    planner = search.chosen_planner
    return replace(search, planner=planner if planner == "uniform" else "alpa", manual=None)
