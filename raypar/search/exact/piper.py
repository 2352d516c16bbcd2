"""Piper's pipelines, optimal in Piper's cost model.

Tarnawski et al. 2021, "Piper: Multidimensional Planner for DNN Parallelization" (NeurIPS), find
them by dynamic programming that minimises the load for every number of devices. Here the load is
bounded, and the program minimises devices (`raypar.search.exact._piper_sweep`); the least bound
that still has a pipeline is the optimum. It is found by bisection between a lower bound and the
load of the best pipeline so far, and proven by asking for anything better.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from raypar.errors import PlanError
from raypar.graph.workloads import LayerWorkload
from raypar.search.exact._piper_figures import DegreeFigures
from raypar.search.exact._piper_formula import PiperSetting
from raypar.search.exact._piper_lattice import Family, Order, nearest, thinned
from raypar.search.exact._piper_sweep import Cut, PiperSweep

_MOST_DOWNSETS = 60_000
_LARGE, _COARSE, _FINE = 1_600, 500, 900
"""Downsets above which parts of the lattice are searched first: a coarse one, then fine ones."""
_BETTER = 1 - 1e-11
"""A pipeline is better if its load is less than this share of the best one's."""
_GALLOP = (1e-4, 2e-3, 3e-2, 0.3, 0.6)
"""Steps above the lower bound that are tried before bisection."""
_GAINS = (1e-11, 1e-3, 4e-3, 1.6e-2, 6e-2)
"""Steps below a pipeline of another search that are tried before bisection."""
_ANYTHING = 1e300
_WIDTH, _FINENESS = 24, 1e-4
"""Labels of a downset, and relative distance to the optimum, in a first search of all degrees."""


@dataclass(frozen=True)
class PiperStage:
    """A stage of a pipeline.

    Attributes:
        layers: Ids.
        replicas: d.
        degree: t: devices of one replica.
        variants: Number of each layer's variant at that degree.
        recomputed: Ids of the layers that make their activations again.
        load: Seconds per microbatch.
    """

    layers: tuple[int, ...]
    replicas: int
    degree: int
    variants: tuple[int, ...]
    recomputed: tuple[int, ...]
    load: float


@dataclass(frozen=True)
class PiperPipeline:
    """What was found.

    Attributes:
        stages: First to last; empty where nothing fits.
        objective: The largest load; infinite where nothing fits.
        bound: No pipeline has a smaller largest load, as far as that was proven in time; infinite
            where it was proven that nothing fits.
    """

    stages: tuple[PiperStage, ...] = ()
    objective: float = math.inf
    bound: float = 0.0


def solve_piper(
    workload: LayerWorkload,
    setting: PiperSetting,
    *,
    replicas: Sequence[int] | None = None,
    seconds: float = 7.5,
) -> PiperPipeline:
    """The pipeline of the least largest load.

    Args:
        workload: The layers.
        setting: Devices, memory, microbatches, bandwidth.
        replicas: Numbers of replicas that a stage may have; default: whatever divides the
            microbatches.
        seconds: CPU seconds after which the best pipeline so far has to do.

    Raises:
        PlanError: The setting is out of range.
    """
    return _Solver(workload, setting, replicas, seconds).run()


class _OutOfTime(Exception):
    """The CPU seconds are used up."""


class _Solver:
    def __init__(
        self,
        workload: LayerWorkload,
        setting: PiperSetting,
        replicas: Sequence[int] | None,
        seconds: float,
    ) -> None:
        _check(setting)
        self.workload, self.setting = workload, setting
        self.deadline = time.process_time() + seconds
        self.order = Order(workload)
        k, total = setting.devices, setting.microbatches
        allowed = range(1, min(k, total) + 1) if replicas is None else sorted(set(replicas))
        self.replicas = [d for d in allowed if total % d == 0 and d <= min(k, total)]
        self.best = PiperPipeline()
        self.complete = True
        self.proving: PiperSweep | None = None
        self.proven = 0.0

    def run(self) -> PiperPipeline:
        """The best pipeline that is found in time."""
        if not self.replicas:
            return replace(self.best, bound=math.inf)
        masks = self.order.all_downsets(_MOST_DOWNSETS)
        self.complete = masks is not None
        if masks is None:
            masks = self.order.coarse_downsets(self._weights(), _MOST_DOWNSETS // 4)
        with contextlib.suppress(_OutOfTime):
            self._search(Family(self.order, masks))
        return replace(self.best, bound=min(self.proven, self.best.objective))

    def _search(self, family: Family) -> None:
        if len(family) <= _LARGE:
            self._solve(family, whole=True)
            return
        part = thinned(family, self._weights(), _COARSE)
        gained = True
        while gained:
            before = self.best.objective
            self._solve(part)
            cuts = self._cuts()
            gained = self.best.objective < before * _BETTER and bool(cuts)
            part = nearest(family, cuts, self._weights(), _FINE) if gained else part
        self._solve(family, whole=True)

    def _solve(self, family: Family, *, whole: bool = False) -> None:
        """Improves `best` to the optimum over a family, the `whole` search space or a part."""
        degrees = [t for t in self.workload.degrees if t <= self.setting.devices]
        upwards = len(family) > _LARGE
        if len(degrees) > 1:
            # One degree is far quicker, and often all that the best pipeline uses.
            self._minimise(self._sweep(family, degrees[:1]), upwards=upwards)
        if not degrees:
            return
        sweep = self._sweep(family, degrees)
        if len(degrees) > 1 and not upwards:
            sweep.width = _WIDTH
            self._minimise(sweep, upwards=not self.best.stages, fineness=_FINENESS)
            sweep.width = None
        self.proving = sweep if whole and self.complete else None
        self._minimise(sweep, upwards=upwards)

    def _weights(self) -> list[float]:
        """Per layer what it matters where it lies."""
        seconds = [
            min(v.seconds for variants in layer.variants.values() for v in variants)
            for layer in self.order.layers
        ]
        little = sum(seconds) / len(seconds) / 10 or 1.0
        return [s + little for s in seconds]

    def _cuts(self) -> list[int]:
        """Downsets between the stages of the best pipeline, as bit masks."""
        masks = [0]
        for stage in self.best.stages:
            masks.append(masks[-1] | sum(1 << self.order.position[one] for one in stage.layers))
        return masks

    def _sweep(self, family: Family, degrees: Sequence[int]) -> PiperSweep:
        figures = [DegreeFigures(self.workload, family, self.setting, t) for t in degrees]
        return PiperSweep(family, figures, self.setting, self.replicas, self._clock)

    def _clock(self) -> None:
        if time.process_time() > self.deadline:
            raise _OutOfTime

    def _minimise(self, sweep: PiperSweep, *, upwards: bool, fineness: float = 0.0) -> None:
        """Improves `best` to the optimum over a family.

        Args:
            sweep: The dynamic program over the family.
            upwards: Begin at the lower bound, even where a pipeline is known: in a large family
                that is quicker than to ask what lies just below that pipeline.
            fineness: Relative distance to the optimum that is near enough.
        """
        low = sweep.least_bound()
        self._note(sweep, low)
        if not low < math.inf:
            return
        if self.best.stages and not upwards:
            # Another family or fewer degrees gave this pipeline: there may be little to gain.
            for step in _GAINS:
                bound = self.best.objective * (1 - step)
                if bound > low and not self._attempt(sweep, bound):
                    low = bound
                    break
        else:
            for step in _GALLOP if low > 0 else ():
                bound = low * (1 + step)
                if bound >= self.best.objective * _BETTER or self._attempt(sweep, bound):
                    break
                low = bound
            if not self.best.stages and not self._attempt(sweep, _ANYTHING):
                self._note(sweep, math.inf)
                return
        stuck = 0
        while low < self.best.objective * min(_BETTER, 1 - fineness):
            high = self.best.objective * _BETTER
            close = high - low < 1e-3 * high and stuck >= 2
            # Far above the optimum there are many labels: rather come from below.
            between = min(max(math.sqrt(low * high), high / 8), max(1.5 * low, high / 8))
            bound = high if close else between
            if self._attempt(sweep, bound):
                stuck = 0
            else:
                low, stuck = bound, stuck + 1

    def _note(self, sweep: PiperSweep, bound: float) -> None:
        """Remembers what is proven for all pipelines, not just for those of a part."""
        if sweep is self.proving:
            self.proven = max(self.proven, bound)

    def _attempt(self, sweep: PiperSweep, bound: float) -> bool:
        """Whether a pipeline keeps the bound; keeps the best one in mind."""
        while (cuts := sweep.pipeline(bound)) is not None:
            found = self._pipeline(sweep, cuts)
            if found is not None:
                if found.objective < self.best.objective:
                    self.best = found
                return found.objective <= bound * (1 + 1e-12)
        self._note(sweep, bound)
        return False

    def _pipeline(self, sweep: PiperSweep, cuts: Sequence[Cut]) -> PiperPipeline | None:
        stages = []
        for cut in cuts:
            found = sweep.recompute.choose(cut.low, cut.high, cut.replicas, cut.degree, cut.flights)
            if found is None:
                sweep.forbid(cut)
                return None
            positions, picks = found
            figures = sweep.figures[cut.degree]
            variants = [figures.variants[p][j] for p, j in zip(positions, picks, strict=True)]
            ids = [self.order.layers[p].id for p in positions]
            stages.append(
                PiperStage(
                    tuple(ids),
                    cut.replicas,
                    figures.degree,
                    tuple(picks),
                    tuple(i for i, v in zip(ids, variants, strict=True) if v.recomputes),
                    figures.load(positions, picks, cut.replicas),
                )
            )
        return PiperPipeline(tuple(stages), max(s.load for s in stages))


def _check(setting: PiperSetting) -> None:
    for name, value, whole in (
        ("devices", setting.devices, True),
        ("memory", setting.memory, False),
        ("microbatches", setting.microbatches, True),
        ("bandwidth", setting.bandwidth, False),
    ):
        if not (math.isfinite(value) and value > 0) or (whole and value != int(value)):
            kind = "whole number" if whole else "finite number"
            raise PlanError(f"{name} is {value}; it must be a {kind} over 0, such as 8")
