"""A rank's parameter gradients: summed over microbatches, stages, mesh axes and owners.

`raypar.stages.layouts` says which way each gradient goes. Where the optimizer holds less than the
programs take (ZeRO), this is also where its updated parts come back to the programs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from raypar.comm.buckets import GradBuckets
from raypar.comm.gather import Copy, GatherBuckets
from raypar.comm.group import Group, TensorSpec
from raypar.comm.mesh import MeshGroups
from raypar.comm.scatter import ScatterBuckets, Split
from raypar.errors import ScheduleError
from raypar.programs.products import Gradient, as_tensor
from raypar.programs.stage import Sink
from raypar.schedules.instructions import Kind
from raypar.sharding.pieces import Piece
from raypar.stages._sharers import Reducers, Sharers
from raypar.stages.holdings import Holdings
from raypar.stages.layouts import reports
from raypar.stages.spec import RankSpec

_BUCKET = 4 << 20
_ONE_BUCKET = 1 << 62

_Buckets = GradBuckets | ScatterBuckets


@dataclass(frozen=True)
class _Place:
    """Where the gradient of one parameter goes when a stage delivers it.

    Attributes:
        buckets: What adds it up.
        index: Its number there.
        part: The part that is kept, where the rest is not needed here; None for all.
        of_stage: Whether the buckets are those of one stage: then its last microbatch is the last,
            even where other stages of the rank share the parameter.
    """

    buckets: _Buckets
    index: int
    part: Piece | None
    of_stage: bool = False


class GradientStore:
    """Collects gradients as the programs deliver them, and hands the optimizer its part of them.

    Gradients that go the same way share buckets: all-reduced ones, those that are reduce-scattered
    once a step (ZeRO-1), and those that are in every microbatch (ZeRO-2, by stage). A parameter
    that several rank groups hold (tied over stages) is reduced over all of their ranks.

    Args:
        spec: What the rank is.
        holdings: What it holds.
        world: All ranks of the run; groups are made here, by all ranks in the same order.
        mesh: Groups along the axes of the own mesh; None for a rank that shares nothing.

    Attributes:
        kept: Copies of the last step's gradients, where asked for.
    """

    def __init__(
        self, spec: RankSpec, holdings: Holdings, world: Group, mesh: MeshGroups | None
    ) -> None:
        self._spec = spec
        self._holdings = holdings
        self._reported = frozenset(n for n in holdings.params if reports(spec, n))
        self._sharers = Sharers(spec, world, mesh, holdings.device)
        self.kept: dict[str, torch.Tensor] = {}
        self._expected = self._expected_counts()
        self._seen: Counter[str] = Counter()
        self._left: Counter[tuple[int, str]] = Counter()
        self._stages_of: dict[str, list[int]] = {}
        self._place: dict[tuple[int, str], _Place] = {}
        self._members: list[tuple[_Buckets, list[str]]] = []
        self._late: dict[Reducers, list[str]] = {}
        self._names = {i: stage.program.weight_gradients for i, stage in holdings.stages.items()}
        for stage in self._sync_order(spec):
            for name in self._names[stage]:
                self._stages_of.setdefault(name, []).append(stage)
        self._make_buckets()
        self._gathers = self._make_gathers()
        self._grads: dict[str, torch.Tensor] = {}

    # -- set-up -----------------------------------------------------------------------------

    def _expected_counts(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for index in self._holdings.stages:
            for name in self._delivered(index):
                counts[name] += self._spec.microbatches
        return dict(counts)

    def _delivered(self, stage: int) -> list[str]:
        """The parameters whose gradients a stage's programs deliver, in that order."""
        program = self._holdings.stages[stage].program
        return [program.weight_gradients[j] for j in program.ready_order]

    def _made(self, name: str) -> bool:
        """Whether every stage that delivers a parameter's gradient does so as a product."""
        own = self._holdings.stages
        return all(name in own[stage].program.products for stage in self._stages_of[name])

    def _sync_order(self, spec: RankSpec) -> list[int]:
        """Stages in the order in which their gradients are complete."""
        return [
            i.stage for i in spec.instructions if i.kind is Kind.GRAD_SYNC and i.stage is not None
        ]

    def _ready_order(self) -> list[str]:
        """Names in the order in which their last gradient comes: late stages first."""
        last: dict[str, tuple[int, int]] = {}
        for index in self._holdings.stages:
            for at, name in enumerate(self._delivered(index)):
                last[name] = max(last.get(name, (-index, 0)), (-index, at))
        return sorted(last, key=lambda n: last[n])

    def _make_buckets(self) -> None:
        reduced: dict[Reducers, list[str]] = {}
        once: dict[tuple[str, ...], list[str]] = {}
        rounds: dict[tuple[str, ...], set[str]] = {}
        ready = self._ready_order()
        # A shared parameter whose gradient comes from other rank groups alone is reduced here too.
        held = self._holdings.params
        self._absent = [n for n in self._spec.shared if n in held and n not in ready]
        for name in (*ready, *self._absent):
            way = self._holdings.ways[name]
            reducers = self._sharers.reducers(name, way.reduce)
            if self._sharers.along(way.scatter) is None:
                reduced.setdefault(reducers, []).append(name)
                continue
            if self._spec.params[name].zero >= 2:
                rounds.setdefault(way.scatter, set()).add(name)
            elif name not in self._absent:
                once.setdefault(way.scatter, []).append(name)
            if self._sharers.group_of(reducers) is not None:
                self._late.setdefault(reducers, []).append(name)
        # Sorted: what waits to the end of the step is then waited for in one order on all ranks,
        # whichever of these parameters a rank group delivers first, or not at all.
        for key, names in sorted(reduced.items()):
            self._add_reduced(key, names)
        for axes, names in once.items():
            self._add_scattered(axes, names, list(self._holdings.stages), rounds=False)
        for axes, members in rounds.items():
            for stage in self._holdings.stages:
                names = [n for n in self._delivered(stage) if n in members]
                self._add_scattered(axes, names, [stage], rounds=True)

    def _add_reduced(self, key: Reducers, names: list[str]) -> None:
        owners, axes = key
        size = _BUCKET
        if owners:  # one bucket: owners see these gradients in different orders
            names, size = sorted(names), _ONE_BUCKET
        parts = [self._holdings.ways[n].own for n in names]
        specs = [
            TensorSpec(part.shape, self._holdings.params[n].dtype)
            for n, part in zip(names, parts, strict=True)
        ]
        what = "gradients of shared parameters" if owners else "gradients"
        over = f" over {'×'.join(axes)}" if axes else ""
        buckets = GradBuckets(specs, self._sharers.group_of(key), size, name=what + over)
        self._members.append((buckets, names))
        for index, (name, part) in enumerate(zip(names, parts, strict=True)):
            place = _Place(buckets, index, part if self._holdings.ways[name].cut else None)
            self._place.update({(stage, name): place for stage in self._holdings.stages})

    def _add_scattered(
        self, axes: tuple[str, ...], names: list[str], stages: Sequence[int], *, rounds: bool
    ) -> None:
        if not names:
            return
        params, ways = self._holdings.params, self._holdings.ways
        splits = [
            Split(
                TensorSpec(tuple(params[n].shape), params[n].dtype), ways[n].shares, self._made(n)
            )
            for n in names
        ]
        group = self._sharers.along(axes)
        assert group is not None
        what = f"gradients scattered over {'×'.join(axes)}"
        buckets = ScatterBuckets(splits, group, _BUCKET, rounds, name=what)
        self._members.append((buckets, names))
        for index, name in enumerate(names):
            place = _Place(buckets, index, None, of_stage=rounds)
            self._place.update({(stage, name): place for stage in stages})

    def _make_gathers(self) -> dict[int, list[GatherBuckets]]:
        """Stage → what brings updated parts back to where its programs take them from.

        Stages are in the order in which they first go forward; what several take comes with the
        first of them, and what none takes with the last.
        """
        held = self._holdings
        forwards = (i.stage for i in self._spec.instructions if i.kind is Kind.FORWARD)
        order = list(dict.fromkeys(stage for stage in forwards if stage is not None))
        takes = {s: {k for k in held.stages[s].program.inputs if k[:6] == "param:"} for s in order}
        copies: dict[tuple[int, tuple[str, ...]], list[Copy]] = {}
        for name, way in held.ways.items():
            if held.params[name].requires_grad and self._sharers.along(way.gather) is not None:
                first = next((s for s in order if f"param:{name}" in takes[s]), order[-1])
                whole, own = held.params[name].detach(), held.stored[name].detach()
                copies.setdefault((first, way.gather), []).append(Copy(whole, own, way.parts))
        found: dict[int, list[GatherBuckets]] = {stage: [] for stage in order}
        for (stage, axes), members in copies.items():
            group = self._sharers.along(axes)
            assert group is not None
            name = f"parameters of stage {stage} over {axes}"
            found[stage].append(GatherBuckets(members, group, _BUCKET, name))
        return found

    # -- a step -----------------------------------------------------------------------------

    def begin(self) -> None:
        """Before a step: the last one's gradients are dropped."""
        self._seen.clear()
        self._left = Counter(dict.fromkeys(self._place, self._spec.microbatches))
        self._grads = {}
        for param in self._holdings.stored.values():
            param.grad = None
        for buckets, _ in self._members:
            buckets.reset()

    def sink(self, stage: int) -> Sink:
        """Takes the gradients of one stage's weight program."""
        names, expected = self._names[stage], self._expected

        def take(index: int, gradient: Gradient) -> None:
            name = names[index]
            self._seen[name] += 1
            self._left[stage, name] -= 1
            place = self._place[stage, name]
            last = self._seen[name] == expected[name]
            last = last or (place.of_stage and not self._left[stage, name])
            if place.part is not None:
                gradient = place.part.read(as_tensor(gradient))
            place.buckets.add(place.index, gradient, last)

        return take

    def check_complete(self, stage: int) -> None:
        """Checks that every microbatch of a stage has delivered its gradients.

        Raises:
            ScheduleError: One has not; the instruction list is wrong.
        """
        for name in self._names[stage]:
            seen, wanted = self._seen[name], self._expected.get(name, 0)
            if self._stages_of[name][-1] == stage and seen != wanted:
                raise ScheduleError(
                    f"stage {stage}: {seen} of {wanted} gradients of {name!r} came before its SYNC"
                )

    def finish(self, device: torch.device) -> torch.Tensor:
        """Waits for all exchanges; returns this rank's share of the squared global norm.

        The shares of all ranks count every element of the model's gradient once.
        """
        self._grads = {}
        for buckets, names in self._members:
            for name, gradient in zip(names, buckets.finish(), strict=True):
                if gradient is None:
                    continue
                known = self._grads.get(name)
                self._grads[name] = gradient if known is None else known + gradient
        for name in self._absent:
            nothing = torch.zeros_like(self._holdings.stored[name].detach())
            self._grads.setdefault(name, nothing)
        self._reduce_late()
        for name, owners in self._sharers.sums.items():
            if name in self._grads:
                self._grads[name] = owners.run(self._grads[name], f"gradient of {name}")
        norms: dict[torch.dtype, list[torch.Tensor]] = {}
        for name, gradient in self._grads.items():
            if name in self._reported:
                norm = torch.linalg.vector_norm(gradient)
                norms.setdefault(norm.dtype, []).append(norm)
        squares = torch.zeros((), dtype=torch.float64, device=device)
        for found in norms.values():
            squares += torch.stack(found).double().square().sum()
        return squares

    def _reduce_late(self) -> None:
        """All-reduces own parts that remain partial sums after they were scattered."""
        under_way = []
        for key, names in sorted(self._late.items()):
            group = self._sharers.group_of(key)
            assert group is not None
            for dtype in sorted({self._grads[n].dtype for n in names}, key=str):
                members = sorted(n for n in names if self._grads[n].dtype == dtype)
                flat = torch.cat([self._grads[n].reshape(-1) for n in members])
                work = group.all_reduce(flat, name="parts of gradients")
                under_way.append((members, flat, work))
        for members, flat, work in under_way:
            work.wait()
            sizes = [self._grads[n].numel() for n in members]
            for name, part in zip(members, flat.split(sizes), strict=True):
                self._grads[name] = part.view(self._grads[name].shape)

    def keep(self) -> None:
        """Copies the gradients as they are now."""
        self.kept = {n: g.detach().clone() for n, g in self._grads.items()}

    def scale(self, factor: float) -> None:
        """Multiplies every gradient."""
        if factor != 1.0:
            for name, gradient in self._grads.items():
                self._grads[name] = gradient * factor

    def assign(self) -> None:
        """Hands the gradients to the stored parameters, for the optimizer."""
        for name, param in self._holdings.stored.items():
            param.grad = self._grads.get(name)

    def spread(self) -> None:
        """After the optimizer: sends its parts to every rank whose programs take them.

        They travel in the background; `arrived` or `all_arrived` has to come before a program
        takes them.

        Raises:
            CommTimeoutError: What was sent before did not arrive in time.
        """
        self.all_arrived()
        for gathers in self._gathers.values():
            for gather in gathers:
                gather.start()

    def arrived(self, stage: int) -> bool:
        """Waits for the parameters of a stage; returns whether any were on their way.

        Raises:
            CommTimeoutError: They missed their deadline.
        """
        found = [
            gather.finish() for gather in self._gathers[stage]
        ]  # all of them, whatever they say
        return any(found)

    def all_arrived(self) -> None:
        """Waits for the parameters of all stages.

        Raises:
            CommTimeoutError: They missed their deadline.
        """
        for stage in self._gathers:
            self.arrived(stage)

    def tensors(self) -> list[torch.Tensor]:
        """All memory that gradients hold now, for accounts of it."""
        held = [t for buckets, _ in self._members for t in buckets.tensors()]
        return [*held, *self._grads.values()]
