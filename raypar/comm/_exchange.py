"""Groups made of messages: every collective as a direct exchange between the ranks.

An all-reduce is a reduce-scatter followed by an all-gather (Rabenseifner 2004, "Optimization of
collective reduction operations", section 4), each as one direct exchange of equal chunks: every
rank moves 2 (n - 1) / n of the tensor, which is the least possible. The owner of a chunk adds it
up in rank order, so results are bitwise equal on all ranks and from run to run. Nothing here has a
thread of its own: the thread that brings the last missing message goes on with the next round.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence

import torch

from raypar.comm._endpoint import MAX_KEY_BYTES, Endpoint
from raypar.comm._reduce import check_reducible, reduce_in_order
from raypar.comm._work import Pending, PendingReceive, fits, misfit
from raypar.comm.group import DEFAULT_TIMEOUT_S, Group, Ready, TensorSpec, Work
from raypar.errors import CommAbortedError, CommError

_ONE_ROUND_BYTES = 32 << 10
"""Up to here an all-reduce exchanges whole tensors: one round costs less than halving the bytes."""


class ExchangeGroup(Group):
    """A group over an `Endpoint`.

    Args:
        endpoint: The transport, shared with the parent group and subgroups.
        members: World rank of every rank of the group.
        name: Name in errors, for example ``"stage 1"``.
        timeout_s: Deadline of every wait, in seconds.
        path: Path of the group's messages.
        parent: The group that this one is a part of, whose deadline it follows.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        members: Sequence[int],
        *,
        name: str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        path: bytes = b"/",
        parent: ExchangeGroup | None = None,
    ) -> None:
        self._parent = parent
        self._endpoint = endpoint
        self._members = tuple(members)
        self.name = name
        self.rank = self._members.index(endpoint.rank)
        self.size = len(self._members)
        self._own_timeout_s = None if parent is not None else timeout_s
        self._path = path
        self._closed = False
        self._children = itertools.count()
        self._calls = itertools.count()
        self._others = [r for r in range(self.size) if r != self.rank]

    @property
    def timeout_s(self) -> float:  # type: ignore[override]
        """Deadline of every wait, in seconds: its own if it was set, else its parent's."""
        own, parent = self._own_timeout_s, self._parent
        if own is None:
            assert parent is not None
            return parent.timeout_s
        return own

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        self._own_timeout_s = seconds

    # ---- point to point -------------------------------------------------------------------

    def isend(self, tensor: torch.Tensor, to: int, tag: str) -> Work:
        """Begins to send; never waits for the receiver. See `Group`.

        Raises:
            CommError: `to` is no rank of the group, the tensor is not on the CPU, or the tag is
                longer than 4,000 bytes.
            CommAbortedError: The group was aborted or closed.
        """

        def call() -> str:
            return f"{self.name} rank {self.rank}: send {tag!r} to rank {to}"

        self._check_open(call)
        pending = Pending(call, self.timeout_s, evidence=lambda: f"rank {to} takes no messages")
        self._endpoint.send(
            self._member(to, call), self._key(tag, call), _plain(tensor, call), pending
        )
        return pending

    def irecv(self, spec: TensorSpec, source: int, tag: str) -> Work:
        """Begins to receive. See `Group`.

        Raises:
            CommError: `source` is no rank of the group, or the tag is longer than 4,000 bytes.
            CommAbortedError: The group was aborted or closed.
        """

        def call() -> str:
            return f"{self.name} rank {self.rank}: recv {tag!r} from rank {source}"

        self._check_open(call)
        world, key = self._member(source, call), self._key(tag, call)
        pending = PendingReceive(
            spec,
            call,
            self.timeout_s,
            evidence=lambda: self._endpoint.arrived(world),
            on_timeout=lambda p: self._endpoint.forget(world, key, p),
        )
        self._endpoint.post(world, key, pending)
        return pending

    def listen(
        self,
        source: int,
        tag: str,
        heard: Callable[[], object],
        ended: Callable[[type[CommError], str], object],
    ) -> None:
        """Calls `heard` for every message of (source, tag), until the source is gone.

        That, and an abort of the group, is told to `ended`. Both run on a transport thread and may
        not block.
        """

        def call() -> str:
            return f"{self.name} rank {self.rank}: listen to {tag!r} from rank {source}"

        world, key = self._member(source, call), self._key(tag, call)

        def came(one: Pending) -> None:
            if one.error is not None:
                ended(*one.error)
                return
            heard()
            arm()

        def arm() -> None:
            self._endpoint.post(world, key, Pending(call, self.timeout_s, then=came))

        arm()

    # ---- collectives ----------------------------------------------------------------------

    def all_reduce(self, tensor: torch.Tensor, *, op: str = "sum", name: str = "") -> Work:
        """In place, in the background; low-precision floats are added up in float32. See `Group`.

        Raises:
            CommError: Unknown `op`, or a dtype that cannot be reduced so.
            CommAbortedError: The group was aborted or closed.
        """
        call = _Call(self, "all_reduce", name)
        check_reducible(tensor.dtype, op, call.text())
        if self.size == 1 or tensor.numel() == 0:
            return Ready(tensor)
        flat = _plain(tensor, call.text).view(-1)
        if flat.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            call.at_end = lambda: tensor.copy_(flat.view(tensor.shape))
        call.value = tensor
        if flat.numel() * flat.element_size() <= _ONE_ROUND_BYTES:
            self._reduce_whole(flat, op, call)
        else:
            self._reduce_chunks(flat, op, call)
        return call.pending

    def _reduce_whole(self, flat: torch.Tensor, op: str, call: _Call) -> None:
        mine = flat.clone()  # the copy is what is sent: `flat` is written as soon as all arrived
        parts = [mine] * self.size

        def add_up() -> None:
            reduce_in_order(parts, op, out=flat)
            call.end()

        call.receive(0, [(r, flat) for r in self._others], parts, add_up)
        call.send(0, [(r, mine) for r in self._others], None)

    def _reduce_chunks(self, flat: torch.Tensor, op: str, call: _Call) -> None:
        chunks = list(flat.tensor_split(self.size))
        own = chunks[self.rank]
        parts = [own] * self.size
        both = _Countdown(2, call.end)

        def add_up() -> None:
            reduce_in_order(parts, op, out=own)
            call.send(1, [(r, own) for r in self._others], both.tick)

        # A chunk comes back only after its owner had all of it, so that no byte of it is still to
        # be sent when the second round writes it: its receives can be posted at once, in place.
        call.receive(1, [(r, chunks[r]) for r in self._others], None, both.tick)
        call.receive(0, [(r, own) for r in self._others], parts, add_up)
        call.send(0, [(r, chunks[r]) for r in self._others], None)

    def all_gather(self, tensor: torch.Tensor, *, name: str = "") -> list[torch.Tensor]:
        """Everyone's tensor in rank order; shapes and dtypes are equal. See `Group`."""
        call = _Call(self, "all_gather", name)
        mine = _plain(tensor, call.text)
        parts = [mine.clone()] * self.size
        both = _Countdown(2, call.end)
        call.receive(0, [(r, mine) for r in self._others], parts, both.tick)
        call.send(0, [(r, mine) for r in self._others], both.tick)
        call.pending.wait()
        return parts

    def reduce_scatter(self, tensors: Sequence[torch.Tensor], *, name: str = "") -> torch.Tensor:
        """Sum over ranks of everyone's `tensors[rank]`. See `Group`.

        Raises:
            CommError: Not one tensor per rank, unequal shapes, or a dtype that has no sum.
        """
        found = self.ireduce_scatter(tensors, name=name).wait()
        assert found is not None
        return found

    def ireduce_scatter(
        self, tensors: Sequence[torch.Tensor], *, into: torch.Tensor | None = None, name: str = ""
    ) -> Work:
        """Begins a `reduce_scatter`. See `Group`.

        Raises:
            CommError: As in `reduce_scatter`, or `into` has another form.
        """
        call = _Call(self, "reduce_scatter", name)
        plain = self._one_per_rank(tensors, call)
        check_reducible(plain[0].dtype, "sum", call.text())
        for tensor in plain[1:]:
            if not fits(tensor, plain[0]):
                raise CommError(f"{call.text()}: unequal shapes {[tuple(t.shape) for t in plain]}")
        own = plain[self.rank]
        out = torch.empty_like(own) if into is None else into
        if not fits(out, own) or not out.is_contiguous():
            raise CommError(
                f"{call.text()}: `into` must be contiguous, of shape {tuple(own.shape)} "
                f"{own.dtype}; found {tuple(out.shape)} {out.dtype}, strides {out.stride()}"
            )
        parts = [own] * self.size
        call.value = out
        call.at_end = lambda: reduce_in_order(parts, "sum", out=out)
        self._swap(plain, parts, own, call)
        return call.pending

    def iall_gather(self, tensor: torch.Tensor, *, name: str = "") -> Work:
        """Begins an `all_gather`. See `Group`."""
        call = _Call(self, "all_gather", name)
        mine = _plain(tensor, call.text)
        out = mine.new_empty((self.size, *mine.shape))
        out[self.rank] = mine
        call.value = out
        both = _Countdown(2, call.end)
        call.receive(0, [(r, out[r]) for r in self._others], None, both.tick)
        call.send(0, [(r, mine) for r in self._others], both.tick)
        return call.pending

    def all_to_all(self, tensors: Sequence[torch.Tensor], *, name: str = "") -> list[torch.Tensor]:
        """Sends `tensors[i]` to rank i; shapes may differ. See `Group`.

        Raises:
            CommError: Not one tensor per rank.
        """
        call = _Call(self, "all_to_all", name)
        plain = self._one_per_rank(tensors, call)
        parts = [plain[self.rank].clone()] * self.size
        self._swap(plain, parts, None, call)
        call.pending.wait()
        return parts

    def _swap(
        self,
        plain: Sequence[torch.Tensor],
        parts: list[torch.Tensor],
        like: torch.Tensor | None,
        call: _Call,
    ) -> None:
        both = _Countdown(2, call.end)
        call.receive(0, [(r, like) for r in self._others], parts, both.tick)
        call.send(0, [(r, plain[r]) for r in self._others], both.tick)

    def broadcast(self, tensor: torch.Tensor, *, root: int, name: str = "") -> None:
        """In place on every rank but `root`. See `Group`.

        Raises:
            CommError: `root` is no rank of the group, or the shapes differ.
        """
        call = _Call(self, "broadcast", name)
        self._member(root, call.text)
        plain = _plain(tensor, call.text)
        if self.rank == root:
            call.send(0, [(r, plain) for r in self._others], call.end)
        else:
            call.receive(0, [(root, plain)], None, call.end)
        call.pending.wait()
        if self.rank != root and plain.data_ptr() != tensor.data_ptr():
            tensor.copy_(plain)

    def barrier(self, *, name: str = "") -> None:
        """Returns once every rank has called it. See `Group`."""
        call = _Call(self, "barrier", name)
        token = torch.empty(0)
        call.receive(0, [(r, token) for r in self._others], None, call.end)
        call.send(0, [(r, token) for r in self._others], None)
        call.pending.wait()

    # ---- life -----------------------------------------------------------------------------

    def subgroup(self, ranks: Sequence[int], name: str) -> Group | None:
        """Some of this group's ranks, over the same connections: costs no message. See `Group`.

        Raises:
            CommError: No ranks, a rank named twice, or one that is not in the group.
        """

        def call() -> str:
            return f"{self.name} rank {self.rank}: subgroup {name!r}"

        self._check_open(call)
        number = next(self._children)
        if not ranks or len(set(ranks)) != len(ranks):
            raise CommError(f"{call()}: ranks must be named once each, found {list(ranks)}")
        members = [self._member(r, call) for r in ranks]
        if self.rank not in ranks:
            return None
        return ExchangeGroup(
            self._endpoint,
            members,
            name=name,
            path=self._path + b"%d/" % number,
            parent=self,
        )

    def abort(self, reason: str = "") -> None:
        """Aborts this group and its subgroups on all ranks that can be reached. See `Group`."""
        text = f"{self.name} was aborted by rank {self.rank}{': ' + reason if reason else ''}"
        self._endpoint.abort(self._path, text)

    def close(self) -> None:
        """Ends the group; the last one out of the root group ends the transport. See `Group`."""
        if not self._closed:
            self._closed = True
            if self._path == b"/":
                self._endpoint.close()

    # ---- checks ---------------------------------------------------------------------------

    def _check_open(self, call: Callable[[], str]) -> None:
        if self._closed:
            raise CommAbortedError(f"{call()}: the group is closed")
        reason = self._endpoint.aborted(self._path)
        if reason is not None:
            raise CommAbortedError(f"{call()}: {reason}")

    def _member(self, rank: int, call: Callable[[], str]) -> int:
        if not 0 <= rank < self.size:
            raise CommError(f"{call()}: the group has ranks 0 to {self.size - 1}, not {rank}")
        return self._members[rank]

    def _key(self, tag: str, call: Callable[[], str]) -> bytes:
        key = self._path + b":" + tag.encode()
        if len(key) > MAX_KEY_BYTES:
            raise CommError(f"{call()}: the tag has {len(key)} bytes, at most {MAX_KEY_BYTES}")
        return key

    def _one_per_rank(self, tensors: Sequence[torch.Tensor], call: _Call) -> list[torch.Tensor]:
        if len(tensors) != self.size:
            raise CommError(
                f"{call.text()}: {self.size} tensors are needed, one per rank, not {len(tensors)}"
            )
        return [_plain(t, call.text) for t in tensors]


class _Countdown:
    """Runs an action at the n-th tick, on the thread that ticks last."""

    def __init__(self, count: int, action: Callable[[], None]) -> None:
        self._left = count
        self._lock = threading.Lock()
        self._action = action

    def tick(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._action()


class _Call:
    """One collective under way: its number in the group, its messages, its outcome."""

    def __init__(self, group: ExchangeGroup, verb: str, name: str) -> None:
        self._group = group
        self._verb = verb
        self._name = name
        group._check_open(self.text)
        # Ranks call collectives in the same order, so the number is the same everywhere; the verb
        # in the key keeps two different collectives from being taken for one another.
        self._key = group._path + b"!%s #%d" % (verb.encode(), next(group._calls))
        self.at_end: Callable[[], object] | None = None
        self.value: torch.Tensor | None = None
        self._missing: dict[int, int] = {}
        self.pending = Pending(self.text, group.timeout_s, evidence=self._evidence)

    def text(self) -> str:
        """Which call this is, for errors."""
        name = f" {self._name!r}" if self._name else ""
        return f"{self._group.name} rank {self._group.rank}: {self._verb}{name}"

    def _evidence(self) -> str:
        silent = sorted(rank for rank, left in list(self._missing.items()) if left)
        if not silent:
            return "all ranks were heard, but what was sent is not taken"
        first = self._group._endpoint.arrived(self._group._members[silent[0]])
        return f"not heard: rank {', '.join(map(str, silent))}; rank {silent[0]}: {first}"

    def end(self) -> None:
        """Marks the collective as done."""
        if self.at_end is not None:
            self.at_end()
        self.pending.complete(self.value)

    def send(
        self,
        round_: int,
        messages: Sequence[tuple[int, torch.Tensor]],
        then: Callable[[], None] | None,
    ) -> None:
        """Sends (rank, tensor) pairs; `then` runs once all tensors may be written again."""
        count = _Countdown(len(messages), then) if then is not None else None
        key = self._key + b".%d" % round_

        def sent(one: Pending) -> None:
            if one.error is not None:
                self.pending.fail(*one.error)
            elif count is not None:
                self._guard(count.tick)

        if not messages and then is not None:
            then()
        for rank, tensor in messages:
            one = Pending(self.text, self._group.timeout_s, then=sent)
            self._group._endpoint.send(self._group._members[rank], key, tensor, one)

    def receive(
        self,
        round_: int,
        forms: Sequence[tuple[int, torch.Tensor | None]],
        parts: list[torch.Tensor] | None,
        then: Callable[[], None],
    ) -> None:
        """Receives from every (rank, form): into `parts[rank]`, or in place if that is None.

        `form` is a tensor of the expected shape and dtype, or None for any; `then` runs once all
        have come.
        """
        count = _Countdown(len(forms), then)
        key = self._key + b".%d" % round_

        def arm(rank: int, form: torch.Tensor | None) -> None:
            def came(one: Pending) -> None:
                self._missing[rank] -= 1
                if one.error is not None:
                    self.pending.fail(*one.error)
                    return
                value = one.value
                assert value is not None
                if form is not None and not fits(value, form):
                    self.pending.fail(CommError, f"from rank {rank}: {misfit(value, form)}")
                    return
                if parts is not None:
                    parts[rank] = value
                self._guard(count.tick)

            into = form if parts is None else None
            self._missing[rank] = self._missing.get(rank, 0) + 1
            one = Pending(self.text, self._group.timeout_s, into=into, then=came)
            self._group._endpoint.post(self._group._members[rank], key, one)

        if not forms:
            then()
        for rank, form in forms:
            arm(rank, form)

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except CommError as error:
            self.pending.fail(type(error), str(error))
        except Exception as error:  # on a transport thread: the waiter must hear of it
            self.pending.fail(CommError, f"{type(error).__name__}: {error}")


def _plain(tensor: torch.Tensor, call: Callable[[], str]) -> torch.Tensor:
    if tensor.device.type != "cpu":
        raise CommError(
            f"{call()}: this backend moves CPU tensors, found one on {tensor.device}; "
            "move it to the CPU, or use backend 'nccl'"
        )
    return tensor.detach().resolve_conj().resolve_neg().contiguous()
