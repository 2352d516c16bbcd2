"""Plan: the one value that flows through the house.

A frozen, typed value whose JSON form round-trips exactly. Planners make it, cost models judge it,
the stage actors execute it, reports draw it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raypar.errors import PlanError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raypar.graph.opgraph import OpGraph
    from raypar.mesh.cluster import Cluster

PLAN_FORMAT = 1
TORCH_RANGE = ">=2.11,<2.14"
"""What plans say of the torch that they were made with."""
_MOST_FIGURE = 2**1000  # whole numbers above it are no floats
DATA = "data"
"""Name of the mesh axis whose coordinates are the replicas."""
RECOMPUTE_POLICIES = ("none", "selective", "full")


@dataclass(frozen=True, slots=True)
class MeshSlice:
    """The devices one stage runs on.

    Attributes:
        devices: Cluster-wide device indices, in mesh order (row-major).
        shape: Mesh shape; its product is ``len(devices)``.
        axes: One name per mesh axis. ``"data"``, if there, is the first and holds the replicas:
            every stage has equally many. Over all other axes ops are sharded by rules.
    """

    devices: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[str, ...] = ("data",)

    @property
    def replicas(self) -> int:
        """Size of the ``data`` axis; 1 without one."""
        return self.shape[self.axes.index(DATA)] if DATA in self.axes else 1

    @property
    def named(self) -> tuple[tuple[str, int], ...]:
        """(name, size) of every axis."""
        return tuple(zip(self.axes, self.shape, strict=True))

    @property
    def inner(self) -> tuple[tuple[str, int], ...]:
        """(name, size) of the axes over which ops are sharded: all but ``data``."""
        return tuple((name, size) for name, size in self.named if name != DATA)


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """What a stage keeps between its forward and its backward pass.

    Attributes:
        recompute: ``none`` saves all that backward needs; ``selective`` recomputes the cheap ops
            (element-wise, norms, dropout masks) from saved matmul-like results; ``full`` saves the
            stage's inputs only and recomputes the forward pass.
        zero: What is cut over the axes on which a parameter would be held whole (Rajbhandari et
            al. 2020, "ZeRO"): 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too.
    """

    recompute: str = "none"
    zero: int = 0


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: a contiguous range of ops on one mesh slice.

    Attributes:
        first: Canonical id of the first op.
        last: Canonical id of the last op (inclusive).
        mesh: The devices.
        memory: What is saved and what is recomputed.
        sharding: How ops run on the mesh's axes other than ``data``: op id → strategy, as
            ``S0,R Rg,S1 > S0,P``. An id with ``*`` for the numbers in its module path speaks for
            all repeated layers that have no entry of their own; an op without an entry is computed
            whole on every rank.
        predicted: Predicted figures (``forward_s``, ``backward_s``, ``peak_bytes``, ...), if known.
    """

    first: str
    last: str
    mesh: MeshSlice
    memory: MemoryPolicy = MemoryPolicy()
    sharding: dict[str, str] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScheduleSpec:
    """Which schedule runs, and where every stage sits.

    Attributes:
        name: A registered schedule: ``gpipe``, ``1f1b``, ``eager_1f1b``,
            ``interleaved_1f1b``, ``zero_bubble_h1``, ``interleaved_zero_bubble``,
            ``interleaved_eager``.
        placement: For every stage its (rank group, chunk): stages of one rank group share a mesh
            slice, and chunk counts them in stage order.
    """

    name: str
    placement: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """How one model is split over one cluster.

    Attributes:
        graph_hash: Hash of ops, shapes and edges of the graph the plan was made for.
        params_hash: Weaker hash of the parameters' names and shapes.
        torch: The torch version range it was made with.
        cluster: Shape of the cluster: devices per node, in node order.
        device: Device kind of the cluster (a key of the device table).
        global_batch: Samples of one step.
        microbatches: M: each step's batch is cut into M contiguous equal parts.
        batch_dims: For every example tensor (flattened), its batch dim or None for broadcast.
        schedule: Name and placement.
        stages: In graph order; together they cover every op once.
        predicted: Predicted figures of the whole step (``step_s``, ...), if known.
        alternatives: What else the planner looked at closely: a plan in words → its predicted
            step in seconds, fastest first.
        certificate: How good it can be told to be: ``lower_bound_s`` (no plan for this model and
            cluster is faster under the cost model) and ``gap`` (how much longer this one takes,
            relative to that), if known.
        planner: Name of the planner that made it.
        format: Number of this JSON form.
    """

    graph_hash: str
    params_hash: str
    torch: str
    cluster: tuple[int, ...]
    device: str
    global_batch: int
    microbatches: int
    batch_dims: tuple[int | None, ...]
    schedule: ScheduleSpec
    stages: tuple[StagePlan, ...]
    predicted: dict[str, float] = field(default_factory=dict)
    alternatives: dict[str, float] = field(default_factory=dict)
    certificate: dict[str, float] = field(default_factory=dict)
    planner: str = "manual"
    format: int = PLAN_FORMAT

    @classmethod
    def of(
        cls,
        graph: OpGraph,
        cluster: Cluster,
        stages: Sequence[StagePlan],
        *,
        microbatches: int,
        schedule: str,
        placement: Sequence[tuple[int, int]],
        planner: str = "manual",
        predicted: dict[str, float] | None = None,
    ) -> Plan:
        """The plan of some stages for a captured model on a cluster; see the attributes."""
        return cls(
            graph_hash=graph.hash,
            params_hash=graph.params_hash,
            torch=TORCH_RANGE,
            cluster=cluster.shape,
            device=cluster.kind,
            global_batch=graph.global_batch,
            microbatches=microbatches,
            batch_dims=graph.batch_dims,
            schedule=ScheduleSpec(schedule, tuple(placement)),
            stages=tuple(stages),
            predicted=predicted or {},
            planner=planner,
        )

    @property
    def replicas(self) -> int:
        """D: data-parallel replicas of every stage."""
        return self.stages[0].mesh.replicas

    @property
    def local_batch(self) -> int:
        """Samples that one replica sees in one microbatch."""
        return self.global_batch // (self.microbatches * self.replicas)

    @property
    def devices(self) -> tuple[int, ...]:
        """Every device in use, ascending."""
        return tuple(sorted({d for s in self.stages for d in s.mesh.devices}))

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` gives back an equal plan.

        Raises:
            PlanError: A predicted figure is not finite: JSON has no such number.
        """
        try:
            return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)
        except ValueError as error:
            raise PlanError(f"the plan has no JSON form: {error}; look at `predicted`") from None

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads what `to_json` wrote.

        Raises:
            PlanError: The text is no JSON, names an unknown or lacks a needed key, holds a value
                of the wrong type, or has a newer format number.
        """
        try:
            raw = json.loads(
                text, object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite
            )
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the plan is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise PlanError(f"a plan is a JSON object, found {type(raw).__name__}")
        found = raw.get("format", PLAN_FORMAT)
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise PlanError(f"plan.format is {found!r}; this raypar writes {PLAN_FORMAT}")
        if found > PLAN_FORMAT:
            raise PlanError(
                f"the plan has format {found}, this raypar reads up to {PLAN_FORMAT}: upgrade "
                "raypar"
            )
        return _build(cls, raw, "plan")

    def save(self, path: str | Path) -> None:
        """Writes the JSON form to `path`."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan file.

        Raises:
            PlanError: No such file, or not a plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read plan file {str(path)!r}: {error}") from None
        try:
            return cls.from_json(text)
        except PlanError as error:
            raise PlanError(f"plan file {str(path)!r}: {error}") from None

    def explain(self, graph: OpGraph | None = None) -> str:
        """The plan as a table of stages.

        Args:
            graph: The captured model: adds what keeps it from being split further. Given graph
                and cluster, `raypar.explain` tells more.
        """
        from raypar._plan_text import plan_text

        return plan_text(self, graph)

    def _repr_html_(self) -> str:
        from raypar._plan_html import plan_html

        return plan_html(self)

    def rebind(self, graph: OpGraph) -> Plan:
        """This plan for another capture of the model.

        Ops are mapped by canonical id. Where an end of a stage is gone, or the graph cannot be cut
        there any more, the cuts are balanced again and everything else is kept. Ops keep their
        strategies, also where they change stages, as far as the new shapes divide.

        Raises:
            PlanError: The number of stages, microbatches or replicas does not fit that graph.
        """
        from raypar.plan_rebind import rebind

        return rebind(self, graph)

    def diff(self, other: Plan) -> list[str]:
        """One line for every field that differs: ``path: mine → theirs``."""
        lines: list[str] = []
        _diff("", dataclasses.asdict(self), dataclasses.asdict(other), lines)
        return lines


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    found = float(text)
    if found - found != 0:  # 1e999 reads as infinity
        raise ValueError(f"{text:.40} is too large for a number")
    return found


def _diff(path: str, mine: Any, theirs: Any, lines: list[str]) -> None:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in [*mine, *(k for k in theirs if k not in mine)]:
            _diff(f"{path}.{key}" if path else key, mine.get(key), theirs.get(key), lines)
    elif isinstance(mine, (list, tuple)) and isinstance(theirs, (list, tuple)) and path == "stages":
        for i in range(max(len(mine), len(theirs))):
            a = mine[i] if i < len(mine) else None
            b = theirs[i] if i < len(theirs) else None
            _diff(f"{path}[{i}]", a, b, lines)
    elif mine != theirs:
        lines.append(f"{path}: {mine} → {theirs}")


_TUPLES: dict[tuple[str, str], Any] = {
    ("Plan", "stages"): StagePlan,
    ("Plan", "schedule"): ScheduleSpec,
    ("StagePlan", "mesh"): MeshSlice,
    ("StagePlan", "memory"): MemoryPolicy,
}


def _build(cls: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise PlanError(f"{where}: expected an object, found {raw!r:.200}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in raw:
        if key not in fields:
            raise PlanError(f"{where}: unknown key {key!r}.{did_you_mean(key, fields)}")
    values: dict[str, Any] = {}
    for name, spec in fields.items():
        optional = (
            spec.default is not dataclasses.MISSING
            or spec.default_factory is not dataclasses.MISSING
        )
        if name not in raw:
            if not optional:
                raise PlanError(f"{where}: key {name!r} is missing")
            continue
        values[name] = _value(cls.__name__, name, str(spec.type), raw[name], f"{where}.{name}")
    return cls(**values)


def _value(owner: str, name: str, kind: str, raw: Any, where: str) -> Any:
    nested = _TUPLES.get((owner, name))
    if nested is not None:
        if kind.startswith("tuple"):
            if not isinstance(raw, list):
                raise PlanError(f"{where}: expected a list, found {raw!r:.200}")
            return tuple(_build(nested, item, f"{where}[{i}]") for i, item in enumerate(raw))
        return _build(nested, raw, where)

    def integer(v: Any) -> bool:
        return isinstance(v, int) and not isinstance(v, bool)

    def number(v: Any) -> bool:
        whole = isinstance(v, int) and not isinstance(v, bool)
        return isinstance(v, float) or (whole and abs(v) < _MOST_FIGURE)

    checks: dict[str, Any] = {
        "str": lambda v: isinstance(v, str),
        "int": integer,
        "tuple[int, ...]": lambda v: isinstance(v, list) and all(map(integer, v)),
        "tuple[str, ...]": lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v),
        "tuple[int | None, ...]": lambda v: (
            isinstance(v, list) and all(x is None or integer(x) for x in v)
        ),
        "tuple[tuple[int, int], ...]": lambda v: (
            isinstance(v, list)
            and all(isinstance(x, list) and len(x) == 2 and all(map(integer, x)) for x in v)
        ),
        "dict[str, str]": lambda v: (
            isinstance(v, dict) and all(isinstance(x, str) for x in v.values())
        ),
        "dict[str, float]": lambda v: isinstance(v, dict) and all(map(number, v.values())),
    }
    if not checks[kind](raw):
        raise PlanError(f"{where}: expected {kind}, found {raw!r:.200}")
    if kind.startswith("tuple[tuple"):
        return tuple(tuple(x) for x in raw)
    return tuple(raw) if kind.startswith("tuple") else raw
