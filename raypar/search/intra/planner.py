"""Chooses a strategy for every op of a stage: an integer program over tied ops, then refined.

Repeated layers are tied to one decision. Under a memory limit ties cost something (all layers pay
for memory that some would have to), so classes are split further until the plan is close enough to
a lower bound over free decisions, or time is out.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from raypar.errors import PlanError
from raypar.graph.build import CleanGraph
from raypar.programs.slicing import StageGraph
from raypar.search.cost.machine import MeshMachine
from raypar.search.intra.evaluate import Estimate, estimate
from raypar.search.intra.prices import Prices
from raypar.search.intra.problem import Built, build
from raypar.search.intra.program import Answer, Program
from raypar.search.intra.reduce import reduce
from raypar.search.intra.settings import Graph, IntraSettings, read_graph
from raypar.search.intra.ties import split, tie, untied
from raypar.sharding.blocks import annotate_blocks
from raypar.sharding.rules.base import OpView, Strategy
from raypar.sharding.spec import R
from raypar.sharding.strategies import pattern_of, strategies

Source = CleanGraph | StageGraph | fx.Graph
_MOST_PARTS = 6
_ROUNDING = 1e-9


@dataclass(frozen=True)
class IntraPlan:
    """How the ops of one graph are sharded.

    Attributes:
        choices: Op id → strategy, of every op (pieces aside).
        objective_s: Predicted seconds of a step on this mesh: compute, conversions, gradient sync
            and optimizer, all microbatches; pipeline bubbles and sending to other stages aside.
        bound_s: No choice takes less; -inf where that was not worked out.
        parts: Seconds by kind; see `raypar.search.intra.evaluate.Estimate`.
        bytes: Bytes held by one device, by kind.
        stats: ``nodes`` (ops), ``decisions`` (after ties and merges), ``variables``,
            ``constraints``, ``enumerate_s``, ``build_s``, ``solve_s``, ``refine_s``, ``parts``
            (into how many each class of tied ops is split), ``gap`` (to `bound_s`; 0 where the
            tied program was solved and no limit binds).
    """

    choices: dict[str, Strategy]
    objective_s: float
    bound_s: float
    parts: dict[str, float]
    bytes: dict[str, float]
    stats: dict[str, float]

    def to_sharding(self) -> dict[str, str]:
        """The texts for `raypar.plan.StagePlan.sharding`.

        Ops that are whole on every rank are left out, and repeated layers are folded: a pattern
        says what most of its ops do, and the others have entries of their own.
        """
        texts = {key: _text(strategy) for key, strategy in self.choices.items()}
        alike: dict[str, list[str]] = defaultdict(list)
        for key in texts:
            alike[pattern_of(key)].append(key)
        found: dict[str, str] = {}
        for pattern, keys in alike.items():
            common = Counter(texts[k] for k in keys).most_common(1)[0][0]
            if len(keys) > 1 and _is_whole(self.choices[keys[0]]) and common == texts[keys[0]]:
                common = ""
            if len(keys) == 1:
                if not _is_whole(self.choices[keys[0]]):
                    found[keys[0]] = texts[keys[0]]
                continue
            if common:
                found[pattern] = common
            for key in keys:
                own = self.choices[key]
                if texts[key] != common and not (not common and _is_whole(own)):
                    found[key] = texts[key]
        return found


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
        self.stats: dict[str, float] = {"nodes": len(self.graph.ops)}
        self.stats["enumerate_s"] = time.perf_counter() - began
        self.stats |= {"build_s": 0.0, "solve_s": 0.0, "refine_s": 0.0}

    def run(self) -> IntraPlan:
        limit = self.settings.memory_bytes
        answer, found = self._solve(self.classes, None)
        self.stats |= {"parts": 1, "gap": 0.0}
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
        built = build(self.graph, self.prices, self.classes, self.options)
        limit = self.settings.memory_bytes
        problem = reduce(built.problem, memory=limit is not None, tied=False)
        program = Program(problem, limit, tied=False)
        return program.solve(max(self._left(), 1.0), relaxed=True).bound

    def _left(self) -> float:
        return self.deadline - time.perf_counter()

    def _solve(
        self, classes: Sequence[Sequence[fx.Node]], limit: float | None
    ) -> tuple[Answer, tuple[dict[str, Strategy], Estimate]]:
        """Solves the program of some classes."""
        began = time.perf_counter()
        built = build(self.graph, self.prices, classes, self.options)
        problem = reduce(built.problem, memory=limit is not None)
        program = Program(problem, limit)
        middle = time.perf_counter()
        answer = program.solve(max(self._left(), 1.0), gap=1e-9 if limit is None else 1e-4)
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
            return answer, ({}, Estimate(float("inf"), float("inf")))
        choices = _read(built, problem.decisions, answer)
        return answer, (choices, estimate(self.graph, self.prices, choices))

    def _refine(self, limit: float) -> tuple[tuple[dict[str, Strategy], Estimate], float]:
        """Splits ties until the plan is near the bound over free decisions, or time is out."""
        began = time.perf_counter()
        bound = self.bound()
        best: tuple[dict[str, Strategy], Estimate] = ({}, Estimate(float("inf"), float("inf")))
        sizes = -1
        for parts in range(1, _MOST_PARTS + 1):
            classes = split(self.classes, parts)
            if len(classes) == sizes:
                break
            sizes = len(classes)
            answer, found = self._solve(classes, limit)
            if answer.choice and found[1].seconds < best[1].seconds:
                best = found
                self.stats["parts"] = parts
            done = best[0] and _gap(best[1].seconds, bound) <= self.settings.gap
            if done or self._left() <= 0:
                break
        self.stats["refine_s"] = time.perf_counter() - began
        if not best[0]:
            raise self._too_large(limit)
        return best, bound

    def _too_large(self, limit: float) -> PlanError:
        """Says how little memory would do, and what takes it."""
        built = build(self.graph, self.prices, untied(self.graph), self.options)
        if len(self.classes) < len(self.graph.ops):
            built = build(self.graph, self.prices, self.classes, self.options)
        problem = reduce(built.problem, memory=True)
        for decision in problem.decisions:
            decision.seconds = decision.seconds * 0
        answer = Program(problem, minimise="bytes").solve(max(self._left(), 5.0))
        choices = _read(built, problem.decisions, answer)
        least = estimate(self.graph, self.prices, choices)
        tensors = ", ".join(f"{name} ({_mib(n)})" for name, n in least.largest[:4])
        return PlanError(
            f"{len(self.graph.ops)} ops were to fit {_mib(limit)} on each of "
            f"{len(self.machine.mesh.devices)} devices; however they are sharded they need "
            f"{_mib(least.nbytes)} (parameters with gradients and optimizer states "
            f"{_mib(least.holds['params'])}, activations saved for {self.settings.in_flight} "
            f"microbatches {_mib(least.holds['saved'])}). Largest: {tensors}. {self._advice(least)}"
        )

    def _advice(self, least: Estimate) -> str:
        ways = []
        if least.holds["params"] >= least.holds["saved"]:
            if self.settings.zero < 3:
                ways.append("search.zero=3 (cuts parameters, gradients and optimizer states)")
        else:
            if self.settings.recompute != "full":
                ways.append("search.recompute=full")
            ways.append("a larger search.microbatches (smaller microbatches)")
        ways.append("more devices per stage, or more stages")
        return f"Use {', or '.join(ways)}."


def _options(
    graph: Graph, mesh: tuple[int, ...], settings: IntraSettings
) -> dict[fx.Node, Sequence[Strategy]]:
    """The allowed strategies of every op; ops with equal ones share one list."""
    found: dict[fx.Node, Sequence[Strategy]] = {}
    shared: dict[tuple[int, tuple[int, ...]], list[Strategy]] = {}
    for op in graph.ops:
        every = strategies(op, mesh)
        if settings.allowed is None:
            found[op] = every
            continue
        view = OpView(op)
        kept = tuple(i for i, s in enumerate(every) if settings.allowed(view, s))
        if not kept:
            kept = (0,)  # whole on every rank
        found[op] = shared.setdefault((id(every), kept), [every[i] for i in kept])
    return found


def _read(built: Built, decisions: Sequence[object], answer: Answer) -> dict[str, Strategy]:
    """Op id → strategy, from an answer over merged decisions."""
    found: dict[str, Strategy] = {}
    for at, option in answer.choice.items():
        for original, meant in decisions[at].picks.items():  # type: ignore[attr-defined]
            if original < len(built.classes):
                strategy = built.options[original][int(meant[option])]
                found |= {str(op.meta["id"]): strategy for op in built.classes[original]}
    return found


def _gap(seconds: float, bound: float) -> float:
    if bound == float("-inf"):
        return float("inf")
    return max(0.0, (seconds - bound) / seconds) if seconds > 0 else 0.0


def _is_whole(strategy: Strategy) -> bool:
    return all(s == R for spec in (*strategy.inputs, *strategy.outputs) for s in spec)


def _text(strategy: Strategy) -> str:
    return str(strategy)


def _mib(nbytes: float) -> str:
    if nbytes >= 2**30:
        return f"{nbytes / 2**30:.1f} GiB"
    return f"{nbytes / 2**20:.1f} MiB"
