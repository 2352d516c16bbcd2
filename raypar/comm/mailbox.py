"""Messages between processes over sockets, received by a thread per peer.

The receiving thread spends its life in `recv_into`, with the GIL released, and writes straight into
the memory of the tensor it hands out. A send writes what the socket takes at once from the caller's
thread and leaves the rest to a sender thread, so that it never waits for the other side. Messages
that nobody has asked for yet are kept, so the receiver always drains and no order of sends and
receives can deadlock.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque

import torch

from raypar.comm import _frames
from raypar.comm._endpoint import Endpoint
from raypar.comm._inbox import Inbox, aborted_reason
from raypar.comm._work import PeerClosedError, Pending
from raypar.comm.rendezvous import Link
from raypar.errors import CommAbortedError, CommError

_SCRATCH_BYTES = 16 << 10
_SOCKET_BUFFER_BYTES = 4 << 20
_DIRECT_BYTES = 2 << 20
"""What a caller's own thread writes at most: 2 MB take some 0.4 ms, about what it costs to wake the
sender thread and share the interpreter with it."""
_CLOSE_S = 2.0
_JOIN_S = 1.0


class Mailbox(Endpoint):
    """One rank's end of a full mesh of sockets.

    Args:
        name: The world's name, for errors and thread names.
        rank: This rank.
        size: Number of ranks.
        links: A connection for every other rank, as `rendezvous.connect` returns them.
    """

    def __init__(self, name: str, rank: int, size: int, links: dict[int, Link]) -> None:
        self.name = name
        self.rank = rank
        self.size = size
        self._aborted: dict[bytes, str] = {}
        self._closed = False
        self._own = Inbox(self._aborted)
        self._peers = {r: _Peer(self, r, link) for r, link in links.items()}
        for peer in self._peers.values():
            peer.start()

    def send(self, to: int, key: bytes, tensor: torch.Tensor, pending: Pending) -> None:
        """Writes what the socket takes at once; a sender thread does the rest. See `Endpoint`."""
        if self._aborted:
            reason = aborted_reason(self._aborted, key)
            if reason is not None:
                pending.fail(CommAbortedError, reason)
                return
        if to == self.rank:
            message = tensor.clone()
            pending.complete()
            self._own.deliver(key, message)
            return
        try:
            header = _frames.data_header(key, tuple(tensor.shape), tensor.dtype)
        except KeyError:
            pending.fail(CommError, f"{tensor.dtype} tensors cannot be sent")
            return
        self._peers[to].send(key, header, _frames.payload(tensor), pending)

    def post(self, source: int, key: bytes, pending: Pending) -> None:
        """See `Endpoint`."""
        self._inbox(source).post(key, pending)

    def forget(self, source: int, key: bytes, pending: Pending) -> None:
        """See `Endpoint`."""
        self._inbox(source).forget(key, pending)

    def arrived(self, source: int) -> str:
        """See `Endpoint`."""
        return self._inbox(source).arrived()

    def _inbox(self, source: int) -> Inbox:
        return self._own if source == self.rank else self._peers[source].inbox

    def abort(self, path: bytes, reason: str) -> None:
        """Tells the peers as far as their sockets take it at once; the root's abort closes all."""
        known = path in self._aborted
        self._abort_here(path, reason)
        if known:
            return
        for peer in self._peers.values():
            peer.tell(_frames.abort_frame(path, reason))
            if path == b"/":
                peer.shut()

    def _abort_here(self, path: bytes, reason: str) -> None:
        reason = self._aborted.setdefault(path, reason)
        for inbox in [self._own, *(p.inbox for p in self._peers.values())]:
            inbox.abort(path, reason)
        for peer in self._peers.values():
            peer.drop_unsent(path, reason)

    def aborted(self, path: bytes) -> str | None:
        """See `Endpoint`."""
        return aborted_reason(self._aborted, path)

    def close(self) -> None:
        """Says goodbye once all sends are out (at most 2 s), then ends sockets and threads.

        Out of an aborted group it says why instead: the word of the rank that aborted may not have
        come to every peer.
        """
        if self._closed:
            return
        self._closed = True
        why = self._aborted.get(b"/")
        last = _frames.bye_frame() if why is None else _frames.abort_frame(b"/", why)
        for peer in self._peers.values():
            peer.finish(last, _CLOSE_S)
        self._abort_here(b"/", f"rank {self.rank} of {self.name} has closed the group")
        for peer in self._peers.values():
            peer.shut()
        for peer in self._peers.values():
            peer.join()


class _Peer:
    """The connection to one other rank."""

    def __init__(self, box: Mailbox, rank: int, link: Link) -> None:
        self._box = box
        self._rank = rank
        self._label = link.label
        self._sock = link.sock
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
        self.inbox = Inbox(box._aborted)
        self._lock = threading.Lock()
        self._unsent: deque[tuple[bytes, list[memoryview], Pending | None]] = deque()
        self._sending = False
        self._current: tuple[bytes, Pending | None] | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._work = threading.Semaphore(0)
        self._sender: threading.Thread | None = None
        self._receiver = threading.Thread(
            target=self._receive, name=f"raypar-recv-{box.name}-{rank}", daemon=True
        )
        self._ended = False

    def start(self) -> None:
        self._receiver.start()

    # ---- sending --------------------------------------------------------------------------

    def send(self, key: bytes, header: bytes, body: memoryview, pending: Pending) -> None:
        done = False
        with self._lock:
            failure = self.inbox.broken
            if failure is None:
                if self._sending:
                    self._unsent.append((key, [memoryview(header), body], pending))
                else:
                    rest, failure = self._write_now([memoryview(header), body[:_DIRECT_BYTES]])
                    if failure is None and len(body) > _DIRECT_BYTES:
                        rest.append(body[_DIRECT_BYTES:])
                    if rest:
                        self._leave(key, rest, pending)
                    else:
                        done = failure is None
        # Completions may send again, so they run outside the lock.
        if done:
            pending.complete()
        elif failure is not None:
            pending.fail(*failure)

    def _write_now(
        self, parts: list[memoryview]
    ) -> tuple[list[memoryview], tuple[type[CommError], str] | None]:
        """Writes what the socket takes without waiting; returns the rest, or why it failed."""
        while parts:
            try:
                written = self._sock.sendmsg(parts, [], socket.MSG_DONTWAIT)
            except BlockingIOError:
                return parts, None
            except OSError as error:
                return [], (CommError, self._gone(f"cannot be written to ({error})"))
            while parts and written >= len(parts[0]):
                written -= len(parts[0])
                parts = parts[1:]
            if parts and written:
                parts = [parts[0][written:], *parts[1:]]
        return [], None

    def _leave(self, key: bytes, rest: list[memoryview], pending: Pending | None) -> None:
        self._sending = True
        self._idle.clear()
        self._unsent.append((key, rest, pending))
        if self._sender is None:
            self._sender = threading.Thread(
                target=self._send_rest,
                name=f"raypar-send-{self._box.name}-{self._rank}",
                daemon=True,
            )
            self._sender.start()
        self._work.release()

    def _send_rest(self) -> None:
        while True:
            self._work.acquire()
            while True:
                with self._lock:
                    if self._ended:
                        return
                    if not self._unsent:
                        self._sending = False
                        self._idle.set()
                        break
                    key, parts, pending = self._unsent.popleft()
                    self._current = (key, pending)
                try:
                    for part in parts:
                        self._sock.sendall(part)
                except OSError as error:
                    why = self._gone(f"cannot be written to ({error})")
                    if pending is not None:
                        pending.fail(CommError, why)
                    self._lost(why)
                    return
                finally:
                    self._current = None
                del parts
                if pending is not None:
                    pending.complete()

    def tell(self, frame: bytes) -> None:
        """Sends a control frame if the socket is free, else after what is being sent."""
        with self._lock:
            if self.inbox.broken is not None or self._ended:
                return
            if self._sending:
                self._unsent.append((b"", [memoryview(frame)], None))
                return
            rest, _ = self._write_now([memoryview(frame)])
            if rest:
                self._leave(b"", rest, None)

    def drop_unsent(self, path: bytes, reason: str) -> None:
        """Wakes those who wait for a send under `path`; frames begun stay whole on the wire."""
        with self._lock:
            begun = [self._current] if self._current is not None else []
            failed = [p for k, p in [*begun, *((k, p) for k, _, p in self._unsent)]
                      if k.startswith(path) and p is not None]  # fmt: skip
        for pending in failed:
            pending.fail(CommAbortedError, reason)

    # ---- receiving ------------------------------------------------------------------------

    def _receive(self) -> None:
        buffer = bytearray(_SCRATCH_BYTES)
        view = memoryview(buffer)
        start = end = 0
        try:
            while True:
                start, end = self._need(view, start, end, _frames.HEADER.size)
                start, end = self._need(view, start, end, _frames.head_size(buffer, start))
                head = _frames.parse_head(buffer, start)
                start += _frames.head_size(buffer, start)
                if head.kind == _frames.BYE:
                    self._lost(self._gone("has closed the group"), PeerClosedError)
                    return
                if head.kind == _frames.ABORT:
                    self._box._abort_here(*_frames.read_abort(head.key))
                    continue
                start, end = self._take(head, view, start, end)
        except (OSError, EOFError) as error:
            said = (
                "closed the connection without a goodbye"
                if isinstance(error, EOFError)
                else (f"broke the connection ({error})")
            )
            self._lost(self._gone(f"{said}: its process died, or it aborted the group"))
        except CommError as error:
            self._lost(self._gone(f"sent what cannot be read: {error}"))
            self.shut()
        except Exception as error:
            self._lost(self._gone(f"sent what cannot be read ({type(error).__name__}: {error})"))
            self.shut()

    def _take(self, head: _frames.Head, view: memoryview, start: int, end: int) -> tuple[int, int]:
        """Reads one tensor; returns where the next frame lies in the scratch buffer."""
        claimed, right = self.inbox.claim(head.key, head.shape, head.dtype)
        if claimed is not None and not right:
            start, end = self._skip(head.nbytes, view, start, end)
            outline = torch.empty(head.shape, dtype=head.dtype, device="meta")
            self.inbox.refuse(head.key, claimed, outline)
            return start, end
        tensor = claimed.into if claimed is not None else None
        if tensor is None:
            tensor = torch.empty(head.shape, dtype=head.dtype)
        body = _frames.payload(tensor)
        have = min(head.nbytes, end - start)
        body[:have] = view[start : start + have]
        while have < head.nbytes:
            count = self._sock.recv_into(body[have:], 0, socket.MSG_WAITALL)
            if count == 0:
                raise EOFError
            have += count
        del body
        start += min(head.nbytes, end - start)
        self.inbox.deliver(head.key, tensor, claimed)
        return start, end

    def _skip(self, count: int, view: memoryview, start: int, end: int) -> tuple[int, int]:
        """Reads `count` bytes that nobody wants, without memory for them."""
        have = min(count, end - start)
        start, count = start + have, count - have
        while count:
            start = end = 0
            got = self._sock.recv_into(view[: min(count, len(view))])
            if got == 0:
                raise EOFError
            count -= got
        return start, end

    def _need(self, view: memoryview, start: int, end: int, count: int) -> tuple[int, int]:
        """Reads until the scratch buffer holds `count` bytes from `start` on."""
        if start == end:
            start = end = 0
        while end - start < count:
            if len(view) - start < count or end == len(view):
                view[: end - start] = view[start:end]
                start, end = 0, end - start
            got = self._sock.recv_into(view[end:])
            if got == 0:
                raise EOFError
            end += got
        return start, end

    # ---- the end --------------------------------------------------------------------------

    def _gone(self, what: str) -> str:
        return f"rank {self._rank} of {self._box.name} ({self._label}) {what}"

    def _lost(self, why: str, kind: type[CommError] = CommError) -> None:
        self.inbox.break_off(kind, why)
        with self._lock:
            unsent, self._unsent = list(self._unsent), deque()
            self._ended = True
            self._idle.set()
        self._work.release()
        for _, _, pending in unsent:
            if pending is not None:
                pending.fail(kind, why)

    def finish(self, last: bytes, timeout_s: float) -> None:
        """Waits until all is sent, then sends the last frame."""
        self._idle.wait(timeout_s)
        self.tell(last)

    def shut(self) -> None:
        """Ends the connection; both threads wake and leave."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        """Waits for the threads, then releases the socket."""
        with self._lock:
            self._ended = True
        self._work.release()
        for thread in (self._receiver, self._sender):
            if thread is not None and thread is not threading.current_thread():
                thread.join(_JOIN_S)
        self._sock.close()
