"""No plan is faster than this: a lower bound on the time of a step under the analytic cost model.

The bound is taken over every way to cut the batch (replicas × microbatches) that the options leave
open; for each, what any plan has to pay is added up, and the least sum is the bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from raypar.errors import PlanError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import Calibration, table_calibration
from raypar.mesh.cluster import Cluster
from raypar.search._sim_setting import CPU_OVERHEAD_S
from raypar.search.bounds.kernels import Kernel, kernels_of, trained_bytes
from raypar.search.bounds.rates import Devices, linear_s
from raypar.search.config import SearchConfig

_ROUNDING = 1 - 1e-9
"""Sums in another order differ in their last digits."""


@dataclass(frozen=True)
class Bound:
    """A lower bound on the seconds of a step.

    Attributes:
        step_s: No plan is simulated faster.
        parts: What it is made of, in seconds; adds up to `step_s`.
        binding: What keeps the step from being shorter, in words.
        replicas: Replicas of the cut of the batch that has this bound.
        microbatches: Its microbatches.
    """

    step_s: float
    parts: dict[str, float] = field(default_factory=dict)
    binding: str = ""
    replicas: int = 1
    microbatches: int = 1


def certificate(plan_step_s: float, bound: Bound) -> dict[str, float]:
    """What `raypar.plan.Plan.certificate` says of a plan.

    Args:
        plan_step_s: Seconds of a simulated step of the plan.
        bound: The bound for its graph, cluster and options.

    Returns:
        ``lower_bound_s``, and ``gap``: how much longer the plan takes, relative to the bound.
        Empty where there is no bound to speak of.
    """
    if bound.step_s <= 0:
        return {}
    return {"lower_bound_s": bound.step_s, "gap": max(0.0, plan_step_s / bound.step_s - 1)}


def lower_bound(
    graph: OpGraph,
    cluster: Cluster,
    calibration: Calibration | None = None,
    config: SearchConfig | None = None,
    *,
    memory: bool = True,
) -> Bound:
    """Seconds that no plan for a model on a cluster goes below.

    It holds for every plan that `raypar.fit.check_plan` takes and that has the options which
    `config` fixes (replicas, microbatches), whatever its stages, meshes, shardings, ZeRO levels,
    recomputation, schedule and interleaving, as `raypar.search.simulate.simulate` plays it with
    the analytic cost model, all cores and this calibration.

    Args:
        graph: The captured model.
        cluster: The devices.
        calibration: What they reach; default: the device table.
        config: What is fixed; default: nothing.
        memory: Only plans that fit the memory count; False: any plan.

    Raises:
        PlanError: The options leave no way to cut the batch.
    """
    config = config or SearchConfig()
    calibration = calibration or table_calibration(cluster)
    cuts = list(_cuts(graph, cluster, config))
    exactly = len(cuts) == 1
    bounds = [_Cut(graph, cluster, calibration, config, *cut).bound(exactly) for cut in cuts]
    found = [bound for bound in bounds if bound is not None]
    if not found:
        raise PlanError(
            f"a global batch of {graph.global_batch} cannot be cut into search.replicas "
            f"{config.replicas} × train.microbatches {config.microbatches} equal parts; "
            "microbatches=1 and replicas=1 always work"
        )
    return min(found, key=lambda b: b.step_s)


def _cuts(graph: OpGraph, cluster: Cluster, config: SearchConfig) -> Iterator[tuple[int, int]]:
    """(replicas, microbatches) of every way to cut the batch."""
    batch = graph.global_batch
    divisors = [n for n in range(1, batch + 1) if batch % n == 0]
    for replicas in divisors if config.replicas == "auto" else [config.replicas]:
        if replicas < 1 or replicas > min(graph.max_replicas, cluster.n_devices):
            continue
        for parts in divisors if config.microbatches == "auto" else [config.microbatches]:
            if parts >= 1 and batch % (replicas * parts) == 0:
                yield replicas, parts


class _Cut:
    """One way to cut the batch."""

    def __init__(
        self,
        graph: OpGraph,
        cluster: Cluster,
        calibration: Calibration,
        config: SearchConfig,
        replicas: int,
        microbatches: int,
    ) -> None:
        self.graph, self.cluster, self.config = graph, cluster, config
        self.devices = Devices.of(cluster, calibration)
        self.replicas, self.microbatches = replicas, microbatches
        self.local_batch = graph.global_batch // (replicas * microbatches)
        self.ranks = cluster.n_devices // replicas

    def bound(self, exactly: bool = False) -> Bound | None:
        """The bound, or None where the model cannot be run in such microbatches."""
        try:
            kernels = kernels_of(self.graph, self.local_batch, exactly=exactly)
        except PlanError:
            return None
        compute = self._compute_rows(kernels)
        state = self._state_rows()
        computing = self.devices.balanced_s(compute)
        with_state = self.devices.balanced_s(np.concatenate([compute, state]))
        launching = self._launching_s()
        parts = {
            "compute": _ROUNDING * computing,
            "optimizer": _ROUNDING * max(0.0, with_state - computing),
            "interpreter": _ROUNDING * launching,
        }
        words = (
            f"the products and kernels of {self.microbatches} microbatches of {self.local_batch} "
            f"samples on {self.replicas} replicas keep {self.cluster.n_devices} devices busy"
        )
        return Bound(sum(parts.values()), parts, words, self.replicas, self.microbatches)

    def _compute_rows(self, kernels: tuple[Kernel, ...]) -> np.ndarray:
        """Device-seconds of each kernel in a step, on each kind of device."""
        seconds = self.devices.seconds(kernels, self.ranks)
        counts = np.array([k.times for k in kernels], dtype=float)[:, None]
        return seconds * counts * (self.microbatches * self.replicas)

    def _state_rows(self) -> np.ndarray:
        """Device-seconds of the optimizer, and of adding up gradients, for every parameter.

        Every part of a trained parameter is stored, and stepped over, by at least one device, and
        that device adds its gradient to the sum once per microbatch.
        """
        rows = []
        for nbytes, count in trained_bytes(self.graph, self.local_batch).items():
            row = []
            for _, rates in self.devices.kinds:
                adding = rates.overhead + linear_s(rates.bytes_curve("plain"), 3.0 * nbytes)
                step = linear_s(rates.optimizer, nbytes) + rates.optimizer_overhead
                row.append(count * (step + self.microbatches * adding))
            rows.append(row)
        return np.array(rows, dtype=float).reshape(len(rows), len(self.devices.kinds))

    def _launching_s(self) -> float:
        """What the interpreter of a CPU rank adds around a forward and a backward."""
        if any(kind.is_gpu for kind, _ in self.devices.kinds):
            return 0.0
        return 2 * self.microbatches * CPU_OVERHEAD_S
