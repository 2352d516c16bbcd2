"""Chooses a strategy for every op of a stage: an integer program over tied ops, then refined.

Repeated layers are tied to one decision. Under a memory limit ties cost something (all layers pay
for memory that some would have to), so classes are split further until the plan is close enough to
a lower bound over free decisions, or time is out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import fx

from raypar.errors import PlanError
from raypar.graph.build import CleanGraph
from raypar.programs.slicing import StageGraph
from raypar.search.cost.machine import MeshMachine
from raypar.search.intra.build import Built, build
from raypar.search.intra.evaluate import Estimate, estimate
from raypar.search.intra.prices import Prices
from raypar.search.intra.problem import Problem, priced
from raypar.search.intra.program import Answer, Program
from raypar.search.intra.reduce import reduce
from raypar.search.intra.result import IntraPlan
from raypar.search.intra.settings import Graph, IntraSettings, read_graph
from raypar.search.intra.ties import split, tie
from raypar.sharding.blocks import annotate_blocks
from raypar.sharding.rules.base import OpView, Strategy
from raypar.sharding.strategies import strategies

Source = CleanGraph | StageGraph | fx.Graph
_Found = tuple[dict[str, Strategy], Estimate]
_NOTHING: _Found = ({}, Estimate(float("inf"), float("inf")))
_MOST_PARTS = 6
_ROUNDING = 1e-9
_PRICES = (0.9, 1.1, 2.0, float("inf"))
"""Prices of a byte at which tied programs are solved, relative to that of the relaxation."""


class OutOfTimeError(PlanError):
    """The solver found no strategies in the time it was given."""


def plan_intra(
    source: Source, machine: MeshMachine, settings: IntraSettings | None = None
) -> IntraPlan:
    """The best strategies for a graph on a mesh.

    Args:
        source: A whole model or a stage, at the size of one microbatch on one replica.
        machine: The mesh; ops are sharded over all of its axes but ``data``.
        settings: Microbatches, memory limit and so on.

    Raises:
        PlanError: It does not fit the memory however it is sharded, or the filter leaves no way.
        OutOfTimeError: The solver found nothing in time.
    """
    search = _Search(source, machine, settings or IntraSettings())
    return search.run()


def lower_bound_s(
    source: Source, machine: MeshMachine, settings: IntraSettings | None = None
) -> float:
    """Seconds that no choice of strategies goes below, ties or not.

    The linear relaxation with a free decision for every op, added up over repeated layers: what
    remains are the shares of the layers that take each option (after Grohe et al. 2014, "Dimension
    reduction via colour refinement", relaxed at the ends of a stack). Under a memory limit it holds
    for free decisions as well.
    """
    search = _Search(source, machine, settings or IntraSettings())
    return search.bound()


class _Search:
    def __init__(self, source: Source, machine: MeshMachine, settings: IntraSettings) -> None:
        began = time.perf_counter()
        self.source = source
        self.machine = machine
        self.settings = settings
        self.deadline = began + settings.time_limit_s
        annotate_blocks(source if isinstance(source, fx.Graph) else source.graph)
        self.graph = read_graph(source, settings.trainable)
        mesh = tuple(size for _, size in machine.mesh.inner)
        self.options = _options(self.graph, mesh, settings)
        self.classes = tie(self.graph, self.options)
        twins = {op: members[0] for members in self.classes for op in members}
        self.prices = Prices(self.graph, machine, settings, twins)
        self._tied: Built | None = None
        self.stats: dict[str, float] = {"nodes": len(self.graph.ops)}
        self.stats["enumerate_s"] = time.perf_counter() - began
        self.stats |= {"build_s": 0.0, "solve_s": 0.0, "refine_s": 0.0}

    def run(self) -> IntraPlan:
        limit = self.settings.memory_bytes
        answer, found = self._solve(self.classes)
        self.stats |= {"parts": 1, "gap": 0.0}
        if not found[0]:
            raise OutOfTimeError(
                f"no strategies were found for {len(self.graph.ops)} ops on a mesh of "
                f"{list(self.prices.mesh)} in {self.settings.time_limit_s} s; give more, as "
                f"time_limit_s={10 * self.settings.time_limit_s:g}, or fewer choices (`allowed`)"
            )
        bound = answer.bound if len(self.classes) == len(self.graph.ops) else float("-inf")
        if limit is not None and found[1].nbytes > limit * (1 + _ROUNDING):
            found, bound = self._refine(limit)
            self.stats["gap"] = _gap(found[1].seconds, bound)
        elif answer.status != "optimal":
            self.stats["gap"] = _gap(found[1].seconds, answer.bound)
        choices, cost = found
        return IntraPlan(choices, cost.seconds, bound, cost.parts, cost.holds, dict(self.stats))

    def bound(self) -> float:
        """See `lower_bound_s`."""
        return _Relaxation(self, self.settings.memory_bytes).answer.bound

    def built(
        self,
        classes: Sequence[Sequence[fx.Node]],
        options: Mapping[fx.Node, Sequence[Strategy]] | None = None,
    ) -> Built:
        """The problem of some classes; that of the tied ones over all options is kept."""
        if classes is not self.classes or options is not None:
            return build(self.graph, self.prices, classes, options or self.options)
        if self._tied is None:
            self._tied = build(self.graph, self.prices, classes, self.options)
        return self._tied

    def left(self) -> float:
        """Seconds until time is out."""
        return self.deadline - time.perf_counter()

    def _solve(
        self,
        classes: Sequence[Sequence[fx.Node]],
        limit: float | None = None,
        options: Mapping[fx.Node, Sequence[Strategy]] | None = None,
        byte_s: float | None = None,
    ) -> tuple[Answer, _Found]:
        """Solves the program of some classes.

        Args:
            classes: Which ops are tied.
            limit: Bytes that may be held.
            options: Strategies to choose from; default: all that are allowed.
            byte_s: Price of a byte; infinite where only bytes count.
        """
        began = time.perf_counter()
        built = self.built(classes, options)
        problem = built.problem
        if byte_s is not None:
            only_bytes = byte_s == float("inf")
            problem = priced(problem, 1.0, 0.0) if only_bytes else priced(problem, byte_s)
        problem = reduce(problem, memory=limit is not None)
        program = Program(problem, limit)
        middle = time.perf_counter()
        gap = 1e-9 if limit is None else min(1e-4, self.settings.gap / 2)
        answer = program.solve(max(self.left(), 1.0), gap=gap)
        self.stats["build_s"] += middle - began
        self.stats["solve_s"] += time.perf_counter() - middle
        self.stats |= {
            "decisions": sum(1 for d in problem.decisions if len(d)),
            "variables": answer.variables,
            "constraints": answer.constraints,
        }
        if answer.status == "infeasible" and limit is None:
            raise PlanError(
                "no strategies of the ops fit together under the filter `allowed` and the "
                "given arrivals; allow every op its whole strategy, or leave out `allowed`"
            )
        if not answer.choice:
            return answer, _NOTHING
        choices = _read(built, problem, answer)
        return answer, (choices, estimate(self.graph, self.prices, choices))

    def _refine(self, limit: float) -> tuple[_Found, float]:
        """Meets the memory limit: splits ties until near the bound over free decisions.

        First among the options that the relaxation and some priced programs take (few, so that
        many classes can be split), then among all.
        """
        began = time.perf_counter()
        relaxation = _Relaxation(self, limit)
        if relaxation.answer.status == "infeasible":
            raise self._too_large(limit)
        some = relaxation.support()
        best = self._candidates(limit, relaxation.answer.byte_s, some)
        bound = relaxation.answer.bound
        for options in (_only(self.options, some), None):
            for parts in range(1, _MOST_PARTS + 1):
                if _gap(best[1].seconds, bound) <= self.settings.gap or self.left() <= 0:
                    break
                classes = split(self.classes, parts)
                if parts > 1 and len(classes) == len(split(self.classes, parts - 1)):
                    break
                answer, found = self._solve(classes, limit, options)
                if answer.choice and found[1].seconds < best[1].seconds:
                    best = found
                    self.stats["parts"] = parts
        self.stats["refine_s"] = time.perf_counter() - began
        if not best[0]:
            raise self._too_large(limit)
        return best, bound

    def _candidates(
        self, limit: float, byte_s: float, some: dict[fx.Node, set[Strategy]]
    ) -> _Found:
        """Solves tied programs at several prices of a byte; adds their strategies to `some`.

        Returns:
            The best of them that fits.
        """
        best = _NOTHING
        for factor in _PRICES:
            if self.left() <= 0:
                break
            price = factor if factor == float("inf") else byte_s * factor
            _, found = self._solve(self.classes, byte_s=price)
            for op in self.graph.ops:
                some[op].update(found[0][k] for k in (str(op.meta["id"]),) if k in found[0])
            if found[1].nbytes <= limit and found[1].seconds < best[1].seconds:
                best = found
        return best

    def _too_large(self, limit: float) -> PlanError:
        """Says how little memory would do, and what takes it."""
        least = self.least()
        tensors = ", ".join(f"{name} ({_mib(n)})" for name, n in least.largest[:4])
        return PlanError(
            f"{len(self.graph.ops)} ops were to fit {_mib(limit)} on each of "
            f"{len(self.machine.mesh.devices)} devices; however they are sharded they need "
            f"{_mib(least.nbytes)} (parameters with gradients and optimizer states "
            f"{_mib(least.holds['params'])}, activations saved for {self.settings.in_flight} "
            f"microbatches {_mib(least.holds['saved'])}). Largest: {tensors}. "
            f"{self._advice(limit)}"
        )

    def least(self) -> Estimate:
        """What the strategies cost that hold the fewest bytes."""
        return self._solve(self.classes, byte_s=float("inf"))[1][1]

    def _advice(self, limit: float) -> str:
        """Other memory policies with what they would need, those that fit first."""
        ways: list[tuple[float, str]] = []
        for zero, recompute in ((3, self.settings.recompute), (self.settings.zero, "full")):
            if (zero, recompute) == (self.settings.zero, self.settings.recompute):
                continue
            other = replace(self.settings, zero=zero, recompute=recompute, time_limit_s=5.0)
            need = _Search(self.source, self.machine, other).least().nbytes
            key = "search.zero=3" if zero != self.settings.zero else "search.recompute=full"
            ways.append((need, f"{key} (needs {_mib(need)})"))
        fitting = [text for need, text in sorted(ways) if need <= limit]
        rest = "more devices per stage, more stages, or more search.microbatches"
        return f"Use {', or '.join([*fitting, rest])}."


class _Relaxation:
    """The linear relaxation over free decisions."""

    def __init__(self, search: _Search, limit: float | None) -> None:
        self.built = search.built(search.classes)
        self.problem = reduce(self.built.problem, memory=limit is not None, tied=False)
        self.program = Program(self.problem, limit, tied=False)
        self.answer = self.program.solve(max(search.left(), 1.0), relaxed=True)

    def support(self) -> dict[fx.Node, set[Strategy]]:
        """The strategies of which it takes any share; of other ops none."""
        found: dict[fx.Node, set[Strategy]] = {op: set() for c in self.built.classes for op in c}
        for at, shares in self.answer.shares.items():
            taken = np.flatnonzero(shares > _ROUNDING)
            for original, meant in self.problem.decisions[at].picks.items():
                if original < len(self.built.classes):
                    some = {self.built.options[original][int(k)] for k in meant[taken]}
                    for op in self.built.classes[original]:
                        found[op] = set(some)
        return found


def _options(
    graph: Graph, mesh: tuple[int, ...], settings: IntraSettings
) -> dict[fx.Node, Sequence[Strategy]]:
    """The allowed strategies of every op; ops with equal ones share one list."""
    found: dict[fx.Node, Sequence[Strategy]] = {}
    shared: dict[tuple[int, tuple[int, ...]], list[Strategy]] = {}
    alive: list[Sequence[Strategy]] = []  # an id means nothing once its list is gone
    for op in graph.ops:
        every = strategies(op, mesh)
        alive.append(every)
        if settings.allowed is None:
            found[op] = every
            continue
        view = OpView(op)
        kept = tuple(i for i, s in enumerate(every) if settings.allowed(view, s))
        if not kept:
            kept = (0,)  # whole on every rank
        found[op] = shared.setdefault((id(every), kept), [every[i] for i in kept])
    return found


def _read(built: Built, problem: Problem, answer: Answer) -> dict[str, Strategy]:
    """Op id → strategy, from an answer over merged decisions."""
    found: dict[str, Strategy] = {}
    for at, option in answer.choice.items():
        for original, meant in problem.decisions[at].picks.items():
            if original < len(built.classes):
                strategy = built.options[original][int(meant[option])]
                found |= {str(op.meta["id"]): strategy for op in built.classes[original]}
    return found


def _only(
    options: Mapping[fx.Node, Sequence[Strategy]], some: Mapping[fx.Node, set[Strategy]]
) -> dict[fx.Node, Sequence[Strategy]]:
    """The options among `some`; all of them for an op of which there are none."""
    return {op: [s for s in every if s in some[op]] or every for op, every in options.items()}


def _gap(seconds: float, bound: float) -> float:
    if bound == float("-inf"):
        return float("inf")
    return max(0.0, (seconds - bound) / seconds) if seconds > 0 else 0.0


def _mib(nbytes: float) -> str:
    if nbytes >= 2**30:
        return f"{nbytes / 2**30:.1f} GiB"
    return f"{nbytes / 2**20:.1f} MiB"
