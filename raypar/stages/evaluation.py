"""One rank evaluates: forwards alone, on the parameters that it trains, between two steps.

Nothing that training depends on is touched: programs are given tensors and return tensors, random
numbers are functions of their keys, and new values of buffers are not even computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from raypar.comm.group import Group, TensorSpec
from raypar.comm.mesh import MeshGroups
from raypar.errors import RayparError
from raypar.graph.replay import replay
from raypar.plan import DATA
from raypar.schedules.instructions import Instruction, Kind
from raypar.sharding.collectives import set_context
from raypar.stages.batch import first_sample, microbatch_rows
from raypar.stages.forward_spec import ForwardSpec, Loan
from raypar.stages.holdings import HeldStage, Holdings, Workshop
from raypar.stages.materialise import materialise
from raypar.stages.spec import RankSpec
from raypar.stages.transfers import Transfers
from raypar.stages.weights import weights_in_use


class Parcel(Protocol):
    """Rows of a batch on their way to a rank."""

    def open(self) -> Mapping[str, torch.Tensor]:
        """Input name → this replica's rows (`raypar.stages.batch.shard_batch`)."""


Outcome = dict[tuple[int, int], torch.Tensor]
"""(number of a result, part of the batch) → its value there, on the CPU. Part ``m·D + d`` is what
replica d sees of microbatch m."""


@dataclass
class _Loaded:
    """One form of batch, ready to run.

    Attributes:
        spec: What was shipped.
        cutting: The rank's spec as to rows.
        stages: Compiled stages by number.
        constants: Constants by placeholder id.
        transfers: The way to other ranks.
        speaks: Whether the rank answers for its replica, and that for a part of the batch.
    """

    spec: ForwardSpec
    cutting: RankSpec
    stages: dict[int, HeldStage]
    constants: dict[str, torch.Tensor]
    transfers: Transfers
    speaks: bool


class ForwardRunner:
    """Runs forward programs on what one rank holds.

    Args:
        spec: What the rank is.
        world: All ranks of the run.
        mesh: The groups of its mesh.
        holdings: What it holds.
    """

    def __init__(self, spec: RankSpec, world: Group, mesh: MeshGroups, holdings: Holdings) -> None:
        self._spec = spec
        self._world = world
        self._mesh = mesh
        self._held = holdings
        self.device = holdings.device
        self._replicas = mesh.along((DATA,))
        self._loaded: dict[str, _Loaded] = {}
        self.standing = ""
        """Where it stands while it evaluates, for those that wonder why it hangs."""

    def load(self, key: str, specs: Mapping[int, ForwardSpec], forget: Sequence[str] = ()) -> None:
        """Makes the programs for one form of batch; all ranks do it in the same order.

        Args:
            key: What `run` will call it.
            specs: For every rank group.
            forget: Forms whose programs are not needed any more.
        """
        for old in forget:
            self._loaded.pop(old, None)
        try:
            self._loaded[key] = self._made_ready(specs)
        except BaseException as error:
            self._abort(error)
            raise

    def _made_ready(self, specs: Mapping[int, ForwardSpec]) -> _Loaded:
        own = specs[self._spec.group]
        device = self._held.device
        route = replace(
            self._spec,
            stages=(),
            edges=own.edges,
            posts=own.posts,
            shapes=own.shapes,
            edge_specs=own.edge_specs,
        )
        workshop = Workshop()
        with workshop.turn(self._spec.default_dtype):
            stages = {s.index: workshop.stage(s, device) for s in own.stages}
            made = {}
            if own.constants:
                found = materialise(
                    self._spec.model_fn, self._spec.seed, {}, (), own.constants, device
                )
                made = found.constants
        first = own.spread or self._spec.replica == 0
        return _Loaded(
            own,
            own.cutting(self._spec),
            stages,
            made,
            Transfers(route, self._world),
            self._spec.leads and first,
        )

    def run(
        self,
        key: str,
        first: int,
        batches: Sequence[Parcel],
        params: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
    ) -> list[Outcome]:
        """Evaluates some batches, one after the other.

        Args:
            key: The form of all of them, as it was loaded.
            first: Number of the first one in its data source.
            batches: This rank's rows of each.
            params: Name → the part that programs take, of every parameter that the rank holds.
            buffers: Name → value of every buffer that it holds.

        Returns:
            For every batch what this rank speaks for.

        Raises:
            RayparError: Nothing was loaded as `key`.
            CommError: A peer is gone, a deadline passed or the group was aborted.
        """
        loaded = self._loaded.get(key)
        if loaded is None:
            raise RayparError(f"nothing was loaded to evaluate as {key!r}: load it first")
        set_context(self._mesh)
        try:
            with torch.no_grad():
                tensors = {f"param:{name}": p.detach() for name, p in params.items()}
                tensors.update({f"buffer:{name}": b for name, b in buffers.items()})
                tensors.update(loaded.constants)
                tensors.update(self._borrow(loaded.spec.loans, buffers))
                walk = _Walk(self, loaded, tensors)
                return [walk.batch(first + i, x.open()) for i, x in enumerate(batches)]
        except BaseException as error:
            self._abort(error)
            raise

    def _abort(self, error: BaseException) -> None:
        """The others wait for what this rank will not send."""
        self._world.abort(f"rank {self._spec.rank} failed to evaluate: {error}")

    def _borrow(
        self, loans: Sequence[Loan], buffers: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Moves what some rank groups need and do not hold; each rank does its share."""
        self.standing = "evaluation: moving tensors that are held elsewhere"
        me, device = self._spec.rank, self._held.device
        sends, found = [], {}
        for loan in loans:
            kind, _, name = loan.key.partition(":")
            lent = dict(loan.lenders)
            own: torch.Tensor | None = None
            if me in lent:
                held = self._held.stored[name] if kind == "param" else buffers[name]
                own = held.detach().contiguous()
                others = [rank for rank in loan.borrowers if rank != me]
                sends += [self._world.isend(own, rank, f"lend {loan.key}") for rank in others]
            if me not in loan.borrowers:
                continue
            dtype = getattr(torch, loan.dtype)
            whole = torch.empty(loan.shape, dtype=dtype, device=device)
            for rank, piece in loan.lenders:
                part = own
                if rank != me:
                    shape = loan.shape if piece is None else piece.shape
                    form = TensorSpec(shape, dtype)
                    part = self._world.irecv(form, rank, f"lend {loan.key}").wait()
                assert part is not None
                if piece is None:
                    whole.copy_(part)
                else:
                    piece.write(whole, part)
            found[loan.key] = whole
        for send in sends:
            send.wait()
        return found

    def total(self, name: str, share: torch.Tensor) -> torch.Tensor:
        """A count of the whole batch, from what each replica counts."""
        share = share.contiguous().clone()
        if self._replicas is not None:
            self._replicas.all_reduce(share, name=f"count {name}").wait()
        return share


class _Walk:
    """Walks one rank's list, batch by batch."""

    def __init__(
        self, runner: ForwardRunner, loaded: _Loaded, tensors: dict[str, torch.Tensor]
    ) -> None:
        self._runner = runner
        self._loaded = loaded
        self._spec = loaded.spec
        self._tensors = tensors

    def batch(self, number: int, inputs: Mapping[str, torch.Tensor]) -> Outcome:
        """Evaluates one batch; `number` keys the random numbers of a model that draws some."""
        device = self._runner.device
        self._number = number
        self._inputs = {k: t.to(device, non_blocking=True) for k, t in inputs.items()}
        self._values: dict[tuple[str, int], torch.Tensor] = {}
        self._globals: dict[str, torch.Tensor] = {}
        self._outcome: Outcome = {}
        transfers = self._loaded.transfers
        count = len(self._spec.instructions)
        for position, now in enumerate(self._spec.instructions):
            self._runner.standing = f"evaluation batch {number}, instruction {position} of {count}"
            transfers.post(position)
            self._do(now)
        transfers.finish()
        self._runner.standing = ""
        return self._outcome

    def _do(self, now: Instruction) -> None:
        key = (now.value or "", now.microbatch or 0)
        if now.kind is Kind.FORWARD:
            assert now.stage is not None
            self._forward(self._loaded.stages[now.stage], key[1])
        elif now.kind is Kind.RECV_FORWARD:
            self._values[key] = self._loaded.transfers.receive(now)
        elif now.kind is Kind.SEND_FORWARD:
            self._loaded.transfers.send(now, self._values[key])
        elif now.kind is Kind.FREE:
            self._values.pop(key, None)
        else:
            self._make_globals()

    def _forward(self, stage: HeldStage, microbatch: int) -> None:
        arguments = [self._argument(key, microbatch) for key in stage.program.inputs]
        outputs = stage.program.forward(arguments)
        edges = stage.spec.edges_out
        for edge, value in zip(edges, outputs, strict=False):
            self._values[edge, microbatch] = value.contiguous()
        if not self._loaded.speaks:
            return
        part = microbatch * self._loaded.cutting.replicas + self._loaded.cutting.replica
        made = zip(self._spec.results[stage.spec.index], outputs[len(edges) :], strict=True)
        for number, value in made:
            self._outcome[number, part] = value.detach().cpu().clone()

    def _argument(self, key: str, microbatch: int) -> torch.Tensor:
        kind, _, name = key.partition(":")
        if kind == "edge":
            return self._values[name, microbatch]
        if kind == "global":
            return self._globals[name]
        if kind == "in":
            dim = self._spec.batch_dims[int(name)]
            return microbatch_rows(self._inputs[key], dim, microbatch, self._spec.microbatches)
        if kind == "rng":
            first = first_sample(self._loaded.cutting, microbatch)
            seed = self._loaded.cutting.seed
            return torch.tensor([seed, self._number, first], dtype=torch.int64)
        return self._tensors[key]

    def _make_globals(self) -> None:
        """Counts of the whole batch, before the first forward."""
        parts = self._spec.microbatches * self._loaded.cutting.replicas
        for stage in self._loaded.stages.values():
            graph = stage.globals_program
            if graph is None:
                continue
            holders = [n for n in graph.nodes if n.op == "placeholder"]
            shares: list[Any] = [
                replay(graph, {n: self._argument(n.meta["id"], m) for n in holders})
                for m in range(self._spec.microbatches)
            ]
            for i, (name, power) in enumerate(stage.spec.globals):
                total = torch.stack([share[i] for share in shares]).sum(0)
                if self._spec.spread:
                    total = self._runner.total(name, total)
                self._globals[name] = total * float(parts) ** power if power else total


__all__ = [
    "ForwardRunner",
    "ForwardSpec",
    "Loan",
    "Outcome",
    "Parcel",
    "weights_in_use",
]
