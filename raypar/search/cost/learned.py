"""The learned cost model: the analytic one, corrected by what was measured.

It was compared, on stages of model families that it had not seen, with a Gaussian process and
gradient boosting over features of whole stages, with non-negative least squares over classes of op,
and with an ensemble of small networks (`release/learned.py`, `release/results/learned.json`):
factors for classes and sizes of ops carry over to new models best, for ops are what models share.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from raypar.lowered import LoweredPlan
from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import MeshSlice, Plan
from raypar.search._sim_setting import CPU_OVERHEAD_S
from raypar.search.cost.analytic import AnalyticCost
from raypar.search.cost.base import (
    CostModel,
    StageCode,
    StageCost,
    register_cost_model,
    stage_code,
    total_s,
)
from raypar.search.cost.collectives import CollectiveFit
from raypar.search.cost.features import PricedStage, Pricer, StageWork, analytic_s, stage_work
from raypar.search.cost.machine import MeshMachine, machine_of
from raypar.search.cost.own_model import OwnModel, Residual
from raypar.search.cost.profiled import Seconds
from raypar.search.cost.regression import Predicted, Row, WorkRegression
from raypar.search.cost.rows import ALONE, TOGETHER, CollectiveRow, StageRow, StepRow
from raypar.search.cost.store import MeasurementStore
from raypar.search.measure import Measured

_MOST_FITS = 4
"""Calibrations, and device kinds under each, for which a fit is kept."""


@register_cost_model
class LearnedCost(CostModel):
    """Corrects `AnalyticCost` by what was measured on such a cluster; equal to it without.

    Attributes:
        store: The measurements; what is observed is added to it.
    """

    name = "learned"

    def __init__(self, store: MeasurementStore | None = None, *, origin: str = "") -> None:
        """Learns from a store when it is first asked; without one, from what it will observe.

        Args:
            store: The measurements.
            origin: The model that it is asked about: what was measured of its own stages says more.
        """
        self._origin = origin
        self.store = store if store is not None else MeasurementStore()
        self._fits: list[tuple[Calibration, str, _StageFit]] = []
        self._links: list[tuple[Calibration, Cluster, CollectiveFit]] = []
        self._held = memory_factor(self.store.steps)
        self._working = working_factor(self.store.stages)

    @classmethod
    def from_store(cls, store: MeasurementStore) -> LearnedCost:
        """The model of what a store knows."""
        return cls(store)

    def for_cluster(self, cluster: Cluster) -> LearnedCost:
        """The model of what was measured on such a cluster, from the cache folder."""
        return LearnedCost(MeasurementStore.for_cluster(cluster))

    def stage_cost(
        self, stage: StageCode, machine: MeshMachine, *, optimizer_states: int = 2
    ) -> StageCost:
        """What `stage` costs on one device of `machine`. See `CostModel`."""
        return self.predict(stage, machine, optimizer_states=optimizer_states)[0]

    def predict(
        self,
        stage: StageCode,
        machine: MeshMachine,
        *,
        optimizer_states: int = 2,
        alone: bool = False,
    ) -> tuple[StageCost, float]:
        """What `stage` costs, and how sure that is.

        Args:
            stage: The stage as one device runs it.
            machine: Its mesh.
            optimizer_states: Tensors that the optimizer keeps per parameter.
            alone: Whether nobody else is at work on the machine, as where a stage is profiled;
                else all devices of a node are.

        Returns:
            The cost, and the standard deviation of the logarithm of its forward and backward
            seconds together.
        """
        cost = AnalyticCost().stage_cost(stage, machine, optimizer_states=optimizer_states)
        work = stage_work(stage)
        ranks = 1 if alone else max(machine.cluster.shape)
        # On devices of several kinds the slowest counts.
        found = [fit.predict(work, ranks) for fit in self._stage_fits(machine)]
        slowest = max(found, key=lambda own: sum(seconds for seconds, _ in own[:2]))
        times = [p for _, p in slowest]
        return self._corrected(cost, times, machine), _together(cost, times)

    def knows(self, stage: StageCode, machine: MeshMachine) -> bool:
        """Whether such programs were measured alone on such a device."""
        device, works = machine.kinds[0][0].name, stage_work(stage).works
        return any(
            row.where == ALONE and row.device == device and row.work.works == works
            for row in self.store.stages
        )

    def observe(
        self,
        stage: StageCode,
        machine: MeshMachine,
        measured: Seconds,
        *,
        origin: str = "",
        working_bytes: int = 0,
    ) -> None:
        """Keeps what a stage was measured at, alone on one device (`profiled.profile`).

        Args:
            stage: The stage.
            machine: Where it would run.
            measured: Its seconds.
            origin: Stages of one model have the same one.
            working_bytes: Most bytes that one microbatch of it held; 0 where that is not known.

        Raises:
            ValueError: The seconds are not finite, negative, or all 0.
        """
        work = stage_work(stage)
        seconds = (*(float(s) for s in measured), 0.0)
        device = machine.kinds[0][0].name
        counted = 0
        if working_bytes:
            counted = _working_bytes(AnalyticCost().stage_cost(stage, machine))
        self.store.add(
            StageRow(
                work, device, seconds, ALONE, 1, origin or work.op_classes,
                working_bytes=working_bytes, counted_bytes=counted,
            )
        )  # fmt: skip

    def observe_collective(
        self, kind: str, tier: str, size: int, nbytes: float, seconds: float
    ) -> None:
        """Keeps what a collective was measured at.

        Args:
            kind: One of `raypar.sharding.convert.COLLECTIVES`.
            tier: ``inside`` a node or ``across`` nodes.
            size: Ranks that took part.
            nbytes: Bytes of the larger side on one rank.
            seconds: How long it took.

        Raises:
            ValueError: A figure is not finite and positive, or there are fewer than two ranks.
        """
        self.store.add(CollectiveRow(kind, tier, size, nbytes, seconds))

    def observe_step(
        self,
        lowered: LoweredPlan,
        plan: Plan,
        cluster: Cluster,
        calibration: Calibration,
        measured: Measured,
    ) -> None:
        """Keeps what the stages of a plan were measured at in real steps, their neighbours at work.

        Args:
            lowered: The lowered plan.
            plan: The plan that ran.
            cluster: Where it ran.
            calibration: What the cluster reaches.
            measured: What was measured; without figures of stages nothing is kept.
        """
        rows = []
        for i, found in enumerate(measured.stages[: len(plan.stages)]):
            machine = machine_of(cluster, plan.stages[i].mesh, calibration)
            code = stage_code(lowered, plan, i)
            cost = AnalyticCost().stage_cost(code, machine)
            around = 0.0 if machine.is_gpu else CPU_OVERHEAD_S
            seconds = (
                _compute(found.forward_s, around + total_s(cost.forward_comm)),
                _compute(found.backward_s, around + total_s(cost.backward_comm)),
                0.0,
                0.0,
                _compute(found.optimizer_s, 0.0),
            )
            if max(seconds) > 0.0:
                device = machine.kinds[0][0].name
                ranks = max(Counter(cluster.device(d)[0] for d in plan.devices).values())
                rows.append(
                    StageRow(stage_work(code), device, seconds, TOGETHER, ranks, plan.params_hash)
                )
        self.store.add(*rows)

    def refit(self) -> None:
        """Takes what was observed since into account."""
        for _, _, fit in self._fits:
            fit.update(self.store.stages)
        self._links.clear()
        self._held = memory_factor(self.store.steps)
        self._working = working_factor(self.store.stages)

    # -- inside -----------------------------------------------------------------------------

    def _corrected(
        self, cost: StageCost, times: Sequence[Predicted], machine: MeshMachine
    ) -> StageCost:
        forward, backward, first, second, step = (math.exp(p.log) for p in times)
        links = self._link_fit(machine)
        working = _working_bytes(cost)
        held = (self._held - 1.0) * (cost.resident_bytes + working)
        # What steps were seen to hold includes what their stages do.
        held = max(held, (self._working - 1.0) * working)
        return replace(
            cost,
            forward_s=cost.forward_s * forward,
            backward_s=cost.backward_s * backward,
            backward_input_s=cost.backward_input_s * first,
            backward_weight_s=cost.backward_weight_s * second,
            optimizer_s=cost.optimizer_s * step,
            forward_comm=links.corrected(machine, cost.forward_comm),
            backward_comm=links.corrected(machine, cost.backward_comm),
            backward_input_comm=links.corrected(machine, cost.backward_input_comm),
            backward_weight_comm=links.corrected(machine, cost.backward_weight_comm),
            gather=links.corrected(machine, cost.gather),
            sync=links.corrected(machine, cost.sync),
            overhead_bytes=cost.overhead_bytes + int(held),
        )

    def _stage_fits(self, machine: MeshMachine) -> list[_StageFit]:
        """One for each kind of device of a mesh."""
        kinds = {machine.cluster.node_of(d).device.name: d for d in machine.mesh.devices}
        found = []
        for name, device in kinds.items():
            fit = next(
                (f for c, n, f in self._fits if n == name and _same(c, machine.calibration)), None
            )
            if fit is None:
                mesh = MeshSlice((device,), (1,))
                own = machine_of(machine.cluster, mesh, machine.calibration)
                fit = _StageFit(own, self._origin)
                fit.update(self.store.stages)
                most = max(_MOST_FITS, len(kinds))
                self._fits = [(machine.calibration, name, fit), *self._fits[: most - 1]]
            found.append(fit)
        return found

    def _link_fit(self, machine: MeshMachine) -> CollectiveFit:
        for calibration, cluster, fit in self._links:
            if cluster == machine.cluster and _same(calibration, machine.calibration):
                return fit
        fit = CollectiveFit(machine.cluster, machine.calibration, self.store.collectives)
        own = (machine.calibration, machine.cluster, fit)
        self._links = [own, *self._links[: _MOST_FITS - 1]]
        return fit


def _same(a: Calibration, b: Calibration) -> bool:
    return a is b or a == b


def _together(cost: StageCost, times: Sequence[Predicted]) -> float:
    """Sigma of forward and backward together.

    What is not known of one stage's parts is mostly the same, so that their errors add up.
    """
    parts = [cost.forward_s * math.exp(times[0].log), cost.backward_s * math.exp(times[1].log)]
    whole = sum(parts)
    if not whole > 0.0:
        return times[0].sigma
    return sum(t * p.sigma for t, p in zip(parts, times, strict=False)) / whole


_LEAST_COMPUTE = 0.5


def _compute(seconds: float, around: float) -> float:
    """What of a measured pass was compute; 0 (not known) where most of it was something else."""
    own = seconds - around
    return own if math.isfinite(seconds) and own > _LEAST_COMPUTE * seconds > 0.0 else 0.0


_MEMORY_PRIOR, _MEMORY_NOISE = 0.05, 0.05


def memory_factor(steps: Sequence[StepRow]) -> float:
    """How much more memory ranks take than is simulated, 1 where no more or not known.

    The mean of the logarithms of measured over simulated peaks, drawn towards 0 by a Gaussian
    prior. A plan that is told to fit must fit: what is measured to be less changes nothing.
    """
    return _factor(
        row.measured_bytes / row.simulated_bytes
        for row in steps
        if row.measured_bytes > 0 and row.simulated_bytes > 0
    )


def working_factor(stages: Sequence[StageRow]) -> float:
    """The same of what one microbatch holds while its stage computes it."""
    return _factor(
        row.working_bytes / row.counted_bytes
        for row in stages
        if row.working_bytes > 0 and row.counted_bytes > 0
    )


def _factor(ratios: Iterable[float]) -> float:
    logs = [math.log(ratio) for ratio in ratios]
    if not logs:
        return 1.0
    weight = len(logs) + (_MEMORY_NOISE / _MEMORY_PRIOR) ** 2
    return math.exp(min(max(sum(logs) / weight, 0.0), 1.0))


def _working_bytes(cost: StageCost) -> int:
    """Most bytes that one microbatch holds besides what is held anyway."""
    return max(cost.forward_peak_bytes, cost.saved_bytes + cost.backward_peak_bytes)


class _StageFit:
    """A regression over the stages of a store, priced on one device with one calibration."""

    def __init__(self, machine: MeshMachine, origin: str) -> None:
        self._origin = origin
        self._own = OwnModel()
        self._device = machine.kinds[0][0].name
        self._price = Pricer(machine)
        self._priced: dict[str, PricedStage] = {}
        self._regression = WorkRegression()
        self._calibrated_at = 0

    def update(self, stages: Sequence[StageRow]) -> None:
        """Fits anew; sigmas are judged again when there is half as much more to see."""
        rows = [row for stage in stages for row in self._rows(stage)]
        calibrate = len(rows) >= 1.5 * self._calibrated_at
        self._regression.fit(rows, calibrate=calibrate)
        if calibrate:
            self._calibrated_at = len(rows)
        own = [s for s in stages if self._origin == s.origin and self._device == s.device]
        self._own = OwnModel([r for r in map(self._residual, own) if r is not None])

    def _residual(self, stage: StageRow) -> Residual | None:
        """How far a stage's forward and backward were from what is learned from all models."""
        if not all(s > 0.0 for s in stage.seconds[:2]):
            return None
        told = sum(seconds for seconds, _ in self._predict(stage.work, stage.ranks)[:2])
        if not told > 0.0:
            return None
        log = math.log(sum(stage.seconds[:2]) / told)
        return Residual(stage.work.works, log, stage.count)

    def _rows(self, stage: StageRow) -> Iterator[Row]:
        if stage.device != self._device:
            return
        key = stage.key
        priced = self._priced.get(key)
        if priced is None:
            priced = self._priced[key] = self._price(stage.work, stage.ranks)
        for seconds, traits, measured in zip(
            priced.pieces, priced.traits, stage.seconds, strict=True
        ):
            if measured > 0.0:
                yield Row(seconds, traits, measured, stage.origin, float(stage.count))

    def predict(self, work: StageWork, ranks: int) -> list[tuple[float, Predicted]]:
        """Per piece, the optimizer last: (seconds, factor on the analytic ones)."""
        shift = self._own.log_factor(work.works)
        *pieces, optimizer = self._predict(work, ranks)
        shifted = [(s * math.exp(shift), p._replace(log=p.log + shift)) for s, p in pieces]
        return [*shifted, optimizer]

    def _predict(self, work: StageWork, ranks: int) -> list[tuple[float, Predicted]]:
        priced = self._price(work, ranks)
        rows = [Row(s, t) for s, t in zip(priced.pieces, priced.traits, strict=True)]
        return [
            (analytic_s(row.seconds) * math.exp(p.log), p)
            for row, p in zip(rows, self._regression.predict(rows), strict=True)
        ]
