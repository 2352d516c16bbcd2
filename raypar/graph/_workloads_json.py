"""What the readers of published workload files share: JSON with exact demands, cycles found."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raypar.errors import PlanError, did_you_mean


def load_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        PlanError: No such file, no JSON (NaN and infinities are none), or not an object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read workload file {str(path)!r}: {error}") from None
    try:
        raw = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"workload file {str(path)!r} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise PlanError(
            f"workload file {str(path)!r} holds a {type(raw).__name__}; a workload is an object "
            "with the keys nodes and edges"
        )
    return raw


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def field(raw: Any, key: str, where: str) -> Any:
    """``raw[key]``.

    Raises:
        PlanError: `raw` is no object, or lacks the key.
    """
    if not isinstance(raw, Mapping):
        raise PlanError(f"{where}: expected an object, found {raw!r:.80}")
    if key not in raw:
        near = did_you_mean(key, [str(k) for k in raw])
        raise PlanError(f"{where} has no {key!r}; it has {', '.join(map(str, raw))}.{near}")
    return raw[key]


def number(raw: Any, key: str, where: str) -> float:
    """A finite number of at least 0.

    Raises:
        PlanError: Missing, no number, infinite or negative.
    """
    value = field(raw, key, where)
    return checked_number(value, f"{where}.{key}")


def checked_number(value: Any, where: str) -> float:
    """`value` as a finite number of at least 0; see `number`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PlanError(f"{where} is {value!r:.80}; it must be a number")
    if not math.isfinite(value) or value < 0:
        raise PlanError(f"{where} is {value}; it must be finite and at least 0")
    return float(value)


def listed(raw: Any, key: str, where: str) -> list[Any]:
    """A list.

    Raises:
        PlanError: Missing, or no list.
    """
    value = field(raw, key, where)
    if not isinstance(value, list):
        raise PlanError(f"{where}.{key} is a {type(value).__name__}; it must be a list")
    return value


def node_id(raw: Any, key: str, where: str) -> int:
    """An id: a whole number.

    Raises:
        PlanError: Missing, or no whole number.
    """
    value = field(raw, key, where)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanError(f"{where}.{key} is {value!r:.80}; an id is a whole number")
    return value


def check_edges(ids: Sequence[int], edges: Iterable[tuple[int, int]]) -> None:
    """Refuses what is no simple directed acyclic graph.

    Raises:
        PlanError: Ids given twice, edges of unknown ids or given twice, or a cycle.
    """
    known: set[int] = set()
    for one in ids:
        if one in known:
            raise PlanError(f"nodes: id {one} is given twice; give every node an id of its own")
        known.add(one)
    if not known:
        raise PlanError("nodes is empty; a workload has at least one node")
    seen: set[tuple[int, int]] = set()
    readers: dict[int, list[int]] = {}
    for source, target in edges:
        for end in (source, target):
            if end not in known:
                raise PlanError(
                    f"edge {source} → {target}: there is no node {end}; ids go from {min(known)} "
                    f"to {max(known)}"
                )
        if (source, target) in seen:
            raise PlanError(
                f"edge {source} → {target} is given twice; join the two into one that carries both"
            )
        seen.add((source, target))
        readers.setdefault(source, []).append(target)
    _check_acyclic(ids, readers)


def _check_acyclic(ids: Sequence[int], readers: Mapping[int, Sequence[int]]) -> None:
    before = dict.fromkeys(ids, 0)
    for targets in readers.values():
        for target in targets:
            before[target] += 1
    ready = [one for one in ids if not before[one]]
    for one in ready:  # grows while it is walked
        for target in readers.get(one, ()):
            before[target] -= 1
            if not before[target]:
                ready.append(target)
    if len(ready) == len(ids):
        return
    # Whatever is left has a predecessor that is left too: walking back must come round.
    left = {one for one in ids if before[one]}
    behind = {t: s for s, targets in readers.items() if s in left for t in targets if t in left}
    walk = [next(iter(left))]
    while (step := behind[walk[-1]]) not in walk:
        walk.append(step)
    cycle = [*walk[walk.index(step) :], step][::-1]
    shown = cycle if len(cycle) <= 9 else [*cycle[:8], "…", cycle[-1]]
    raise PlanError(
        f"edges: the nodes {' → '.join(map(str, shown))} form a cycle; a workload is an acyclic "
        "graph: take one of these edges out"
    )
