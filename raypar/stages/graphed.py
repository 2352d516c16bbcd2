"""The forward and backward of a stage as CUDA graphs: one call to the device for each.

A graph reads and writes the same memory in every replay. Several microbatches are between their
forward and their backward at once, so each has a *slot*: a pair of graphs with memory of its own.
There are as many slots as there are microbatches under way, which is as much memory as without
graphs. What enters a slot is copied in; what leaves the stage (values for other stages, the loss,
buffers, gradients) is copied out, so that communication, which stays outside of graphs, sees
ordinary tensors that nobody overwrites; what is saved for backward stays where it is.

Parameters are read where they lie. If one has moved since the capture, all slots are made anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from raypar.programs.stage import Sink, StageProgram
from raypar.stages.compiled import Outlet

_WARM_UP = 2
"""Calls before the capture: libraries allocate their workspaces, kernels are chosen."""
_FIXED = ("param", "const")
"""Arguments that lie at one address for the whole run."""
_log = logging.getLogger(__name__)


class Graphs(Protocol):
    """What records work for a device and plays it again."""

    def capture(
        self, work: Callable[[], list[torch.Tensor]]
    ) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """Records `work` without running it.

        Returns:
            Its results, whose memory every replay fills, and what replays it.
        """


class CudaGraphs:
    """`torch.cuda.CUDAGraph`, all of a rank's from one pool of memory.

    Args:
        device: The rank's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def capture(
        self, work: Callable[[], list[torch.Tensor]]
    ) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """See `Graphs`.

        Only this thread is watched for calls that do not fit into a graph: the watchdog of the
        communication asks for its events meanwhile.
        """
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                results = work()
        return results, graph.replay


def graphed(program: StageProgram, graphs: Graphs, device: torch.device) -> StageProgram:
    """A stage whose forward and backward are replayed from graphs.

    Its two halves of backward stay as they are: they would have to tell when a slot is free, so
    `reason_against` refuses schedules that use them.
    """
    stage = GraphedStage(program, graphs, device)
    made = frozenset[str]()  # graphs make all gradients themselves
    return replace(program, forward=stage.forward, backward=stage.backward, products=made)


def reason_against(program: StageProgram, *, halves: bool, exchanges: bool) -> str | None:
    """Why a stage cannot be graphed, or None.

    Args:
        program: The stage.
        halves: Whether its schedule splits backward in two.
        exchanges: Whether its programs exchange tensors with other ranks.
    """
    if program.data_dependent:
        return "sizes in it depend on the data"
    if "rng" in program.inputs:
        return "it draws random numbers, whose key is read by the host"
    if exchanges:
        return "its programs communicate, and communication stays outside of graphs"
    if halves:
        return "its schedule splits backward in two; use 1f1b, gpipe or interleaved_1f1b"
    if not program.tangent_outputs:
        return "it has no backward"
    return None


@dataclass(eq=False)
class _Slot:
    """One microbatch's memory.

    Attributes:
        given: Static arguments of forward.
        copied: Positions among them that every microbatch fills.
        results: What forward writes: outputs, then what it saves.
        replay: Runs forward.
        tangents: Static gradients of the outputs.
        gradients: What backward writes.
        back: Runs backward; None until it is captured.
        outlet: What of it is returned, and what goes to the sink.
    """

    given: list[Any]
    copied: list[int]
    results: list[Any] = field(default_factory=list)
    replay: Callable[[], None] | None = None
    tangents: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    back: Callable[[], None] | None = None
    outlet: Outlet = field(default_factory=Outlet)


class GraphedStage:
    """Forward and backward of a stage, replayed; see the module's text.

    Args:
        program: The stage as it is.
        graphs: What captures.
        device: Where it runs.

    Attributes:
        slots: How many microbatches have had memory of their own at once.
        refused: Why the stage runs as it was after all, or None.
    """

    def __init__(self, program: StageProgram, graphs: Graphs, device: torch.device) -> None:
        self._program = program
        self._graphs = graphs
        self._device = device
        kinds = [key.partition(":")[0] for key in program.inputs]
        self._fixed = [i for i, kind in enumerate(kinds) if kind in _FIXED]
        self._filled = [i for i, kind in enumerate(kinds) if kind not in _FIXED]
        self._calls = 0
        self._addresses: tuple[int, ...] = ()
        self._free: list[_Slot] = []
        self._busy: dict[int, _Slot] = {}
        self._mark: int | None = None
        self.slots = 0
        self.refused: str | None = None

    def forward(self, box: list[Any], sink: Any = None) -> list[Any]:
        """As the stage's forward; outputs are the caller's, what is saved is the slot's."""
        self._calls += 1
        if self._calls <= _WARM_UP or self.refused is not None:
            return self._program.forward(box)
        addresses = tuple(box[i].data_ptr() for i in self._fixed)
        if addresses != self._addresses:
            self._addresses = addresses
            self._free.clear()
        slot = self._free.pop() if self._free else self._new_slot(box)
        if slot is None:
            return self._program.forward(box)
        for i in slot.copied:
            slot.given[i].copy_(box[i], non_blocking=True)
        box.clear()
        assert slot.replay is not None
        slot.replay()
        count = self._program.n_outputs
        saved = slot.results[count:]
        if (key := self._key(saved)) is None:  # nothing was saved: backward begins anew
            self._free.append(slot)
            return [_copy(r) for r in slot.results]
        self._busy[key] = slot
        return [*(_copy(r) for r in slot.results[:count]), *saved]

    def backward(self, box: list[Any], sink: Sink) -> list[Any]:
        """As the stage's backward: the slot is found by what was saved, and free afterwards."""
        kept, ends = len(self._program.kept), len(self._program.tangent_outputs)
        saved = box[kept : len(box) - ends]
        key = self._key(saved)
        slot = None if key is None else self._busy.pop(key, None)
        if slot is None:
            return self._program.backward(box, sink)
        tangents = box[len(box) - ends :]
        if slot.back is None and not self._capture_backward(slot, saved, tangents):
            return self._program.backward(box, sink)
        for static, tangent in zip(slot.tangents, tangents, strict=True):
            static.copy_(tangent, non_blocking=True)
        box.clear()
        assert slot.back is not None
        slot.back()
        found = slot.outlet.deliver([g.clone() for g in slot.gradients], sink)
        if tuple(slot.given[i].data_ptr() for i in self._fixed) == self._addresses:
            self._free.append(slot)
        return found

    def _new_slot(self, box: list[Any]) -> _Slot | None:
        kind = self._device.type
        strange = [
            k for k, v in zip(self._program.inputs, box, strict=True) if v.device.type != kind
        ]
        if strange:
            self._refuse(f"its arguments {', '.join(strange)} are not on the {kind} device")
            return None
        slot = _Slot(list(box), self._filled)
        for i in slot.copied:
            slot.given[i] = box[i].clone()
        try:
            slot.results, slot.replay = self._graphs.capture(
                lambda: self._program.forward(list(slot.given))
            )
        except RuntimeError as error:
            self._refuse(f"its forward could not be captured: {error}")
            return None
        self.slots += 1
        if self.slots == 1:
            self._mark = self._own_memory(slot)
        return slot

    def _own_memory(self, slot: _Slot) -> int | None:
        """Position of a saved value in memory of the slot: views of parameters tell no slots."""
        shared = {slot.given[i].untyped_storage().data_ptr() for i in self._fixed}
        for i, value in enumerate(slot.results[self._program.n_outputs :]):
            tells = isinstance(value, torch.Tensor) and value.numel()
            if tells and value.untyped_storage().data_ptr() not in shared:
                return i
        return None

    def _key(self, saved: Sequence[Any]) -> int | None:
        """What tells the slot of something saved."""
        return None if self._mark is None else saved[self._mark].data_ptr()

    def _capture_backward(
        self, slot: _Slot, saved: Sequence[Any], tangents: Sequence[torch.Tensor]
    ) -> bool:
        slot.tangents = [t.clone() for t in tangents]
        kept = [slot.given[i] for i in self._program.kept]
        program = self._program.backward
        try:
            slot.gradients, slot.back = self._graphs.capture(
                lambda: slot.outlet.collect(program, [*kept, *saved, *slot.tangents])
            )
        except RuntimeError as error:
            self._refuse(f"its backward could not be captured: {error}")
            return False
        return True

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        _log.warning("a stage runs without CUDA graphs: %s", reason)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
