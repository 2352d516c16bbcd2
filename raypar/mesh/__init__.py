"""The cluster as a value, and as Ray placement groups.

`raypar.mesh.placement` and `raypar.mesh.discover` meet Ray and are imported by those who need it.
"""

from raypar.mesh.cluster import Cluster, Node
from raypar.mesh.device_mesh import DeviceMesh, PlacementRequest, device_meshes
from raypar.mesh.devices import DEVICES, DeviceKind, Link, device_kind

__all__ = [
    "DEVICES",
    "Cluster",
    "DeviceKind",
    "DeviceMesh",
    "Link",
    "Node",
    "PlacementRequest",
    "device_kind",
    "device_meshes",
]
