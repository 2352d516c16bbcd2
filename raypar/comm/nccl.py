"""The backend for CUDA tensors: cupy's NCCL communicators, ordered with torch by events.

* Collectives of a group run on one communicator and one side stream. Every ordered pair of ranks
  that exchange messages has a communicator and a side stream of its own, so that a send that waits
  for its receiver holds up neither receives nor sends to others. Pairs are made at first use, on
  threads of their own and with a first byte sent both ways, because NCCL connects two ranks only
  when both are there.
* A side stream waits for an event of the caller's current stream before it touches a tensor, and
  `Work.wait` makes the current stream wait for the side stream: the host goes on. Tensors are
  recorded on the streams that use them, so that torch's allocator does not reuse them early.
* Every group bootstraps its own communicator among its members. Splitting the parent's
  (`ncclCommSplit`) would be a call of all its ranks for each group, and groups are made one by one.
* NCCL carries no tags: it matches the messages of an ordered pair in the order in which both sides
  issue them. Tags only name a call in errors. Both sides must therefore issue a pair's sends and
  receives in the same order, which raypar's compiler of instruction lists guarantees.
* Deadlines are kept by a thread that polls the events. One that is missed aborts the group: its
  kernels end, and every later call raises what happened. A `GlooGroup` beside it carries ids,
  barriers, aborts and the news of dead processes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from raypar.comm import _nccl_api
from raypar.comm._exchange import ExchangeGroup
from raypar.comm._nccl_api import unavailable_reason
from raypar.comm._nccl_pair import Lane, Pairs, end_all
from raypar.comm._work import PeerClosedError
from raypar.comm.gloo import GlooGroup
from raypar.comm.group import DEFAULT_TIMEOUT_S, Group, Ready, TensorSpec, Work
from raypar.comm.network import NetworkSettings
from raypar.comm.rendezvous import Address
from raypar.errors import CommAbortedError, CommError, CommTimeoutError

__all__ = ["NcclGroup", "unavailable_reason"]

_POLL_S = 0.02


class NcclGroup(Group):
    """Ranks in different processes, one CUDA device each; use `create`.

    Args:
        control: The same ranks' CPU group, which this group owns.
        device: This rank's CUDA device.
    """

    def __init__(self, control: ExchangeGroup, device: torch.device) -> None:
        self.name, self.rank, self.size = control.name, control.rank, control.size
        self._control = control
        self._device = device
        self._nccl = _nccl_api.load()
        self._failed: tuple[type[CommError], str] | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._watched: deque[_DeviceWork] = deque()
        self._children: list[NcclGroup] = []
        with torch.cuda.device(device):
            ids = _nccl_api.pack_ids([self._nccl.get_unique_id()])
            control.broadcast(ids, root=0, name="nccl id")
            comm = self._guard(
                "connecting",
                lambda: self._nccl.NcclCommunicator(
                    self.size, _nccl_api.unpack_ids(ids)[0], self.rank
                ),
            )
            self._all = Lane(comm, torch.cuda.Stream(device), 0)  # type: ignore[no-untyped-call]
        self._pairs = Pairs(control, self._nccl, device, self._fail)
        self._pairs.listen()
        self._stop = threading.Event()
        self._watch = threading.Thread(
            target=self._poll, name=f"raypar-nccl-{self.name}", daemon=True
        )
        self._watch.start()

    @classmethod
    def create(
        cls,
        name: str,
        rank: int,
        size: int,
        address: Address | None,
        *,
        device: torch.device | str | int | None = None,
        host: str = "127.0.0.1",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        network: NetworkSettings | None = None,
    ) -> NcclGroup:
        """Connects this process with the others; see `GlooGroup.create`.

        Args:
            name: The group's name, equal on all ranks.
            rank: This process's rank.
            size: Number of ranks.
            address: What rank 0's `Rendezvous` gave; unused for size 1.
            device: This rank's CUDA device; None for the current one.
            host: Host name or IP of this machine as the others reach it.
            timeout_s: Deadline of every wait, in seconds.
            network: Which interface and ports to use, and what to tell NCCL.

        Raises:
            CommError: No GPU, no cupy, or NCCL failed; the text says what to install or change.
            CommTimeoutError: Some ranks did not join in time.
        """
        reason = unavailable_reason()
        if reason is not None:
            raise CommError(f"{name}: comm backend 'nccl' cannot be used here: {reason}")
        place = _nccl_api.numbered(device)
        if place.type != "cuda":
            raise CommError(f"{name}: backend 'nccl' needs a CUDA device, not {place}")
        if network is not None:
            network.apply_environment(host)
        control = GlooGroup.create(
            name, rank, size, address, host=host, timeout_s=timeout_s, network=network
        )
        try:
            return cls(control, place)
        except BaseException:
            control.abort("its NCCL communicator could not be made")
            control.close()
            raise

    @property
    def timeout_s(self) -> float:  # type: ignore[override]
        """Deadline of every wait, in seconds: the CPU group's."""
        return self._control.timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        self._control.timeout_s = seconds

    # ---- point to point -------------------------------------------------------------------

    def isend(self, tensor: torch.Tensor, to: int, tag: str) -> Work:
        """See `Group` and the module's text: order counts, not tags."""
        call = self._call(f"send {tag!r} to rank {to}")
        plain = self._plain(tensor, call)
        lane = self._pairs.lane(to, outward=True, call=call)
        if plain.numel() == 0:
            return Ready()

        def issue(stream: int) -> None:
            lane.comm.send(plain.data_ptr(), *_nccl_api.moved_as(plain), lane.peer, stream)

        return self._issue(lane, call, issue, [plain], None)

    def irecv(self, spec: TensorSpec, source: int, tag: str) -> Work:
        """See `Group` and the module's text: order counts, not tags.

        NCCL carries no shape: a message of another size than `spec` says is an error of the
        program that NCCL may or may not notice.
        """
        call = self._call(f"recv {tag!r} from rank {source}")
        lane = self._pairs.lane(source, outward=False, call=call)
        with torch.cuda.device(self._device):
            out = torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
        if out.numel() == 0:
            return Ready(out)

        def issue(stream: int) -> None:
            lane.comm.recv(out.data_ptr(), *_nccl_api.moved_as(out), lane.peer, stream)

        return self._issue(lane, call, issue, [out], out)

    # ---- collectives ----------------------------------------------------------------------

    def all_reduce(self, tensor: torch.Tensor, *, op: str = "sum", name: str = "") -> Work:
        """In place, on the side stream; NCCL adds low-precision floats in its own way."""
        call = self._call(f"all_reduce {name!r}")
        per, kind, code = _nccl_api.reduced_as(tensor.dtype, op, call())
        plain = self._plain(tensor, call)
        if self.size == 1 or plain.numel() == 0:
            return Ready(tensor)

        def issue(stream: int) -> None:
            at = plain.data_ptr()
            self._all.comm.allReduce(at, at, per * plain.numel(), kind, code, stream)

        after = None if plain.data_ptr() == tensor.data_ptr() else (lambda: tensor.copy_(plain))
        return self._issue(self._all, call, issue, [plain], tensor, after)

    def all_gather(self, tensor: torch.Tensor, *, name: str = "") -> list[torch.Tensor]:
        """See `Group`."""
        out = self.iall_gather(tensor, name=name).wait()
        assert out is not None
        return list(out.unbind(0))

    def iall_gather(self, tensor: torch.Tensor, *, name: str = "") -> Work:
        """Begins an `all_gather` on the side stream. See `Group`."""
        call = self._call(f"all_gather {name!r}")
        plain = self._plain(tensor, call)
        out = plain.new_empty((self.size, *plain.shape))
        if out.numel() == 0:
            return Ready(out)

        def issue(stream: int) -> None:
            self._all.comm.allGather(
                plain.data_ptr(), out.data_ptr(), *_nccl_api.moved_as(plain), stream
            )

        return self._issue(self._all, call, issue, [plain, out], out)

    def reduce_scatter(self, tensors: Sequence[torch.Tensor], *, name: str = "") -> torch.Tensor:
        """See `Group`.

        Raises:
            CommError: Not one tensor per rank, or NCCL cannot add up the dtype.
        """
        found = self.ireduce_scatter(tensors, name=name).wait()
        assert found is not None
        return found

    def ireduce_scatter(
        self, tensors: Sequence[torch.Tensor], *, into: torch.Tensor | None = None, name: str = ""
    ) -> Work:
        """Begins a `reduce_scatter` on the side stream. See `Group`.

        Raises:
            CommError: As in `reduce_scatter`.
        """
        call = self._call(f"reduce_scatter {name!r}")
        self._one_per_rank(tensors, call)
        rows = [t.detach() for t in tensors]
        # Rows of one flat bucket are reduced where they lie.
        whole = _nccl_api.as_one(rows)
        stacked = self._plain(torch.stack(rows) if whole is None else whole, call)
        per, kind, code = _nccl_api.reduced_as(stacked.dtype, "sum", call())
        out = torch.empty_like(stacked[0]) if into is None else into
        if out.numel() == 0:
            return Ready(out)

        def issue(stream: int) -> None:
            self._all.comm.reduceScatter(
                stacked.data_ptr(), out.data_ptr(), per * out.numel(), kind, code, stream
            )

        return self._issue(self._all, call, issue, [stacked, out], out)

    def all_to_all(self, tensors: Sequence[torch.Tensor], *, name: str = "") -> list[torch.Tensor]:
        """See `Group`; what rank r sends here has the shape of what this rank sends to r.

        Raises:
            CommError: Not one tensor per rank.
        """
        call = self._call(f"all_to_all {name!r}")
        self._one_per_rank(tensors, call)
        plain = [self._plain(t, call) for t in tensors]
        outs = [torch.empty_like(t) for t in plain]

        def issue(stream: int) -> None:
            # Grouped, because a send of one rank ends only with the receive of another.
            self._nccl.groupStart()
            for rank in range(self.size):
                if plain[rank].numel():
                    form = _nccl_api.moved_as(plain[rank])
                    self._all.comm.send(plain[rank].data_ptr(), *form, rank, stream)
                    self._all.comm.recv(outs[rank].data_ptr(), *form, rank, stream)
            self._nccl.groupEnd()

        self._issue(self._all, call, issue, [*plain, *outs], None).wait()
        return outs

    def broadcast(self, tensor: torch.Tensor, *, root: int, name: str = "") -> None:
        """See `Group`."""
        call = self._call(f"broadcast {name!r}")
        self._pairs.member(root, call)
        plain = self._plain(tensor, call)

        def issue(stream: int) -> None:
            self._all.comm.bcast(plain.data_ptr(), *_nccl_api.moved_as(plain), root, stream)

        if plain.numel():
            self._issue(self._all, call, issue, [plain], None).wait()
        if plain.data_ptr() != tensor.data_ptr():
            tensor.copy_(plain)

    def barrier(self, *, name: str = "") -> None:
        """Host barrier: says nothing about kernels under way. See `Group`."""
        self._call(f"barrier {name!r}")
        self._control.barrier(name=name)

    # ---- life -----------------------------------------------------------------------------

    def subgroup(self, ranks: Sequence[int], name: str) -> NcclGroup | None:
        """See `Group`."""
        self._call(f"subgroup {name!r}")
        control = self._control.subgroup(ranks, name)
        if control is None:
            return None
        assert isinstance(control, ExchangeGroup)
        child = NcclGroup(control, self._device)
        self._children.append(child)
        return child

    def abort(self, reason: str = "") -> None:
        """Ends all kernels of the group here and tells the other ranks. See `Group`."""
        text = f"{self.name} was aborted by rank {self.rank}{': ' + reason if reason else ''}"
        self._fail(CommAbortedError, text)
        self._control.abort(reason)

    def close(self) -> None:
        """Waits for the group's own streams, then releases communicators. See `Group`."""
        if self._closed:
            return
        for child in self._children:
            child.close()
        self._closed = True
        self._stop.set()
        self._watch.join(1.0)
        lanes = self._lanes()
        deadline = time.monotonic() + self.timeout_s
        while self._failed is None and time.monotonic() < deadline:
            if all(lane.stream.query() for lane in lanes):
                break
            time.sleep(_POLL_S)
        end_all(lanes, self._failed is None and all(lane.stream.query() for lane in lanes))
        self._control.close()

    def _fail(self, kind: type[CommError], reason: str) -> None:
        with self._lock:
            if self._failed is not None or self._closed or kind is PeerClosedError:
                return
            self._failed = (kind, reason)
            children = list(self._children)
        end_all([lane for group in self._family(children) for lane in group._lanes()], False)

    def _family(self, children: Sequence[NcclGroup]) -> list[NcclGroup]:
        """This group, and all below it that had not failed before: they fail with it."""
        found = [self]
        for child in children:
            with child._lock:
                if child._failed is None and not child._closed:
                    child._failed = self._failed
                below = list(child._children)
            found += child._family(below)
        return found

    def _lanes(self) -> list[Lane]:
        return [self._all, *self._pairs.lanes()]

    # ---- plumbing -------------------------------------------------------------------------

    def _call(self, what: str) -> Callable[[], str]:
        """Names a call, and refuses it where the group has ended."""
        text = f"{self.name} rank {self.rank}: {what}"
        self._check(text)
        return lambda: text

    def _check(self, text: str) -> None:
        if self._failed is not None:
            kind, reason = self._failed
            raise kind(f"{text}: {reason}")
        if self._closed:
            raise CommAbortedError(f"{text}: the group is closed")

    def _guard(self, what: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except CommError:
            raise
        except RuntimeError as error:
            raise _nccl_api.explain(error, f"{self.name} rank {self.rank}: {what}") from error

    def _plain(self, tensor: torch.Tensor, call: Callable[[], str]) -> torch.Tensor:
        if tensor.device != self._device:
            raise CommError(
                f"{call()}: this rank's tensors live on {self._device}, found {tensor.device}"
            )
        return tensor.detach().resolve_conj().resolve_neg().contiguous()

    def _one_per_rank(self, tensors: Sequence[torch.Tensor], call: Callable[[], str]) -> None:
        if len(tensors) != self.size:
            raise CommError(
                f"{call()}: {self.size} tensors are needed, one per rank, not {len(tensors)}"
            )

    def _issue(
        self,
        lane: Lane,
        call: Callable[[], str],
        issue: Callable[[int], None],
        uses: Sequence[torch.Tensor],
        value: torch.Tensor | None,
        after: Callable[[], object] | None = None,
    ) -> _DeviceWork:
        with torch.cuda.device(self._device), lane.lock:
            lane.stream.wait_stream(torch.cuda.current_stream(self._device))
            self._check(call())
            self._guard(call(), lambda: issue(lane.stream.cuda_stream))
            for tensor in uses:
                tensor.record_stream(lane.stream)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(lane.stream)
        work = _DeviceWork(self, event, call, uses, value, after)
        self._watched.append(work)
        return work

    def _poll(self) -> None:
        """Keeps the deadlines: ends the group when the oldest unfinished call is too old."""
        while not self._stop.wait(_POLL_S):
            late = None
            try:
                for _ in range(len(self._watched)):
                    work = self._watched.popleft()
                    if not work.finished():
                        self._watched.append(work)
                        waited = time.monotonic() - work.began
                        if waited > self.timeout_s and (late is None or waited > late[0]):
                            late = (waited, work.call())
                errors = (lane.async_error() for lane in self._lanes())
                error = next((e for e in errors if e is not None), None)
            except RuntimeError as failure:  # the CUDA context is lost
                text = str(_nccl_api.explain(failure, "watching its kernels"))
                self._fail(CommError, text)
                self._control.abort(f"on rank {self.rank} {text}")
                return
            if late is not None:
                self._fail(
                    CommTimeoutError,
                    f"{late[1]}: waited {late[0]:.1f} s. If the peer is only slow, raise timeout_s "
                    f"(now {self.timeout_s:g}), for example to {4 * self.timeout_s:g}",
                )
                self._control.abort(f"{late[1]} missed its deadline")
                return
            if error is not None:
                self._fail(CommError, error)
                self._control.abort(f"on rank {self.rank} {error}")
                return


class _DeviceWork(Work):
    """A kernel under way; waiting orders the current stream after it."""

    def __init__(
        self,
        group: NcclGroup,
        event: torch.cuda.Event,
        call: Callable[[], str],
        uses: Sequence[torch.Tensor],
        value: torch.Tensor | None,
        after: Callable[[], object] | None,
    ) -> None:
        self.event = event
        self.call = call
        self.began = time.monotonic()
        self._group = group
        self._uses = tuple(uses)
        self._value = value
        self._after = after

    def wait(self) -> torch.Tensor | None:
        """Makes the current stream wait, not the host; raises if the group has failed."""
        self._group._check(self.call())
        torch.cuda.current_stream(self._group._device).wait_event(self.event)
        if self._after is not None:
            self._after()
            self._after = None
        self._uses = ()
        return self._value

    def done(self) -> bool:
        return self._group._failed is not None or self.finished()

    def finished(self) -> bool:
        """Whether the kernel has run."""
        return bool(self.event.query())  # type: ignore[no-untyped-call]
