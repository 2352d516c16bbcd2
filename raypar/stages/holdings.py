"""What a rank holds: its slice of the model, and the programs of its stages."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from raypar.errors import PlanError
from raypar.graph.capture import build_model
from raypar.graph.origins import fetch_tensor
from raypar.programs.stage import StageProgram, compile_stage
from raypar.programs.wire import unpack
from raypar.sharding.pieces import piece_of
from raypar.stages.layouts import Way, is_view, taken_ranges, way_of
from raypar.stages.spec import RankSpec, StageSpec

_MAIN_LOCK = threading.Lock()


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
        stages: Stage number → programs.
    """

    def __init__(
        self, spec: RankSpec, device: torch.device, lock: threading.Lock | None = None
    ) -> None:
        self.device = device
        # Tracing and seeding use process-wide state, so threads of one process take turns.
        with lock or _MAIN_LOCK, _default_dtype(spec.default_dtype):
            self.stages = {s.index: _compile(spec, s, device) for s in spec.stages}
            self._build(spec, device)

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
        model = _seeded_model(spec)
        trainable = dict(model.named_parameters())
        missing = sorted(names - set(trainable))
        if missing:
            raise PlanError(
                f"model_fn built a model without parameter {missing[0]!r}, which the plan's graph "
                "has: plan and model do not belong together"
            )
        self.params = {
            name: nn.Parameter(
                _taken_part(spec, name, p.detach()).clone().to(device),
                requires_grad=p.requires_grad,
            )
            for name, p in trainable.items()
            if name in names
        }
        self.ways = {
            name: way_of(spec.params[name], spec.axes, spec.coordinate)
            for name in self.params
            if name in spec.params
        }
        self.stored = {
            name: _stored_part(p, self.ways[name]) if name in self.ways else p
            for name, p in self.params.items()
        }
        self.constants = {
            key: (found if isinstance(found, torch.Tensor) else fetch_tensor(model, found))
            .clone()
            .to(device)
            for key, found in spec.constants.items()
        }
        self.buffers = {
            name: b.detach().clone().to(device)
            for name, b in model.named_buffers()
            if name in buffers
        }


def _taken_part(spec: RankSpec, name: str, whole: torch.Tensor) -> torch.Tensor:
    """What programs take of a parameter: all of it where no stage has a say."""
    if name not in spec.params:
        return whole
    return piece_of(taken_ranges(spec.params[name], spec.axes, spec.coordinate)).read(whole)


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


def _seeded_model(spec: RankSpec) -> nn.Module:
    """The model as ``torch.manual_seed(seed); model_fn()`` makes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return build_model(spec.model_fn, on_meta=False)


def _compile(spec: RankSpec, stage: StageSpec, device: torch.device) -> HeldStage:
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
