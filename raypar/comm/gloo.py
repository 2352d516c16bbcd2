"""The backend for CPU tensors between processes: it stands where torch's gloo would.

Messages and collectives go through `raypar.comm.mailbox`. Torch's own gloo was measured beside it
(`release/comm.py` prints both): a small message takes it ten times as long, and its all-reduce
costs more CPU time from 1 MB on, which is where gradient buckets are. Besides, a gloo collective
cannot be aborted, hangs when a rank that is no direct neighbour dies, and a receive accepts a
message that is too short.
"""

from __future__ import annotations

from raypar.comm._exchange import ExchangeGroup
from raypar.comm.group import DEFAULT_TIMEOUT_S
from raypar.comm.mailbox import Mailbox
from raypar.comm.network import NetworkSettings
from raypar.comm.rendezvous import Address, connect
from raypar.errors import CommError


class GlooGroup(ExchangeGroup):
    """Ranks in different processes, CPU tensors."""

    @classmethod
    def create(
        cls,
        name: str,
        rank: int,
        size: int,
        address: Address | None,
        *,
        host: str = "127.0.0.1",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        network: NetworkSettings | None = None,
    ) -> GlooGroup:
        """Connects this process with the others; all ranks call it, at any time, concurrently.

        Args:
            name: The group's name, equal on all ranks, for example ``"world"``.
            rank: This process's rank.
            size: Number of ranks.
            address: What rank 0's `raypar.comm.rendezvous.Rendezvous` gave; unused for size 1.
            host: Host name or IP of this machine as the others reach it; with `network`, the
                address by which Ray knows this node.
            timeout_s: Deadline of the connecting and, later, of every wait, in seconds.
            network: Which interface and ports to use; None for `host` and any port.

        Raises:
            CommTimeoutError: Some ranks did not join in time.
            CommError: The rendezvous or a peer cannot be reached, `rank` does not fit `size`, or
                this machine has no such interface or no free port.
        """
        if not 0 <= rank < size:
            raise CommError(f"{name}: a group of {size} has ranks 0 to {size - 1}, not {rank}")
        if size == 1:
            return cls(Mailbox(name, 0, 1, {}), [0], name=name, timeout_s=timeout_s)
        if address is None:
            raise CommError(
                f"{name} rank {rank}: {size} ranks need a rendezvous; pass the address that "
                "Rendezvous(host).address gave in rank 0's process"
            )
        chosen = network or NetworkSettings()
        links = connect(
            name,
            rank,
            size,
            address,
            host=chosen.host(host),
            timeout_s=timeout_s,
            port_range=chosen.port_range,
        )
        box = Mailbox(name, rank, size, links)
        return cls(box, range(size), name=name, timeout_s=timeout_s)
