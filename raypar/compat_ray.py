"""Every private Ray name that raypar uses, in this one file; torch's are in `compat`.

It imports no torch, and neither do the actors that look after a run and hold no tensor.
"""

from __future__ import annotations


def ray_address_on_this_machine() -> str | None:
    """``host:port`` of the Ray that was last started on this machine, running or not.

    `ray.init` reads the same file; there is no public name that looks without connecting.
    """
    from ray._private.services import find_bootstrap_address

    return find_bootstrap_address(None) or None


def ray_node_on_this_machine(address: str, timeout_s: int) -> bool:
    """Whether a node of the cluster at ``host:port`` runs on this machine, within `timeout_s`.

    `ray.init` asks the same, with a limit of a minute that cannot be set. What else goes wrong is
    left to it.
    """
    from ray._private.services import GcsClient, get_node_to_connect_for_driver

    try:
        get_node_to_connect_for_driver(GcsClient(address=address), timeout_seconds=timeout_s)
    except RuntimeError as error:
        return "No node info found" not in str(error)
    return True


def ray_free_by_node() -> dict[str, dict[str, float]]:
    """Ray node id → resources that are free now; the public call adds all nodes up."""
    from ray._private.state import available_resources_per_node

    return {
        node: {name: float(amount) for name, amount in free.items()}
        for node, free in available_resources_per_node().items()
    }


def ray_workers() -> set[str]:
    """Ids of the worker processes that are alive on the cluster's nodes; drivers are none.

    Those of a node that died stay in Ray's table as they were.

    The public call (`ray.util.state.list_workers`) asks the dashboard, which need not run.
    """
    import ray
    from ray._private.state import workers

    there = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    return {worker for worker, info in workers().items() if info["node_ip_address"] in there}


def ray_autoscaler() -> tuple[bool, int]:
    """Whether an autoscaler runs for this cluster, and how many nodes it is bringing up.

    Ray has no public name that tells either. Without an autoscaler its monitor only mirrors the
    nodes that are there, each as a node type of its own that is called ``node_<id>``. Version 1
    reports to the internal key-value store, version 2 to the GCS.
    """
    import json
    import re

    import ray
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    try:
        if is_autoscaler_v2(fetch_from_server=True):
            status = get_cluster_status(ray.get_runtime_context().gcs_address)
            return True, sum(n.count for n in status.pending_launches) + len(status.pending_nodes)
        text = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
        report = json.loads(text).get("autoscaler_report") or {} if text else {}
        types = {kind for part in ("active_nodes", "idle_nodes") for kind in report.get(part) or ()}
        coming = sum((report.get("pending_launches") or {}).values())
        coming += len(report.get("pending_nodes") or ())
    except Exception:  # of whatever kind: what cannot be asked cannot be waited for
        return False, 0
    return coming > 0 or not all(re.fullmatch("node_[0-9a-f]{56}", t) for t in types), coming
