"""What the plan of a run promises: ``predicted.json``, written when the run starts.

A simulation needs the captured model, which a report that is made later does not have: so all that
the page draws of it is put away beforehand.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raypar.errors import ConfigError
from raypar.graph.opgraph import OpGraph
from raypar.lowered import LoweredPlan, lower_plan
from raypar.mesh.calibration_files import load_calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.report.page._bands import Band, NodeRow, Part, StageBox, bands, device_map
from raypar.search.simulate import simulate
from raypar.search.simulation import (
    MOVING,
    LaneReport,
    LinkUse,
    MemoryTimeline,
    Simulation,
    Span,
)

PREDICTED_FORMAT = 1
_MOST_SPANS = 60_000
_US = 1e6


@dataclass(frozen=True, slots=True)
class Moved:
    """What goes from one rank group to another in a step.

    Attributes:
        source: Sending rank group.
        target: Receiving rank group.
        count: Messages.
        nbytes: Bytes of all of them.
    """

    source: int
    target: int
    count: int
    nbytes: int


@dataclass(frozen=True)
class Prediction:
    """A simulated step as far as a report draws it; a `raypar.report._played.PlayedStep`.

    Attributes:
        step_s: Seconds of a step.
        samples: Samples of a step.
        bubble: Share of device time in which devices wait for somebody.
        source: Where the costs come from, in words.
        cluster: The cluster in words.
        model: What was captured.
        lanes: Ranks that go in step.
        memory: What they hold.
        links: What devices send.
        moved: The same between rank groups.
        path: Kind of work → share of the critical path.
        bands: The plan as bands.
        nodes: The map of devices.
    """

    step_s: float
    samples: int
    bubble: float
    source: str
    cluster: str
    model: str
    lanes: tuple[LaneReport, ...]
    memory: tuple[MemoryTimeline, ...]
    links: tuple[LinkUse, ...]
    moved: tuple[Moved, ...]
    path: dict[str, float]
    bands: tuple[Band, ...]
    nodes: tuple[NodeRow, ...]
    _spans: tuple[tuple[Span, ...], ...] = field(repr=False, default=())

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """Per lane the most that one of its ranks holds, in bytes."""
        return tuple(memory.peak_bytes for memory in self.memory)

    def spans(self, lane: int) -> list[Span]:
        """What a lane does, in order."""
        return list(self._spans[lane])

    def to_json(self) -> str:
        """JSON text; `from_json` reads it."""
        raw: dict[str, Any] = {"format": PREDICTED_FORMAT}
        for name in ("step_s", "samples", "bubble", "source", "cluster", "model", "path"):
            raw[name] = getattr(self, name)
        for name in ("lanes", "links", "moved", "bands", "nodes"):
            raw[name] = [dataclasses.asdict(one) for one in getattr(self, name)]
        raw["memory"] = [_memory_json(one) for one in self.memory]
        raw["spans"] = [
            [[s.name, s.kind, round(s.start * _US, 3), round(s.end * _US, 3)] for s in lane]
            for lane in self._spans
        ]
        return json.dumps(raw)

    @classmethod
    def from_json(cls, text: str) -> Prediction:
        """Reads what `to_json` wrote.

        Raises:
            ConfigError: It is something else, or of a newer format.
        """
        try:
            raw = json.loads(text)
            found = raw.get("format") if isinstance(raw, dict) else None
            if isinstance(found, int) and found > PREDICTED_FORMAT:
                raise ConfigError(
                    f"the prediction has format {found}, this raypar reads up to "
                    f"{PREDICTED_FORMAT}: upgrade raypar"
                )
            return _prediction(raw)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ConfigError(f"this is no prediction: {type(error).__name__}: {error}") from None
        except (RecursionError, OverflowError) as error:
            raise ConfigError(f"this is no prediction: {error}") from None


def predict(
    graph: OpGraph,
    plan: Plan,
    cluster: Cluster,
    *,
    lowered: LoweredPlan | None = None,
    model: str = "",
) -> Prediction:
    """Simulates a step with what was measured of such a cluster, else with the device table.

    Args:
        graph: The captured model.
        plan: Its plan.
        cluster: The devices.
        lowered: The lowered plan, where it is at hand.
        model: What to call the model.

    Raises:
        PlanError: The plan does not fit the graph or the cluster.
    """
    lowered = lowered or lower_plan(graph, plan)
    played = simulate(graph, plan, cluster, calibration=load_calibration(cluster), lowered=lowered)
    spans = tuple(tuple(played.spans(i)) for i in range(len(played.lanes)))
    if sum(map(len, spans)) > _MOST_SPANS:  # a file of megabytes that no picture shows
        most = max(1, _MOST_SPANS // len(spans))
        spans = tuple(_coarse(own, most) for own in spans)
    return Prediction(
        step_s=played.step_s,
        samples=played.global_batch,
        bubble=played.bubble,
        source=played.source,
        cluster=cluster.describe(),
        model=model,
        lanes=played.lanes,
        memory=tuple(_binned(memory) for memory in played.memory),
        links=played.links,
        moved=_moved(played),
        path=played.path_shares(),
        bands=tuple(bands(plan, graph, cluster, lowered, played)),
        nodes=tuple(device_map(plan, cluster)),
        _spans=spans,
    )


def read_prediction(path: Path) -> Prediction:
    """Reads a file.

    Raises:
        ConfigError: It cannot be read, or is damaged; names the file.
    """
    try:
        return Prediction.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{str(path)!r}: {error}") from None


def _moved(played: Simulation) -> tuple[Moved, ...]:
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for message in played.messages():
        # A lane that stands for all replicas sends for one of them.
        lane = played.lanes[message.source]
        times = 1 if lane.replica is not None else played.setting.replicas
        key = (lane.group, played.lanes[message.target].group)
        count, nbytes = found.get(key, (0, 0))
        found[key] = count + times, nbytes + times * message.nbytes
    return tuple(Moved(*key, *value) for key, value in sorted(found.items()))


def _coarse(spans: Sequence[Span], most: int) -> tuple[Span, ...]:
    """The longest spans, in order; what is left out shows as idle."""
    longest = sorted(range(len(spans)), key=lambda i: spans[i].start - spans[i].end)[:most]
    return tuple(spans[i] for i in sorted(longest))


_MOST_TIMES = 2000


def _binned(memory: MemoryTimeline) -> MemoryTimeline:
    """The same at no more than so many times: evenly spread, with the peak."""
    count = len(memory.times)
    if count <= _MOST_TIMES:
        return memory
    peak = int(memory.moving.sum(axis=0).argmax())
    kept = np.unique(np.append(np.linspace(0, count - 1, _MOST_TIMES).astype(int), peak))
    return dataclasses.replace(memory, times=memory.times[kept], moving=memory.moving[:, kept])


def _memory_json(memory: MemoryTimeline) -> dict[str, Any]:
    return {
        "resident": memory.resident,
        "peak_bytes": memory.peak_bytes,
        "peak_s": memory.peak_s,
        "peak_parts": memory.peak_parts,
        "saved_peak": {str(k): v for k, v in memory.saved_peak.items()},
        "times_us": np.round(np.asarray(memory.times, dtype=float) * _US, 3).tolist(),
        "moving": memory.moving.astype(int).tolist(),
    }


def _prediction(raw: dict[str, Any]) -> Prediction:
    lanes = tuple(
        LaneReport(**{**one, "devices": tuple(one["devices"]), "stages": tuple(one["stages"])})
        for one in raw["lanes"]
    )
    memory = tuple(_memory(one) for one in raw["memory"])
    spans = tuple(
        tuple(Span(str(n), str(k), float(a) / _US, float(b) / _US) for n, k, a, b in lane)
        for lane in raw["spans"]
    )
    if not len(lanes) == len(memory) == len(spans) or not lanes:
        raise ValueError(f"{len(lanes)} lanes, {len(memory)} memories, {len(spans)} rows of spans")
    step_s = float(raw["step_s"])
    if not 0 < step_s < float("inf"):
        raise ValueError(f"step_s is {raw['step_s']!r}")
    return Prediction(
        step_s=step_s,
        samples=int(raw["samples"]),
        bubble=float(raw["bubble"]),
        source=str(raw["source"]),
        cluster=str(raw["cluster"]),
        model=str(raw["model"]),
        lanes=lanes,
        memory=memory,
        links=tuple(LinkUse(**one) for one in raw["links"]),
        moved=tuple(Moved(**one) for one in raw["moved"]),
        path={str(k): float(v) for k, v in raw["path"].items()},
        bands=tuple(_band(one) for one in raw["bands"]),
        nodes=tuple(
            NodeRow(one["name"], [(cell[0], cell[1], cell[2]) for cell in one["cells"]])
            for one in raw["nodes"]
        ),
        _spans=spans,
    )


def _memory(raw: dict[str, Any]) -> MemoryTimeline:
    times = np.array(raw["times_us"], dtype=float) / _US
    moving = np.array(raw["moving"], dtype=float)
    if moving.shape != (len(MOVING), len(times)) or not len(times):
        raise ValueError(f"memory of shape {moving.shape} at {len(times)} times")
    return MemoryTimeline(
        {str(k): int(v) for k, v in raw["resident"].items()},
        int(raw["peak_bytes"]),
        float(raw["peak_s"]),
        {str(k): int(v) for k, v in raw["peak_parts"].items()},
        {int(k): int(v) for k, v in raw["saved_peak"].items()},
        times,
        moving,
    )


def _band(raw: dict[str, Any]) -> Band:
    own = dict(raw)
    own["boxes"] = [StageBox(**{**box, "ends": tuple(box["ends"])}) for box in raw["boxes"]]
    own["memory"] = [Part(**part) for part in raw["memory"]]
    own["time"] = [Part(**part) for part in raw["time"]]
    return Band(**own)
