"""``raypar doctor``: what is installed, whether it fits together, and how to mend it.

`diagnose` looks at this machine (`here.py`, `packages.py`), `examine_cluster` at every node of a
Ray cluster (`cluster.py`; `nodes.py` judges what they told).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raypar.doctor.finding import FAIL, OK, WARN, Finding, failed, render
from raypar.doctor.here import diagnose

if TYPE_CHECKING:
    from raypar.doctor.cluster import ClusterReport

__all__ = [
    "FAIL",
    "OK",
    "WARN",
    "Finding",
    "diagnose",
    "examine_cluster",
    "failed",
    "main",
    "main_cluster",
    "render",
]


def main() -> int:
    """Looks, prints, and returns the exit code: 1 if something has to be mended, else 0."""
    findings = diagnose()
    render(findings)
    return int(failed(findings) > 0)


def examine_cluster(
    interface: str | None = None,
    port_range: tuple[int, int] | None = None,
    deadline_s: float = 60.0,
) -> ClusterReport:
    """Looks at every node of the Ray cluster that this process is connected to.

    See `raypar.doctor.cluster.examine`; imported here at first use, since `diagnose` has to work
    where Ray does not.
    """
    from raypar.doctor.cluster import examine

    return examine(interface, port_range, deadline_s)


def main_cluster(
    address: str | None = None,
    interface: str | None = None,
    port_range: tuple[int, int] | None = None,
    json_path: str | None = None,
) -> int:
    """Connects, looks at every node, prints, and returns the exit code as `main` does.

    Args:
        address: The cluster, as ``ray.init`` takes it; None for RAY_ADDRESS, then for a Ray on
            this machine.
        interface: ``comm.interface``.
        port_range: ``comm.port_range``.
        json_path: Where to write the report as JSON, too; ``-`` for stdout.

    Raises:
        ClusterError: The cluster is not reachable.
        ConfigError: `interface` or `port_range` cannot be meant, or the report cannot be written.
    """
    from pathlib import Path

    from raypar.errors import ConfigError
    from raypar.train.session import connect

    with connect(address or "auto"):
        report = examine_cluster(interface, port_range)
    count = len(report.nodes)
    where = "this node" if count == 1 else f"these {count} nodes"
    render(report.findings, f"raypar can run on {where}")
    if json_path == "-":
        print(report.to_json())
    elif json_path is not None:
        try:
            Path(json_path).write_text(report.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json: cannot write {json_path!r}: {error.strerror}") from None
    return int(failed(report.findings) > 0)
