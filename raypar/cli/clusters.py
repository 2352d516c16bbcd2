"""Commands about machines."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from raypar.cli._shared import json_option, written_option

if TYPE_CHECKING:
    from raypar.mesh._probe_fit import LinkSample
    from raypar.mesh.cluster import Cluster
    from raypar.mesh.probe import Keep


@click.command()
@click.option(
    "--address", metavar="HOST:PORT", help="Measure this Ray cluster; default: RAY_ADDRESS."
)
@click.option(
    "--local",
    "processes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Measure this machine with N processes; without a cluster: one per core.",
)
@click.option(
    "--gpu", is_flag=True, help="Measure this machine's GPUs, without Ray; with --local: N of them."
)
@written_option("--out", "Also write the constants here (JSON).")
def probe(address: str | None, processes: int | None, gpu: bool, out: str | None) -> None:
    """Measure devices and links, and keep what was found.

    Plans and predictions then go by that instead of a device table. It takes under a minute, and
    longer where processes share cores.
    """
    if address is not None and processes is not None:
        raise click.UsageError("give --address or --local, not both")
    if address is not None and gpu:
        raise click.UsageError(
            "give --address or --gpu, not both: a cluster's GPUs are known to it"
        )
    from raypar.mesh.cluster import Cluster
    from raypar.mesh.local_gpus import local_gpus
    from raypar.mesh.probe import probe as measure
    from raypar.mesh.probe import save_calibration
    from raypar.report.calibration import calibration_text

    if processes is None and address is None and not gpu:
        # As runs do, which go by what is found here.
        address = os.environ.get("RAY_ADDRESS") or None
    local = address in (None, "local")
    here = local_gpus if gpu else Cluster.local
    cluster = here(processes) if local else Cluster.from_ray(address)
    found = measure(cluster, address=None if local else address, keep=_learner(cluster))
    click.echo(calibration_text(found, cluster))
    click.echo(f"kept in {save_calibration(found)}")
    if out is not None:
        save_calibration(found, Path(out))


def _learner(cluster: Cluster) -> Keep:
    """Keeps measured collectives for the cost model that learns (`search.cost_model`)."""
    from raypar.search.cost.learned import LearnedCost
    from raypar.search.cost.store import MeasurementStore
    from raypar.sharding.convert import COLLECTIVES

    model = LearnedCost(MeasurementStore.for_cluster(cluster))

    def keep(tier: str, sample: LinkSample) -> None:
        if sample.kind in COLLECTIVES and sample.seconds > 0:
            model.observe_collective(sample.kind, tier, sample.size, sample.nbytes, sample.seconds)

    return keep


@click.command()
@click.option("--cluster", is_flag=True, help="Look at every node of a Ray cluster.")
@click.option("--address", metavar="HOST:PORT", help="Of the cluster; default: RAY_ADDRESS.")
@click.option("--interface", metavar="NAME", help="As comm.interface: try ports there.")
@click.option("--ports", metavar="FIRST:LAST", help="As comm.port_range.")
@json_option
def doctor(
    cluster: bool,
    address: str | None,
    interface: str | None,
    ports: str | None,
    json_file: str | None,
) -> None:
    """Tell what is installed and seen here, and how to mend it.

    With --cluster, on every node of a Ray cluster: versions, devices, clocks, and whether all nodes
    reach each other.
    """
    from raypar import doctor as examination

    if not cluster:
        if any(value is not None for value in (address, interface, ports, json_file)):
            raise click.UsageError("--address, --interface, --ports and --json go with --cluster")
        sys.exit(examination.main())
    sys.exit(examination.main_cluster(address, interface, _ports(ports), json_file))


def _ports(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit()):
        raise click.UsageError(f"--ports takes FIRST:LAST, such as 20000:20100; got {text!r}")
    return int(first), int(last)
