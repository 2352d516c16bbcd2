"""From a configuration to a simulated step: what `raypar simulate` does."""

from __future__ import annotations

from pathlib import Path

from raypar._launch import plan_of, shared_cores
from raypar._targets import states_of
from raypar.config import Config
from raypar.mesh.calibration_files import load_calibration
from raypar.search.simulate import Simulation, simulate


def simulate_config(
    config: Config,
    plan_file: str | Path | None = None,
    cluster_file: str | Path | None = None,
    *,
    cost: str = "analytic",
    cores: int | None = None,
) -> Simulation:
    """Simulates a step of the configured run.

    Args:
        config: The run.
        plan_file: The plan; default: the one that the configuration would get.
        cluster_file: The cluster; default: the one that the configuration would get.
        cost: Name of the cost model.
        cores: Cores that the ranks of each CPU node share; default: one each, or this machine's
            where the run has more ranks on it.

    Raises:
        ConfigError: A key is wrong, or there is no such cost model.
        PlanError: The plan cannot be read, or does not fit the model or the cluster.
    """
    plan, graph, cluster = plan_of(config, cluster_file, plan_file)
    if cores is None:
        cores = shared_cores(cluster, virtual=cluster_file is not None)
    states = states_of(config)
    return simulate(
        graph,
        plan,
        cluster,
        calibration=load_calibration(cluster),
        cost=cost,
        cores=cores,
        optimizer_states=states,
    )
