"""From a configuration to a simulated step: what `raypar simulate` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from raypar._launch import capture_of, cluster_of, optimizer_of, plan_of
from raypar.config import Config
from raypar.errors import OptimizerError
from raypar.mesh.calibration_files import load_calibration
from raypar.plan import Plan
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
    if plan_file is None:
        plan, graph, cluster = plan_of(config, cluster_file)
    else:
        plan = Plan.load(plan_file)
        graph, cluster = capture_of(config), cluster_of(config, cluster_file)
    own = os.cpu_count() or 1
    if cores is None and cluster_file is None and cluster.n_devices > own:
        cores = own
    states = optimizer_states(optimizer_of(config))
    return simulate(
        graph,
        plan,
        cluster,
        calibration=load_calibration(cluster),
        cost=cost,
        cores=cores,
        optimizer_states=states,
    )


def optimizer_states(
    build: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
) -> int:
    """How many tensors an optimizer keeps per parameter: found by one step on a small one.

    Raises:
        OptimizerError: The optimizer cannot be built, or its step raises.
    """
    param = torch.nn.Parameter(torch.zeros(2, 2))
    param.grad = torch.zeros_like(param)
    try:
        optimizer = build([param])
        optimizer.step()
    except Exception as error:
        raise OptimizerError(
            f"the optimizer failed on a parameter of shape (2, 2): {type(error).__name__}: {error}"
        ) from error
    kept = optimizer.state[param].values()
    return sum(isinstance(t, torch.Tensor) and t.shape == param.shape for t in kept)
