"""Who shares a parameter's gradient: groups along the own mesh's axes, and over rank groups."""

from __future__ import annotations

import torch

from raypar.comm.group import Group
from raypar.comm.mesh import MeshGroups, lines
from raypar.comm.reshard import Layout
from raypar.comm.resharder import ReplicaGroups, ReshardSum
from raypar.sharding.layout import ParamLayout
from raypar.stages.layouts import way_of
from raypar.stages.spec import RankSpec

Reducers = tuple[tuple[int, ...], tuple[str, ...]]
"""The rank groups (none: the own one alone) and the axes over which a gradient is all-reduced."""


class Sharers:
    """The groups that gradients and parameters of one rank go through.

    Every rank of the world makes one, with the same meshes and shared parameters, so that all make
    the same groups in the same order.

    Args:
        spec: What the rank is.
        world: All ranks of the run.
        mesh: Groups along single axes; None for a rank that shares nothing with others.
        device: Where the rank's tensors live.

    Attributes:
        sums: For parameters that rank groups share whose meshes or layouts differ: what adds up
            the rank groups' gradients, each as its own optimizer holds it.
    """

    def __init__(
        self, spec: RankSpec, world: Group, mesh: MeshGroups | None, device: torch.device
    ) -> None:
        self._spec = spec
        self._mesh = mesh
        self._along: dict[tuple[str, ...], Group | None] = {}
        self._owners: dict[Reducers, Group | None] = {}
        self._base = self._whole_mesh()
        self._equal = {n for n in spec.shared if _lie_alike(spec, n)}
        for owners, axes in sorted({self._shared_key(n) for n in self._equal}):
            self._owners[owners, axes] = self._over_owners(world, owners, axes)
        replicas = ReplicaGroups(world)
        self.sums = {
            name: ReshardSum(
                spec.shared_layouts[name][0].shape,
                getattr(torch, spec.shared_dtypes[name]),
                _lie_at(spec, name),
                world,
                device,
                replicas,
            )
            for name in sorted(set(spec.shared) - self._equal)
        }

    def _whole_mesh(self) -> Group | None:
        """All ranks of the own mesh, from which groups along several axes are made.

        Which of those are needed only the mesh's own ranks know, so all ranks make the meshes.
        """
        if self._mesh is None:
            return None
        own = None
        for names in dict.fromkeys(_long_axes(axes) for axes in self._spec.meshes):
            if len(names) > 1:
                made = self._mesh.along(names)
                own = made if names == _long_axes(self._spec.axes) else own
        return own

    def along(self, axes: tuple[str, ...]) -> Group | None:
        """The ranks of the own mesh that differ along `axes` alone; None for this rank alone.

        All ranks of the mesh call it with the same axes, in the same order.
        """
        names = tuple(n for n in _long_axes(self._spec.axes) if n in axes)
        if not names or self._mesh is None:
            return None
        if len(names) == 1:
            return self._mesh.along(names)
        if names not in self._along:
            assert self._base is not None
            own = self._base if names == _long_axes(self._spec.axes) else None
            if own is None:
                for line in lines(self._spec.axes, names):
                    made = self._base.subgroup(line, f"{'×'.join(names)} from {line[0]}")
                    own = own if made is None else made
            self._along[names] = own
        return self._along[names]

    def reducers(self, name: str, axes: tuple[str, ...]) -> Reducers:
        """Over whom a gradient is all-reduced that is a partial sum over `axes`."""
        return (self._spec.shared[name] if name in self._equal else (), axes)

    def group_of(self, reducers: Reducers) -> Group | None:
        """The ranks that all-reduce together; None for this rank alone."""
        owners, axes = reducers
        return self._owners[reducers] if owners else self.along(axes)

    def _shared_key(self, name: str) -> Reducers:
        owners, layout = self._spec.shared[name], self._spec.shared_layouts[name][0]
        axes = self._spec.meshes[owners[0]]
        return owners, way_of(layout, axes, (0,) * len(axes)).reduce

    def _over_owners(
        self, world: Group, owners: tuple[int, ...], axes: tuple[str, ...]
    ) -> Group | None:
        """Equal positions of several meshes, times a line along `axes`."""
        own = None
        for line in lines(self._spec.meshes[owners[0]], axes):
            ranks = [self._spec.bases[g] + position for g in owners for position in line]
            made = world.subgroup(ranks, f"owners {'-'.join(map(str, owners))} at {line[0]}")
            own = own if made is None else made
        return own if self._mesh is not None else None


def _long_axes(axes: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    return tuple(name for name, size in axes if size > 1)


def _lie_alike(spec: RankSpec, name: str) -> bool:
    layouts: tuple[ParamLayout, ...] = spec.shared_layouts[name]
    meshes = [spec.meshes[group] for group in spec.shared[name]]
    return len(set(layouts)) == 1 and len(set(meshes)) == 1


def _lie_at(spec: RankSpec, name: str) -> list[Layout]:
    """Where the optimizers' parts of a shared parameter lie, by rank group."""
    found = []
    for group, layout in zip(spec.shared[name], spec.shared_layouts[name], strict=True):
        sizes = tuple(size for _, size in spec.meshes[group])
        found.append(Layout(layout.stored, sizes, spec.bases[group]))
    return found
