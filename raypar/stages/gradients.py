"""A rank's parameter gradients: summed over microbatches, stages, replicas and owners."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from raypar.comm.buckets import GradBuckets
from raypar.comm.group import Group, TensorSpec
from raypar.errors import ScheduleError
from raypar.schedules.instructions import Kind
from raypar.stages.holdings import Holdings
from raypar.stages.spec import RankSpec

_BUCKET = 4 << 20
_ONE_BUCKET = 1 << 62


class GradientStore:
    """Collects gradients as the programs deliver them.

    Parameters are grouped by who shares them: the replicas of this rank group, or, for a parameter
    that several rank groups hold (tied over stages), all ranks of those.

    Attributes:
        kept: Copies of the last step's gradients, where asked for.
    """

    def __init__(
        self, spec: RankSpec, holdings: Holdings, world: Group, replicas: Group | None
    ) -> None:
        self._spec = spec
        self._params = holdings.params
        self._owned = frozenset(spec.owned_params)
        self.kept: dict[str, torch.Tensor] = {}
        self._expected = self._expected_counts(holdings)
        self._seen: Counter[str] = Counter()
        self._stages_of: dict[str, list[int]] = {}
        self._place: dict[str, tuple[GradBuckets, int]] = {}
        self._members: list[tuple[GradBuckets, list[str]]] = []
        self._names = {i: stage.program.weight_gradients for i, stage in holdings.stages.items()}
        for stage in self._sync_order(spec):
            for name in self._names[stage]:
                self._stages_of.setdefault(name, []).append(stage)
        ready = self._ready_order(holdings)
        self._add_buckets([n for n in ready if n not in spec.shared], replicas, "replicas", _BUCKET)
        for group in sorted(set(spec.shared.values())):
            names = sorted(n for n, owners in spec.shared.items() if owners == group)
            ranks = [g * spec.replicas + r for g in group for r in range(spec.replicas)]
            owners = world.subgroup(ranks, f"owners {'-'.join(map(str, group))}")
            if spec.group in group:
                # One bucket: owners see these gradients in different orders.
                self._add_buckets(names, owners, "shared parameters", _ONE_BUCKET)
        self._grads: dict[str, torch.Tensor] = {}

    def _expected_counts(self, holdings: Holdings) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for stage in holdings.stages.values():
            program = stage.program
            for j in program.ready_order:
                counts[program.weight_gradients[j]] += self._spec.microbatches
        return dict(counts)

    def _sync_order(self, spec: RankSpec) -> list[int]:
        """Stages in the order in which their gradients are complete."""
        return [
            i.stage for i in spec.instructions if i.kind is Kind.GRAD_SYNC and i.stage is not None
        ]

    def _ready_order(self, holdings: Holdings) -> list[str]:
        """Names in the order in which their last gradient comes: late stages first."""
        last: dict[str, tuple[int, int]] = {}
        for index, stage in holdings.stages.items():
            for at, j in enumerate(stage.program.ready_order):
                name = stage.program.weight_gradients[j]
                last[name] = max(last.get(name, (-index, 0)), (-index, at))
        return sorted(last, key=lambda n: last[n])

    def _add_buckets(self, names: list[str], group: Group | None, what: str, size: int) -> None:
        names = [n for n in names if n in self._params]
        if not names:
            return
        params = [self._params[n] for n in names]
        specs = [TensorSpec(tuple(p.shape), p.dtype) for p in params]
        buckets = GradBuckets(specs, group, size, name=f"gradients of {what}")
        self._members.append((buckets, names))
        self._place.update({n: (buckets, i) for i, n in enumerate(names)})

    def begin(self) -> None:
        """Before a step."""
        self._seen.clear()
        for buckets, _ in self._members:
            buckets.reset()

    def sink(self, stage: int) -> Callable[[int, torch.Tensor], None]:
        """Takes the gradients of one stage's weight program."""
        names = self._names[stage]

        def take(index: int, gradient: torch.Tensor) -> None:
            name = names[index]
            self._seen[name] += 1
            buckets, place = self._place[name]
            buckets.add(place, gradient, self._seen[name] == self._expected[name])

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
        """Waits for all exchanges; returns this rank's share of the squared global norm."""
        self._grads = {}
        norms: dict[torch.dtype, list[torch.Tensor]] = {}
        for buckets, names in self._members:
            for name, gradient in zip(names, buckets.finish(), strict=True):
                if gradient is None:
                    continue
                self._grads[name] = gradient
                if self._spec.replica == 0 and name in self._owned:
                    norm = torch.linalg.vector_norm(gradient)
                    norms.setdefault(norm.dtype, []).append(norm)
        squares = torch.zeros((), dtype=torch.float64, device=device)
        for found in norms.values():
            squares += torch.stack(found).double().square().sum()
        return squares

    def keep(self) -> None:
        """Copies the gradients as they are now."""
        self.kept = {n: g.detach().clone() for n, g in self._grads.items()}

    def scale(self, factor: float) -> None:
        """Multiplies every gradient."""
        if factor != 1.0:
            for name, gradient in self._grads.items():
                self._grads[name] = gradient * factor

    def assign(self) -> None:
        """Hands the gradients to the parameters, for the optimizer."""
        for name, param in self._params.items():
            param.grad = self._grads.get(name)
