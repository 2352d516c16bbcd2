"""Communicators of two ranks, one for each direction, made when a pair first talks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from raypar.comm import _nccl_api
from raypar.comm._exchange import ExchangeGroup
from raypar.comm.group import TensorSpec
from raypar.errors import CommError, CommTimeoutError

_KNOCK = "nccl: make our pair"
_IDS = "nccl: ids of our pair"
_IN_PROGRESS = 7
"""ncclInProgress."""


class Lane:
    """A communicator, the stream its kernels run on, and this rank's peer in it.

    Attributes:
        comm: cupy's NcclCommunicator.
        stream: A side stream.
        peer: The other rank's number in the communicator (of two).
        lock: Held while a kernel is issued: one thread at a time may use a communicator.
    """

    def __init__(self, comm: _nccl_api.Communicator, stream: torch.cuda.Stream, peer: int) -> None:
        self.comm = comm
        self.stream = stream
        self.peer = peer
        self.lock = threading.Lock()
        self._ended = False
        self._end_lock = threading.Lock()

    def end(self, clean: bool) -> None:
        """Destroys the communicator, or aborts it with its kernels."""
        with self._end_lock:
            if self._ended:
                return
            self._ended = True
        with contextlib.suppress(RuntimeError):
            if clean:
                self.comm.destroy()
            else:
                self.comm.abort()

    def async_error(self) -> str | None:
        """What NCCL says if the communicator failed in the background.

        cupy raises it: `NcclError`, or KeyError for a code that is newer than cupy (6, a remote
        error). That a call is still in progress (7) is no error.
        """
        with self._end_lock:
            if self._ended:
                return None
            try:
                self.comm.check_async_error()
            except KeyError as error:
                code = error.args[0] if error.args else None
                return None if code == _IN_PROGRESS else f"NCCL reports error code {code}"
            except RuntimeError as error:
                return str(_nccl_api.explain(error, "NCCL reports an error"))
        return None


def end_all(lanes: Sequence[Lane], clean: bool) -> None:
    """Ends lanes at the same time.

    Aborting one frees memory of the device, which may wait for every kernel on it: those of other
    lanes, too, which only their own abort ends.
    """
    threads = [threading.Thread(target=lane.end, args=(clean,), daemon=True) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Pairs:
    """All pairs of one rank.

    Making a pair needs both ranks at once, but a program may first send on one rank and first
    receive from a third on the other. So a rank that needs a pair knocks at the other over the CPU
    group, and on both a thread makes it, whatever the callers are doing.

    Args:
        control: The CPU group of the same ranks.
        nccl: cupy's NCCL module.
        device: This rank's device.
        fail: Told when a peer is gone or the group was aborted.
    """

    def __init__(
        self,
        control: ExchangeGroup,
        nccl: Any,
        device: torch.device,
        fail: Callable[[type[CommError], str], None],
    ) -> None:
        self._control = control
        self._nccl = nccl
        self._device = device
        self._fail = fail
        self._lock = threading.Lock()
        self._made: dict[int, _Pair] = {}

    def listen(self) -> None:
        """Begins to answer knocks; a peer that has failed already is told of here and now."""
        for peer in range(self._control.size):
            if peer != self._control.rank:
                self._control.listen(
                    peer,
                    _KNOCK,
                    lambda peer=peer: self._start(peer),  # type: ignore[misc]
                    self._fail,
                )

    def lane(self, peer: int, *, outward: bool, call: Callable[[], str]) -> Lane:
        """The lane to (`outward`) or from a peer; makes the pair if need be.

        Raises:
            CommError: No such rank, this rank itself, or NCCL could not connect the two.
            CommTimeoutError: The peer did not answer in time.
        """
        self.member(peer, call)
        if peer == self._control.rank:
            raise CommError(f"{call()}: with NCCL a rank cannot send to itself")
        pair = self._made.get(peer)
        if pair is None:
            self._control.isend(torch.empty(0), peer, _KNOCK)
            pair = self._start(peer)
        if not pair.ready.wait(self._control.timeout_s):
            raise CommTimeoutError(
                f"{call()}: connecting the pair: waited {self._control.timeout_s:.1f} s"
            )
        if pair.error is not None:
            raise CommError(f"{call()}: {pair.error}") from pair.error
        assert pair.out is not None
        assert pair.back is not None
        return pair.out if outward else pair.back

    def member(self, rank: int, call: Callable[[], str]) -> None:
        """Refuses what is no rank of the group."""
        if not 0 <= rank < self._control.size:
            raise CommError(
                f"{call()}: the group has ranks 0 to {self._control.size - 1}, not {rank}"
            )

    def lanes(self) -> list[Lane]:
        """Every lane made so far."""
        with self._lock:
            pairs = list(self._made.values())
        return [lane for pair in pairs for lane in (pair.out, pair.back) if lane is not None]

    def _start(self, peer: int) -> _Pair:
        with self._lock:
            pair = self._made.get(peer)
            if pair is None:
                pair = self._made[peer] = _Pair()
                threading.Thread(
                    target=self._make,
                    args=(peer, pair),
                    name=f"raypar-nccl-pair-{peer}",
                    daemon=True,
                ).start()
            return pair

    def _make(self, peer: int, pair: _Pair) -> None:
        try:
            me = int(self._control.rank > peer)
            ids = self._ids(peer, first=me == 0)
            with torch.cuda.device(self._device):
                lanes = []
                for one in ids:  # the first lane goes from the lower to the higher rank
                    comm = self._nccl.NcclCommunicator(2, one, me)
                    stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
                    lanes.append(Lane(comm, stream, 1 - me))
                pair.out, pair.back = lanes[me], lanes[1 - me]
                self._first_byte(pair)
        except Exception as error:
            pair.error = (
                error
                if isinstance(error, CommError)
                else _nccl_api.explain(error, f"connecting to rank {peer}")
            )
        finally:
            pair.ready.set()

    def _ids(self, peer: int, first: bool) -> list[tuple[int, ...]]:
        if first:
            ids = [self._nccl.get_unique_id() for _ in range(2)]
            self._control.isend(_nccl_api.pack_ids(ids), peer, _IDS).wait()
            return ids
        spec = TensorSpec((2, _nccl_api.UNIQUE_ID_BYTES), torch.int16)
        packed = self._control.irecv(spec, peer, _IDS).wait()
        assert packed is not None
        return _nccl_api.unpack_ids(packed)

    def _first_byte(self, pair: _Pair) -> None:
        """Sends one byte each way.

        NCCL sets up a connection at its first message, and blocks the host until the other side
        does so too; here both sides are sure to be there.
        """
        assert pair.out is not None
        assert pair.back is not None
        token = torch.zeros(2, dtype=torch.uint8, device=self._device)
        for lane in (pair.out, pair.back):
            lane.stream.wait_stream(torch.cuda.current_stream(self._device))
        self._nccl.groupStart()
        pair.out.comm.send(
            token[:1].data_ptr(), *_nccl_api.moved_as(token[:1]), pair.out.peer,
            pair.out.stream.cuda_stream,
        )  # fmt: skip
        pair.back.comm.recv(
            token[1:].data_ptr(), *_nccl_api.moved_as(token[1:]), pair.back.peer,
            pair.back.stream.cuda_stream,
        )  # fmt: skip
        self._nccl.groupEnd()
        pair.out.stream.synchronize()
        pair.back.stream.synchronize()


class _Pair:
    def __init__(self) -> None:
        self.ready = threading.Event()
        self.error: CommError | None = None
        self.out: Lane | None = None
        self.back: Lane | None = None
