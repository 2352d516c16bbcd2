"""What a rank holds: its slice of the model, and the programs of its stages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from raypar.graph.turns import TRACING
from raypar.programs.stage import StageProgram, compile_stage
from raypar.programs.wire import unpack
from raypar.stages.engines import engaged
from raypar.stages.layouts import Way, is_view, taken_ranges, way_of
from raypar.stages.materialise import Part, materialise
from raypar.stages.spec import RankSpec, StageSpec


@dataclass
class HeldStage:
    """A stage on a rank.

    Attributes:
        spec: What was shipped.
        program: Its compiled programs.
        globals_program: Nodes that compute this part's share of the batch-wide values.
    """

    spec: StageSpec
    program: StageProgram
    globals_program: torch.fx.Graph | None


class Workshop:
    """Where the ranks of one run that live in one process are built: every stage is compiled once.

    The ranks of a mesh run the same programs, which hold no state of a rank: those that are given
    the same `StageSpec` share them.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.device], HeldStage] = {}

    @contextlib.contextmanager
    def turn(self, default_dtype: str) -> Iterator[None]:
        """The own turn, under a default dtype: tracing and seeding use process-wide state."""
        with TRACING, _default_dtype(default_dtype):
            yield

    def stage(self, stage: StageSpec, device: torch.device) -> HeldStage:
        """A stage, compiled; call it in turn."""
        key = (id(stage), device)  # no other spec gets this id: what is held keeps the spec alive
        known = self._made.get(key)
        if known is None:
            known = self._made[key] = _compile(stage, device)
        return replace(known, program=replace(known.program))


class Holdings:
    """Parameters, buffers and programs of one rank.

    Attributes:
        device: Where all of it lives.
        params: Own parameters by name, in the model's order, as programs take them.
        stored: The parts of them that the optimizer holds: the parameter itself, a view of it
            where the part is contiguous, else a tensor of its own.
        ways: How each of them gets from one to the other.
        buffers: Own buffers by name.
        constants: Constant tensors of the graph by placeholder id.
        names: Key of the model's ``state_dict()`` → canonical name of its tensor.
        note: Why the whole model had to be built to get these, or None.
        stages: Stage number → programs.
    """

    def __init__(
        self, spec: RankSpec, device: torch.device, workshop: Workshop | None = None
    ) -> None:
        self.device = device
        workshop = workshop or Workshop()
        with workshop.turn(spec.default_dtype):
            self.stages = {s.index: workshop.stage(s, device) for s in spec.stages}
            self._build(spec, device)
        for index, held in self.stages.items():
            held.program = engaged(
                held.program, held.spec.nodes["graph"], f"stage {index}", spec, device
            )

    def _build(self, spec: RankSpec, device: torch.device) -> None:
        names = {*spec.owned_params, *spec.params}
        for stage in self.stages.values():
            names |= {k[6:] for k in stage.program.inputs if k.startswith("param:")}
        buffers = set(spec.owned_buffers)
        for stage in self.stages.values():
            counts = stage.globals_program
            read = (
                []
                if counts is None
                else [n.meta["id"] for n in counts.find_nodes(op="placeholder")]
            )
            keys = [*stage.program.inputs, *read]
            buffers |= {k[7:] for k in keys if k.startswith("buffer:")}
        made = materialise(
            spec.model_fn,
            spec.seed,
            {name: _taken_part(spec, name) for name in names},
            buffers,
            spec.constants,
            device,
            spec.initial,
        )
        self.params, self.buffers, self.constants = made.params, made.buffers, made.constants
        self.names, self.note = made.names, made.note
        self.ways = {
            name: way_of(spec.params[name], spec.axes, spec.coordinate)
            for name in self.params
            if name in spec.params
        }
        self.stored = {
            name: _stored_part(p, self.ways[name]) if name in self.ways else p
            for name, p in self.params.items()
        }


def _taken_part(spec: RankSpec, name: str) -> Part:
    """What programs take of a parameter: all of it where no stage has a say."""
    layout = spec.params.get(name)
    return None if layout is None else taken_ranges(layout, spec.axes, spec.coordinate)


def _stored_part(taken: nn.Parameter, way: Way) -> nn.Parameter:
    if not way.cut:
        return taken
    part = way.own.read(taken.detach())
    if not is_view(way):
        part = part.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(part, requires_grad=taken.requires_grad)


@contextlib.contextmanager
def _default_dtype(name: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    wanted = getattr(torch, name)
    if wanted is before:
        yield
        return
    torch.set_default_dtype(wanted)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _compile(stage: StageSpec, device: torch.device) -> HeldStage:
    program = compile_stage(
        stage.nodes["graph"],
        name=f"stage {stage.index}",
        device=device,
        recompute=stage.recompute,
        trainable=set(stage.trainable),
        differentiable=set(stage.differentiable),
        outputs_with_grad=stage.outputs_with_grad,
        changing=stage.updates,
    )
    wire = stage.nodes["globals"]
    return HeldStage(stage, program, None if wire is None else unpack(wire, device))
