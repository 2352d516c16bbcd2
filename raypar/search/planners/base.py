"""The planner contract: a graph and a cluster in, a plan out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from raypar.errors import ConfigError, did_you_mean
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.config import SearchConfig


class Planner(ABC):
    """Makes plans.

    Attributes:
        name: What the planner is registered under.
        obeys_budget: Whether it ends its search after `SearchConfig.budget_s`.
    """

    name: str
    obeys_budget: ClassVar[bool] = False

    @abstractmethod
    def plan(self, graph: OpGraph, cluster: Cluster, config: SearchConfig) -> Plan:
        """Makes a plan that fits the graph and the cluster.

        Raises:
            PlanError: What was asked for does not fit; says which key to change.
        """


_PLANNERS: dict[str, type[Planner]] = {}


def register_planner(planner: type[Planner]) -> type[Planner]:
    """Class decorator that makes a planner known by its name."""
    if not issubclass(planner, Planner):
        raise TypeError(f"{planner!r} is not a Planner")
    if _PLANNERS.setdefault(planner.name, planner) is not planner:
        raise ValueError(f"a planner named {planner.name!r} is registered already")
    return planner


def planner_names() -> list[str]:
    """Registered names."""
    from raypar.search.planners import (  # noqa: F401
        alpa,
        exhaustive,
        manual,
        piper,
        placement,
        study,
        uniform,
    )

    return sorted(_PLANNERS)


def get_planner(name: str) -> Planner:
    """The planner of that name.

    Raises:
        ConfigError: None has it.
    """
    names = planner_names()
    if name not in names:
        raise ConfigError(
            f"search.planner is {name!r}; valid are {', '.join(names)}.{did_you_mean(name, names)}"
        )
    return _PLANNERS[name]()
