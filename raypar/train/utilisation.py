"""Model FLOPs utilisation: how much of what the devices could compute goes into the model.

``MFU = model FLOPs of a step / (seconds of the step × FLOP/s of all devices at best)``, as
Chowdhery et al. 2022 ("PaLM", appendix B) define it: model FLOPs are those of the matrix products
of the unsplit model, forward and backward, each once: what is recomputed, or computed on several
devices, does not count. At best a GPU reaches its vendor's figure for dense matrices of the number
format that most products of the model have. A CPU core has no such figure: there the rate of very
large products that `raypar probe` measured is taken; without a measurement there is no MFU.
"""

from __future__ import annotations

import torch

from raypar.graph.costs import forward_flops, is_matmul_like
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import Calibration
from raypar.mesh.calibration_files import load_calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan


def model_flops(graph: OpGraph) -> int:
    """FLOPs of one step's matrix products (one multiply-add is two).

    Backward takes two products for every one of forward: for the gradient of its input and for
    that of its weight. A product whose parameters are all frozen has no second one.
    """
    total = 0
    trained = {name for name, (_, _, grows) in graph.params.items() if grows}
    for flops, params in _products(graph):
        frozen = bool(params) and not trained.intersection(params)
        total += flops * (2 if frozen else 3)
    return total


def product_dtype(graph: OpGraph) -> str:
    """The number format of most of the model's products; ``tf32`` where torch runs float32 so."""
    found: dict[str, int] = {}
    for node in graph.clean.ops:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point() and is_matmul_like(node):
            name = str(value.dtype).removeprefix("torch.")
            found[name] = found.get(name, 0) + forward_flops(node)
    most = max(found, key=lambda name: found[name], default="float32")
    if most == "float32" and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return most


def peak_flops(
    plan: Plan, cluster: Cluster, dtype: str, calibration: Calibration | None = None
) -> float | None:
    """FLOP/s that the devices of a plan reach at best, together; None where that is not known.

    Args:
        plan: Whose devices.
        cluster: Where they are.
        dtype: Number format of the products.
        calibration: What was measured; default: what is on file for such a cluster.
    """
    calibration = calibration or load_calibration(cluster)
    total = 0.0
    for device in plan.devices:
        kind = cluster.node_of(device).device
        if kind.is_gpu:
            total += kind.peak(dtype)
        elif calibration.measured:
            plain = "float32" if dtype == "tf32" else dtype
            total += kind.peak(plain) * calibration.rates(kind).curve(plain).top
        else:
            return None
    return total


def _products(graph: OpGraph) -> list[tuple[int, tuple[str, ...]]]:
    """Forward FLOPs and parameters of every matrix product."""
    return [
        (op.flops, op.params)
        for node, op in zip(graph.clean.ops, graph.ops, strict=True)
        if is_matmul_like(node)
    ]
