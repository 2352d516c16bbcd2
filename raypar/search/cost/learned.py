"""The learned cost model: the analytic one, corrected by what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from raypar.lowered import LoweredPlan
from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import MeshSlice, Plan
from raypar.search.cost.analytic import AnalyticCost
from raypar.search.cost.base import (
    CostModel,
    StageCode,
    StageCost,
    register_cost_model,
    stage_code,
)
from raypar.search.cost.features import PricedStage, Pricer, StageWork, stage_work
from raypar.search.cost.machine import MeshMachine, machine_of
from raypar.search.cost.profiled import Seconds
from raypar.search.cost.regression import Row, WorkRegression
from raypar.search.cost.rows import ALONE, TOGETHER, StageRow
from raypar.search.cost.store import MeasurementStore
from raypar.search.measure import Measured


@register_cost_model
class LearnedCost(CostModel):
    """Corrects `AnalyticCost` by what was measured on such a cluster; equal to it without.

    Attributes:
        store: The measurements; what is observed is added to it.
    """

    name = "learned"

    def __init__(self, store: MeasurementStore | None = None) -> None:
        self.store = store if store is not None else MeasurementStore()
        self._fits: list[tuple[Calibration, str, _Fit]] = []

    @classmethod
    def from_store(cls, store: MeasurementStore) -> LearnedCost:
        """The model of what a store knows; it is fitted when it is first asked."""
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
        analytic = AnalyticCost().stage_cost(stage, machine, optimizer_states=optimizer_states)
        ranks = 1 if alone else max(machine.cluster.shape)
        return self._fit(machine).corrected(analytic, stage_work(stage), ranks)

    def observe(
        self, stage: StageCode, machine: MeshMachine, measured: Seconds, *, origin: str = ""
    ) -> None:
        """Keeps what a stage was measured at, alone on one device (`profiled.profile`).

        Args:
            stage: The stage.
            machine: Where it would run.
            measured: Its seconds.
            origin: Stages of one model have the same one.

        Raises:
            ValueError: The seconds are not finite, negative, or all 0.
        """
        work = stage_work(stage)
        seconds = (*(float(s) for s in measured), 0.0)
        device = machine.kinds[0][0].name
        self.store.add(StageRow(work, device, seconds, ALONE, 1, origin or work.op_classes))

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
            seconds = (found.forward_s, found.backward_s, 0.0, 0.0, found.optimizer_s)
            if not all(0.0 <= s < math.inf for s in seconds) or not max(seconds):
                continue
            work = stage_work(stage_code(lowered, plan, i))
            rows.append(
                StageRow(
                    work, machine.kinds[0][0].name, seconds, TOGETHER, max(cluster.shape),
                    plan.params_hash,
                )
            )  # fmt: skip
        self.store.add(*rows)

    def refit(self) -> None:
        """Takes what was observed since into account, for every machine that was asked for."""
        for _, _, fit in self._fits:
            fit.update(self.store.stages)

    def _fit(self, machine: MeshMachine) -> _Fit:
        device = machine.kinds[0][0].name
        for calibration, name, fit in self._fits:
            if name == device and (
                calibration is machine.calibration or calibration == machine.calibration
            ):
                return fit
        fit = _Fit(machine)
        fit.update(self.store.stages)
        self._fits = [(machine.calibration, device, fit), *self._fits[:3]]
        return fit


class _Fit:
    """A regression over the stages of a store, priced with one calibration."""

    def __init__(self, machine: MeshMachine) -> None:
        mesh = MeshSlice(machine.mesh.devices[:1], (1,))
        one = machine_of(machine.cluster, mesh, machine.calibration)
        self._device = one.kinds[0][0].name
        self._price = Pricer(one)
        self._priced: dict[str, PricedStage] = {}
        self._regression = WorkRegression()
        self._chosen_at = 0

    def update(self, stages: Sequence[StageRow]) -> None:
        """Fits anew; how much may vary is chosen again when there is half as much more to see."""
        rows = [row for stage in stages for row in self._rows(stage)]
        choose = len(rows) >= 1.5 * self._chosen_at
        self._regression.fit(rows, choose=choose)
        if choose:
            self._chosen_at = len(rows)

    def _rows(self, stage: StageRow) -> Iterable[Row]:
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

    def corrected(self, cost: StageCost, work: StageWork, ranks: int) -> tuple[StageCost, float]:
        """An analytic cost with its seconds corrected, and its sigma."""
        priced = self._price(work, ranks)
        rows = [Row(s, t) for s, t in zip(priced.pieces, priced.traits, strict=True)]
        _, sigma = self._regression.joint(rows[:2])
        found = self._regression.predict(rows)
        forward, backward, first, second, step = (math.exp(p.log) for p in found)
        corrected = cost.with_seconds(
            cost.forward_s * forward,
            cost.backward_s * backward,
            cost.backward_input_s * first,
            cost.backward_weight_s * second,
        )
        return replace(corrected, optimizer_s=cost.optimizer_s * step), sigma
