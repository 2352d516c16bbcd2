"""Planner `optuna`: the study over outer decisions, seeded by the exact planners."""

from __future__ import annotations

from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.planners.base import Planner, register_planner


@register_planner
class OptunaPlanner(Planner):
    """Searches stages, meshes, shardings, memory policies and schedules by an Optuna study."""

    name = "optuna"

    def plan(self, graph: OpGraph, cluster: Cluster, config: SearchConfig) -> Plan:
        """The fastest plan that is found; see `Planner.plan`."""
        from raypar.search.study.study import StudySearch

        return StudySearch(graph, cluster, config).run().plan
