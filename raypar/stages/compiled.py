"""The programs of a stage through `torch.compile`.

A program is straight-line Python that calls operators through the dispatcher, which Dynamo cannot
look into. So it is run once under `make_fx`, which writes the operators down, and what was written
is compiled. Gradients that a program hands to a sink on its way, also as products that are not made
yet, are made and delivered at its end: what is compiled is one function. Fused kernels round
differently: a compiled plan equals the uncompiled one up to rounding, not bit for bit.

A program is compiled at its first call, which can take minutes: where that is possible, it is
called once before the first step (`raypar.stages.ahead`); until the first step is over, messages
are waited for as long as `COMPILING_S`.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from raypar.compat import compile_fixed, fake_mode, make_fx
from raypar.errors import PlanError, RayparError
from raypar.graph.turns import TRACING
from raypar.programs.codegen import Program
from raypar.programs.products import as_tensor
from raypar.programs.stage import Sink, StageProgram

COMPILING_S = 1800.0
"""Deadline of what waits for a stage that is being compiled, in seconds."""
_log = logging.getLogger(__name__)

Compile = Callable[[torch.fx.GraphModule], Callable[..., Any]]
"""Makes a fast function of a graph; called once for each program."""


def compiled(
    program: StageProgram, name: str = "a stage", make: Compile | None = None
) -> StageProgram:
    """A stage whose programs are compiled at their first use.

    Args:
        program: The stage as it is.
        name: Name in errors.
        make: What compiles; default: `torch.compile`, for the shapes of the plan alone.
    """
    chosen = make or compile_fixed

    def fast(which: str) -> Program:
        return CompiledProgram(getattr(program, which), chosen, f"{name} {which}")

    return replace(
        program,
        forward=fast("forward"),
        backward=fast("backward"),
        backward_input=fast("backward_input"),
        backward_weight=fast("backward_weight"),
        products=frozenset(),  # they are made inside
    )


class CompiledProgram:
    """One program (see `raypar.programs.codegen`), compiled when it is first called.

    Args:
        program: What to run.
        make: What compiles a graph.
        name: Name in errors.
    """

    def __init__(self, program: Program, make: Compile, name: str) -> None:
        self._program = program
        self._name = name
        self._make = make
        self._run: Callable[..., Any] | None = None
        self._outlet = Outlet()
        self._tensors: list[int] = []

    def __call__(self, box: list[Any], sink: Sink | None = None) -> list[Any]:
        """As the program; see `raypar.programs.codegen.Program`."""
        first = self._run is None
        try:
            if self._run is None:  # its truth is not asked: a compiled module has no length
                self._run = self._compile(box)
            run = self._run
            given = [box[i] for i in self._tensors]
            box.clear()
            results = list(run(*given))
        except RayparError:
            raise
        except Exception as error:
            if not first:
                raise
            self._run = None
            raise PlanError(
                f"{self._name} cannot be compiled ({_reason(error)}): run its plan with engine = "
                "'eager' (train.engine: eager)"
            ) from error
        return self._outlet.deliver(results, sink)

    def _compile(self, box: list[Any]) -> Callable[..., Any]:
        self._tensors = [i for i, v in enumerate(box) if isinstance(v, torch.Tensor)]
        rest = list(box)

        def flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
            whole = list(rest)
            for i, tensor in zip(self._tensors, tensors, strict=True):
                whole[i] = tensor
            return self._outlet.collect(self._program, whole)

        # On fake tensors: nothing is computed, and no rank waits for another while it traces.
        with TRACING, torch.no_grad(), fake_mode() as mode:
            graph = make_fx(flat)(*(mode.from_tensor(rest[i].detach()) for i in self._tensors))
        # Made anew: while another thread compiles, torch makes modules that write their code late,
        # and these cannot be compiled.
        made = torch.fx.GraphModule(graph, graph.graph)
        recurrent = torch.ops.raypar.recurrent_backward.default
        if any(node.target is recurrent for node in made.graph.nodes):
            _log.warning(
                "%s is not compiled: torch.compile fails in the backward of a recurrent layer",
                self._name,
            )
            return made
        return self._make(made)


def _reason(error: Exception) -> str:
    """What torch said, without its hints for people who work on torch."""
    if "C++ compiler" in str(error):
        return (
            "torch.compile needs a C++ compiler on every node, and there is none on "
            f"{platform.node()}: install g++, or name one in the environment variable CXX"
        )
    return f"{type(error).__name__}: {str(error).partition('Set TORCHDYNAMO_VERBOSE')[0].strip()}"


class Outlet:
    """What a program returns and what it hands to its sink, as one flat list of tensors."""

    def __init__(self) -> None:
        self._returned: list[Any] = []
        self._sunk: list[int] = []

    def collect(self, program: Program, box: list[Any]) -> list[torch.Tensor]:
        """Runs a program; returns its tensors: results, then what it handed to the sink."""
        delivered: list[tuple[int, torch.Tensor]] = []
        results = program(box, lambda index, value: delivered.append((index, as_tensor(value))))
        self._returned = [None if isinstance(r, torch.Tensor) else (r,) for r in results]
        self._sunk = [index for index, _ in delivered]
        return [
            *(r for r in results if isinstance(r, torch.Tensor)),
            *(value for _, value in delivered),
        ]

    def deliver(
        self,
        tensors: list[torch.Tensor],
        sink: Sink | None,
    ) -> list[Any]:
        """The reverse of `collect`: feeds the sink, and returns what the program returns."""
        given = iter(tensors)
        # A place of the form (value,) is no tensor, and the same in every call.
        results = [next(given) if place is None else place[0] for place in self._returned]
        for index, value in zip(self._sunk, given, strict=True):
            assert sink is not None
            sink(index, value)
        return results
