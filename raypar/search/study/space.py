"""The outer decisions of a search, and how Optuna proposes them.

Every proposal can be carried out: values that do not go together (more stages than devices, say)
are brought to the nearest that do, so that no sampler wastes proposals on what has no meaning.
What is left to the solvers is called ``solver``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from raypar.mesh.cluster import Cluster
from raypar.plan import RECOMPUTE_POLICIES, Plan
from raypar.schedules.registry import schedule_names
from raypar.search.config import SearchConfig
from raypar.search.interop.space import Split, splits, stage_sizes
from raypar.search.interop.workbench import MOST_STAGES, Workbench
from raypar.search.intra.forms import forms_of, parameter_groups
from raypar.search.record import Decision
from raypar.search.study.obey import INTERLEAVED, check_fixed, least_groups

SOLVER = "solver"
MIXED = 0
"""Devices of a stage: every stage its own number, as the solver finds."""
_FREE = 0
"""Number of stages: as the solver finds."""
_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)
_MOST_OWN = 16
"""Up to so many rank groups, every stage can have cuts and policies of its own."""
_FURTHEST = 3
"""Units by which a proposal may move a cut from where the solver put it."""
_CHUNKS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
_MODES = (SOLVER, "batch", "tensor")
_PLAIN = (
    "replicas", "local_batch", "used", "devices", "groups", "chunks", "schedule", "interleaved",
    "recompute", "zero", "modes", "turned",
)  # fmt: skip
"""Decisions for the whole plan, not for one layer or stage."""


class Trial(Protocol):
    """What this module asks of an Optuna trial."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices."""
        ...

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A number of the range, ends included."""
        ...


@dataclass(frozen=True, slots=True)
class Decisions:
    """Everything that a trial decides.

    Attributes:
        replicas: D.
        local_batch: Samples of a microbatch on one replica.
        devices: Devices of a stage (of one replica); `MIXED`: the solver's, stage by stage.
        groups: Rank groups; 0: as many as the solver finds best.
        chunks: Stages per rank group.
        schedule: Name of the schedule.
        recompute: A policy for all stages, or ``solver``.
        zero: A ZeRO level for all stages, or ``solver``.
        modes: What the integer program may cut on the mesh's axes: ``solver`` (anything), or
            ``batch``, ``tensor``.
        forms: (parameter pattern, form) of layers that are told how to be cut.
        used: Devices of the line in use; the others are left out.
        turned: Whether stages take the devices from the line's end.
        moves: Per cut by how many units it is moved from where the solver puts it.
        policies: Per stage (recompute or ``solver``, ZeRO level or ``solver``).
    """

    replicas: int
    local_batch: int
    devices: int = MIXED
    groups: int = _FREE
    chunks: int = 1
    schedule: str = "1f1b"
    recompute: str = SOLVER
    zero: int | str = SOLVER
    modes: str = SOLVER
    forms: tuple[tuple[str, str], ...] = ()
    used: int = 0
    turned: bool = False
    moves: tuple[int, ...] = ()
    policies: tuple[tuple[str, int | str], ...] = ()

    def named(self) -> dict[str, Decision]:
        """Name → value, for records."""
        plain: dict[str, Decision] = {
            k: v for k, v in asdict(self).items() if isinstance(v, (str, int, bool))
        }
        plain["devices"] = self.devices or "mixed"
        plain["groups"] = self.groups or SOLVER
        plain |= {f"form {pattern}": form for pattern, form in self.forms}
        plain |= {f"cut {i + 1}": move for i, move in enumerate(self.moves)}
        for i, (recompute, zero) in enumerate(self.policies):
            plain |= {f"recompute {i}": recompute, f"zero {i}": zero}
        return plain


class Space:
    """The choices that a model, a cluster and fixed options leave.

    Args:
        bench: The model on the cluster; its config fixes what it names.

    Raises:
        PlanError: The options leave nothing.
    """

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.config = bench.config
        graph, cluster = bench.graph, bench.cluster
        check_fixed(graph, cluster, self.config)
        self._least_groups = least_groups(self.config)
        tensor = 1 if self.config.tensor == "auto" else self.config.tensor
        self._least_devices = self._least_groups * tensor  # of one replica
        room = cluster.n_devices // self._least_devices
        free = [s for s in splits(graph, cluster, self.config) if s.replicas <= room]
        self._by_replicas: dict[int, list[Split]] = {}
        for split in free:
            self._by_replicas.setdefault(split.replicas, []).append(split)
        self.replicas = sorted(self._by_replicas)
        self.local_batches = sorted({split.local_batch for split in free})
        self.devices = _devices(cluster, self.config, bench.per_node)
        self.most_groups = min(len(bench.units), cluster.n_devices, MOST_STAGES)
        self.groups = _groups(self.config, self.most_groups)
        self.chunks = _chunks(self.config, len(bench.units))
        self.schedules, self.interleaved = _schedules(self.config)
        self.recompute = _fixed(self.config.recompute, (SOLVER, *RECOMPUTE_POLICIES))
        self.zero = _fixed(self.config.zero, (SOLVER, 0, 1, 2, 3))
        sharded = max(self.devices) > 1 or MIXED in self.devices
        several = cluster.n_devices > 1 and sharded and self.config.tensor != 1
        self.modes = _MODES if several else (SOLVER,)
        self.patterns = tuple(parameter_groups(graph)) if several else ()
        self.used = _used(bench)
        self.turned = (False, True) if not bench.alike else (False,)

    def suggest(self, trial: Trial) -> Decisions:
        """One proposal."""
        replicas = _pick(trial, "replicas", self.replicas)
        sizes = self.local_batches
        wanted = sizes[trial.suggest_int("local_batch", 0, len(sizes) - 1)] if len(sizes) > 1 else 0
        local_batch = self.nearest_batch(replicas, wanted or sizes[0])
        used = _pick(trial, "used", self.used)
        if used < replicas * self._least_devices:
            used = self.used[0]
        devices = self._fitting(_pick(trial, "devices", self.devices), used // replicas)
        room = max(used // replicas // max(devices, 1), 1)
        groups = min(_pick(trial, "groups", self.groups), room)
        chunks = _pick(trial, "chunks", self.chunks) if groups != 1 else 1
        units = len(self.bench.units)
        if groups > 1 and self.config.chunks > 1:
            groups = min(groups, max(units // chunks, self._least_groups))
        elif groups > 1:
            chunks = min(chunks, max(units // groups, 1))
        schedule = _pick(trial, "schedule", self.schedules)
        if chunks > 1:
            schedule = _pick(trial, "interleaved", self.interleaved)
        elif groups == 1:
            schedule = self.schedules[0]
        forms: tuple[tuple[str, str], ...] = ()
        if self.patterns and devices != 1 and _pick(trial, "told", (False, True)):
            forms = self._forms(trial)
        moves, policies = self._own(trial, groups, chunks)
        return Decisions(
            replicas=replicas,
            local_batch=local_batch,
            devices=devices,
            groups=groups,
            chunks=chunks,
            schedule=schedule,
            recompute=_pick(trial, "recompute", self.recompute),
            zero=_pick(trial, "zero", self.zero),
            modes=_pick(trial, "modes", self.modes) if devices != 1 else SOLVER,
            forms=forms,
            used=used,
            turned=_pick(trial, "turned", self.turned),
            moves=moves,
            policies=policies,
        )

    def _fitting(self, devices: int, room: int) -> int:
        """A stage's devices, or the next fewer of which the least rank groups find room."""
        if devices * self._least_groups <= room:
            return devices
        fewer = [n for n in self.devices if 0 < n * self._least_groups <= room]
        return max(fewer, default=MIXED)

    def _forms(self, trial: Trial) -> tuple[tuple[str, str], ...]:
        found = []
        for pattern in self.patterns:
            choices = (SOLVER, *forms_of(self.bench.graph, pattern))
            form = trial.suggest_categorical(f"form {pattern}", choices)
            if form != SOLVER:
                found.append((pattern, form))
        return tuple(found)

    def _own(
        self, trial: Trial, groups: int, chunks: int
    ) -> tuple[tuple[int, ...], tuple[tuple[str, int | str], ...]]:
        """Cuts and policies stage by stage."""
        if not 1 < groups <= _MOST_OWN:
            return (), ()
        own = _pick(trial, "own", ("none", "cuts", "policies"))
        if own == "cuts":
            cuts = range(1, groups * chunks)
            return tuple(trial.suggest_int(f"cut {i}", -_FURTHEST, _FURTHEST) for i in cuts), ()
        if own == "policies" and len(self.recompute) + len(self.zero) > 2:
            return (), tuple(
                (
                    _pick(trial, f"recompute {i}", self.recompute),
                    _pick(trial, f"zero {i}", self.zero),
                )
                for i in range(groups * chunks)
            )
        return (), ()

    def neighbours(self, params: Mapping[str, Any], plan: Plan) -> Iterator[dict[str, Any]]:
        """Proposals near one: a trade of devices, or a single other decision; what pays most first.

        Other schedules come first: the stages stay as they are, so that a look takes a fraction of
        the time of another. Changed alone, fewer replicas or smaller stages leave devices idle: two
        of replicas, stages' devices and rank groups change together.

        Args:
            params: Optuna's parameters of that one.
            plan: What came of it: proposed values that do not go together are brought to others.
        """
        groups, sizes = len({group for group, _ in plan.schedule.placement}), _sizes(plan)
        base = {k: v for k, v in params.items() if k in _PLAIN} | {"told": False, "own": "none"}
        if len(self.groups) > 1:
            base["groups"] = groups if groups in self.groups else _FREE
        ordered: Mapping[str, Sequence[Any]] = {
            "chunks": self.chunks,
            "groups": self.groups,
            "devices": self.devices,
            "replicas": self.replicas,
            "local_batch": range(len(self.local_batches)),
        }
        unordered: Mapping[str, Sequence[Any]] = {
            "zero": self.zero,
            "recompute": self.recompute,
            "modes": self.modes,
            "turned": self.turned,
            "used": self.used,
        }
        if base.get("chunks", self.chunks[0]) > 1:
            yield from _others(base, "interleaved", self.interleaved)
        else:
            yield from _others(base, "schedule", self.schedules)
        real = {**base, "devices": sizes.pop()} if len(sizes) == 1 and "devices" in base else base
        for less, more in itertools.permutations(("replicas", "devices", "groups"), 2):
            yield from _traded(real, less, ordered[less], more, ordered[more])
        for name, choices in unordered.items():
            yield from _others(base, name, choices)
        for step in (1, 2):
            for name, choices in ordered.items():
                yield from _beside(base, name, choices, step)

    def nearest_batch(self, replicas: int, wanted: int) -> int:
        """The size of microbatches that is possible for so many replicas and nearest to one."""
        sizes = [split.local_batch for split in self._by_replicas[replicas]]
        return min(sizes, key=lambda n: (abs(math.log(n / wanted)), n))

    def split_of(self, decisions: Decisions) -> Split:
        """How the batch is cut."""
        share = self.bench.graph.global_batch // decisions.replicas
        parts = share // decisions.local_batch
        used = decisions.used or self.bench.cluster.n_devices
        return Split(decisions.replicas, parts, decisions.local_batch, used // decisions.replicas)

    def parameters_of(self, plan: Plan) -> dict[str, Any]:
        """The proposal that is nearest to a plan, as Optuna's parameters.

        The plan of another planner may have cuts and shardings that no proposal has; what is
        proposed near it is proposed by these.
        """
        sizes = _sizes(plan)
        groups = len({group for group, _ in plan.schedule.placement})
        chunks = -(-len(plan.stages) // groups)
        recompute = {s.memory.recompute for s in plan.stages}
        zero: set[int] = {s.memory.zero for s in plan.stages}
        wanted: Mapping[str, tuple[Any, Sequence[Any]]] = {
            "replicas": (plan.replicas, self.replicas),
            "used": (self.used[0], self.used),
            "devices": (sizes.pop() if len(sizes) == 1 else MIXED, self.devices),
            "groups": (groups, self.groups),
            "chunks": (chunks, self.chunks),
            "schedule": (plan.schedule.name, self.schedules),
            "interleaved": (plan.schedule.name, self.interleaved),
            "told": (False, (False, True)),
            "own": ("none", ("none", "cuts", "policies")),
            "recompute": (recompute.pop() if len(recompute) == 1 else SOLVER, self.recompute),
            "zero": (zero.pop() if len(zero) == 1 else SOLVER, self.zero),
            "modes": (SOLVER, self.modes),
            "turned": (False, self.turned),
        }
        found = {
            name: value if value in choices else choices[0]
            for name, (value, choices) in wanted.items()
            if len(choices) > 1
        }
        if len(self.local_batches) > 1:
            near = min(self.local_batches, key=lambda n: abs(math.log(n / plan.local_batch)))
            found["local_batch"] = self.local_batches.index(near)
        return found


def _sizes(plan: Plan) -> set[int]:
    """Devices of stages, of one replica."""
    return {len(stage.mesh.devices) // plan.replicas for stage in plan.stages}


def _pick(trial: Trial, name: str, choices: Sequence[Any]) -> Any:
    """A decision, if there is anything to decide."""
    return trial.suggest_categorical(name, tuple(choices)) if len(choices) > 1 else choices[0]


def _others(base: Mapping[str, Any], name: str, choices: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """The proposal with every other value of a decision."""
    if len(choices) > 1:
        yield from ({**base, name: choice} for choice in choices if choice != base.get(name))


def _traded(
    base: Mapping[str, Any],
    less: str,
    fewer: Sequence[int],
    more: str,
    choices: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """The proposal with the next lower value of one decision and as many times more of another."""
    had, has = base.get(less, fewer[0]), base.get(more, choices[0])
    lower = [n for n in fewer if 0 < n < had and had % n == 0 and has * (had // n) in choices]
    if lower and has:
        yield {**base, less: max(lower), more: has * (had // max(lower))}


def _beside(
    base: Mapping[str, Any], name: str, choices: Sequence[Any], step: int
) -> Iterator[dict[str, Any]]:
    """The proposal with the values so many steps above and below."""
    if len(choices) > 1 and base.get(name) in choices:
        at = choices.index(base[name])
        for other in (at + step, at - step):
            if 0 <= other < len(choices):
                yield {**base, name: choices[other]}


def _fixed(given: Any, choices: Sequence[Any]) -> Sequence[Any]:
    return choices if given == "auto" else (given,)


def _devices(cluster: Cluster, config: SearchConfig, per_node: int) -> list[int]:
    if config.tensor != "auto":
        return [config.tensor]
    sizes = stage_sizes(cluster.n_devices, per_node)
    return [MIXED, *sizes] if len(sizes) > 1 else sizes


def _groups(config: SearchConfig, most: int) -> list[int]:
    if config.stages != "auto":
        return [least_groups(config)]
    least = least_groups(config)
    return [_FREE, *(n for n in _COUNTS if least <= n <= most)]


def _chunks(config: SearchConfig, units: int) -> list[int]:
    if config.chunks != 1 or config.stages != "auto":
        return [config.chunks]
    if config.schedule not in ("auto", *INTERLEAVED):
        return [1]
    return [n for n in _CHUNKS if n <= max(units // 2, 1)]


def _schedules(config: SearchConfig) -> tuple[list[str], list[str]]:
    """Those of one stage per rank group, and those of several."""
    if config.schedule != "auto":
        return [config.schedule], [config.schedule]
    if config.chunks > 1:
        return [INTERLEAVED[0]], list(INTERLEAVED)
    names = [n for n in schedule_names() if n not in INTERLEAVED]
    return sorted(names, key=lambda n: n != "1f1b"), list(INTERLEAVED)


def _used(bench: Workbench) -> list[int]:
    """How many devices of the line may be in use: all, or those up to a change of kind."""
    cluster = bench.cluster
    kinds = [repr((n.device, n.inside, n.across)) for n in map(cluster.node_of, bench.line)]
    ends = [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]
    return [len(kinds), *reversed(ends)]
