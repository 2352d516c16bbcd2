"""`raypar probe`: measures the cluster it is on and fits the constants of the cost models.

One rank per device, all of them at work while each is measured: the cores of a machine share its
memory bandwidth. Ranks are Ray actors where a Ray cluster is asked for, else processes of this
machine; they exchange messages through the backends that training uses.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from raypar.comm.group import Group
from raypar.comm.registry import backend_for, get_backend
from raypar.comm.rendezvous import Address, Rendezvous
from raypar.errors import ClusterError, RayparError
from raypar.mesh._probe_device import DeviceSamples, measure_device
from raypar.mesh._probe_fit import LinkSample, by_kind, fit_tier
from raypar.mesh._probe_links import measure_links
from raypar.mesh.calibration import ACROSS, INSIDE, Calibration, TierRates, table_calibration
from raypar.mesh.calibration_files import fingerprint, load_calibration, save_calibration
from raypar.mesh.cluster import Cluster
from raypar.mesh.device_mesh import DeviceMesh

__all__ = ["load_calibration", "probe", "probe_local", "probe_ray", "save_calibration"]

Keep = Callable[[str, LinkSample], None]
"""Is given the tier (``inside`` or ``across``) and the figures of an exchange that was measured."""

_DEADLINE_S = 300.0
_MOST_PER_NODE = 8
_MOST_NODES = 2


@dataclass
class RankSamples:
    """What one rank measured.

    Attributes:
        device: Its device number in the cluster.
        ops: Its device.
        links: Tier → exchanges it took part in.
    """

    device: int
    ops: DeviceSamples
    links: dict[str, list[LinkSample]]


def measure_rank(
    world: Group, devices: Sequence[int], nodes: Sequence[int], device: torch.device
) -> RankSamples:
    """Measures as one rank; called by all ranks at once.

    Args:
        world: All ranks.
        devices: For every rank its device number in the cluster.
        nodes: For every rank its node.
        device: Where this rank computes.
    """
    ops = measure_device(device, lambda: world.barrier(name="probe"))
    world.barrier(name="probe")
    return RankSamples(devices[world.rank], ops, measure_links(world, nodes, device))


def chosen_devices(cluster: Cluster) -> tuple[int, ...]:
    """The devices to measure: up to 8 on each of 2 nodes of every kind of node."""
    seen: dict[object, int] = {}
    found: list[int] = []
    for index, node in enumerate(cluster.nodes):
        look = (node.device.name, node.devices, node.inside, node.across)
        seen[look] = seen.get(look, 0) + 1
        if seen[look] <= _MOST_NODES:
            found += cluster.devices_of(index)[:_MOST_PER_NODE]
    return tuple(found)


def calibrate(cluster: Cluster, ranks: Sequence[RankSamples]) -> Calibration:
    """Fits the constants of a cluster to what its ranks measured.

    A tier without a measurement (one node, one device) keeps the table's constants.
    """
    kinds = {node.device.name: node.device for node in cluster.nodes}
    table = table_calibration(cluster)

    def tier(name: str, default: TierRates) -> TierRates:
        samples = [s for rank in ranks for s in rank.links[name]]
        nodes = {cluster.device(rank.device)[0]: rank.device for rank in ranks}
        links = [
            cluster.nodes[n].inside if name == INSIDE else cluster.nodes[n].across for n in nodes
        ]
        slow = min(links, key=lambda link: link.bandwidth)
        return fit_tier(samples, slow) or default

    named = [(cluster.node_of(rank.device).device.name, rank.ops) for rank in ranks]
    return Calibration(
        by_kind(named, kinds),
        tier(INSIDE, table.inside),
        tier(ACROSS, table.across),
        measured=True,
        fingerprint=fingerprint(cluster),
        note=f"measured on {cluster.describe()}",
    )


def probe(
    cluster: Cluster | None = None, *, address: str | None = None, keep: Keep | None = None
) -> Calibration:
    """Measures a cluster; the result is not yet kept (`save_calibration`).

    Args:
        cluster: What to measure; default: all cores of this machine, or the Ray cluster at
            `address`.
        address: Address of a Ray cluster, as in `Cluster.from_ray`; None: processes here.
        keep: Is given every exchange as it was measured, which the constants only sum up.

    Raises:
        ClusterError: The cluster is not reachable or too busy, or a rank failed.
    """
    if address is not None:
        cluster = cluster or Cluster.from_ray(address)
        ranks = probe_ray(cluster)
    else:
        cluster = cluster or Cluster.local()
        ranks = probe_local(cluster)
    for tier, sample in ((t, s) for rank in ranks for t, own in rank.links.items() for s in own):
        if keep is not None:
            keep(tier, sample)
    return calibrate(cluster, ranks)


def probe_local(cluster: Cluster) -> list[RankSamples]:
    """Measures this machine with one process for each device of a local cluster.

    Raises:
        ClusterError: The cluster has several nodes or other GPUs than are here, or a rank failed.
    """
    gpu = cluster.nodes[0].device.is_gpu
    if len(cluster.nodes) > 1 or (gpu and cluster.n_devices > torch.cuda.device_count()):
        raise ClusterError(
            f"cluster {cluster.name!r} is not this machine ({cluster.describe()}): start Ray on it "
            "and run `raypar probe --address HOST:6379`"
        )
    devices = tuple(range(cluster.n_devices))
    context = multiprocessing.get_context("spawn")
    meeting = Rendezvous()
    pipes: list[Connection] = []
    processes: list[Any] = []
    try:
        for rank in devices:
            mine, its = context.Pipe(duplex=False)
            process = context.Process(
                target=_local_rank, args=(rank, devices, gpu, meeting.address, its), daemon=True
            )
            process.start()
            its.close()
            pipes.append(mine)
            processes.append(process)
        return _collect(pipes)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        meeting.close()


def _collect(pipes: Sequence[Connection]) -> list[RankSamples]:
    end = time.monotonic() + _DEADLINE_S
    found: list[RankSamples] = []
    for rank, pipe in enumerate(pipes):
        try:
            if not pipe.poll(max(0.0, end - time.monotonic())):
                raise ClusterError(
                    f"probe rank {rank} did not finish within {_DEADLINE_S:g} s: the machine is "
                    "too busy; end other programs, or give fewer devices with --local"
                )
            answer = pipe.recv()
        except EOFError:
            raise ClusterError(
                f"probe rank {rank} ended without a result: its process was killed, perhaps for "
                "memory; give fewer devices with --local"
            ) from None
        if isinstance(answer, str):
            raise ClusterError(f"probe rank {rank} failed: {answer}")
        found.append(answer)
    return found


def _local_rank(
    rank: int, devices: tuple[int, ...], gpu: bool, address: Address, results: Connection
) -> None:
    """A rank in a process of its own; sends its samples, or the text of its error."""
    torch.set_num_threads(1)
    world = None
    try:
        place = torch.device("cuda", rank) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(place)
        backend: Any = get_backend(backend_for(place))
        world = backend.create("probe", rank, len(devices), address, timeout_s=_DEADLINE_S)
        results.send(measure_rank(world, devices, [0] * len(devices), place))
    except (RayparError, RuntimeError) as error:
        results.send(f"{type(error).__name__}: {error}")
    finally:
        if world is not None:
            world.close()
        results.close()


class ProbeActor:
    """A rank on a Ray node."""

    def __init__(self) -> None:
        self._meeting: Rendezvous | None = None

    def serve(self) -> Address:
        """Begins a rendezvous here (rank 0)."""
        import ray

        self._meeting = Rendezvous(ray.util.get_node_ip_address())
        return self._meeting.address

    def measure(
        self, rank: int, devices: tuple[int, ...], nodes: tuple[int, ...], address: Address
    ) -> RankSamples:
        """Joins the others and measures."""
        import ray

        gpu = torch.cuda.is_available() and bool(
            ray.get_runtime_context().get_accelerator_ids().get("GPU")
        )
        device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        torch.set_num_threads(1)
        backend: Any = get_backend(backend_for(device))
        host = ray.util.get_node_ip_address()
        world = backend.create(
            "probe", rank, len(devices), address, host=host, timeout_s=_DEADLINE_S
        )
        try:
            return measure_rank(world, devices, nodes, device)
        finally:
            world.close()


def probe_ray(cluster: Cluster) -> list[RankSamples]:
    """Measures a Ray cluster that this process is connected to (`Cluster.from_ray`).

    Raises:
        ClusterError: Its devices are held by others, or a rank failed.
    """
    import ray

    from raypar.mesh.placement import acquired

    devices = chosen_devices(cluster)
    nodes = tuple(cluster.device(d)[0] for d in devices)
    mesh = DeviceMesh("raypar/probe", devices, (len(devices),))
    request = mesh.request(cluster)
    make: Any = ray.remote(ProbeActor)
    with acquired([request]) as (group,):
        actors = []
        for i, bundle in enumerate(request.bundles):
            strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=i
            )
            actors.append(
                make.options(
                    num_cpus=bundle.get("CPU", 0),
                    num_gpus=bundle.get("GPU", 0),
                    scheduling_strategy=strategy,
                    max_restarts=0,
                ).remote()
            )
        try:
            address = ray.get(actors[0].serve.remote(), timeout=_DEADLINE_S)
            calls = [a.measure.remote(i, devices, nodes, address) for i, a in enumerate(actors)]
            ranks: list[RankSamples] = ray.get(calls, timeout=_DEADLINE_S)
        except ray.exceptions.RayError as error:
            raise ClusterError(
                f"a probe rank on the Ray cluster failed: {str(error).splitlines()[-1]}"
            ) from error
    return ranks
