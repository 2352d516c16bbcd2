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
        params: Own parameters by name, in the model's order.
        buffers: Own buffers by name.
        constants: Constant tensors of the graph by placeholder id.
        stages: Stage number → programs.
    """

    def __init__(
        self, spec: RankSpec, device: torch.device, lock: threading.Lock | None = None
    ) -> None:
        # Tracing and seeding use process-wide state, so threads of one process take turns.
        with lock or _MAIN_LOCK, _default_dtype(spec.default_dtype):
            self.stages = {s.index: _compile(spec, s, device) for s in spec.stages}
            self._build(spec, device)

    def _build(self, spec: RankSpec, device: torch.device) -> None:
        names = set(spec.owned_params)
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
            name: nn.Parameter(p.detach().clone().to(device), requires_grad=p.requires_grad)
            for name, p in trainable.items()
            if name in names
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
