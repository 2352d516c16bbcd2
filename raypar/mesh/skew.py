"""Whether the nodes of a Ray cluster have the same software, asked before anything is placed.

Stages travel as lists of torch's operators, reports and specs as pickles: with another torch,
Python or raypar on one node, a run would fail late, or in a way that nobody understands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raypar.errors import ClusterError
from raypar.mesh import _node_facts
from raypar.mesh.cluster import Cluster

_HERE = "this process"


@dataclass(frozen=True, slots=True)
class Software:
    """What one node (or this process) runs.

    Attributes:
        where: The node, for people: ``host (address)``.
        python: Version.
        torch: Version, or None if it is missing.
        ray: Version, or None.
        raypar: Version, or None.
        byteorder: ``little`` or ``big``.
    """

    where: str
    python: str
    torch: str | None
    ray: str | None
    raypar: str | None
    byteorder: str

    @classmethod
    def of(cls, where: str, found: Mapping[str, Any]) -> Software:
        """From what `_node_facts.software` answers."""
        names = ("python", "torch", "ray", "raypar", "byteorder")
        return cls(where, **{name: found[name] for name in names})


def check_skew(cluster: Cluster, deadline_s: float = 60.0) -> tuple[Software, ...]:
    """Compares the software of every node of `cluster` with this process's.

    Costs one small task for each node, all at once (some 0.1 s where Ray has idle workers), and
    nothing where the only node is this process's own, or the cluster does not come from Ray.

    Args:
        cluster: As `Cluster.from_ray` gives it; this process is connected to its Ray.
        deadline_s: Seconds to wait for the slowest node.

    Returns:
        What was found, this process first.

    Raises:
        ClusterError: Nodes disagree, one lacks raypar, or one does not answer.
    """
    here = Software.of(_HERE, _node_facts.software())
    ids = [node.id for node in cluster.nodes if node.id]
    if not ids or (len(ids) == 1 and _is_here(ids[0])):
        return (here,)
    names = {node.id: node.name for node in cluster.nodes}
    found = (here, *_ask(ids, names, deadline_s))
    problems = disagreements(found)
    if problems:
        raise ClusterError(
            f"the {len(ids)} nodes of {cluster.name!r} cannot run one program together: "
            + "; ".join(problems)
            + ". Install the same versions on every node, or let Ray bring them: runtime_env "
            f"pip=['torch=={here.torch}', 'raypar=={here.raypar}']; `raypar doctor --cluster` "
            "shows every node"
        )
    return found


def _is_here(node_id: str) -> bool:
    import ray

    return bool(ray.get_runtime_context().get_node_id() == node_id)


def _ask(ids: Sequence[str], names: Mapping[str, str], deadline_s: float) -> list[Software]:
    import ray

    ask: Any = ray.remote(by_value(_node_facts.software))
    calls = [
        ask.options(num_cpus=0, max_retries=0, scheduling_strategy=pinned(node_id)).remote()
        for node_id in ids
    ]
    _, late = ray.wait(calls, num_returns=len(calls), timeout=deadline_s)
    if late:
        silent = ", ".join(names[i] for i, call in zip(ids, calls, strict=True) if call in late)
        for call in late:
            ray.cancel(call, force=True)
        raise ClusterError(
            f"{len(late)} of {len(ids)} nodes did not tell their versions within {deadline_s:g} s: "
            f"{silent}; they are overloaded, or gone. Look at `ray status`, or leave them out of "
            "mesh"
        )
    found: list[Software] = []
    for node_id, call in zip(ids, calls, strict=True):
        try:
            found.append(Software.of(names[node_id], ray.get(call)))
        except ray.exceptions.RayError as error:
            raise ClusterError(
                f"node {names[node_id]} cannot run a task: {str(error).strip().splitlines()[-1]}"
            ) from error
    return found


def by_value(thing: Any) -> Any:
    """A function or class of `_node_facts`, so marked that Ray ships its code with it."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(_node_facts)
    return thing


def pinned(node_id: str) -> Any:
    """The strategy that runs a task or actor on this very node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def disagreements(found: Iterable[Software]) -> list[str]:
    """One clause for each thing in which nodes differ; builds of one torch version are equal."""
    every = list(found)
    problems: list[str] = []
    for name, plain in (
        ("raypar", _whole),
        ("torch", _without_build),
        ("ray", _whole),
        ("python", _minor),
        ("byteorder", _whole),
    ):
        versions: dict[str, list[str]] = {}
        for one in every:
            versions.setdefault(plain(getattr(one, name)), []).append(one.where)
        if len(versions) > 1:
            said = ", ".join(f"{v} on {_some(where)}" for v, where in versions.items())
            problems.append(f"{name}: {said}")
    return problems


def _whole(version: str | None) -> str:
    return version or "none"


def _without_build(version: str | None) -> str:
    """``2.13.0`` of ``2.13.0+cu128``: nodes with and without GPUs have different builds."""
    return _whole(version).partition("+")[0]


def _minor(version: str | None) -> str:
    """``3.11`` of ``3.11.9``: pickled functions carry bytecode, which changes with the minor."""
    return ".".join(_whole(version).split(".")[:2])


def _some(places: Sequence[str]) -> str:
    shown = ", ".join(places[:3])
    return shown + (f" and {len(places) - 3} more" if len(places) > 3 else "")
