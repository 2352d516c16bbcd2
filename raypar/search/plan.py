"""`raypar.plan`: the one door to all planners."""

from __future__ import annotations

from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.planners.base import get_planner


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
    config = config or SearchConfig()
    return get_planner(config.chosen_planner).plan(graph, cluster, config)
