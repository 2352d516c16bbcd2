"""No plan is faster than this: a lower bound on the time of a step under the analytic cost model.

The bound is taken over every way to cut the batch (replicas × microbatches) that the options leave
open; for each, what any plan has to pay is added up, and the least sum is the bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from raypar.errors import CaptureError, PlanError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import Calibration, table_calibration
from raypar.mesh.cluster import Cluster
from raypar.search._sim_setting import CPU_OVERHEAD_S
from raypar.search.bounds.kernels import kernels_of, trained_bytes
from raypar.search.bounds.memory import Room, again_s, room_of, usable_bytes
from raypar.search.bounds.one_op import Kernel
from raypar.search.bounds.rates import Devices, Floats, linear_s
from raypar.search.config import SearchConfig

_ROUNDING = 1 - 1e-9
"""Sums in another order differ in their last digits."""
_WEIGHTS = (0.02, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Weights of the chain in the means that are tried."""


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
    fitting: bool = True,
) -> Bound:
    """Seconds that no plan for a model on a cluster goes below.

    It holds for every plan that `raypar.fit.check_plan` takes, that fits the memory, and that
    has the options which `config` fixes (replicas, microbatches; the devices that stages and
    tensor leave; the share of the memory that may be filled), whatever its stages, meshes,
    shardings, ZeRO levels, recomputation, schedule and interleaving, as
    `raypar.search.simulate.simulate` plays it with the analytic cost model, a core for every CPU
    device, and this calibration.

    What it does not count, since there are plans without it: additions of gradients to those of
    earlier microbatches (a large product reads the sum while it multiplies), bubbles (any of them
    shrinks with more interleaving), collectives and messages (stages of one rank per replica need
    no collectives, and messages travel while ranks compute), and recomputation beyond what a
    single microbatch asks for (memory can be had by keeping fewer of them in flight).

    Args:
        graph: The captured model.
        cluster: The devices.
        calibration: What they reach; default: the device table.
        config: What is fixed; default: nothing.
        fitting: Whether it is for plans that fit the memory. Else it holds for all others as well.

    Raises:
        PlanError: The options leave no way to cut the batch.
    """
    config = config or SearchConfig()
    calibration = calibration or table_calibration(cluster)
    cuts = list(_cuts(graph, cluster, config))
    exactly = len(cuts) == 1
    usable = usable_bytes(cluster, calibration, config) if fitting else None
    bounds = [
        _Cut(graph, cluster, calibration, config, *cut).bound(exactly, usable) for cut in cuts
    ]
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
        self.replicas, self.microbatches = replicas, microbatches
        self.local_batch = graph.global_batch // (replicas * microbatches)
        every = Devices.of(cluster, calibration)
        used = every.total // replicas
        if config.stages != "auto" and config.tensor != "auto":
            used = min(used, config.stages * config.tensor)  # of one replica
        self.used = used * replicas
        self.devices = every.at_most(self.used)
        self.ranks = used if config.tensor == "auto" else min(used, config.tensor)

    def bound(self, exactly: bool, usable: Sequence[float] | None) -> Bound | None:
        """The bound, or None where the model cannot be run in such microbatches.

        Two things hold of every plan, and so does every mean of them. Devices are busy with all
        kernels: the time is at least their device-seconds over the devices. And one microbatch
        goes through a chain of kernels, forward to the loss and back, one after the other. Few
        ranks for each op make the first small, many the second; for a given mean, the best number
        of ranks of each op (and kind of device) is that of its own summand, so that the sum of
        the least summands is a bound; the largest over some means is taken.
        """
        try:
            kernels = kernels_of(self.graph, self.local_batch, exactly=exactly)
        except (PlanError, CaptureError):  # batch norm needs two samples, say
            return None
        compute, state = self._compute_rows(kernels), self._state_rows()
        prices = self.devices.prices(np.concatenate([compute, state]))
        computing = float((compute * prices).min(axis=1).sum())
        keeping = float((state * prices).min(axis=1).sum())
        room = Room(0.0, 0.0) if usable is None else self._room(kernels, usable)
        again = again_s(kernels, (compute * prices).min(axis=1), room)
        launch = 0.0 if any(kind.is_gpu for kind, _ in self.devices.kinds) else CPU_OVERHEAD_S
        best, share = computing + again + keeping + 2 * self.microbatches * launch, 0.0
        for weight in _WEIGHTS:
            mixed = self._mixed_s(kernels, prices, weight) + (1 - weight) * (again + keeping)
            mixed += 2 * (weight + (1 - weight) * self.microbatches) * launch
            if mixed > best:
                best, share = mixed, weight
        launching = 2 * (share + (1 - share) * self.microbatches) * launch
        parts = {"compute": computing, "optimizer": keeping}
        if share:
            parts["optimizer"] = (1 - share) * keeping
            rest = best - launching - parts["optimizer"] - (1 - share) * again
            parts["compute"] = min(computing, rest)
            parts["chain"] = rest - parts["compute"]
        if again:
            parts["recompute"] = (1 - share) * again
        if launch:
            parts["interpreter"] = launching
        parts = {name: _ROUNDING * seconds for name, seconds in parts.items()}
        words = self._words(share, room if again else None)
        return Bound(sum(parts.values()), parts, words, self.replicas, self.microbatches)

    def _room(self, kernels: tuple[Kernel, ...], usable: Sequence[float]) -> Room:
        return room_of(
            kernels,
            trained_bytes(self.graph, self.local_batch),
            usable[: self.used],
            replicas=self.replicas,
            optimizer_states=self.config.optimizer_states,
        )

    def _words(self, share: float, room: Room | None) -> str:
        cut = (
            f"{self.microbatches} microbatches of {self.local_batch} samples on {self.replicas} "
            "replicas"
        )
        if room is not None:
            cut += (
                f" (of whose {room.needed / 2**30:.3g} GiB for backward each replica can hold "
                f"{room.held / 2**30:.3g}, so that the rest is computed again)"
            )
        if share > 0.5:
            return f"{cut} are few: each goes through its ops one after the other"
        busy = f"the kernels of {cut} keep {self.devices.total} devices busy"
        return f"{busy}, and each microbatch goes through them one by one" if share else busy

    def _mixed_s(self, kernels: tuple[Kernel, ...], prices: Floats, weight: float) -> float:
        """The least mean of the chain (by `weight`) and of device-seconds at given prices."""
        ranks = _ranks(self.ranks)
        seconds = self.devices.latencies(kernels, ranks)
        fewest = np.array(ranks, dtype=float)
        # Between two numbers of ranks that are looked at: no faster than on the larger, and no
        # fewer device-seconds than on the smaller.
        later = np.concatenate([seconds[..., 1:], seconds[..., -1:]], axis=2)
        apart = np.diff([*ranks, self.ranks + 1]) > 1
        chain = np.where(apart, later, seconds)
        busy = seconds * fewest * (self.microbatches * self.replicas)
        priced = (1 - weight) * busy * prices[None, :, None]
        alone = priced.min(axis=(1, 2))
        together = (priced + weight * chain).min(axis=(1, 2))
        chained = np.array([k.chained for k in kernels], dtype=float)
        times = np.array([k.times for k in kernels], dtype=float)
        return float(chained @ together + (times - chained) @ alone)

    def _compute_rows(self, kernels: tuple[Kernel, ...]) -> np.ndarray:
        """Device-seconds of each kernel in a step, on each kind of device."""
        seconds = self.devices.seconds(kernels, self.ranks)
        counts = np.array([k.times for k in kernels], dtype=float)[:, None]
        return seconds * counts * (self.microbatches * self.replicas)

    def _state_rows(self) -> np.ndarray:
        """Device-seconds of the optimizer for every parameter.

        Every part of a trained parameter is stored, and stepped over, by at least one device.
        Adding up gradients may cost nothing: a large product reads the sum while it multiplies.
        """
        rows = []
        for nbytes, count in trained_bytes(self.graph, self.local_batch).items():
            row = []
            for _, rates in self.devices.kinds:
                step = linear_s(rates.optimizer, nbytes) + rates.optimizer_overhead
                row.append(count * step)
            rows.append(row)
        return np.array(rows, dtype=float).reshape(len(rows), len(self.devices.kinds))


def _ranks(most: int) -> list[int]:
    """Numbers of ranks that are looked at: all small ones, then in steps of a twelfth."""
    found = list(range(1, min(most, 48) + 1))
    while found[-1] * 13 // 12 < most:
        found.append(found[-1] * 13 // 12)
    return found if found[-1] == most else [*found, most]
